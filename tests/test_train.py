"""The command as a user meets it: runs to the end, refuses bad input with a helpful line, stops when asked."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import closing
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pexpect
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster.run_dir import RunDir
from flowps.config import Config
from flowps.hub.schema import infer
from flowps.knob import load
from flowps.train import main

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RATES = r"\(\d+\.\d it/sec; \d+\.\d examples/sec\)"


def write(path: Path, columns: dict[str, object], **options: object) -> Path:
    """A Parquet file of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def good_columns(rows: int, seed: int = 0) -> dict[str, object]:
    """Label, a dense column, an id and a list; the label depends on the id."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 50, rows)
    return {
        "label": ((users % 5 == 0) ^ (rng.random(rows) < 0.1)).astype(np.int8),
        "price": rng.random(rows, np.float32),
        "user": users,
        "tags": [[f"t{t}" for t in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(rows)],
    }


def command(*arguments: object) -> list[str]:
    """Arguments for a quick run without a dashboard."""
    return ["--cluster.dashboard", "", "--data.batch_size", "64", "--status.print_interval", "10", *map(str, arguments)]


def refuse(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """Run, expect exit `status` and one `error:` line on stderr, no stack trace; return that line."""
    assert main(command(*arguments)) == status
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in out + err
    return lines[0]


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write(tmp_path / "train.parquet", good_columns(2000), row_group_size=300)


class TestRuns:
    def test_leaves_a_run_directory_and_prints_what_people_grep_for(self, tmp_path, train_file, capsys):
        test_file = write(tmp_path / "test.parquet", good_columns(500, seed=1))
        run_dir = tmp_path / "run"
        assert main(command("--data.train", train_file, "--data.test", test_file, "--run_dir", run_dir, "--epochs", 2)) == 0
        out = capsys.readouterr().out

        for name in ("auc", "xentropy_mean", "prob_mean", "real_mean"):
            assert re.search(rf"^step 10, {name} = \d\.\d{{4}} {RATES}$", out, re.M)
        for stage in ("ReadSample", "EmbeddingLookup", "PushGrad", "TrainStep"):
            numbers = r"count: \d+  P50: \d+\.\d  P95: \d+\.\d  P99: \d+\.\d  Max: \d+\.\d"
            assert re.search(rf"^\[RunStatus\]: Ops{stage} statistics => {numbers}$", out, re.M)
        found = re.search(r"^test: auc = (\d\.\d+), logloss = \d.\d+, calibration = \d\.\d+ \(mean prediction", out, re.M)
        assert found
        assert float(found[1]) > 0.8

        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["finished"]["examples"] == 4000
        assert summary["finished"]["steps"] == 2 * -(-2000 // 64)
        assert summary["test"]["examples"] == 500
        again = load(run_dir / "config.toml")
        assert again.data.batch_size == 64
        schema = json.loads((run_dir / "schema.json").read_text())
        assert [slot["name"] for slot in schema["slots"]] == ["user", "tags"]
        assert schema["dense"] == ["price"]
        assert pq.read_metadata(run_dir / "embeddings" / "user.parquet").num_rows == 50
        assert pq.read_metadata(run_dir / "embeddings" / "tags.parquet").num_rows == 9
        kinds = [json.loads(line)["type"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert kinds.count("Evaluated") == 1
        assert kinds[-1] == "Finished"
        assert "Interval" in kinds
        reports = [json.loads(line) for line in (run_dir / "status.jsonl").read_text().splitlines()]
        assert reports[-1]["stages"]["PushGrad"]["count"] == summary["finished"]["steps"]
        assert reports[-1]["counters"].get("empty_reads", 0) == 0

    def test_leaves_no_thread_behind(self, tmp_path, train_file):
        main(command("--data.train", train_file, "--run_dir", tmp_path / "warm"))  # TensorFlow and Dask keep their pools
        before = {thread.name for thread in threading.enumerate()}
        assert main(command("--data.train", train_file, "--run_dir", tmp_path / "run")) == 0
        assert {t.name for t in threading.enumerate() if t.name.startswith("flowps")} == set()
        assert not {t.name for t in threading.enumerate() if not t.daemon} - before

    def test_in_flight_1_is_reproducible_to_the_bit(self, tmp_path, train_file):
        found = []
        for name in "ab":
            run_dir = tmp_path / name
            assert main(command("--data.train", train_file, "--run_dir", run_dir, "--trainer.in_flight", 1, "--seed", 3)) == 0
            rows = pq.read_table(run_dir / "embeddings" / "user.parquet").sort_by("sign")
            metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            found.append((rows, [m["metrics"] for m in metrics if m["type"] == "Interval"]))
        assert found[0][0].equals(found[1][0])
        assert found[0][1] == found[1][1]

    def test_the_number_of_shards_changes_nothing(self, tmp_path, train_file):
        losses = []
        for shards in (1, 2, 5):
            run_dir = tmp_path / str(shards)
            assert main(command("--data.train", train_file, "--run_dir", run_dir, "--trainer.in_flight", 1,
                                "--ps.num_shards", shards, "--status.print_interval", 1)) == 0  # fmt: skip
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            losses.append([line["metrics"]["logloss"] for line in lines if line["type"] == "Interval"])
        assert len(losses[0]) == -(-2000 // 64)
        np.testing.assert_allclose(losses[1], losses[0], atol=1e-6)
        np.testing.assert_allclose(losses[2], losses[0], atol=1e-6)

    @pytest.mark.parametrize("model", ["dnn", "deepfm", "lr"])
    def test_every_built_in_model_trains(self, tmp_path, train_file, model, capsys):
        assert main(command("--data.train", train_file, "--run_dir", tmp_path / "run", "--model", model, "--epochs", 3)) == 0
        aucs = [float(x) for x in re.findall(r"step \d+, auc = (\d\.\d+)", capsys.readouterr().out)]
        assert aucs[-1] > 0.75

    def test_your_own_model_trains(self, tmp_path, train_file, monkeypatch):
        (tmp_path / "own_model.py").write_text(
            "import keras\n"
            "def build(spec):\n"
            "    inputs = spec.inputs()\n"
            "    vectors = spec.vectors(inputs['embeddings'])\n"
            "    x = keras.layers.concatenate([vectors['user'], vectors['tags'], inputs['dense_columns']])\n"
            "    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(8, 'relu')(x)))\n"
        )
        monkeypatch.chdir(tmp_path)
        assert main(command("--data.train", train_file, "--run_dir", tmp_path / "run", "--model", "own_model:build")) == 0

    def test_a_toml_file_with_slots_describes_a_run(self, tmp_path, train_file):
        toml = tmp_path / "run.toml"
        toml.write_text(
            f'run_dir = "{tmp_path}/run"\n[data]\ntrain = ["{train_file}"]\n[slot_default]\ndim = 4\noptimizer = "sgd"\n'
            '[[slot]]\nname = "tags"\ndim = 8\npooling = "mean"\noptimizer = "adagrad"\nhash_size = 5\n'
        )
        assert main(command(toml)) == 0
        tags = pq.read_table(tmp_path / "run" / "embeddings" / "tags.parquet")
        assert tags.num_rows <= 5
        assert tags.schema.field("weights").type == pa.list_(pa.float32(), 8)
        user = pq.read_table(tmp_path / "run" / "embeddings" / "user.parquet")
        assert user.schema.field("weights").type == pa.list_(pa.float32(), 4)
        assert user.column("state").null_count == user.num_rows

    def test_a_weight_is_how_many_times_a_value_counts(self, tmp_path, monkeypatch, capsys):
        """So weights 0 … 3 train the rows that 0 … 3 copies of each value train; those that always weigh 0 stay as they began."""
        monkeypatch.setenv("COLUMNS", "200")
        columns = good_columns(2000)
        rng = np.random.default_rng(7)
        counts = [[0 if tag in ("t0", "t1") else int(n) for tag, n in zip(tags, rng.integers(0, 4, len(tags)), strict=True)]
                  for tags in columns["tags"]]  # fmt: skip
        copies = [[tag for tag, n in zip(*row, strict=True) for _ in range(n)] for row in zip(columns["tags"], counts, strict=True)]
        weights = pa.array(counts, pa.list_(pa.float32()))
        rows, initial = {}, np.float32(0.25)
        for name, change in {"weights": {"counts": weights}, "copies": {"tags": copies}}.items():
            # Rows are shuffled by the file's name.
            file = write(tmp_path / name / "train.parquet", {**columns, **change}, row_group_size=300)
            arguments = command("--data.train", file, "--run_dir", tmp_path / f"run {name}", "--trainer.in_flight", 1,
                                "--data.partition_rows", 300, "--slot.tags.initializer", "constant",
                                "--slot.tags.init_scale", initial)  # fmt: skip
            assert main([*arguments, *(["--slot.tags.weights", "counts"] if name == "weights" else [])]) == 0
            found = pq.read_table(tmp_path / f"run {name}" / "embeddings" / "tags.parquet").to_pydict()
            rows[name] = dict(zip(found["sign"], np.array(found["weights"], np.float32), strict=True))
        assert "weights of tags" in capsys.readouterr().out
        schema = json.loads((tmp_path / "run weights" / "schema.json").read_text())
        assert (schema["dense"], [slot["weights"] for slot in schema["slots"]]) == (["price"], ["", "counts"])
        unlearned = {sign for sign, row in rows["weights"].items() if (row == initial).all()}
        assert (len(rows["weights"]), len(unlearned)) == (9, 2)
        assert rows["copies"].keys() == rows["weights"].keys() - unlearned
        for sign, row in rows["copies"].items():
            assert not (row == initial).any()
            np.testing.assert_allclose(rows["weights"][sign], row, rtol=1e-3)

    def test_an_earlier_run_with_the_same_schema_is_replaced_and_said(self, tmp_path, train_file, capsys):
        arguments = command("--data.train", train_file, "--run_dir", tmp_path / "run")
        assert main(arguments) == 0
        assert main(arguments) == 0
        assert "held an earlier run with this schema" in capsys.readouterr().out
        assert not (tmp_path / "run" / "previous").exists()

    def test_a_run_that_fails_keeps_what_the_earlier_one_left(self, tmp_path, train_file):
        arguments = command("--data.train", train_file, "--run_dir", tmp_path / "run")
        assert main(arguments) == 0
        model, summary = ((tmp_path / "run" / name).read_bytes() for name in ("model.keras", "summary.json"))
        for _ in range(2):  # the second failure must not take the first one's leftovers for a run
            assert main([*arguments, "--model", "dnnn"]) == 1
            assert (tmp_path / "run" / "previous" / "model.keras").read_bytes() == model
            assert (tmp_path / "run" / "previous" / "summary.json").read_bytes() == summary
        assert main(arguments) == 0
        assert not (tmp_path / "run" / "previous").exists()

    def test_a_run_goes_on_from_one_of_its_own_checkpoints(self, tmp_path, train_file, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)  # relative paths, though workers may be elsewhere
        arguments = command("--data.train", train_file, "--run_dir", "run", "--trainer.in_flight", 1)
        assert main(arguments) == 0
        rows = (tmp_path / "run" / "embeddings" / "user.parquet").read_bytes()
        (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
        capsys.readouterr()
        for how in (["--resume"], ["--resume_from", f"run/checkpoints/{saved.name}"]):
            assert main([*arguments, *how]) == 0
            assert f"going on from {saved.parent}/step-" in capsys.readouterr().out
            assert not (tmp_path / "run" / "previous").exists()
            assert (tmp_path / "run" / "embeddings" / "user.parquet").read_bytes() == rows
        assert main([*arguments, "--warm_start", "run/checkpoints"]) == 1
        assert "has checkpoints of an earlier run; go on from them with --resume" in capsys.readouterr().err
        assert main([*arguments, "--warm_start", "run/checkpoints", "--run_dir", "other", "--checkpoint.url", "saved"]) == 0
        assert list((tmp_path / "saved").glob("step-*/manifest.json"))

    def test_two_runs_at_once_do_not_share_a_directory(self, tmp_path, train_file, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        moment = datetime(2026, 1, 2, 3, 4, 5)
        monkeypatch.setattr("flowps.train.datetime", SimpleNamespace(now=lambda: moment))
        for _ in range(3):
            assert main(command("--data.train", train_file)) == 0
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"20260102-030405{n}" for n in ("", "-2", "-3")]
        with closing(RunDir(tmp_path / "mine")) as run_dir:
            run_dir.prepare(Config(), infer({"label": pa.int8(), "a": pa.int8()}, Config()))
            assert main(command("--data.train", train_file, "--run_dir", tmp_path / "mine")) == 1
        assert "another run is using it" in capsys.readouterr().err

    def test_another_learning_rate_is_no_other_schema(self, tmp_path, train_file):
        arguments = command("--data.train", train_file, "--run_dir", tmp_path / "run")
        assert main(arguments) == 0
        assert main([*arguments, "--slot_default.learning_rate", "0.01"]) == 0

    def test_hive_folders_become_columns(self, tmp_path):
        for hour in ("07", "08"):
            write(tmp_path / "data" / "date=2024-09-21" / f"hour={hour}" / "part.parquet", good_columns(200, seed=int(hour)))
        assert main(command("--data.train", tmp_path / "data", "--run_dir", tmp_path / "run")) == 0
        assert pq.read_metadata(tmp_path / "run" / "embeddings" / "hour.parquet").num_rows == 2

    def test_a_table_that_gives_up_rows_says_so(self, tmp_path, train_file, capsys):
        """Bounded, with admission: the end of the run and summary.json count what went and what was not taken."""
        run = tmp_path / "run"
        knobs = ["--slot_default.capacity_rows", 60, "--slot_default.admit_after", 2, "--data.batch_size", 16, "--epochs", 2]
        assert main(command("--data.train", train_file, "--run_dir", run, *knobs)) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "GiB from the start" in out
        tables = json.loads((run / "summary.json").read_text())["tables"]
        assert [table["slots"] for table in tables] == [["user", "tags"]]
        (table,) = tables
        assert 0 < table["rows"] <= 120
        assert table["refused"] > 0
        assert re.search(
            rf"table of user, tags: {table['rows']} of 120 rows; .*{table['refused']} sights of signs not admitted", out
        )

    def test_sequences_schedules_and_storages_train(self, tmp_path, train_file, capsys):
        """Pooling none, warm-up and decay, 16-bit rows, several threads, an optimizer with more state: all in one run."""
        knobs = [
            "--slot.tags.pooling", "none", "--slot.tags.max_len", 2, "--slot.user.storage", "bfloat16",
            "--slot.user.optimizer", "adam", "--slot.user.learning_rate", 0.01, "--trainer.warmup_steps", 3,
            "--trainer.decay", "cosine", "--trainer.decay_steps", 10, "--ps.threads", 2,
        ]  # fmt: skip
        run = tmp_path / "run"
        assert main(command("--data.train", train_file, "--run_dir", run, *knobs)) == 0
        summary = json.loads((run / "summary.json").read_text())
        assert [table["slots"] for table in summary["tables"]] == [["user"], ["tags"]]
        state = pq.read_table(run / "embeddings" / "user.parquet")["state"].combine_chunks()
        assert state.type.list_size == 2 * 16
        assert pq.read_table(run / "embeddings" / "tags.parquet").num_rows > 0


class TestUnusualData:
    def test_one_row_in_all(self, tmp_path):
        file = write(tmp_path / "one.parquet", {"label": [1], "user": ["a"]})
        assert main(command("--data.train", file, "--data.test", file, "--run_dir", tmp_path / "run")) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["finished"]["examples"] == 1
        assert summary["test"]["auc"] is None

    def test_empty_lists_everywhere(self, tmp_path):
        lists = pa.array([[] for _ in range(200)], pa.list_(pa.string()))
        file = write(tmp_path / "empty.parquet", {"label": [0, 1] * 100, "tags": lists, "ids": pa.array([[]] * 200)})
        assert main(command("--data.train", file, "--run_dir", tmp_path / "run")) == 0
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"] == 0

    def test_zero_row_groups_and_a_zero_row_file_among_others(self, tmp_path, train_file):
        table = pq.read_table(train_file)
        with pq.ParquetWriter(tmp_path / "groups.parquet", table.schema) as writer:
            for part in (table.slice(0, 0), table.slice(0, 100), table.slice(0, 0), table.slice(100, 50), table.slice(0, 0)):
                writer.write_table(part)
        pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
        assert (
            main(command("--data.train", tmp_path / "groups.parquet", tmp_path / "none.parquet", "--run_dir", tmp_path / "run"))
            == 0
        )
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]["examples"] == 150

    def test_lists_of_dictionaries_over_several_row_groups(self, tmp_path):
        columns = good_columns(300)
        tags = pa.array(columns["tags"], pa.list_(pa.string()))
        nested = pa.ListArray.from_arrays(tags.offsets, tags.values.dictionary_encode())
        for name, tags_ in (("plain", tags), ("nested", nested)):
            file = write(tmp_path / f"{name}.parquet", {**columns, "tags": tags_}, row_group_size=100)
            arguments = command(
                "--data.train", file, "--run_dir", tmp_path / name, "--trainer.in_flight", 1, "--data.shuffle", "false"
            )
            assert main(arguments) == 0
        rows = [pq.read_table(tmp_path / name / "embeddings" / "tags.parquet").sort_by("sign") for name in ("plain", "nested")]
        assert rows[0].num_rows == 9
        assert rows[0].equals(rows[1])

    def test_an_excluded_column_may_differ_between_files(self, tmp_path):
        columns = good_columns(50)
        write(tmp_path / "data" / "a.parquet", {**columns, "odd": list(range(50))})
        write(tmp_path / "data" / "b.parquet", {**columns, "odd": ["x"] * 50, "odder": [0.5] * 50})
        arguments = ["--data.train", tmp_path / "data", "--run_dir", tmp_path / "run"]
        assert main(command(*arguments, "--data.exclude", "odd*")) == 0
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]["examples"] == 100

    def test_only_dense_columns_and_only_slots(self, tmp_path):
        columns = good_columns(300)
        dense = write(tmp_path / "dense.parquet", {k: columns[k] for k in ("label", "price")})
        assert main(command("--data.train", dense, "--run_dir", tmp_path / "dense")) == 0
        slots = write(tmp_path / "slots.parquet", {k: columns[k] for k in ("label", "user")})
        assert main(command("--data.train", slots, "--run_dir", tmp_path / "slots")) == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "helps"),
        [
            (["--data.train", "nowhere.parquet"], "data.train: nowhere.parquet: no such file or directory"),
            (["--data.train", "absent*.parquet"], "absent*.parquet: matches no file"),
            (["--data.train", "empty_folder"], "holds no .parquet file"),
            (["--data.train", "text.parquet"], "text.parquet: not a readable Parquet file"),
            (["--data.train", "truncated.parquet"], "truncated.parquet: not a readable Parquet file"),
            (["--data.train", "none.parquet"], "no rows in them"),
            (["--data.train", "good.parquet", "other.parquet"], "column 'user' is string, but int64"),
            (["--data.train", "good.parquet", "more.parquet"], "column 'city' is not in"),
            (["--data.train", "good.parquet", "--ps.memory_share", "1e-9"], "fewer than 1024 rows each; raise ps.memory_share"),
            (["--data.train", "good.parquet", "--data.test", "other.parquet"], "column 'user' is string, but int64"),
            (["--data.train", "nolabel.parquet"], "no column 'label' in the files"),
            (["--data.train", "struct.parquet"], "--data.exclude 'place'"),
            (["--data.train", "good.parquet", "--data.exclude", "usr"], "did you mean user?"),
            (["--data.train", "good.parquet", "--slot_default.capacity_rows", "2000000000"], "are available; lower capacity_rows"),
            (["--data.train", "good.parquet", "--run_dir", "text.parquet"], "is a file; choose another with --run_dir"),
            (["--data.train", "good.parquet", "--run_dir", "text.parquet/below"], "cannot be written"),
            (["--data.train", "good.parquet", "--run_dir", "foreign"], "holds files but no readable schema.json"),
        ],
    )  # fmt: skip
    def test_bad_files_are_refused_before_anything_starts(self, tmp_path, monkeypatch, capsys, arguments, helps):
        monkeypatch.chdir(tmp_path)
        columns = good_columns(100)
        write(tmp_path / "good.parquet", columns)
        (tmp_path / "empty_folder").mkdir()
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign" / "thesis.doc").write_text("mine")
        (tmp_path / "text.parquet").write_text("label,user\n1,2\n")
        (tmp_path / "truncated.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-20])
        pq.write_table(pa.table(columns).slice(0, 0), tmp_path / "none.parquet")
        write(tmp_path / "other.parquet", {**columns, "user": [str(u) for u in columns["user"]]})
        write(tmp_path / "more.parquet", {**columns, "city": ["a"] * 100})
        write(tmp_path / "nolabel.parquet", {"user": [1, 2]})
        write(tmp_path / "struct.parquet", {**columns, "place": [{"x": 1}] * 100})
        assert helps in refuse(capsys, 1, *arguments)

    @pytest.mark.parametrize(
        ("change", "helps"),
        [
            ({"label": [0, 1, 2, 0]}, "column 'label', row 2: found 2, expected a label of 0 or 1"),
            ({"label": [0, 1, None, 0]}, "column 'label', row 2: found null"),
            (
                {"price": [0.5, 1.0, 2.0, float("nan")]},
                "column 'price', row 3: found nan, expected a finite float32 number or null",
            ),
            ({"price": [0.5, float("-inf"), 2.0, 1.0]}, "column 'price', row 1: found -inf"),
            ({"w": [[1.0], [1.0, 1.0], [], [1.0, 2.0]]}, "column 'w', row 3: found a list of 2, expected a list of 1"),
            ({"w": [[1.0], [1.0, float("nan")], [], [1.0]]}, "column 'w', row 1: found nan, expected a finite float32 number"),
        ],
    )
    def test_bad_values_stop_the_run_and_name_file_column_and_row(self, tmp_path, capsys, change, helps):
        columns = {"label": [0, 1, 1, 0], "price": [0.1, 0.2, 0.3, 0.4], "user": [1, 2, 3, 4], "tags": [[1], [2, 3], [], [4]],
                   "w": [[1.0], [2.0, 3.0], None, [4.0]]}  # fmt: skip
        file = write(tmp_path / "bad.parquet", {**columns, **change})
        error = refuse(capsys, 1, "--data.train", file, "--run_dir", tmp_path / "run", "--slot.tags.weights", "w")
        assert helps in error
        assert str(file) in error

    def test_what_was_learned_before_bad_data_is_saved(self, tmp_path, capsys):
        columns = good_columns(20_000)
        columns["label"][-1] = 7
        file = write(tmp_path / "late.parquet", columns, row_group_size=1000)
        error = refuse(capsys, 1, "--data.train", file, "--run_dir", tmp_path / "run", "--data.shuffle", "false",
                       "--data.partition_rows", 1000)  # fmt: skip
        assert "column 'label', row 19999: found 7" in error
        assert "what was trained before, 59 rows and the dense model, is in" in error
        assert pq.read_metadata(tmp_path / "run" / "embeddings" / "user.parquet").num_rows == 50
        assert (tmp_path / "run" / "model.keras").exists()

    def test_an_error_in_the_evaluation_does_not_throw_the_training_away(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "steep_model.py").write_text(
            "import keras\n"
            "def build(spec):\n"
            "    inputs = spec.inputs()\n"
            "    x = keras.ops.concatenate([inputs['embeddings'], keras.ops.exp(inputs['dense_columns'])], axis=1)\n"
            "    return keras.Model(inputs, keras.layers.Dense(1)(x))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        columns = good_columns(300)
        train = write(tmp_path / "train.parquet", columns)
        test = write(tmp_path / "test.parquet", {**columns, "price": np.full(300, 1000, np.float32)})
        error = refuse(capsys, 1, "--data.train", train, "--data.test", test, "--run_dir", tmp_path / "run",
                       "--model", "steep_model:build")  # fmt: skip
        assert "a prediction is NaN or infinite" in error
        assert "59 rows and the dense model, is in" in error
        assert (tmp_path / "run" / "model.keras").exists()

    def test_a_model_that_exits_is_refused_and_does_not_hang(self, tmp_path, train_file, monkeypatch, capsys):
        (tmp_path / "exiting_model.py").write_text(
            "import keras\n"
            "class Exits(keras.layers.Layer):\n"
            "    def call(self, x, training=False):\n"
            "        if training:\n"
            "            raise SystemExit('goodbye')\n"
            "        return x\n"
            "def build(spec):\n"
            "    raise SystemExit('goodbye')\n"
            "def late(spec):\n"
            "    inputs = spec.inputs()\n"
            "    return keras.Model(inputs, keras.layers.Dense(1)(Exits()(inputs['embeddings'])))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        arguments = ["--data.train", train_file, "--run_dir", tmp_path / "run", "--model"]
        assert "build raised SystemExit: goodbye" in refuse(capsys, 1, *arguments, "exiting_model:build")
        assert "SystemExit: goodbye" in refuse(capsys, 1, *arguments, "exiting_model:late")

    def test_columns_with_markup_in_their_names(self, tmp_path, capsys):
        file = write(tmp_path / "odd.parquet", {"label": [0, 1], "[/x] :id: [bold]": [1, 2]})
        assert main(command("--data.train", file, "--run_dir", tmp_path / "run")) == 0
        assert "[/x] :id:" in capsys.readouterr().out

    def test_a_custom_model_that_cannot_be_saved_or_traced(self, tmp_path, train_file, monkeypatch, capsys):
        (tmp_path / "odd_models.py").write_text(
            "import keras\n"
            "class Scaled(keras.layers.Layer):\n"
            "    def __init__(self, by):\n"
            "        super().__init__()\n"
            "        self.by = by\n"
            "    def call(self, x, training=False):\n"
            "        if training and self.by is None:\n"
            "            raise RuntimeError('no scale')\n"
            "        return x\n"
            "def unsaved(spec):\n"
            "    inputs = spec.inputs()\n"
            "    return keras.Model(inputs, keras.layers.Dense(1)(Scaled(object())(inputs['embeddings'])))\n"
            "def untraced(spec):\n"
            "    inputs = spec.inputs()\n"
            "    return keras.Model(inputs, keras.layers.Dense(1)(Scaled(None)(inputs['embeddings'])))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        arguments = ["--data.train", train_file, "--run_dir", tmp_path / "run", "--model"]
        assert "could not be saved after training" in refuse(capsys, 1, *arguments, "odd_models:unsaved")
        assert "no scale" in refuse(capsys, 1, *arguments, "odd_models:untraced")

    def test_a_file_damaged_inside_stops_the_run(self, tmp_path, train_file, capsys):
        content = bytearray(train_file.read_bytes())
        content[4:2000] = bytes(1996)  # the pages of the first row group; the footer stays whole
        train_file.write_bytes(content)
        assert f"{train_file}: row groups [" in refuse(capsys, 1, "--data.train", train_file, "--run_dir", tmp_path / "run")

    def test_a_run_directory_of_another_schema(self, tmp_path, train_file, capsys):
        assert main(command("--data.train", train_file, "--run_dir", tmp_path / "run")) == 0
        capsys.readouterr()
        error = refuse(capsys, 1, "--data.train", train_file, "--run_dir", tmp_path / "run", "--slot_default.dim", 8)
        assert "slot 'user': dim 16 there, 8 now" in error

    def test_a_full_table(self, tmp_path, train_file, capsys):
        error = refuse(capsys, 1, "--data.train", train_file, "--run_dir", tmp_path / "run", "--slot_default.capacity_rows", 10)
        assert "need more rows than the table of slots user, tags can hold: 20 rows" in error
        assert "raise capacity_rows of these slots" in error

    def test_more_slots_than_memory_allows(self, tmp_path, capsys):
        file = write(tmp_path / "wide.parquet", {"label": [0, 1], **{f"s{i}": [1, 2] for i in range(40)}})
        error = refuse(capsys, 1, "--data.train", file, "--run_dir", tmp_path / "run",
                       "--slot_default.dim", 4096, "--trainer.in_flight", 1024)  # fmt: skip
        assert "does not fit in memory" in error
        assert "40 slots" in error

    @pytest.mark.parametrize(
        ("body", "helps"),
        [
            ("return keras.Model(inputs, keras.layers.Dense(2)(x))", "gives shape (3, 2) for 3 samples"),
            ("return keras.Model(inputs, keras.layers.Dense(1)(x) * float('nan'))", "gives nan for an input of zeros"),
            ("return 'a model'", "expected the function to return a keras.Model, found str"),
            ("return 1 / 0", "build raised ZeroDivisionError"),
        ],
    )
    def test_a_custom_model_that_is_wrong(self, tmp_path, train_file, monkeypatch, capsys, body, helps):
        name = f"wrong_model_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(
            f"import keras\ndef build(spec):\n    inputs = spec.inputs()\n    x = inputs['embeddings']\n    {body}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        assert helps in refuse(capsys, 1, "--data.train", train_file, "--run_dir", tmp_path / "run", "--model", f"{name}:build")

    def test_a_loss_that_becomes_infinite(self, tmp_path, train_file, monkeypatch, capsys):
        (tmp_path / "model_of_infinity.py").write_text(
            "import keras\n"
            "def build(spec):\n"
            "    inputs = spec.inputs()\n"
            "    cheap = keras.ops.cast(inputs['dense_columns'] < 0.9, 'float32')\n"
            "    return keras.Model(inputs, keras.layers.Dense(1, bias_initializer='ones')(inputs['embeddings']) / cheap)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        error = refuse(capsys, 1, "--data.train", train_file, "--run_dir", tmp_path / "run", "--model", "model_of_infinity:build")
        assert "the loss became" in error
        assert "lower trainer.learning_rate" in error

    @pytest.mark.parametrize(
        ("arguments", "helps"),
        [
            ([], "data.train: no training data; give --data.train"),
            (["--data.batchsize", 3], "did you mean --data.batch_size"),
            (["--model", "dnnn", "--data.train", "good.parquet"], "did you mean dnn?"),
            (["--trainer.optimizer", "adamm", "--data.train", "good.parquet"], "no optimizer 'adamm'"),
        ],
    )
    def test_bad_knobs(self, tmp_path, monkeypatch, capsys, arguments, helps):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "good.parquet", good_columns(100))
        assert main(command(*arguments)) != 0
        assert helps in capsys.readouterr().err


class TestInterrupt:
    """Real processes, a real terminal, real signals."""

    @staticmethod
    def spawn(tmp_path: Path, train_file: Path, *more: str) -> pexpect.spawn:
        arguments = command("--data.train", train_file, "--run_dir", tmp_path / "run", "--epochs", 1_000_000, *more)
        return pexpect.spawn(
            sys.executable, ["-m", "flowps.train", *arguments], cwd=str(ROOT), timeout=120, dimensions=(50, 160),
            encoding="utf-8", codec_errors="replace",  # a process that ends at once may do so within a character
        )  # fmt: skip

    def test_ctrl_c_stops_cleanly_and_says_what_was_trained(self, tmp_path, train_file):
        child = self.spawn(tmp_path, train_file)
        child.expect(r"step 100, auc")
        child.sendintr()
        child.expect("stopping and saving what was trained")
        child.expect(r"stopped: (\d+) examples, \d+ steps")
        examples = int(child.match[1])
        child.expect(r"stopped by a signal after")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 130
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["finished"]["examples"] == examples
        assert summary["finished"]["stopped"]
        assert (tmp_path / "run" / "model.keras").exists()
        assert pq.read_metadata(tmp_path / "run" / "embeddings" / "user.parquet").num_rows == 50

    def test_a_terminal_shows_live_progress(self, tmp_path, train_file):
        child = self.spawn(tmp_path, train_file)
        child.expect(r"epoch \d+/1000000 .*step \d+ .*examples/sec .*queue \d .*loss \d\.\d+ .*auc")
        child.kill(signal.SIGTERM)
        child.expect(r"stopped: \d+ examples")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 130

    @pytest.mark.long
    def test_a_signal_that_comes_twice_at_once_is_one(self, tmp_path, train_file):
        """`timeout -s INT` and some schedulers signal a process and then its group."""
        child = self.spawn(tmp_path, train_file)
        child.expect(r"step 10, auc")
        child.kill(signal.SIGINT)
        child.kill(signal.SIGINT)
        child.expect(r"stopped: \d+ examples")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 130
        assert (tmp_path / "run" / "summary.json").exists()

    @pytest.mark.parametrize(
        ("output", "said"), [("| head -n 5", "closed by its reader"), ("> /dev/full", "No space left on device")]
    )
    def test_an_output_that_cannot_be_written_stops_the_run_and_keeps_what_was_trained(self, tmp_path, train_file, output, said):
        arguments = command("--data.train", train_file, "--run_dir", tmp_path / "run", "--epochs", 1_000_000)
        line = f"set -o pipefail; {sys.executable} -m flowps.train {shlex.join(arguments)} {output}"
        found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert found.returncode == 1
        assert found.stderr.startswith("error: standard output "), found.stderr
        assert said in found.stderr
        assert "Traceback" not in found.stderr

    @pytest.mark.long
    def test_a_terminal_that_cannot_show_a_name_shows_it_escaped(self, tmp_path):
        file = write(tmp_path / "odd.parquet", {"label": [0, 1], "城市": [1, 2]})
        found = subprocess.run(
            [sys.executable, "-m", "flowps.train", *command("--data.train", file, "--run_dir", tmp_path / "run")],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert "\\u57ce\\u5e02" in found.stdout

    @pytest.mark.long
    def test_the_dashboard_answers_at_the_address_that_is_printed(self, tmp_path, train_file):
        child = self.spawn(tmp_path, train_file, "--cluster.dashboard", "127.0.0.1:0")
        child.expect(r"dashboard: (http://127\.0\.0\.1:\d+/status)")
        with urllib.request.urlopen(child.match[1], timeout=30) as page:
            assert b"Dask" in page.read()
        child.expect(r"step 10, auc")
        child.kill(signal.SIGTERM)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 130

    @pytest.mark.long
    def test_a_second_ctrl_c_stops_at_once(self, tmp_path, train_file, monkeypatch):
        """The first step never ends, so the first Ctrl-C alone would stop nothing."""
        (tmp_path / "stuck_model.py").write_text(
            "import threading\n"
            "import keras\n"
            "import tensorflow as tf\n"
            "def wait(x):\n"
            "    print('the step is stuck', flush=True)\n"
            "    threading.Event().wait()\n"
            "class Stuck(keras.layers.Layer):\n"
            "    def call(self, x, training=False):\n"
            "        return tf.ensure_shape(tf.numpy_function(wait, [x], tf.float32), x.shape) if training else x\n"
            "def build(spec):\n"
            "    inputs = spec.inputs()\n"
            "    return keras.Model(inputs, keras.layers.Dense(1)(Stuck()(inputs['embeddings'])))\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        child = self.spawn(tmp_path, train_file, "--model", "stuck_model:build")
        child.expect("the step is stuck")
        child.sendintr()
        child.expect("Ctrl-C again stops at once")
        child.expect(pexpect.TIMEOUT, timeout=0.5)  # two signals at once would count as one
        child.sendintr()
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 130
        assert not (tmp_path / "run" / "model.keras").exists()


def test_help_and_version_without_loading_tensorflow(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    code = "import sys; sys.argv = ['x', '--help']; import runpy; runpy.run_module('flowps.train', run_name='__main__')"
    check = f"import atexit, sys; atexit.register(lambda: print('tensorflow' in sys.modules)); {code}"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert "--data.batch_size" in found.stdout
    assert found.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("train", "options"),
    [
        ("criteo/*.parquet", []),
        ("criteo/criteo_kaggle_first10k.parquet", ["--data.dense", "I*", "--data.log1p"]),
        ("beauty/valid.parquet", ["--data.test", "beauty/test.parquet"]),
        ("lastfm/valid.parquet", ["--data.test", "lastfm/test.parquet"]),
        ("avazu/train.parquet", ["--data.test", "avazu/test.parquet", "--data.exclude", "id"]),
        ("ipinyou/train.parquet", ["--data.test", "ipinyou/test.parquet"]),
        ("obd/*.parquet", []),
        ("ml100k/train.parquet", ["--data.test", "ml100k/valid.parquet", "--data.exclude", "timestamp"]),
    ],
)
def test_real_data_trains_with_data_options_only(tmp_path, train, options, capsys):
    if not SHARED.is_dir():
        pytest.skip(f"the real data sets are not here: {SHARED}")
    options = [str(SHARED / option) if option.endswith(".parquet") else option for option in options]
    # As a user types it: no batch size, no settings beyond --data.*.
    assert main(["--data.train", str(SHARED / train), *options, "--run_dir", str(tmp_path / "run"), "--cluster.dashboard", ""]) == 0
    rows = sum(pq.read_metadata(f).num_rows for f in SHARED.glob(train))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]["examples"] == rows


def test_ml1m_reaches_the_quality_of_plain_keras(tmp_path):
    data = SHARED / "ml1m"
    if not data.is_dir():
        pytest.skip(f"the real data sets are not here: {SHARED}")
    arguments = [ROOT / "examples" / "ml1m.toml", "--data.train", data / "train.parquet", "--data.test", data / "test.parquet"]
    assert main([*map(str, arguments), "--run_dir", str(tmp_path / "run"), "--cluster.dashboard", ""]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["auc"] >= 0.8605
