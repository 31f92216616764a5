"""The same net without flowps: what its reader reads, what a step does to the rows, and the comparison with flowps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import end_to_end, rival
from bench.rival_reader import Samples, Shape, ahead, batches, buckets_of, hash_strings
from flowps.config import SlotDefault
from flowps.synthetic import Dataset, criteo, dsp_ctr, generate

RIVALS = ("keras", "torch")
BUCKETS = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strings, lists of numbers, lists of strings, dense columns, nulls in all of them; two files of several row groups."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for file, n in enumerate((250, 90)):
        lists = [rng.integers(0, 1 << 63, rng.integers(0, 5)).tolist() for _ in range(n)]
        table = pa.table(
            {
                "label": pa.array(rng.integers(0, 2, n), pa.int8()),
                "count": pa.array([None if k % 7 == 3 else float(k - 20) for k in range(n)], pa.float32()),
                "name": pa.array([None if k % 11 == 5 else "äb"[: k % 3] + str(k % 20) for k in range(n)]),
                "signs": pa.array([None if k % 13 == 1 else [*of, 7] for k, of in enumerate(lists)], pa.list_(pa.uint64())),
                "age": pa.array([None if k % 17 == 1 else k for k in range(n)], pa.int64()),
                "tags": pa.array([[f"t{tag}" if tag else None for tag in range(k % 4)] for k in range(n)], pa.list_(pa.string())),
            }
        )
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=100)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """A folder of little `criteo`, and what is in it."""
    folder = tmp_path_factory.mktemp("criteo")
    return folder, generate(criteo(), folder, rows=500, test_rows=50)


def files_of(data: Path) -> list[str]:
    return sorted(str(path) for path in data.glob("*.parquet"))


def values_of(row: Mapping[str, Any], slot: str) -> list[Any]:
    """Of a sample's slot, as a list; of a null list none."""
    found = row[slot]
    return found if isinstance(found, list) else [] if found is None and slot in ("signs", "tags") else [found]


def test_batches_have_what_the_files_have(data: Path) -> None:
    files = files_of(data)
    shape = Shape.of(files[0], BUCKETS)
    assert (shape.slots, shape.dense) == (("name", "signs", "tags"), ("count", "age"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    found = list(batches(files, shape, 64))
    assert [len(samples) for samples in found] == [64] * 5 + [20]
    seen: dict[int, tuple[str, Any]] = {}
    at = 0
    for samples in found:
        assert samples.offsets[0] == 0
        assert samples.offsets[-1] == len(samples.rows)
        for k in range(len(samples)):
            row = rows[at + k]
            assert samples.labels[k] == row["label"]
            assert samples.dense[k].tolist() == [row["count"] or 0, row["age"] or 0]
            for slot, name in enumerate(shape.slots):
                first, last = samples.offsets[k * 3 + slot : k * 3 + slot + 2]
                of_slot = samples.rows[first:last].tolist()
                values = values_of(row, name)
                assert len(of_slot) == len(values)
                for number, value in zip(of_slot, values, strict=True):
                    # A slot's rows are its own, and what has equal values has equal rows, in all row groups and files.
                    assert slot * (BUCKETS + 1) <= number < (slot + 1) * (BUCKETS + 1)
                    assert (number == slot * (BUCKETS + 1) + BUCKETS) == (value is None)
                    assert seen.setdefault(number, (name, value)) == (name, value)  # no two of so few collide
        at += len(samples)
    assert at == len(rows)
    assert len(set(seen.values())) == len(seen)
    assert shape.num_rows == 3 * (BUCKETS + 1)


def lines(found: Sequence[Samples]) -> list[Any]:
    """Each sample as one tuple."""
    return [
        (of.labels[k], *of.dense[k], *(tuple(of.rows[of.offsets[k * 3 + s] : of.offsets[k * 3 + s + 1]]) for s in range(3)))
        for of in found
        for k in range(len(of))
    ]


def test_shuffling_moves_samples_and_changes_none(data: Path) -> None:
    files = files_of(data)
    shape = Shape.of(files[0], BUCKETS)
    plain = lines(list(batches(files, shape, 64)))
    one, same, other = (lines(list(batches(files, shape, 64, shuffle=np.random.default_rng(seed)))) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert one != plain
    assert sorted(one) == sorted(other) == sorted(plain)


def test_one_value_of_every_slot(small: tuple[Path, Dataset]) -> None:
    """As of `criteo`: the short way through the reader."""
    (file,) = small[1].train_files
    shape = Shape.of(str(file), 1 << 10)
    (plain,) = batches([str(file)], shape, 1000, log1p=True)
    assert plain.offsets.tolist() == list(range(500 * 26 + 1))
    table = pq.read_table(file)
    for slot, name in enumerate(shape.slots):
        buckets = buckets_of(table[name].combine_chunks(), 1 << 10)
        assert (plain.rows.reshape(500, 26)[:, slot] == slot * ((1 << 10) + 1) + buckets).all()
    dense = np.stack([np.nan_to_num(table[name].to_numpy()) for name in shape.dense], axis=1)
    assert plain.dense == pytest.approx(np.sign(dense) * np.log1p(np.abs(dense)))
    (shuffled,) = batches([str(file)], shape, 1000, log1p=True, shuffle=np.random.default_rng(3))
    moved = [np.c_[of.labels, of.dense, of.rows.reshape(500, 26)] for of in (plain, shuffled)]
    assert (moved[0] != moved[1]).any()
    assert sorted(map(tuple, moved[0])) == sorted(map(tuple, moved[1]))


def test_numbers_of_any_kind_share_buckets_only_by_chance() -> None:
    numbers = np.arange(1 << 16)
    for kind in (pa.uint64(), pa.int64(), pa.int32()):
        found = buckets_of(pa.array(numbers, kind), 1 << 20)
        assert found.min() >= 0
        assert found.max() < 1 << 20
        assert len(np.unique(found)) > 0.95 * len(numbers)
    far = np.random.default_rng(0).integers(0, 1 << 64, 1 << 16, np.uint64)
    assert len(np.unique(buckets_of(pa.array(far), 1 << 20))) > 0.95 * len(far)
    assert buckets_of(pa.array([-1, None], pa.int64()), 4).tolist()[1] == 4


def test_strings_have_different_hashes() -> None:
    strings = ["", "a", "b", "ab", "ba", "a\0", "\0", "\0\0", *map(str, range(10_000)), "long" * 1000]
    hashes = hash_strings(pa.array(strings))
    assert len(np.unique(hashes)) == len(strings)
    assert hash_strings(pa.array(strings)[3:6]).tolist() == hashes[3:6].tolist()
    assert hash_strings(pa.array(["", ""])).tolist() == [0, 0]
    assert hash_strings(pa.array([], pa.string())).tolist() == []


@pytest.mark.parametrize("buckets", [0, 1, 1000])
def test_buckets_are_a_power_of_two(data: Path, buckets: int) -> None:
    with pytest.raises(ValueError, match=f"{buckets} buckets; expected a power of two"):
        Shape.of(files_of(data)[0], buckets)


def test_a_reader_that_fails_and_one_that_is_left() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    found = ahead(failing(), 2)
    assert next(found) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    made = list[int]()
    left = ahead((made.append(k) or k for k in range(1_000_000)), 2)
    assert [next(left) for _ in range(3)] == [0, 1, 2]
    left.close()  # it has ended its thread
    assert len(made) < 10
    assert list(ahead(iter(range(5)), 1)) == list(range(5))


# --- a step ---------------------------------------------------------------------------------------------------------------

DIM = 4
KNOBS = SlotDefault(dim=DIM, init_scale=0.5, initial_accumulator=1e-3, epsilon=1e-3)  # no step is ±learning_rate


def a_rival(name: str, shape: Shape, model: str, precision: str = "float32") -> Any:
    if name == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return import_module(f"bench.rival_{name}").Rival(shape, model, (8,), KNOBS, precision, 1)


def table_of(name: str, made: Any) -> np.ndarray:
    return (made.table.numpy() if name == "keras" else made.bag.weight.detach().numpy()).copy()


def weights_of(name: str, made: Any) -> dict[str, np.ndarray]:
    """By their shapes, which all differ: those of the hidden layer, of the last one, and of a linear part."""
    weights = made.net.get_weights() if name == "keras" else [of.detach().numpy().T.copy() for of in made.net.parameters()]
    names = {(9, 8): "hidden", (8,): "bias", (8, 1): "last", (9, 1): "linear", (1,): "of_logit"}
    assert len({of.shape for of in weights}) == len(weights)
    return {names[of.shape]: of for of in weights}


@pytest.fixture
def batch() -> tuple[Shape, Samples]:
    """Duplicates within a slot's list, within a sample and between samples; empty lists at the beginning and at the end."""
    rows, counts = [1, 1, 5, 10, 1, 3, 9, 17, 1, 11, 11, 2], [0, 3, 1, 2, 2, 2, 2, 0]
    dense = np.random.default_rng(5).normal(size=(4, 1)).astype(np.float32)
    samples = Samples(np.array(rows, np.int32), np.cumsum([0, *counts]), dense, np.array([1, 0, 0, 1], np.float32))
    return Shape(("a", "b"), ("x",), 8), samples


@pytest.mark.parametrize("model", ["dnn", "deepfm"])
@pytest.mark.parametrize("name", RIVALS)
def test_a_step_beside_its_numpy_twin(name: str, model: str, batch: tuple[Shape, Samples]) -> None:
    shape, samples = batch
    made = a_rival(name, shape, model)
    before, weights = table_of(name, made), weights_of(name, made)
    assert before.shape == (18, DIM)
    assert 0.4 < np.abs(before).max() <= 0.5
    assert (weights["of_logit"] == 0).all()
    for of in ("hidden", "last"):  # Glorot and Bengio 2010, eq. 16
        assert 0.5 < np.abs(weights[of]).max() / np.sqrt(6 / sum(weights[of].shape)) <= 1

    # Forward.
    bounds = list(zip(samples.offsets[:-1], samples.offsets[1:], strict=True))
    pooled = np.stack([before[samples.rows[first:last]].sum(axis=0) for first, last in bounds]).reshape(4, 2, DIM)
    x = np.concatenate([pooled.reshape(4, -1), samples.dense], axis=1)
    hidden = np.maximum(x @ weights["hidden"] + weights["bias"], 0)
    logits = hidden @ weights["last"]
    if model == "deepfm":
        logits = logits + x @ weights["linear"] + (pooled[:, 0] * pooled[:, 1]).sum(axis=1, keepdims=True)
    logits = logits[:, 0]
    prepared = made.prepare(samples)
    assert made.predict(prepared) == pytest.approx(logits, abs=1e-5)

    # Backward, to the gradient of each sum, and from there to that of each row.
    of_logits = ((1 / (1 + np.exp(-logits)) - samples.labels) / 4)[:, None]
    of_x = ((of_logits @ weights["last"].T) * (hidden > 0)) @ weights["hidden"].T
    of_sums = of_x[:, : 2 * DIM]
    if model == "deepfm":
        of_sums = of_sums + (of_logits @ weights["linear"].T)[:, : 2 * DIM]
        of_sums = of_sums + of_logits * pooled[:, ::-1].reshape(4, -1)
    grads = np.zeros_like(before)
    for (first, last), of_sum in zip(bounds, of_sums.reshape(8, DIM), strict=True):
        for row in samples.rows[first:last]:
            grads[row] += of_sum
    squares = KNOBS.initial_accumulator + np.square(grads)
    expected = before - KNOBS.learning_rate * grads / np.sqrt(squares + KNOBS.epsilon)

    loss = np.mean(np.logaddexp(0, logits) - samples.labels * logits)
    assert made.train(prepared) == pytest.approx(loss, abs=1e-5)
    after = table_of(name, made)
    assert after == pytest.approx(expected, abs=1e-5)
    touched = np.isin(np.arange(18), samples.rows)
    assert (after[~touched] == before[~touched]).all()
    assert (after[touched] != before[touched]).any(axis=1).all()
    assert all(np.abs(weights[of] - new).max() > 5e-4 for of, new in weights_of(name, made).items())  # Adam's first step is 1e-3

    # The second step has the squares of both.
    made.train(prepared)
    steps = np.abs(table_of(name, made) - after)[touched].max(), np.abs(after - before)[touched].max()
    assert steps[0] < steps[1]


@pytest.mark.parametrize("name", RIVALS)
def test_bfloat16_is_for_the_hidden_layers(name: str, batch: tuple[Shape, Samples]) -> None:
    shape, samples = batch
    logits = [of.predict(of.prepare(samples)) for of in (a_rival(name, shape, "deepfm", p) for p in rival.PRECISIONS)]
    assert logits[1].dtype == np.float32
    assert (logits[0] != logits[1]).any()
    assert logits[1] == pytest.approx(logits[0], abs=0.02)


@pytest.mark.long
@pytest.mark.parametrize("name", RIVALS)
def test_the_command_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts it; lists of numbers, and so few values that the buckets are enough."""
    if name == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torch's wait for each other by turning round, beside other tests for long
    slots = tuple(replace(slot, cardinality=50) for slot in dsp_ctr().slots[:4])
    made = generate(replace(dsp_ctr(), slots=slots, target_auc=0.9, label_rate=0.3), tmp_path, rows=3000, test_rows=1000)
    found = rival.run_rival(
        [
            name, "dsp_ctr", "--train", *map(str, made.train_files), "--test", *map(str, made.test_files), "--batch-size", "50",
            "--buckets", "1024", "--epochs", "2",
        ]
    )  # fmt: skip
    assert (found["steps"], found["examples"], found["buckets"]) == (120, 6000, 1024)
    assert 0.55 < found["test_auc"] < made.best_auc
    assert all(found[of] > 0 for of in rival.FIGURES)
    assert found["trainer_wait_share"] < 1
    assert found["peak_rss_bytes"] > 1 << 26


# --- the command ----------------------------------------------------------------------------------------------------------


def test_steady_rates_leave_the_first_steps_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps of ten samples, as flowps's clock does; here a step takes a second, and the others wait two for a batch."""
    now = [0.0]

    class Stub:
        steps = 0

        def prepare(self, samples: Samples) -> tuple[Any, ...]:
            return (samples.labels,)

        def train(self, batch: tuple[Any, ...]) -> float:
            self.steps += 1
            now[0] += 1.0 if self.steps > 20 else 100.0
            return 0.0

    def waiting(made: Iterator[Any], depth: int) -> Iterator[Any]:
        for of in made:
            now[0] += 2.0
            yield of

    monkeypatch.setattr(rival, "ahead", waiting)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: now[0] / 2)
    files, stub = files_of(data), Stub()
    found = rival.train(stub, Shape.of(files[0], 4), files, 10, log1p=False)  # type: ignore[arg-type]
    assert (stub.steps, found["steps"], found["examples"]) == (34, 34, 340)
    assert found["examples_per_s"] == pytest.approx(140 / (14 * 3))
    assert found["cpu_s_per_million"] == pytest.approx(14 * 1.5 / 140 * 1e6)
    assert found["trainer_wait_share"] == pytest.approx(2 / 3)
    short = rival.train(Stub(), Shape.of(files[0], 4), files, 17, log1p=False)  # type: ignore[arg-type]
    assert (short["steps"], short["examples_per_s"], short["cpu_s_per_million"]) == (20, 0, 0)


def test_torch_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rival.require("keras")
    with pytest.raises(SystemExit, match="pip install torch"):
        rival.require("torch")


def test_torch_and_tensorflow_are_imported_by_their_rivals_only() -> None:
    """The comparison itself runs without both."""
    code = "import bench.end_to_end, bench.rival, sys; assert not {'torch', 'tensorflow', 'keras', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- beside flowps --------------------------------------------------------------------------------------------------------


def a_run(examples_per_s: float, test_auc: float = 0.75) -> dict[str, Any]:
    figures = dict.fromkeys(rival.FIGURES, 0.5) | {"peak_rss_bytes": 1 << 30}
    return {**figures, "examples_per_s": examples_per_s, "cpu_s_per_million": 1e4 / examples_per_s, "test_auc": test_auc}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What has run instead of trainings, in order."""
    done = list[list[str]]()

    @contextmanager
    def training(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
        done.append(["warm", *arguments])
        yield

    def run(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        done.append(["flowps", *arguments])
        return a_run(300.0 + 10 * len(done))

    def run_rival(arguments: Sequence[str]) -> dict[str, Any]:
        done.append(list(arguments))
        return a_run(100.0 + 10 * len(done), 0.74)

    monkeypatch.setattr(end_to_end, "training", training)
    monkeypatch.setattr(end_to_end, "_run", run)
    monkeypatch.setattr(rival, "run_rival", run_rival)
    return done


def end_to_end_with(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.end_to_end", *arguments])
    return end_to_end.main()


def test_beside_flowps_by_turns(
    stubs: list[list[str]],
    small: tuple[Path, Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "result.json"
    arguments = ["criteo", "--rival", "keras", "--net", "deepfm", "--data", str(small[0]), "--runs", "3", "--json", str(to)]
    knobs = ["--trainer.precision", "mixed_bfloat16", "--data.batch_size", "512", "--seed", "5"]
    assert end_to_end_with([*arguments, "--", *knobs], monkeypatch) == 0
    assert [of[0] for of in stubs] == ["warm", "flowps", "keras", "keras", "flowps", "flowps", "keras"]
    assert stubs[1][-6:] == knobs
    assert stubs[2] == [
        "keras", "criteo", "--net", "deepfm", "--train", *map(str, small[1].train_files), "--test", *map(str, small[1].test_files),
        "--batch-size", "512", "--precision", "mixed_bfloat16", "--epochs", "1", "--seed", "5",
    ]  # fmt: skip
    found = json.loads(to.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    assert (found["workload"], found["net"], found["precision"], found["batch_size"]) == ("criteo", "deepfm", "mixed_bfloat16", 512)
    assert (found["rounds"], found["mode"], found["shards"], found["knobs"]) == (3, "embedded", 1, knobs)
    ours, theirs = found["flowps"], found["rival"]
    assert [run["examples_per_s"] for run in ours["runs"]] == [320, 350, 360]
    assert [run["examples_per_s"] for run in theirs["runs"]] == [130, 140, 170]
    assert theirs["name"] == "keras"
    assert found["ratio"] == 350 / 140
    assert (found["ratio_least"], found["ratio_most"]) == (360 / 170, 350 / 140)
    assert found["cpu_ratio"] == pytest.approx(140 / 350)
    assert (ours["test_auc"], theirs["test_auc"]) == (0.75, 0.74)
    assert "torch" not in found["machine"]["versions"]
    table = rival.markdown(found, found).splitlines()
    assert len(table) == 6
    ends = "1.0 GiB | 50.0% |"
    assert table[2] == f"| `criteo` | deepfm | mixed_bfloat16 | flowps | 350 (320–360) | 2.50 (2.12–2.50) | 28.6 | {ends} 0.7500 |"
    assert table[3] == f"| `criteo` | deepfm | mixed_bfloat16 | Keras | 140 (130–170) | 1 | 71.4 | {ends} 0.7400 |"


def test_the_version_of_torch_is_told_where_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival, "version", lambda package: f"{package} 9")
    assert rival.described("torch")["versions"]["torch"] == "torch 9"
    assert "torch" not in rival.described("keras")["versions"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (["--slot_default.dim", "8"], "--slot_default.dim 8: a rival has 16 only; leave the knob out"),
        (["--trainer.learning_rate", "0.1"], "--trainer.learning_rate 0.1: a rival has 0.001 only"),
        (["--slot.C1.dim", "8"], "--slot.C1: a rival has no knobs of single slots"),
        (["--net.hidden", "7"], "a rival has the nets small, deepfm, dnn only"),
        (["--trainer.precision", "mixed_float16"], "a rival has float32, mixed_bfloat16 only"),
    ],
)
def test_what_a_rival_does_not_do_is_refused(
    knobs: list[str], message: str, stubs: list[list[str]], small: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        end_to_end_with(["criteo", "--rival", "keras", "--data", str(small[0]), "--", *knobs], monkeypatch)
    assert not [of for of in stubs if of[0] == "flowps"]


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(SystemExit, match="criteo: too few steps for a steady state; use more data"):
        rival.compared("criteo", "keras", [a_run(10.0)], [{**a_run(10.0), "examples_per_s": 0.0}])


def test_one_comparison_at_a_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end_to_end_with(["criteo", "--rival", "keras", "--compare"], monkeypatch)
    assert "give --compare or --rival" in capsys.readouterr().err


def test_a_rival_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"(?s)the rival failed with status 2: .*invalid choice: 'steam'"):
        rival.run_rival(["steam", "criteo"])
