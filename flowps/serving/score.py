"""`Scorer`: rows → predictions, from a bundle alone.

The hub's code hashes and the shard's kernel pools, so that a prediction is what the trained model gives; the dense model is the
bundle's SavedModel. TensorFlow is imported when a bundle is loaded, Dask never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowps.batch import Batch, Float32, Int32
from flowps.errors import ModelError
from flowps.hub import decode as hub
from flowps.hub.schema import Schema
from flowps.ps.kernels import pool as kernels
from flowps.serving.columns import conform
from flowps.serving.manifest import BundleSlot, Manifest
from flowps.serving.rows import Rows, Tables, load_tables

_CHUNK_ROWS = 4096
_POOLING = {"sum": kernels.SUM, "mean": kernels.MEAN, "sqrtn": kernels.SQRTN, "none": kernels.NONE}


def load(path: str | Path, verify: bool = False) -> Scorer:
    """The live version of the bundle in folder `path`, or the version that `path` itself is (`OUT/3`), in memory.

    verify   compare the files' checksums too, not only their sizes

    Raises BundleError for a folder that is no bundle, is damaged, or was hashed in another way.
    """
    from flowps.serving.model import load_model  # here: TensorFlow takes seconds to import

    tables = load_tables(Path(path), verify)
    return Scorer(tables, load_model(tables.version.folder, tables.manifest))


class Scorer:
    """Scores rows. Any thread may call any method; nothing is changed by it.

    model   inputs by name → logits [n, labels]
    """

    def __init__(self, tables: Tables, model: Callable[[dict[str, Any]], Float32]) -> None:
        self._tables, self._model = tables, model
        manifest = tables.manifest
        dense = manifest.dense
        self._schema = Schema("", dense.columns, tuple(slot.settings for slot in manifest.slots), {}, {})
        self._dense = hub.Dense(dense.fill, dense.log1p)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._tables.manifest

    @property
    def version(self) -> int:
        """Of the bundle."""
        return self._tables.version.number

    def score(self, rows: Any) -> Float32:
        """Probabilities, float32 [n]; of a bundle with several labels [n, labels].

        rows   a pyarrow.Table, a data frame of pandas or polars, a dict of columns, or a list of dicts; labels are not needed, and
               other columns may be there. In a list of dicts a key that is missing in one row is null.

        Raises SchemaError for columns that are missing or of another type, DataError for values that training would refuse, and
        ModelError when a logit is NaN or infinite.
        """
        logits = self.logits(rows)
        small = np.exp(-np.abs(logits))  # never overflows
        return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)

    def logits(self, rows: Any) -> Float32:
        """What `score` is the sigmoid of, in the same shape."""
        found = np.concatenate([np.empty((0, len(self.manifest.labels)), np.float32), *self._chunks(conform(rows, self.manifest))])
        if not np.isfinite(found).all():
            row = int(np.argmax(~np.isfinite(found).all(axis=1)))
            raise ModelError(f"row {row}: the prediction is NaN or infinite: look for very large values in its dense columns")
        return found[:, 0] if found.shape[1] == 1 else found

    def _chunks(self, table: pa.Table) -> Iterator[Float32]:
        for at in range(0, table.num_rows, _CHUNK_ROWS):
            chunk = table.slice(at, _CHUNK_ROWS)
            columns = hub.decode(chunk, self._schema, self._dense, "rows to score", at, labelled=False)
            yield self._model(self._inputs(hub.cut(columns, None, [0, chunk.num_rows])[0]))

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        values = {"embeddings": embeddings(batch, self._tables), "dense_columns": batch.dense, "lengths": self._lengths(batch)}
        return {tensor.name: values[tensor.name] for tensor in self.manifest.inputs}

    def _lengths(self, batch: Batch) -> Int32:
        """How many vectors each slot with pooling none has in each sample, int32 [n, such slots]."""
        of = [(s, slot.max_len) for s, slot in enumerate(self.manifest.slots) if slot.pooling == "none"]
        found = np.empty((batch.size, len(of)), np.int32)
        for k, (s, max_len) in enumerate(of):
            found[:, k] = np.minimum(np.diff(batch.offsets[s * batch.size : (s + 1) * batch.size + 1]), max_len)
        return found


def embeddings(batch: Batch, tables: Tables) -> Float32:
    """The pooled vectors of all slots side by side, float32 [n, width], as a shard gives them."""
    out = np.empty((batch.size, tables.manifest.width), np.float32)
    for s, slot in enumerate(tables.manifest.slots):
        _pool(tables.rows[slot.name], slot, s, batch, out)
    return out


def _pool(rows: Rows, slot: BundleSlot, position: int, batch: Batch, out: Float32) -> None:
    """Write slot number `position` to its columns of `out`: by the shard's kernel, over the rows that the batch has."""
    size = batch.size
    signs = batch.signs[batch.offsets[position * size] : batch.offsets[(position + 1) * size]]
    distinct, places = np.unique(signs, return_inverse=True)
    found, _ = rows.read(distinct)
    # The types are those of the shard's own call: numba then takes the code that it has compiled for that.
    kernels.pool(
        places.astype(np.int32), np.zeros(1, np.int64), np.empty(0, np.float32) if batch.shares is None else batch.shares,
        batch.offsets, np.array([position], np.int64), size, np.int64(0), np.int64(size),
        np.array([_POOLING[slot.pooling]], np.int32), np.array([slot.max_len], np.int64), found.reshape(-1), slot.dim, slot.dim, 1,
        out.reshape(-1), out.shape[1], np.array([slot.column], np.int64), False,
    )  # fmt: skip
