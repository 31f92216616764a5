"""The models in plain Keras that flowps is compared with: the same functions, rows that learn alike, results that are kept."""

from __future__ import annotations

import io
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import plain_keras, quality
from flowps.config import Config, Data, Net, Slot, SlotDefault
from flowps.knob import load
from flowps.status.progress import PlainConsole
from flowps.train import train
from flowps.trainer.models import ModelSpec, build

NAMES = ("user", "item", "genre", "history")
NET = Net(hidden=(8, 4), cin=(6, 5), attention_dim=5, activation_unit=(7,), target="item")
DIM, MAX_LEN, SIZE = 4, 3, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Integers and strings, lists that are empty and lists with repetitions; the test samples have values of their own."""
    to = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(7)
    for name, rows, values in (("train", 3000, 20), ("test", 2000, 25)):
        item = random.integers(0, values, rows)
        lists = [random.integers(0, values, n) for n in random.integers(0, 6, rows)]
        chance = 1 / (1 + np.exp(1 - 0.1 * item - np.array([0.2 * (of % 3).sum() for of in lists])))
        table = pa.table({
            "user": [f"u{n}" for n in random.integers(0, 300, rows)], "item": item, "history": lists,
            "label": (random.random(rows) < chance).astype(np.int8),
        })  # fmt: skip
        pq.write_table(table, to / f"{name}.parquet")
    return to


def knobs(folder: Path, **more: str) -> dict[str, list[str]]:
    found = {"data.train": f"{folder}/train.parquet", "data.test": f"{folder}/test.parquet", "data.batch_size": "64", **more}
    return {name: [value] for name, value in found.items()}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_rows_learn_as_those_of_flowps(folder: Path, tmp_path: Path, pooling: str):
    """With rows of zeros, logistic regression and the file's order nothing is left to chance."""
    how = knobs(folder, **{
        "model": "lr", "epochs": "2", "data.shuffle": "false", "slot_default.dim": "2", "slot_default.pooling": pooling,
        "slot_default.init_scale": "0", "slot_default.learning_rate": "0.1", "trainer.warmup_steps": "20", "trainer.in_flight": "1",
        "run_dir": str(tmp_path / "run"), "cluster.dashboard": "", "checkpoint.every_s": "0",
    })  # fmt: skip
    config = load(None, list(how.items()))
    test = train(config, PlainConsole(file=io.StringIO())).test
    assert test is not None
    assert test.auc is not None
    assert test.auc > 0.6
    assert plain_keras.test_auc(config) == pytest.approx(test.auc, abs=2e-4)


def test_a_step_is_that_of_numpy(folder: Path):
    config = Config(model="lr", slot_default=SlotDefault(dim=1), data=Data(batch_size=64))
    samples, _, num_rows = plain_keras.read(f"{folder}/train.parquet", f"{folder}/test.parquet", "label", ())
    trainer = plain_keras.Trainer(config, samples, num_rows)
    rows, sums = np.array(trainer.rows).astype(np.float64), np.full((num_rows, 1), 1e-8)
    assert rows[0] == 0
    assert 0.009 < np.abs(rows).max() < 0.01
    ends, bias = np.cumsum(samples.lengths.sum(axis=1)), 0.0
    for at, batch in enumerate(samples.batches(64, np.arange(128))):
        trainer.train(batch)
        gradient = np.zeros_like(rows)
        for k in range(64 * at, 64 * at + 64):
            of_sample = samples.rows[ends[k] - samples.lengths[k].sum() : ends[k]]
            logit = rows[of_sample].sum() + bias
            np.add.at(gradient, of_sample, (1 / (1 + np.exp(-logit)) - samples.labels[k]) / 64)
        sums += gradient**2
        rows -= 0.05 * gradient / np.sqrt(sums + 1e-7)
        np.testing.assert_allclose(np.array(trainer.rows), rows, atol=1e-5)
        bias = float(trainer.model.trainable_variables[0][0])
    assert rows[0] == 0


def test_samples_are_those_of_the_files(folder: Path):
    files = f"{folder}/train.parquet", f"{folder}/test.parquet"
    train, test, num_rows = plain_keras.read(*files, "label", (("history", MAX_LEN),))
    table, of_test = (pq.read_table(file).to_pydict() for file in files)
    assert train.names == ("user", "item")
    row_of = {value: row for row, value in zip(train.rows[1::2], table["item"], strict=True)}
    assert len(set(row_of.values())) == len(set(table["item"])) == 20
    assert [row_of.get(value, 0) for value in of_test["item"]] == test.rows[1::2].tolist()
    assert 0 in test.rows
    seen = {value: row for values, rows in zip(table["history"], train.sequences["history"], strict=True)
            for value, row in zip(values[:MAX_LEN], rows, strict=False)}  # fmt: skip
    expected = [([seen[value] for value in values] + [0] * MAX_LEN)[:MAX_LEN] for values in table["history"]]
    assert train.sequences["history"].tolist() == expected
    assert max(seen.values()) < num_rows


@pytest.mark.parametrize("model", quality.MODELS)
def test_a_model_is_that_of_flowps(model: str):
    """The same layers; and with weights that depend on their shapes alone the same logits."""
    is_din = model == "din"
    spec = ModelSpec.of(NAMES, [DIM] * 4, 0, max_lens=[0, 0, 0, MAX_LEN * is_din], net=NET)
    pooled = NAMES[: 4 - is_din]
    random = np.random.default_rng(1)
    vectors = random.normal(size=(SIZE, len(pooled), DIM)).astype(np.float32)
    lengths = np.array([0, 1, 2, 3, 3], np.int32)[:, None]
    masks = np.arange(MAX_LEN) < lengths
    history = (random.normal(size=(SIZE, MAX_LEN, DIM)) * masks[:, :, None]).astype(np.float32)
    slots = [Slot(name="history", pooling="none", max_len=MAX_LEN)] if is_din else []
    plain = plain_keras.keras_model(model, NET, DIM, pooled, {slot.name: slot.max_len for slot in slots})
    ours = build(model, spec)
    ours_in = {"embeddings": vectors.reshape(SIZE, -1)}
    if is_din:
        ours_in = {"embeddings": np.hstack([vectors.reshape(SIZE, -1), history.reshape(SIZE, -1)]), "lengths": lengths}
    # Of lr there is a kernel for dense columns, too, which are none.
    used = [v for v in ours.trainable_variables if model != "lr" or v.shape == (1,)]
    assert sorted(tuple(v.shape) for v in plain.trainable_variables) == sorted(tuple(v.shape) for v in used)
    for variable in (*plain.trainable_variables, *ours.trainable_variables):
        variable.assign(np.random.default_rng(list(variable.shape)).normal(size=variable.shape))
    found = plain([vectors, {"history": history} if is_din else {}, {"history": masks} if is_din else {}])
    np.testing.assert_allclose(np.array(found), np.array(ours(ours_in))[:, 0], rtol=1e-4, atol=1e-4)


class Here:
    """A process that is this one."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_result(function(*arguments))
        return future


def test_what_is_there_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done, to = list[tuple[str, str, str]](), tmp_path / "quality.json"

    def test_auc(way: str, of: dict[str, list[str]]) -> float:
        done.append((of["model"][0], way, of["seed"][0]))
        return 0.8 + 0.001 * int(of["seed"][0]) - 0.0005 * (way == "async")

    monkeypatch.setattr(quality, "test_auc", test_auc)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    quality.measure({}, ["lr"], ["plain"], [1], to)
    result = quality.measure({}, ["lr", "dnn"], quality.WAYS, [1, 2], to)
    assert json.loads(to.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert len(done) == len(set(done)) == 2 * 3 * 2
    found = result["models"]["lr"]["ways"]
    assert found["plain"]["mean"] == pytest.approx(0.8015)
    assert (found["sync"]["above_plain"], found["async"]["above_plain"]) == (0, pytest.approx(-0.0005))
    assert "| `lr` | 0.8015 (0.8010–0.8020) | 0.8015 (0.8010–0.8020) | +0.0000 | 0.8010 (" in quality.markdown(result)
    monkeypatch.setattr(quality, "SETTINGS", {**quality.SETTINGS, "epochs": ["9"]})
    quality.measure({}, ["lr"], ["plain"], [1], to)
    assert len(done) == 13


def test_orders_are_of_the_samples_of_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As they are, and in random orders in row groups of two sizes; what is there is not trained again."""
    seen, to = list[tuple[list[int], list[dict[str, Any]], str]](), tmp_path / "quality.json"

    def test_auc(way: str, of: dict[str, list[str]]) -> float:
        file = pq.ParquetFile(of["data.train"][0])
        sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        seen.append((sizes, file.read().to_pylist(), of["data.partition_rows"][0]))
        return 0.8 + 0.001 * len(sizes)

    monkeypatch.setattr(quality, "test_auc", test_auc)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(quality, "ORDERS", {"file": 0, "large": 2000, "small": 500})
    result = quality.measure_orders(folder, tmp_path, [1], to)
    assert quality.measure_orders(folder, tmp_path, [1], to) == json.loads(json.dumps(result))
    assert [sizes for sizes, _, _ in seen] == [[3000], [2000, 1000], [500] * 6]
    assert [rows for _, _, rows in seen] == ["4096", "2000", "500"]
    as_it_is, *random = [samples for _, samples, _ in seen]
    assert as_it_is == pq.read_table(folder / "train.parquet").to_pylist()
    for samples in random:
        assert samples != as_it_is
        assert sorted(map(str, samples)) == sorted(map(str, as_it_is))
    assert "| large | 2,000 | 0.8020 (0.8020–0.8020) |" in quality.orders(result)
    assert "| file | 3,000 | 0.8010" in quality.orders(result)
