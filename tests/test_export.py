"""The command that makes a bundle, as a person runs it: what it prints and leaves, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest

from flowps.config import Slot
from flowps.export import main
from flowps.ps.export import export_rows
from flowps.ps.shard import SlotRows
from flowps.serving import load
from flowps.serving.bundle import open_version
from flowps.trainer.models import ModelSpec, build
from tests.serving.samples import columns, make_run

SLOTS = ["user", "tags", "history", "city", "words", "seen", "mobile"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run. Not to be changed."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Expect exit status 1 and one `error:` line on standard error; return that line."""
    assert main(list(map(str, arguments))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestCommand:
    def test_leaves_a_bundle_and_says_what_it_has(self, trained, tmp_path):
        out = tmp_path / "some" / "out"
        command = [sys.executable, "-m", "flowps.export", str(trained), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ)
        assert (done.returncode, done.stderr) == (0, "")
        for name in SLOTS:
            rows = pq.read_metadata(trained / "embeddings" / f"{name}.parquet").num_rows
            assert any(f" {name} " in line and f" {rows} " in line and "float32" in line for line in done.stdout.splitlines()), name
        auc = json.loads((trained / "summary.json").read_text())["test"]["auc"]
        assert f"{out}: version 1 of {trained} (step " in done.stdout
        assert f"test auc = {auc:.4f}): " in done.stdout
        assert done.stdout.rstrip().endswith("verified, live")
        version = open_version(out, verify=True)
        assert {path.name for path in version.folder.iterdir()} == {
            "manifest.json", "schema.json", "hash.json", "model.keras", "saved_model", "embeddings"
        }  # fmt: skip
        assert (version.folder / "schema.json").read_bytes() == (trained / "schema.json").read_bytes()
        assert {file.path for file in version.manifest.files} == {
            path.relative_to(version.folder).as_posix()
            for path in version.folder.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }

    def test_makes_a_next_version_in_fewer_bits_and_says_what_they_cost(self, trained, tmp_path, capsys):
        assert main([str(trained), str(tmp_path / "out")]) == 0
        exact = capsys.readouterr().out
        assert main([str(trained), str(tmp_path / "out"), "--dtype", "int8", "--keep", "1"]) == 0
        coarse = capsys.readouterr().out
        assert "version 2 of" in coarse
        assert not (tmp_path / "out" / "1").exists()
        assert "largest error" in exact
        assert "0.000%" in exact
        for slot in open_version(tmp_path / "out").manifest.slots:
            assert 0 < slot.relative_error < 0.01
            assert any(
                f" {slot.name} " in line and f"{slot.max_error:.3g}" in line and f"{slot.relative_error:.3%}" in line
                for line in coarse.splitlines()
            )

    def test_says_that_negatives_were_left_out(self, run, tmp_path, capsys):
        config = run / "config.toml"
        config.write_text(config.read_text().replace("negative_rate = 1.0", "negative_rate = 0.25"))
        assert main([str(run), str(tmp_path / "out")]) == 0
        assert "logits are shifted by -1.3863, in both models: data.negative_rate left out" in capsys.readouterr().out

    def test_help_explains(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        for said in ("RUN", "OUT", "--dtype {float32,float16,int8}", "--keep N", "Exit status", "python -m flowps.export runs/ctr"):
            assert said in out

    @pytest.mark.parametrize("wrong", [["--dtype", "int4"], ["--keep", "-1"], ["--keep", "x"]])
    def test_refuses_options_that_it_does_not_have(self, wrong, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["run", "out", *wrong])
        assert ended.value.code == 2
        assert wrong[0] in capsys.readouterr().err

    def test_a_run_without_a_summary_can_be_exported(self, run, tmp_path, capsys):
        (run / "summary.json").unlink()
        assert main([str(run), str(tmp_path / "out")]) == 0
        assert "version 1 of" in capsys.readouterr().out
        manifest = open_version(tmp_path / "out").manifest
        assert (manifest.steps, manifest.test) == (0, None)


class TestModels:
    def test_with_layers_of_their_own_need_their_module_to_be_exported_and_not_to_be_served(self, run, tmp_path, monkeypatch):
        """Keras cannot find a layer's class that its module makes inside the function: it is built again, and given the weights."""
        (tmp_path / "layers_of_my_own.py").write_text(
            "import keras\n"
            "def build(spec):\n"
            "    class Twice(keras.layers.Layer):\n"
            "        def call(self, x):\n"
            "            return 2 * x\n"
            "    inputs = spec.inputs()\n"
            "    return keras.Model(inputs, Twice()(keras.layers.Dense(1)(spec.concatenated(inputs))))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        config = (run / "config.toml").read_text()
        (run / "config.toml").write_text(config.replace('model = "dnn"', 'model = "layers_of_my_own:build"'))
        slots = json.loads((run / "schema.json").read_text())["slots"]
        max_lens = [slot["max_len"] if slot["pooling"] == "none" else 0 for slot in slots]
        spec = ModelSpec.of([slot["name"] for slot in slots], [slot["dim"] for slot in slots], 2, max_lens=max_lens)
        model = build("layers_of_my_own:build", spec)
        model.save(run / "model.keras")
        assert main([str(run), str(tmp_path / "out")]) == 0
        (tmp_path / "layers_of_my_own.py").unlink()
        sys.modules.pop("layers_of_my_own")
        scorer = load(tmp_path / "out")
        table = columns(20)
        kernel, bias = (keras.ops.convert_to_numpy(weight) for weight in model.weights)
        given = {}
        scorer._model = lambda inputs, model=scorer._model: given.update(inputs) or model(inputs)
        logits = scorer.logits(table)
        x = np.concatenate([given["embeddings"], given["dense_columns"]], axis=1)
        np.testing.assert_allclose(logits, 2 * (x @ kernel + bias)[:, 0], atol=1e-5)

    def test_that_give_one_logit_without_an_axis_are_exported(self, run, tmp_path):
        width = sum(
            slot["dim"] * (3 if slot["pooling"] == "none" else 1) for slot in json.loads((run / "schema.json").read_text())["slots"]
        )
        inputs = {
            "embeddings": keras.Input((width,), name="embeddings"),
            "dense_columns": keras.Input((2,), name="dense_columns"),
            "lengths": keras.Input((1,), name="lengths", dtype="int32"),
        }
        logits = keras.layers.Dense(1)(inputs["embeddings"])
        keras.Model(inputs, keras.ops.squeeze(logits, axis=-1)).save(run / "model.keras")
        assert main([str(run), str(tmp_path / "out")]) == 0
        assert load(tmp_path / "out").score(columns(9)).shape == (9,)


class TestRefusals:
    def test_of_what_is_no_run(self, tmp_path, capsys):
        assert "cannot be read: No such file" in refusal(capsys, tmp_path / "none", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        found = refusal(capsys, tmp_path / "empty", tmp_path / "out")
        assert "config.toml: cannot be read" in found
        assert "is this the directory of a run?" in found
        assert not (tmp_path / "out").exists()

    def test_of_a_run_that_has_not_finished(self, run, tmp_path, capsys):
        (run / "model.keras").unlink()
        found = refusal(capsys, run, tmp_path / "out")
        assert f"{run}: has no model.keras: the run has not finished; finish it with --resume, then export" in found
        (run / "previous").mkdir()
        (run / "previous" / "model.keras").write_bytes(b"")
        assert "previous has what an earlier run left" in refusal(capsys, run, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_of_a_run_that_is_going_on(self, run, tmp_path, capsys):
        handle = os.open(run, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            assert f"{run}: a run is using it; wait until it has ended" in refusal(capsys, run, tmp_path / "out")
        finally:
            os.close(handle)

    def test_of_a_folder_that_is_no_bundle(self, run, tmp_path, capsys):
        assert f"{run}: holds something that is no bundle" in refusal(capsys, run, run)
        (tmp_path / "file").write_text("")
        assert "is a file; choose another folder" in refusal(capsys, run, tmp_path / "file")

    def test_of_a_schema_and_a_model_that_do_not_fit(self, run, tmp_path, capsys):
        slots = json.loads((run / "schema.json").read_text())["slots"]
        edit(run / "schema.json", dense=["price"])
        found = refusal(capsys, run, tmp_path / "out")
        assert "model.keras: does not fit schema.json" in found
        assert "are both of the same run?" in found
        edit(run / "schema.json", dense=["price", "age"], labels=["a", "b"])
        assert "gives shape (3, 1) for 3 samples and 2 label(s)" in refusal(capsys, run, tmp_path / "out")
        edit(run / "schema.json", labels=["label"], slots=[slots[0] | {"dim": 5}, *slots[1:]])
        assert "does not fit schema.json" in refusal(capsys, run, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    def test_of_another_hash(self, run, tmp_path, capsys):
        slots = json.loads((run / "schema.json").read_text())["slots"]
        edit(run / "schema.json", slots=[slots[0] | {"seed": "0" * 16}, *slots[1:]])
        assert "schema.json: the run hashed with 'xxh64' in another way than this flowps" in refusal(capsys, run, tmp_path / "out")
        edit(run / "schema.json", slots=slots, hash="md5")
        assert "the run hashed with 'md5' in another way" in refusal(capsys, run, tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "content"),
        [("schema.json", "{}"), ("schema.json", "nothing"), ("model.keras", "nothing"), ("config.toml", "a = 1")],
    )
    def test_of_files_that_are_damaged(self, run, tmp_path, capsys, name, content):
        (run / name).write_text(content)
        assert f"{run / name}: cannot be read" in refusal(capsys, run, tmp_path / "out")

    def test_of_rows_that_lack(self, run, tmp_path, capsys):
        (run / "embeddings" / "city.parquet").unlink()
        assert "embeddings: no file of slot 'city'; finish the run with --resume" in refusal(capsys, run, tmp_path / "out")

    def test_of_weights_that_are_no_numbers_or_too_large(self, run, tmp_path, capsys):
        for weight, says in (
            (np.nan, "slot 'user': a weight is NaN or infinite"),
            (1e6, "slot 'user': a weight is 1e+06, more than"),
        ):
            weights, no_state = np.full((1, 4), weight, np.float32), np.empty((1, 0), np.float32)
            chunk = SlotRows(Slot(name="user", dim=4), np.array([1], np.uint64), weights, no_state)
            export_rows([chunk], run / "embeddings")
            assert says in refusal(capsys, run, tmp_path / "out", "--dtype", "float16")
        assert list((tmp_path / "out").iterdir()) == []
