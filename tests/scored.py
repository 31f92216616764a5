"""Small runs to evaluate and predict with, and their predictions worked out by hand: numpy, Keras, and the published sign rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import flowps
from tests.hub.naive import sign

TRAIN_ROWS, TEST_ROWS = 600, 300
USERS, CITIES, TAGS = 20, ("Kyiv", "Oslo", "Łódź"), 9
SLOTS = [{"name": "city", "hash_size": 100}, {"name": "tags", "dim": 6, "pooling": "mean"}]


def columns_of(rows: int, seed: int = 0, users: int = USERS) -> dict[str, Any]:
    """Label, two dense columns, one of them with nulls, an id, a string and a list; the label depends on the id."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    spent = rng.normal(size=rows)
    return {
        "label": ((user % 2 == 0) ^ (rng.random(rows) < 0.2)).astype(np.int8),
        "price": rng.random(rows, np.float32),
        "spent": pa.array(spent, mask=rng.random(rows) < 0.1),
        "user": user,
        "city": [CITIES[k] for k in rng.integers(0, len(CITIES), rows)],
        "tags": [[f"t{t}" for t in rng.integers(0, TAGS, rng.integers(0, 4))] for _ in range(rows)],
    }


def other_columns(rows: int = TEST_ROWS, seed: int = 1) -> dict[str, Any]:
    """Of other samples, some of users that were not trained on, and a number for each, which no model knows."""
    return {**columns_of(rows, seed, USERS + 5), "request": np.arange(rows) + 1000 * seed}


def write(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> Path:
    """A Parquet file, in row groups of 100."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **{"row_group_size": 100, **options})
    return path


def config_of(train: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    """A short run; `more`: sections to add to, or knobs."""
    config: dict[str, Any] = {
        "run_dir": str(run_dir), "model": "dnn", "slot": SLOTS, "slot_default": {"dim": 4}, "net": {"hidden": [8]},
        "data": {"train": str(train), "batch_size": 32, "partition_rows": 100, "dense_fill": 0.5},
        "cluster": {"dashboard": ""}, "status": {"progress": "plain"}, "trainer": {"in_flight": 1},
    }  # fmt: skip
    for name, value in more.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return config


def train_run(folder: Path, console: Console | None = None, **more: Any) -> Path:
    """Train on `folder/train.parquet`, to be tested on `folder/test.parquet`; the run directory."""
    train = write(folder / "train.parquet", columns_of(TRAIN_ROWS))
    test = write(folder / "test.parquet", other_columns())
    more["data"] = {"test": str(test), **more.get("data", {})}
    flowps.train(config_of(train, folder / "run", **more), console)
    return folder / "run"


def main_words(*words: object) -> list[str]:
    """For a command's `main`."""
    return [str(word) for word in words]


# --- by hand ----------------------------------------------------------------------------------------------------------


def embedding_rows(run_dir: Path, slot: str) -> dict[int, np.ndarray]:
    """Sign → weights."""
    found: dict[int, np.ndarray] = {}
    for path in (run_dir / "embeddings").glob(f"{slot}*.parquet"):
        table = pq.read_table(path, columns=["sign", "weights"])
        found.update(zip(table["sign"].to_pylist(), np.array(table["weights"].to_pylist(), np.float32), strict=True))
    return found


def inputs_by_hand(run_dir: Path, samples: pa.Table) -> dict[str, np.ndarray]:
    """What the dense model gets: of every slot the pooled rows, zeros for signs without one; and the dense columns."""
    schema = json.loads((run_dir / "schema.json").read_text())
    pooled = []
    for slot in schema["slots"]:
        rows, name = embedding_rows(run_dir, slot["name"]), slot["name"]
        for cell in samples[name].to_pylist():
            values = [value for value in (cell if isinstance(cell, list) else [cell]) if value is not None]
            found = [rows.get(sign(value, name, slot["hash_size"]), np.zeros(slot["dim"], np.float32)) for value in values]
            whole = np.sum(found, axis=0) if found else np.zeros(slot["dim"], np.float32)
            pooled.append(whole / len(found) if found and slot["pooling"] == "mean" else whole)
    count, dims = samples.num_rows, [slot["dim"] for slot in schema["slots"]]
    of_slots = [np.stack(pooled[k * count : (k + 1) * count]).reshape(count, dim) for k, dim in enumerate(dims)]
    dense = [[0.5 if value is None else value for value in samples[name].to_pylist()] for name in schema["dense"]]
    return {"embeddings": np.hstack(of_slots).astype(np.float32), "dense_columns": np.array(dense, np.float32).T}


def by_hand(run_dir: Path, samples: pa.Table, negative_rate: float = 1.0) -> np.ndarray:
    """Probabilities from RUN/embeddings and RUN/model.keras, [samples] or [samples, labels]."""
    import keras

    model = keras.models.load_model(run_dir / "model.keras", compile=False)
    logits = np.asarray(model(inputs_by_hand(run_dir, samples)), np.float64) + math.log(negative_rate)
    found: np.ndarray = 1 / (1 + np.exp(-logits))
    return found[:, 0] if found.shape[1] == 1 else found


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files below a folder: when they were written, and what is in them."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
