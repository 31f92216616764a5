"""The examples and the shell blocks of the documentation, run as a reader runs them; and the pages themselves.

Commands are run in this process, by the function that `python -m` calls: TensorFlow is imported once. The data set has the shape of
the one that the documentation generates, 31 files for training, and a fortieth of its samples.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import msgspec
import pyarrow.parquet as pq
import pytest

from flowps.config import Config
from flowps.knob import from_mapping, knobs, load
from flowps.synthetic import dsp_ctr, generate, quickstart
from workflows.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all of it runs: a folder with examples/ and the generated data, smaller and easier to learn."""

    def small() -> object:
        sizes = {"row_group_rows": 1536, "train_rows": 123 * 1536, "test_rows": 8192}
        return replace(quickstart(), **sizes, target_auc=0.95, dense_share=0.4)

    def few_lists() -> object:
        return replace(dsp_ctr(), slots=tuple(replace(slot, cardinality=1000) for slot in dsp_ctr().slots[:8]))

    path = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", path / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)  # as `python -m` does
        patch.setattr("flowps.synthetic.__main__.WORKLOADS", {"quickstart": small, "dsp_ctr": few_lists})
        patch.setattr("flowps.synthetic.quickstart", small)
        generate(small(), "data/quickstart")
        yield path
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        del sys.modules[name]


def run(*words: str) -> str:
    """What a command or a script prints; it must succeed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        if words[1] == "-m":
            module = importlib.import_module({"flowps.synthetic": "flowps.synthetic.__main__"}.get(words[2], words[2]))
            quick = ["--cluster.dashboard", ""] if words[2] in ("flowps.train", "flowps.evaluate", "flowps.predict") else []
            assert module.main([*words[3:], *quick]) == 0
        else:
            runpy.run_path(words[1], run_name="__main__")
    return printed.getvalue()


def lines_of(block: str) -> list[list[str]]:
    """The commands of a shell block, in words."""
    found = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in found if words]


def auc_of(printed: str) -> float:
    """Of the test data, or without any of the last steps; of an evaluation."""
    return float(re.findall(r"^(?:test: auc = |step \d+, auc = |AUC +)(0\.\d+)", printed, re.M)[-1])


BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{k}")
    # What the quick start leaves, other pages go on with.
    for path in sorted(PAGES, key=lambda path: path.stem != "quickstart")
    for k, block in enumerate(re.findall(r"<!-- run -->\n```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_marked_block_of_a_page_runs_line_by_line(block: str):
    for words in lines_of(block):
        assert words[0] == "python", "only commands of flowps are run here"
        printed = run(*words)
        if words[2] in ("flowps.train", "flowps.evaluate"):
            assert 0.52 < auc_of(printed) < 0.95, printed  # after one short epoch


def test_every_page_that_is_a_task_has_a_block_that_is_run():
    stems = {block.id.rpartition("-")[0] for block in BLOCKS}
    assert stems >= {"README", "quickstart", "training", "models", "evaluating", "predicting"}


def test_the_quick_start_leaves_what_it_says(folder: Path):
    if not (folder / "bundles/quickstart/current").exists():  # this test alone
        test_a_marked_block_of_a_page_runs_line_by_line(BLOCKS[0].values[0])
    predictions = pq.read_table(folder / "predictions/quickstart/test-00000.parquet")
    assert predictions.schema.names == ["label", "prediction"]
    text = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    code = next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "scorer" in code)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "quickstart.md", "exec"), {})
    scores = [float(number) for number in re.findall(r"\d\.\d+", printed.getvalue())]
    assert scores == pytest.approx(predictions["prediction"].to_pylist()[:3], abs=1e-5)


def test_the_notebook_gets_the_same_figures_from_training_evaluation_prediction_and_bundle(folder: Path):
    printed = run("python", "examples/notebook.py")
    assert "trained 61,440 samples" in printed
    trained = float(re.findall(r"test AUC (0\.\d+)", printed)[0])
    assert trained > 0.53  # 15 steps, two batches in flight
    assert float(re.findall(r"\nAUC (0\.\d+)", printed)[0]) == pytest.approx(trained, abs=2e-4)
    assert "['label', 'prediction'] 8192" in printed
    predicted = pq.read_table(folder / "predictions/notebook")["prediction"].to_pylist()[:3]
    scored = [float(number) for number in re.findall(r"\d\.\d+", printed.rpartition("[")[2])]
    assert scored == pytest.approx(predicted, abs=1e-3)  # rows in float16


def test_a_keras_model_with_embedding_layers_learns():
    printed = run("python", "examples/keras_model.py")
    assert float(re.findall(r"test AUC (0\.\d+)", printed)[0]) > 0.55
    rows = int(re.findall(r"([\d,]+) rows instead of 2,600,000", printed)[0].replace(",", ""))
    assert 10_000 < rows < 300_000


def test_two_labels_are_evaluated_each():
    printed = run("python", "examples/multi_task.py")
    clicks, purchases = re.findall(r"^(?:label|purchase): AUC (0\.\d+), ([\d,]+) of 8,192", printed, re.M)
    assert float(clicks[0]) > 0.5
    assert 0 < int(purchases[1].replace(",", "")) < int(clicks[1].replace(",", ""))


def test_early_stopping_ends_with_the_best_evaluation():
    soon = ["--data.train", "data/quickstart/train-0000*.parquet", "--trainer.learning_rate", "0.03"]  # known by heart
    printed = run("python", "-m", "flowps.train", "examples/early_stopping.toml", *soon)
    found = re.findall(r"examples of data\.valid in .*?auc = (0\.\d+).*?(; the best so far)?$", printed, re.M)
    assert [bool(best) for _, best in found[-4:]] == [True, False, False, False]
    assert "the run ends with its rows and weights" in printed
    assert auc_of(printed) == pytest.approx(float(found[-4][0]), abs=0.03)  # of other samples


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_a_run_of_the_examples_has_knobs_that_there_are(path: Path):
    assert isinstance(load(path), Config)


def test_settings_in_the_pages_are_knobs_that_there_are():
    for path in PAGES:
        for block in re.findall(r"```toml\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            if block.startswith("# pipeline.toml"):
                assert msgspec.convert(tomllib.loads(block), Pipeline), path.name
            elif "--8<--" not in block:
                assert isinstance(from_mapping(tomllib.loads(block)), Config), path.name


def test_my_own_model_is_twenty_lines_as_the_page_says():
    source = (ROOT / "examples/own_model.py").read_text(encoding="utf-8").partition("import keras")[2]
    assert len([line for line in source.splitlines() if line.strip()]) <= 20


# --- the pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """docs/hook.py, where mkdocs is installed."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: `make docs` builds the pages")
    return _module("hook")


@pytest.fixture(scope="module")
def docstring() -> ModuleType:
    """docs/docstring.py, where griffe is installed."""
    pytest.importorskip("griffe", reason="griffe is not installed: `make docs` builds the pages")
    return _module("docstring")


def _module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module(name)


def test_the_page_of_knobs_has_every_knob_with_its_description(hook: ModuleType):
    rows = [line for line in hook.knobs_page().splitlines() if line.startswith("| `")]
    for knob in knobs():
        name, description = knob.path.rpartition(".")[2], hook.escaped(knob.description).replace("|", "\\|")
        assert any(line.startswith(f"| `{name}` |") and line.endswith(f"| {description} |") for line in rows), knob.path
    assert "| `in_flight` | `2` | 1 … 1024 |" in hook.knobs_page()
    assert '| `monitor` | `"auc"` | `auc`, `logloss` |' in hook.knobs_page()


def test_the_page_of_a_pipelines_file_has_what_must_be_given(hook: ModuleType):
    page = hook.pipeline_page()
    for name in ("config", "state", "root", "fixed", "registry"):
        assert f"| `{name}` | must be given |" in page
    assert '| `marker` | `"_SUCCESS"` |' in page
    assert page.count("\n## ") == 7


def test_the_page_of_words_has_them_as_a_table(hook: ModuleType):
    assert "| `lookup`, `push` | read pooled rows, send gradients |" in hook.words_page()


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("left   a\nright  another,\n       of 2", "|  |  |\n|---|---|\n| `left` | a |\n| `right` | another, of 2 |"),
        ("Parameters\n----------\nsize : of it,\n    in all\n", "**Parameters**\n\n|  |  |\n|---|---|\n| `size` | of it, in all |"),
        ("Examples\n--------\n>>> 1 + 1  # doctest: +SKIP\n2", "**Examples**\n\n```pycon\n>>> 1 + 1\n2\n```"),
        ("Σ <v_i, v_j> of a :class:`Slot`, `a < b`", "Σ &lt;v_i, v_j> of a `Slot`, `a < b`"),
        ("Two words.  And two\nlines, no table.", "Two words.  And two\nlines, no table."),
    ],
)  # fmt: skip
def test_docstrings_become_markdown(docstring: ModuleType, written: str, shown: str):
    assert docstring.markdown(written) == shown


def test_the_pages_build_without_a_warning_and_need_no_network(hook: ModuleType, tmp_path: Path):
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: `make docs` builds the pages")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    assert "def build(spec)" in re.sub("<[^>]+>", "", (tmp_path / "site/models.html").read_text(encoding="utf-8"))  # not its name
    loaded = r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+href="(?:https?:)?//'
    assert [page.name for page in pages if re.search(loaded, page.read_text(encoding="utf-8"))] == []
