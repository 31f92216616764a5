"""A small run with every kind of slot, its predictions worked out by hand, and bundles without a model for what only looks up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from flowps.batch import Float32
from flowps.config import Slot
from flowps.knob import load
from flowps.serving.bundle import Version, publication
from flowps.serving.manifest import EMBEDDINGS, BundleSlot, Dense, Dtype, Manifest, list_files, tensor, write_manifest
from flowps.serving.pack import write_rows
from flowps.serving.quantize import Error
from flowps.serving.vectors import write_vectors
from flowps.train import train

TOML = """\
[data]
batch_size = 64
log1p = true
dense_fill = 0.5
[net]
hidden = [16]
[cluster]
dashboard = ""
[slot_default]
dim = 4
learning_rate = 0.2
[[slot]]
name = "tags"
pooling = "mean"
weights = "tag_weights"
dim = 8
[[slot]]
name = "history"
pooling = "none"
max_len = 3
dim = 5
[[slot]]
name = "city"
pooling = "sqrtn"
storage = "bfloat16"
hash_size = 4
[[slot]]
name = "words"
pooling = "sqrtn"
weights = "word_weight"
[[slot]]
name = "seen"
pooling = "mean"
dim = 16
"""


def columns(rows: int, seed: int = 0, users: int = 50) -> pa.Table:
    """Samples with nulls, empty lists, null lists, weights, and values of every type."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    tags = [None if i % 17 == 3 else [f"t{t}" for t in rng.integers(0, 9, rng.integers(0, 5))] for i in range(rows)]
    seen = [[None if x == 7 else int(x) for x in rng.integers(0, 20, rng.integers(0, 6))] for _ in range(rows)]
    return pa.table(
        {
            "label": ((user % 5 == 0) ^ (rng.random(rows) < 0.1)).astype(np.int8),
            "price": pa.array([None if x < 0.1 else x * 9 - 3 for x in rng.random(rows)], pa.float32()),
            "age": pa.array(rng.random(rows)),
            "user": user,
            "tags": pa.array(tags, pa.list_(pa.string())),
            "tag_weights": pa.array([None if t is None else list(map(float, rng.random(len(t)))) for t in tags]),
            "history": [[int(x) for x in rng.integers(-9, 9, rng.integers(0, 6))] for _ in range(rows)],
            "city": pa.array([None if x == 6 else f"Ort-{x}-ß" for x in rng.integers(0, 7, rows)]).dictionary_encode(),
            "words": pa.array([None if x > 4 else "ab" * int(x) for x in rng.integers(0, 6, rows)]),
            "word_weight": rng.random(rows, np.float32),
            "seen": pa.array(seen, pa.large_list(pa.int32())),
            "mobile": pa.array([bool(x) for x in rng.integers(0, 2, rows)]),
        }
    )


def make_run(folder: Path) -> Path:
    """Train a little on `columns`; returns the run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns(1000), folder / "train.parquet", row_group_size=300)
    (folder / "run.toml").write_text(TOML)
    files = [str(folder / "train.parquet")]
    overrides = [("data.train", files), ("data.test", files), ("run_dir", [str(folder / "run")])]
    train(load(folder / "run.toml", overrides))
    return folder / "run"


# --- by hand ----------------------------------------------------------------------------------------------------------------


def sign(value: str | int, slot: str, hash_size: int = 0) -> int:
    """As docs/hashing.md has it, by another implementation of xxh64."""
    seed = xxhash.xxh64_intdigest(slot.encode())
    data = value.encode() if isinstance(value, str) else (int(value) % 2**64).to_bytes(8, "little")
    found = xxhash.xxh64_intdigest(data, seed=seed)
    return xxhash.xxh64_intdigest((found % hash_size).to_bytes(8, "little"), seed=seed) if hash_size else found


def inputs_by_hand(run: Path, table: pa.Table, slots: Sequence[Slot], fill: float = 0.5) -> dict[str, Any]:
    """What the model of a run of `columns` takes, from the rows as the run has left them, value by value."""
    pooled, lengths = [], []
    for slot in slots:
        found = pq.read_table(run / "embeddings" / f"{slot.name}.parquet").to_pydict()
        rows = dict(zip(found["sign"], np.array(found["weights"], np.float32), strict=True))
        weights = table.column(slot.weights).to_pylist() if slot.weights else [None] * table.num_rows
        bags = [_bag(slot, v, w, rows) for v, w in zip(table.column(slot.name).to_pylist(), weights, strict=True)]
        pooled.append(np.stack([_pool(slot, *bag) for bag in bags]))
        if slot.pooling == "none":
            lengths.append([min(len(bag[0]), slot.max_len) for bag in bags])
    dense = np.array([[fill if x is None else x for x in table.column(n).to_pylist()] for n in ("price", "age")], np.float32).T
    return {
        "embeddings": np.concatenate(pooled, axis=1).astype(np.float32),
        "dense_columns": (np.sign(dense) * np.log1p(np.abs(dense))).astype(np.float32),
        "lengths": np.array(lengths, np.int32).T,
    }


def _bag(slot: Slot, values: Any, weights: Any, rows: Mapping[int, Float32]) -> tuple[list[Float32], list[float]]:
    if values is None:
        return [], []
    values = values if isinstance(values, list) else [values]
    weights = [1.0] * len(values) if weights is None else weights if isinstance(weights, list) else [weights]
    pairs = [(sign(v, slot.name, slot.hash_size), w) for v, w in zip(values, weights, strict=True) if v is not None]
    return [rows.get(of, np.zeros(slot.dim, np.float32)) for of, _ in pairs], [w for _, w in pairs]


def _pool(slot: Slot, vectors: list[Float32], weights: list[float]) -> Float32:
    shares = np.array(weights, np.float64)
    if slot.pooling == "none":
        out = np.zeros((slot.max_len, slot.dim))
        for k, (vector, share) in list(enumerate(zip(vectors, shares, strict=True)))[: slot.max_len]:
            out[k] = vector * share
        return out.reshape(-1)
    if not vectors:
        return np.zeros(slot.dim)
    summed = sum(vector * share for vector, share in zip(vectors, shares, strict=True))
    by = {"sum": 1.0, "mean": shares.sum(), "sqrtn": np.sqrt((shares**2).sum())}[slot.pooling]
    return summed / by if by else np.zeros(slot.dim)


def sigmoid(logits: Any) -> Float32:
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


# --- bundles without a model ------------------------------------------------------------------------------------------------

ROWS = {"user": {0: [1.0, 2.0], 7: [3.0, 4.0], 2**63: [5.0, 6.0], 2**64 - 1: [-7.0, 8.0]}, "city": {5: [0.5, 0.25, 0.125]}}
DIMS = {"user": 2, "city": 3, "empty": 4}


def make_bundle(
    out: Path, rows: Mapping[str, Mapping[int, Sequence[float]]] = ROWS, factor: float = 1.0, dtype: Dtype = "float32",
    keep: int = 2,
) -> Version:  # fmt: skip
    """The next version of a bundle whose rows are `factor` times these, and whose model is no model; slots as in DIMS."""
    with publication(out) as publishing:
        folder = publishing.folder
        (folder / EMBEDDINGS).mkdir()
        (folder / "model.keras").write_bytes(b"no model")
        slots, column = [], 0
        for name, dim in DIMS.items():
            of_slot = dict(sorted(rows.get(name, {}).items()))
            path, error = folder / EMBEDDINGS / f"{name}.parquet", Error()
            weights = np.array(list(of_slot.values()), np.float32).reshape(-1, dim) * np.float32(factor)
            write_rows(path, name, dim, dtype, [(np.array(list(of_slot), np.uint64), weights)], error)
            slots.append(
                BundleSlot(
                    name=name, type="int64", is_list=False, values="integer", dim=dim, pooling="sum", max_len=1, hash_size=0,
                    weights="", column=column, rows=len(of_slot), file=path.name, size_bytes=path.stat().st_size, dtype=dtype,
                    max_error=error.most, relative_error=error.relative,
                )
            )  # fmt: skip
            column += dim
        write_vectors(folder, [slot.settings for slot in slots])
        manifest = Manifest(
            created=time.time(), run="by hand", steps=1, examples=1, test=None, labels=("label",), dense=Dense(),
            slots=tuple(slots), logit_shift=0.0, inputs=(tensor("embeddings", "float32", list(DIMS.items())),),
            output=tensor("output_0", "float32", [("label", 1)]), files=list_files(folder),
        )  # fmt: skip
        write_manifest(folder, manifest)
        return publishing.publish(keep)


def make_live(out: Path, number: int) -> None:
    """Name the live version, at once."""
    following = out / "current.unfinished"
    following.write_text(str(number))
    following.replace(out / "current")


def spoil(path: Path, at: int = -20) -> None:
    """Change one byte of a file, not its size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
