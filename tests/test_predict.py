"""`flowps.predict`: what it writes against predictions by hand, where it writes it, going on after a stop, and what is refused."""

from __future__ import annotations

import decimal
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from flowps.cluster.prediction_folder import PredictionFolder
from flowps.cluster.roles import Roles
from flowps.cluster.trained_run import TrainedRun, open_run
from flowps.errors import OutputError
from flowps.predict import main, predict
from tests.scored import TEST_ROWS, by_hand, columns_of, main_words, other_columns, snapshot, train_run, write

ROOT = Path(__file__).resolve().parents[1]
FILES = ("date=2024-09-21/part-0.parquet", "date=2024-09-22/hour=01/part-0.parquet", "date=2024-09-22/part-0.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `run`, with a checkpoint on the way, `test.parquet`, and the same samples in three files below `data`."""
    folder = tmp_path_factory.mktemp("predict")
    train_run(folder, checkpoint={"every_steps": 10})
    table = pq.read_table(folder / "test.parquet")
    for k, name in enumerate(FILES):
        write(folder / "data" / name, table.slice(k * 100, 100), row_group_size=50)
    return folder


@pytest.fixture
def run(folder: Path) -> TrainedRun:
    return open_run(folder / "run", (), "", print)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left in the folder for temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert not list(scratch.glob("flowps*"))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refuse(capsys: pytest.CaptureFixture[str], *words: object, status: int = 1) -> str:
    """The one line with which the command refuses."""
    assert main(main_words(*words)) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


def unlabelled(path: Path, rows: int = 30, seed: int = 5) -> Path:
    """A file of samples whose label nobody knows."""
    return write(path, {name: of for name, of in other_columns(rows, seed).items() if name != "label"})


# --- what is written --------------------------------------------------------------------------------------------------


def test_predictions_are_those_worked_out_by_hand(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of values that nobody has trained on, whose rows are zeros; of several partitions in the order of the file."""
    assert main(main_words(folder / "run", folder / "test.parquet", tmp_path / "out", "--columns", "request")) == 0
    out = capsys.readouterr().out
    assert f"predictions of {TEST_ROWS} samples are in {tmp_path / 'out'}" in out
    samples, found = pq.read_table(folder / "test.parquet"), pq.ParquetFile(tmp_path / "out" / "test.parquet")
    with found:
        assert [found.metadata.row_group(k).num_rows for k in range(found.num_row_groups)] == [100, 100, 100]
        table = found.read()
    assert table.schema.names == ["request", "prediction"]
    assert table.schema.field("prediction").type == pa.float32()
    assert table["request"].equals(samples["request"])
    np.testing.assert_allclose(table["prediction"].to_numpy(), by_hand(folder / "run", samples), rtol=1e-5)
    assert files_below(tmp_path / "out") == ["_SUCCESS", "test.parquet"]


def test_samples_without_a_label_are_predicted_beside_others(folder: Path, tmp_path: Path, run: TrainedRun) -> None:
    """Of any kind: the label is not looked at."""
    table = pq.read_table(folder / "test.parquet").slice(0, 40)
    write(tmp_path / "data" / "plain.parquet", table)
    unlabelled(tmp_path / "data" / "new.parquet")
    write(tmp_path / "data" / "odd.parquet", table.drop(["label"]).append_column("label", pa.array(["?"] * 40)))
    assert predict(run, [str(tmp_path / "data")], str(tmp_path / "out")) == 110
    found = {name: pq.read_table(tmp_path / "out" / f"{name}.parquet")["prediction"] for name in ("plain", "odd", "new")}
    assert found["plain"].equals(found["odd"])
    by_us = by_hand(folder / "run", pq.read_table(tmp_path / "data" / "new.parquet"))
    np.testing.assert_allclose(found["new"].to_numpy(), by_us, rtol=1e-5)


def test_columns_are_copied_as_they_are(tmp_path: Path, run: TrainedRun) -> None:
    """Whatever their type, of every partition, hive keys too."""
    rows, base = 250, columns_of(250)
    rng = np.random.default_rng(0)
    of_all_types = pa.table({
        **base, "when": pa.array(rng.integers(0, 10**9, rows), pa.timestamp("ms", "UTC")),
        "price_paid": pa.array([decimal.Decimal(k) / 100 for k in range(rows)], pa.decimal128(9, 2)),
        "kind": pa.array([None if k % 3 else f"kind {k // 100}" for k in range(rows)]).dictionary_encode(),
        "seen": pa.array([[f"s{k}"] * (k % 3) for k in range(rows)]), "raw": pa.array([b"\x00\xff"] * rows),
        "deep": pa.array([{"a": k, "b": [k]} for k in range(rows)]), "nothing": pa.nulls(rows),
    })  # fmt: skip
    data = write(tmp_path / "day=7" / "x.parquet", of_all_types)
    wanted = ["seen", "day", "user", "when", "price_paid", "kind", "raw", "deep", "nothing", "tags", "label"]
    predict(run, [str(data)], str(tmp_path / "out"), columns=[*wanted, "user"])
    found = pq.ParquetFile(tmp_path / "out" / "day=7" / "x.parquet").read()
    assert found.column_names == [*wanted, "prediction"], "one that was named twice is one"
    for name in set(wanted) - {"day"}:
        assert found[name].type == of_all_types[name].type, name
        assert found[name].to_pylist() == of_all_types[name].to_pylist(), name
    assert found["day"].to_pylist() == ["7"] * rows


def test_of_fewer_negatives_the_odds_are_taken_back(tmp_path: Path) -> None:
    made = train_run(tmp_path, data={"negative_rate": 0.25})
    samples = pq.read_table(tmp_path / "test.parquet")
    predict(open_run(made, (), "", print), [str(tmp_path / "test.parquet")], str(tmp_path / "out"))
    found = pq.read_table(tmp_path / "out" / "test.parquet")["prediction"].to_numpy()
    np.testing.assert_allclose(found, by_hand(made, samples, negative_rate=0.25), rtol=1e-5)
    assert found.mean() < by_hand(made, samples).mean() - 0.1


@pytest.mark.filterwarnings("error")
def test_logits_of_any_size_become_probabilities() -> None:
    """Without a word from numpy."""
    table = PredictionFolder("/nowhere", "step-1", ("label",), (), 1).table(None, np.array([-1e9, -20, 0, 1e9], np.float32))
    np.testing.assert_allclose(table["prediction"].to_numpy(), [0, 1 / (1 + np.exp(20)), 0.5, 1], rtol=1e-6)


# --- where it is written ----------------------------------------------------------------------------------------------


def test_the_output_has_the_folders_of_the_input(folder: Path, tmp_path: Path, run: TrainedRun) -> None:
    """Files of equal names stay apart, one without samples has its file too, and empty row groups are passed over."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder / "data", data)
    table = pq.read_table(folder / "test.parquet")
    write(data / "date=2024-09-23" / "part-0.parquet", table.slice(0, 0))
    with pq.ParquetWriter(data / "date=2024-09-23" / "part-1.parquet", table.schema) as writer:
        for at, rows in ((0, 0), (7, 20), (0, 0), (27, 13), (0, 0)):
            writer.write_table(table.slice(at, rows))
    assert predict(run, [str(data)], str(out), columns=["request", "user"]) == TEST_ROWS + 33
    names = [*FILES, "date=2024-09-23/part-0.parquet", "date=2024-09-23/part-1.parquet"]
    assert files_below(out) == sorted(["_SUCCESS", *names])
    whole = by_hand(run.path, table)
    for name, at in zip(names, (slice(0, 100), slice(100, 200), slice(200, 300), slice(0, 0), slice(7, 40)), strict=True):
        found = pq.ParquetFile(out / name).read()
        assert found.schema.names == ["request", "user", "prediction"], name
        assert found["request"].to_pylist() == table["request"].to_pylist()[at], name
        np.testing.assert_allclose(found["prediction"].to_numpy(), whole[at], rtol=1e-5)
    # As people read such a folder: the keys are columns again.
    dataset = ds.dataset(out, partitioning="hive")
    assert set(dataset.to_table()["date"].to_pylist()) == {"2024-09-21", "2024-09-22", "2024-09-23"}
    assert dataset.count_rows() == TEST_ROWS + 33
    before = snapshot(out)
    del before["_SUCCESS"]
    assert predict(run, [str(data)], str(out), columns=["request", "user"]) == 0, "nothing is left to do"
    assert {name: of for name, of in snapshot(out).items() if name != "_SUCCESS"} == before


def relative(sources: list[str]) -> list[str]:
    """Where the predictions of such files go."""
    from flowps.hub.partition import SampleFile

    files = [SampleFile(url, {}, {}, (1,)) for url in sources]
    shares = PredictionFolder("/out", "step-1", ("label",), (), 10).shares(1, files)
    names = shares[0].sink.args[1]  # type: ignore[attr-defined]
    return [names[url][0] for url in sources]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/d/a.parquet"], ["a.parquet"]),
        (["/a.parquet", "/b/a.parquet"], ["a.parquet", "b/a.parquet"]),
        (["/d/ab/x.pq", "/d/ac/x.pq"], ["ab/x.pq", "ac/x.pq"]),
        (["/d/ab/x.pq", "/d/ab/y.pq"], ["x.pq", "y.pq"]),
        (["/d/day=1/x.pq"], ["day=1/x.pq"]),
        (["/d/day=1/hour=2/x.pq", "/d/day=1/hour=3/x.pq"], ["day=1/hour=2/x.pq", "day=1/hour=3/x.pq"]),
        (["s3://bucket/d/a.parquet"], ["a.parquet"]),
        (["memory://a.parquet"], ["a.parquet"]),
        (["s3://bucket/day=1/a.parquet"], ["day=1/a.parquet"]),
        (["s3://bucket/d/a/x.pq", "s3://bucket/d/b/x.pq"], ["a/x.pq", "b/x.pq"]),
        (["s3://bucket/a/x.pq", "s3://basket/a/x.pq"], ["bucket/a/x.pq", "basket/a/x.pq"]),
        (["zip://x.pq::file:///d/a.zip", "zip://y.pq::file:///d/a.zip"], ["x.pq", "y.pq"]),
        (["zip://x.pq::file:///d/a.zip", "zip://x.pq::file:///d/b.zip"], ["a.zip/x.pq", "b.zip/x.pq"]),
    ],
)  # fmt: skip
def test_names_are_what_paths_do_not_share_and_hive_keys(sources: list[str], names: list[str]) -> None:
    assert relative(sources) == names


def test_data_and_output_may_be_named_in_all_ways(
    folder: Path, tmp_path: Path, run: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    memory = fsspec.filesystem("memory")
    samples = (folder / "data" / FILES[0]).read_bytes()
    try:
        memory.pipe("/predict-in/one.parquet", samples)
        predict(run, ["memory://predict-in/one.parquet"], "memory://predict-out/deep")
        assert sorted(memory.find("/predict-out")) == ["/predict-out/deep/_SUCCESS", "/predict-out/deep/one.parquet"]
        predict(run, [str(folder / "data/date=*/part-0.parquet")], "relative/out")
        predict(run, [f"file://{folder}/data/{FILES[0]}"], (tmp_path / "url" / "out").as_uri())
        assert files_below(tmp_path / "relative/out") == ["_SUCCESS", FILES[0], FILES[2]]
        assert files_below(tmp_path / "url") == ["out/_SUCCESS", f"out/{FILES[0]}"]
        with memory.open("/predict-out/deep/one.parquet") as file:
            found = pq.read_table(file)
        assert found.equals(pq.ParquetFile(tmp_path / "url" / "out" / FILES[0]).read())
        assert found.equals(pq.ParquetFile(tmp_path / "relative" / "out" / FILES[0]).read())
    finally:
        for path in ("/predict-in", "/predict-out"):
            memory.rm(path, recursive=True)


# --- stopped, begun again ---------------------------------------------------------------------------------------------


@pytest.fixture
def stopped_after_one(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ctrl-C is pressed when the first file has been written, and all scorers have been told before they go on."""
    put, request_stop, told = PredictionFolder.put, Roles.request_stop, threading.Event()
    written: list[str] = []

    def told_to(roles: Roles, failed: bool = False) -> None:
        request_stop(roles, failed)
        told.set()

    def putting(own: PredictionFolder, local: Path, name: str) -> None:
        put(own, local, name)
        written.append(name)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert told.wait(60)

    monkeypatch.setattr(Roles, "request_stop", told_to)
    monkeypatch.setattr(PredictionFolder, "put", putting)
    return written


def test_it_goes_on_where_it_was_stopped(
    folder: Path, tmp_path: Path, stopped_after_one: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    words = main_words(folder / "run", folder / "data", tmp_path / "out", "--columns", "user")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_SUCCESS").touch()  # of yesterday
    assert main(words) == 130
    err = capfd.readouterr().err
    assert "stopping; whole files stay; Ctrl-C again stops at once" in err
    assert err.splitlines()[-1] == "error: scoring samples: the run was asked to stop"
    assert files_below(tmp_path / "out") == stopped_after_one == [FILES[0]]
    before = snapshot(tmp_path / "out")

    assert main(words) == 0
    assert "; 200 samples in 2 file(s); 1 file(s) are there already" in capfd.readouterr().out
    assert sorted(stopped_after_one) == sorted(FILES), "none was written twice"
    after = snapshot(tmp_path / "out")
    assert after.keys() == {*FILES, "_SUCCESS"}
    assert after[FILES[0]] == before[FILES[0]]


def test_only_what_is_missing_is_written(folder: Path, tmp_path: Path, run: TrainedRun) -> None:
    out = tmp_path / "out"
    assert predict(run, [str(folder / "data")], str(out)) == TEST_ROWS
    before = snapshot(out)
    (out / FILES[1]).unlink()
    assert predict(run, [str(folder / "data")], str(out)) == 100
    after = snapshot(out)
    assert after[FILES[1]][1] == before[FILES[1]][1], "the same predictions"
    assert [after[name] for name in (FILES[0], FILES[2])] == [before[name] for name in (FILES[0], FILES[2])]


def test_success_comes_last_and_a_file_appears_whole(
    folder: Path, tmp_path: Path, run: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, put, seen = tmp_path / "out", PredictionFolder.put, list[list[str]]()
    predict(run, [str(folder / "data")], str(out))
    shutil.rmtree(out / "date=2024-09-22")

    def putting(own: PredictionFolder, local: Path, name: str) -> None:
        seen.append(files_below(out))
        put(own, local, name)

    monkeypatch.setattr(PredictionFolder, "put", putting)
    predict(run, [str(folder / "data")], str(out))
    assert [len(names) for names in seen] == [1, 2]
    assert not any("_SUCCESS" in names for names in seen)
    assert files_below(out) == sorted([*FILES, "_SUCCESS"])


def test_bad_data_leave_the_whole_files_and_no_success(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is bad at its end does not appear."""
    table = pq.read_table(folder / "test.parquet")
    write(tmp_path / "data" / "a.parquet", table)
    prices = table["price"].to_numpy().copy()
    prices[250] = np.inf
    bad = write(tmp_path / "data" / "b.parquet", table.set_column(1, "price", pa.array(prices)))
    error = refuse(capsys, folder / "run", tmp_path / "data", tmp_path / "out")
    assert f"{bad}: column 'price', row 250" in error
    assert files_below(tmp_path / "out") == ["a.parquet"]


# --- what is refused --------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_predictions_of_samples_that_were_there_before_are_not_taken_for_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was written anew, with as many samples."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder / "data", data)
    assert main(main_words(folder / "run", data, out)) == 0
    table = pq.read_table(folder / "test.parquet")
    (data / FILES[0]).touch()
    assert main(main_words(folder / "run", data, out)) == 0, "the same samples, however old"
    assert "more, which are" not in capsys.readouterr().out
    write(data / FILES[0], table.slice(100, 100))
    error = refuse(capsys, folder / "run", data, out)
    assert f"{out}: {FILES[0]} has other predictions (of {data / FILES[0]} as it was before it was written anew)" in error
    assert main(main_words(folder / "run", data, out, "--overwrite")) == 0
    found = pq.ParquetFile(out / FILES[0]).read()["prediction"].to_numpy()
    np.testing.assert_allclose(found, by_hand(folder / "run", table.slice(100, 100)), rtol=1e-5)
    capsys.readouterr()
    (data / FILES[2]).unlink()
    assert main(main_words(folder / "run", data, out)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{out} has 1 Parquet file(s) more, which are no predictions of DATA: {FILES[2]}" in said


def test_predictions_of_another_checkpoint_are_not_taken_for_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = checkpoints(folder / "run")
    words = (folder / "run", folder / "data", tmp_path / "out")
    assert main(main_words(*words, "--checkpoint", first)) == 0
    before = snapshot(tmp_path / "out")
    error = refuse(capsys, *words)
    assert f"{tmp_path / 'out'}: {FILES[0]} has other predictions (flowps.checkpoint {first!r} there, {last!r} now)" in error
    assert error.endswith("choose another OUT, or replace them with --overwrite (in Python overwrite=True)")
    assert {name: of for name, of in snapshot(tmp_path / "out").items() if name != "_SUCCESS"} == {
        name: of for name, of in before.items() if name != "_SUCCESS"
    }
    assert main(main_words(*words, "--overwrite")) == 0
    after = snapshot(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(after[name][1] != before[name][1] for name in FILES)
    samples = pq.read_table(folder / "data" / FILES[2])
    found = pq.ParquetFile(tmp_path / "out" / FILES[2]).read()["prediction"].to_numpy()
    np.testing.assert_allclose(found, by_hand(folder / "run", samples), rtol=1e-5)
    assert "flowps.columns '' there, 'user' now" in refuse(capsys, *words, "--columns", "user")


def test_what_is_there_of_other_data_is_not_taken_for_done(
    folder: Path, tmp_path: Path, run: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = unlabelled(tmp_path / "data" / "x.parquet"), tmp_path / "out"
    predict(run, [str(data)], str(out))
    unlabelled(data, rows=31)
    assert f"has other predictions (of {data} as it was before it was written anew)" in refuse(capsys, run.path, data, out)
    other = unlabelled(tmp_path / "other" / "x.parquet")
    assert f"flowps.source '{data}' there, '{other}' now" in refuse(capsys, run.path, other, out)
    (out / "x.parquet").write_bytes(b"PAR1, but no more")
    assert "x.parquet has other predictions (it cannot be read: " in refuse(capsys, run.path, data, out)
    assert main(main_words(run.path, data, out, "--overwrite")) == 0
    assert pq.read_metadata(out / "x.parquet").num_rows == 31


def test_the_data_themselves_are_never_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = unlabelled(tmp_path / "data" / "x.parquet")
    before = snapshot(tmp_path / "data")
    for out in (data.parent, f"file://{data.parent}/", f"{tmp_path}/data/../data"):
        for more in ([], ["--overwrite"]):
            assert "x.parquet is a file of DATA" in refuse(capsys, folder / "run", data, out, *more)
    assert snapshot(tmp_path / "data") == before


def test_an_output_that_cannot_be_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = folder / "run", unlabelled(tmp_path / "data" / "day=1" / "x.parquet")
    (tmp_path / "file").touch()
    assert f"OUT {tmp_path / 'file'}: is a file; choose another folder" in refuse(capsys, run, data, tmp_path / "file")
    assert f"OUT {run}: is the directory of a run; choose another folder" in refuse(capsys, run, data, run)
    assert "OUT nothing://x: " in refuse(capsys, run, data, "nothing://x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "day=1").touch()
    error = refuse(capsys, run, data, tmp_path / "out")
    assert f"{tmp_path / 'out'}: day=1/x.parquet cannot be written: " in error
    assert files_below(tmp_path / "out") == ["day=1"]
    (tmp_path / "in the way" / "day=1" / "x.parquet").mkdir(parents=True)
    error = refuse(capsys, run, data, tmp_path / "in the way", "--overwrite")
    assert "day=1/x.parquet cannot be replaced: " in error


def test_a_full_disk_is_said(run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = unlabelled(tmp_path / "x.parquet")

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device; is the disk full\? \(TMPDIR\)"):
        predict(run, [str(data)], str(tmp_path / "out"))
    assert files_below(tmp_path / "out") == []


def test_data_and_columns_that_do_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out, columns = folder / "run", tmp_path / "out", other_columns(20)
    data = write(tmp_path / "x.parquet", {**columns, "prediction": columns["user"]})
    error = refuse(capsys, run, data, out, "--columns", "user", "prediction")
    assert "--columns: 'prediction' is what a column of predictions is called" in error
    assert "x.parquet: no column 'usr'; it has label, price" in refuse(capsys, run, data, out, "--columns", "usr")
    del columns["city"]
    assert "no column 'city', which the run was trained on" in refuse(capsys, run, write(tmp_path / "y.parquet", columns), out)
    columns["city"] = columns["user"]
    assert "column 'city' is int64, but the run" in refuse(capsys, run, write(tmp_path / "y.parquet", columns), out)
    assert "matches no file" in refuse(capsys, run, tmp_path / "*.pq", out)
    assert not out.exists(), "nothing is made where nothing is written"
    assert main(main_words(run, data, out, "--columns", "user")) == 0, "a column that is not asked for is in nobody's way"
    capsys.readouterr()


def test_arguments_that_are_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = folder / "run", folder / "test.parquet"
    assert "required: OUT" in refuse(capsys, run, data, status=2)
    assert "--net.hidden: belongs to the trained model" in refuse(capsys, run, data, tmp_path, "--net.hidden", 3, status=2)
    assert "--column: no such option; did you mean --columns?" in refuse(capsys, run, data, tmp_path, "--column", "x", status=2)
    assert "is this the directory of a run?" in refuse(capsys, tmp_path, data, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert said.startswith("usage: python -m flowps.predict RUN DATA [DATA ...] OUT [--columns COLUMN [COLUMN ...]]")
    assert "`_SUCCESS` comes last" in said


@pytest.mark.long
def test_both_commands_as_commands(folder: Path, tmp_path: Path) -> None:
    """Their output, exit status and files, from another working directory."""
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copy(folder / "test.parquet", tmp_path)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120
        )  # fmt: skip

    refused = command("flowps.evaluate", "run", "none.parquet")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: DATA: none.parquet: no such file")
    predicted: Any = command("flowps.predict", "run", "test.parquet", "out", "--columns", "user", "--cluster.dashboard", "")
    assert predicted.returncode == 0, predicted.stderr
    lines = predicted.stdout.splitlines()
    assert lines[0] == f"run: {checkpoints(folder / 'run')[-1]}; {TEST_ROWS} samples in 1 file(s)"
    assert lines[-1] == f"predictions of {TEST_ROWS} samples are in out"
    assert files_below(tmp_path / "out") == ["_SUCCESS", "test.parquet"]
