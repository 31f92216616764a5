"""`flowps.evaluate`: the figures against scikit-learn's on the predictions that `flowps.predict` wrote, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from flowps.cluster.roles import Roles
from flowps.cluster.trained_run import open_run
from flowps.errors import StoppedError
from flowps.evaluate import evaluate, main
from flowps.predict import main as predict_main
from flowps.quality import Quality
from tests.scored import (
    CITIES,
    TEST_ROWS,
    by_hand,
    columns_of,
    embedding_rows,
    main_words,
    other_columns,
    snapshot,
    train_run,
    write,
)

Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `run`, with checkpoints on the way, and `train.parquet` and `test.parquet` beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    train_run(folder, checkpoint={"every_steps": 10})
    return folder


@pytest.fixture(scope="module")
def predictions(folder: Path) -> pa.Table:
    """Of the test file."""
    words = main_words(folder / "run", folder / "test.parquet", folder / "out", "--columns", "label", "user", "city")
    assert predict_main(words) == 0
    return pq.read_table(folder / "out" / "test.parquet")


def figures(*words: object) -> Json:
    """All that `--json` has."""
    out = Path(str(words[0])).parent / "figures.json"
    assert main(main_words(*words, "--json", out)) == 0
    found: Json = json.loads(out.read_text())
    out.unlink()
    return found


def of_run(run: Path, data: Path, **keywords: Any) -> Quality:
    """By the function."""
    found = evaluate(open_run(run, (), "", print), [str(data)], console=Console(file=io.StringIO()), **keywords)
    assert list(found) == ["label"]
    return found["label"]


def refuse(capsys: pytest.CaptureFixture[str], *words: object, status: int = 1) -> str:
    """The one line with which the command refuses."""
    assert main(main_words(*words)) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    return err.strip()


# --- the figures ------------------------------------------------------------------------------------------------------


def entropy(rate: float) -> float:
    return float(-rate * np.log(rate) - (1 - rate) * np.log(1 - rate))


def test_the_figures_are_those_of_scikit_learn(folder: Path, predictions: pa.Table) -> None:
    found = figures(folder / "run", folder / "test.parquet", "--group", "user", "--slice", "city", "user")["label"]
    labels, scores = predictions["label"].to_numpy(), predictions["prediction"].to_numpy().astype(np.float64)
    users, cities = predictions["user"].to_numpy(), np.array(predictions["city"].to_pylist())
    assert (found["samples"], found["positives"]) == (TEST_ROWS, int(labels.sum()))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert found["pr_auc"] == pytest.approx(average_precision_score(labels, scores), abs=1e-3)
    loss = log_loss(labels, scores)
    assert found["logloss"] == pytest.approx(loss, rel=1e-6)
    assert found["normalised_entropy"] == pytest.approx(loss / entropy(labels.mean()), rel=1e-6)
    assert found["mean_prediction"] == pytest.approx(scores.mean(), rel=1e-6)
    assert found["mean_label"] == pytest.approx(labels.mean())
    assert found["calibration"] == pytest.approx(scores.mean() / labels.mean(), rel=1e-6)

    groups = [(labels[users == user], scores[users == user]) for user in np.unique(users)]
    both = [(own, of) for own, of in groups if 0 < own.sum() < len(own)]
    assert len(both) > 1, "there is something to rank"
    weights = [len(own) for own, _ in both]
    gauc = np.average([roc_auc_score(own, of) for own, of in both], weights=weights)
    assert found["gauc"]["value"] == pytest.approx(gauc, abs=1e-6)
    assert (found["gauc"]["groups"], found["gauc"]["samples"]) == (len(both), sum(weights))
    assert found["gauc"]["one_class_samples"] == TEST_ROWS - sum(weights)

    assert [table["column"] for table in found["slices"]] == ["city", "user"]
    rows = {row["value"]: row for row in found["slices"][0]["rows"]}
    assert rows.keys() == set(CITIES)
    for city, row in rows.items():
        own, of = labels[cities == city], scores[cities == city]
        assert row["samples"] == len(own)
        assert row["auc"] == pytest.approx(roc_auc_score(own, of), abs=2e-3)
        assert row["logloss"] == pytest.approx(log_loss(own, of), rel=1e-6)
        assert row["mean_prediction"] == pytest.approx(of.mean(), rel=1e-6)
        assert row["calibration"] == pytest.approx(of.mean() / own.mean(), rel=1e-6)
    assert found["slices"][1]["values"] == len(np.unique(users))


def test_the_calibration_is_that_of_equal_buckets_by_prediction(folder: Path, predictions: pa.Table) -> None:
    found = of_run(folder / "run", folder / "test.parquet", buckets=6)
    scores = predictions["prediction"].to_numpy().astype(np.float64)
    order = np.argsort(scores, kind="stable")
    labels = predictions["label"].to_numpy()[order]
    assert len(found.buckets) == 6
    for bucket, at in zip(found.buckets, np.array_split(np.arange(TEST_ROWS), 6), strict=True):
        assert bucket.samples == len(at)
        assert bucket.mean_prediction == pytest.approx(scores[order][at].mean(), rel=1e-2)
        assert bucket.mean_label == pytest.approx(labels[at].mean(), abs=1 / len(at))
    assert sum(bucket.mean_label * bucket.samples for bucket in found.buckets) == pytest.approx(labels.sum())


def test_the_run_has_printed_the_same_of_its_test_data(folder: Path) -> None:
    printed = json.loads((folder / "run" / "summary.json").read_text())["test"]
    found = of_run(folder / "run", folder / "test.parquet")
    assert printed["examples"] == found.samples == TEST_ROWS
    assert found.auc == pytest.approx(printed["auc"], abs=1e-4)
    assert found.logloss == pytest.approx(printed["logloss"], rel=1e-6)
    assert found.mean_prediction == pytest.approx(printed["prob_mean"], rel=1e-6)
    assert found.mean_label == pytest.approx(printed["real_mean"], rel=1e-6)


def test_so_has_one_that_went_back_to_its_best_weights(tmp_path: Path) -> None:
    """The checkpoint that a run ends with has what it ended with."""
    valid = write(tmp_path / "valid.parquet", columns_of(100, seed=7))
    run = train_run(
        tmp_path, epochs=20, data={"valid": str(valid)}, trainer={"patience": 1, "learning_rate": 0.05, "in_flight": 1}
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]["epochs"] < 20, "it was stopped early"
    found = of_run(run, tmp_path / "test.parquet")
    assert found.auc == pytest.approx(summary["test"]["auc"], abs=1e-4)
    assert found.logloss == pytest.approx(summary["test"]["logloss"], rel=1e-6)


def test_nothing_is_changed_and_no_rows_are_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the data have users that nobody has trained on."""
    run, rows, stop = folder / "run", [], Roles.stop

    def counting(roles: Roles) -> None:
        rows.append(sum(shard.rows for shard in roles.figures()))
        stop(roles)

    monkeypatch.setattr(Roles, "stop", counting)
    before = snapshot(run)
    known, there = embedding_rows(run, "user"), set(pq.read_table(folder / "test.parquet")["user"].to_pylist())
    assert len(known) < len(there), "some are new"
    found = of_run(run, folder / "test.parquet")
    assert found.samples == TEST_ROWS
    assert rows == [sum(len(embedding_rows(run, slot)) for slot in ("user", "city", "tags"))]
    assert snapshot(run) == before


def test_the_figures_do_not_depend_on_how_samples_are_read(folder: Path) -> None:
    words = (folder / "run", folder / "test.parquet", "--group", "user", "--slice", "city")
    reference = figures(*words)
    knobs = ("--data.partition_rows", 300, "--ps.num_shards", 2, "--data.batch_size", 300, "--trainer.feed_threads", 2)
    found = figures(*words, *knobs)
    assert found["label"].pop("buckets")
    for key in ("auc", "gauc", "samples", "positives"):
        assert found["label"][key] == reference["label"][key]
    assert found["label"]["logloss"] == pytest.approx(reference["label"]["logloss"], rel=1e-6)
    assert figures(*words, "--data.tasks_in_flight", 1, "--trainer.in_flight", 8) == reference


def test_files_are_evaluated_together(folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(folder / "test.parquet")
    for k, at in enumerate((0, 100)):
        write(tmp_path / f"part={k}" / "x.parquet", table.slice(at, 100 if k == 0 else None))
    assert of_run(folder / "run", tmp_path) == of_run(folder / "run", folder / "test.parquet")
    by_part = of_run(folder / "run", tmp_path, slices=["part"]).slices[0]
    assert {row.value: row.samples for row in by_part.rows} == {"0": 100, "1": 200}


def test_integers_of_other_widths_and_dictionaries_are_the_same_values(folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(folder / "test.parquet")
    wide = {name: table[name] for name in reversed(table.column_names)} | {
        "label": table["label"].cast(pa.float64()), "price": table["price"].cast(pa.float64()),
        "user": table["user"].cast(pa.uint16()).combine_chunks().dictionary_encode(), "city": table["city"].cast(pa.large_string()),
        "tags": table["tags"].cast(pa.large_list(pa.large_string())),
    }  # fmt: skip
    narrow = wide | {"user": table["user"].cast(pa.uint8()), "city": table["city"].combine_chunks().dictionary_encode()}
    reference = of_run(folder / "run", folder / "test.parquet")
    for name, other in (("wide", wide), ("narrow", narrow)):
        assert of_run(folder / "run", write(tmp_path / f"{name}.parquet", other)) == reference


def test_of_several_labels_each_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    train = {**columns_of(400), "buy": rng.random(400) < 0.3}
    test = {**columns_of(200, seed=1), "buy": rng.random(200) < 0.3}
    write(tmp_path / "several.parquet", train)
    data = write(tmp_path / "several-test.parquet", test)
    run = train_run(
        tmp_path, model="shared_bottom",
        data={"train": str(tmp_path / "several.parquet"), "test": str(data), "extra_labels": ["buy"]},
    )  # fmt: skip
    assert predict_main(main_words(run, data, tmp_path / "out", "--columns", "label", "buy")) == 0
    predicted = pq.read_table(tmp_path / "out" / data.name)
    assert predicted.column_names == ["label", "buy", "prediction_label", "prediction_buy"]
    both = by_hand(run, pq.read_table(data))
    capsys.readouterr()
    found = figures(run, data, "--group", "user")
    out = capsys.readouterr().out
    assert list(found) == ["label", "buy"]
    assert found["label"]["auc"] != found["buy"]["auc"]
    for k, label in enumerate(found):
        scores = predicted[f"prediction_{label}"].to_numpy()
        np.testing.assert_allclose(scores, both[:, k], rtol=1e-5)
        assert found[label]["auc"] == pytest.approx(roc_auc_score(predicted[label].to_numpy(), scores), abs=1e-3)
        assert f"label {label}\n" in out
    assert "prediction_buy" in refuse_predict(
        capsys, run, predicted_with(tmp_path, test), tmp_path / "o", "--columns", "prediction_buy"
    )


def predicted_with(folder: Path, columns: Json) -> Path:
    """A file that has a column of the name of a prediction."""
    return write(folder / "clash.parquet", {**columns, "prediction_buy": columns["label"]})


def refuse_predict(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert predict_main(main_words(*words)) == 1
    return capsys.readouterr().err


def test_a_column_that_is_named_twice_is_one(folder: Path) -> None:
    slices = of_run(folder / "run", folder / "test.parquet", slices=["city", "city"], group="city").slices
    assert [table.column for table in slices] == ["city"]


# --- which checkpoint -------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    shutil.copytree(folder / "run", tmp_path / "copied")
    return tmp_path / "copied"


def checkpoints(run: Path) -> list[str]:
    """By step."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_another_checkpoint_can_be_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = folder / "run", folder / "test.parquet"
    names = checkpoints(run)
    assert len(names) == 2
    found = {name: figures(run, data, "--checkpoint", name)["label"]["logloss"] for name in names}
    assert len(set(found.values())) == 2
    assert f"{run}: {names[0]}; {TEST_ROWS} samples in 1 file(s)" in capsys.readouterr().out
    assert found[names[-1]] == of_run(run, data).logloss


def test_a_run_that_has_not_ended_has_its_newest_sound_checkpoint(
    copied: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "summary.json").unlink()
    names = checkpoints(copied)
    (copied / "checkpoints" / names[-1] / "manifest.json").write_text("{}")
    found = figures(copied, folder / "test.parquet")["label"]
    said = capsys.readouterr().out
    assert names[-1] in said, "it is said that it was passed over"
    assert f"{copied}: {names[-2]}; " in said
    assert found == figures(folder / "run", folder / "test.parquet", "--checkpoint", names[-2])["label"]


class Stopping(Console):
    """Presses Ctrl-C when a line begins so."""

    def __init__(self, line: str) -> None:
        super().__init__(file=io.StringIO())
        self._line = line

    def print(self, *objects: Any, **keywords: Any) -> None:
        super().print(*objects, **keywords)
        if str(objects[0] if objects else "").startswith(self._line):
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_was_stopped_can_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train_run(tmp_path, Stopping("step 8,"), epochs=1000, status={"print_interval": 8, "progress": "plain"})
    assert of_run(tmp_path / "run", tmp_path / "test.parquet").samples == TEST_ROWS


def test_without_a_checkpoint_there_are_no_rows(
    copied: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, names = folder / "test.parquet", checkpoints(copied)
    error = refuse(capsys, copied, data, "--checkpoint", "step-000000099")
    assert "the rows are read from a checkpoint, and step-000000099 cannot be had: " in error
    assert f"there are {', '.join(reversed(names))}; a run has one" in error
    shutil.rmtree(copied / "checkpoints" / names[-1])
    assert names[-1] in refuse(capsys, copied, data), "summary.json names it: another would be another model"
    shutil.rmtree(copied / "checkpoints")
    (copied / "summary.json").unlink()
    error = refuse(capsys, copied, data)
    assert "and there is none to be had: " in error
    assert "a run has one when it ends, unless checkpoint.every_s and checkpoint.every_steps are 0" in error
    assert "is this the directory of a run?" in refuse(capsys, tmp_path / "nowhere", data)
    (copied / "schema.json").write_text("{")
    assert "schema.json: cannot be read" in refuse(capsys, copied, data)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_data_without_what_the_model_needs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, run = other_columns(100), folder / "run"
    wrong: dict[str, tuple[Json, str]] = {
        "unlabelled": ({"label": None}, "no column 'label', which the run was trained on; the file has price, spent, user, city"),
        "missing": ({"user": None, "spent": None}, "no column 'spent', 'user', which the run was trained on"),
        "string": ({"user": [str(u) for u in columns["user"]]}, "column 'user' is string, but the run was trained on int64"),
        "integer": ({"city": columns["user"]}, "column 'city' is int64, but the run was trained on string"),
        "dense": ({"price": columns["city"]}, "column 'price' is string, expected numbers"),
    }
    for name, (change, said) in wrong.items():
        changed = {key: value for key, value in {**columns, **change}.items() if value is not None}
        error = refuse(capsys, run, write(tmp_path / f"{name}.parquet", changed))
        assert f"{name}.parquet: {said}" in error
    two = {**columns, "label": columns["user"]}
    assert "two.parquet: column 'label', row" in refuse(capsys, run, write(tmp_path / "two.parquet", two))
    assert "no such file" in refuse(capsys, run, tmp_path / "none.parquet")


def test_columns_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = folder / "run", folder / "test.parquet"
    assert "test.parquet: no column 'usr'; it has label, price" in refuse(capsys, run, data, "--group", "usr")
    assert "no column 'town'" in refuse(capsys, run, data, "--slice", "city", "town")
    assert "test.parquet: slice column 'tags' is list" in refuse(capsys, run, data, "--slice", "tags")
    assert "'price' is float" in refuse(capsys, run, data, "--group", "price")


def test_arguments_that_are_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = folder / "run", folder / "test.parquet"
    assert "--buckets: expected 1 or more, found 0" in refuse(capsys, run, data, "--buckets", 0, status=2)
    assert "--slot.user.dim: belongs to the trained model" in refuse(capsys, run, data, "--slot.user.dim", 3, status=2)
    assert "--model: belongs to the trained model" in refuse(capsys, run, data, "--model", "lr", status=2)
    assert "--slices: no such option; did you mean --slice?" in refuse(capsys, run, data, "--slices", "city", status=2)
    assert "required: DATA" in refuse(capsys, run, status=2)
    assert "trainer.count = 2 in one process" in refuse(capsys, run, data, "--trainer.count", 2, status=2)
    error = refuse(capsys, run, data, "--json", tmp_path / "none" / "figures.json")
    assert "figures.json: cannot be written: No such file or directory" in error


def test_help_and_what_a_person_sees(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m flowps.evaluate RUN DATA [DATA ...]")
    for word in ("--group COLUMN", "--slice COLUMN [COLUMN ...]", "--json FILE", "--checkpoint NAME", "--ps.num_shards", "130"):
        assert word in said
    assert "--slot_default.dim" not in said, "what belongs to the model is not offered"
    # An option may come between the data.
    assert main(main_words(folder / "run", folder / "test.parquet", "--group", "user", folder / "train.parquet")) == 0
    said = capsys.readouterr().out
    assert "900 samples in 2 file(s)" in said
    assert "GAUC" in said
    assert "label label" not in said, "one label needs no heading"


def test_a_run_whose_slots_are_elsewhere_now_is_read_too(folder: Path, tmp_path: Path) -> None:
    """Trained on two shards, evaluated on one."""
    run = train_run(tmp_path, ps={"num_shards": 2})
    found, reference = of_run(run, tmp_path / "test.parquet"), of_run(folder / "run", folder / "test.parquet")
    one = figures(run, tmp_path / "test.parquet", "--ps.num_shards", 1)["label"]
    assert one["logloss"] == pytest.approx(found.logloss, rel=1e-6)
    assert found.logloss == pytest.approx(reference.logloss, rel=1e-3)
