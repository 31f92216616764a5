"""`Rows`: the rows of one slot of a bundle in memory, found by sign; and `Tables`: those of all slots.

Signs are kept sorted and searched; weights stay as they are stored, and only those that are read become float32. Nothing is ever
changed, so any thread may read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flowps.batch import Float32, Uint64
from flowps.errors import BundleError
from flowps.serving import manifest as files
from flowps.serving.bundle import Version, open_version
from flowps.serving.manifest import BundleSlot, Manifest
from flowps.serving.quantize import DTYPES, dequantize
from flowps.serving.vectors import check_vectors

_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Rows:
    """signs uint64 [n], ascending; weights [n, dim] as stored; scales float32 [n], or None."""

    signs: Uint64
    weights: NDArray[Any]
    scales: Float32 | None

    @property
    def dim(self) -> int:
        """Floats of a row."""
        return self.weights.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(array.nbytes for array in (self.signs, self.weights, self.scales) if array is not None)

    def read(self, signs: Uint64) -> tuple[Float32, int]:
        """The weights of `signs`, float32 [len(signs), dim], zeros for signs without a row; and how many those are."""
        if not len(self.signs):
            return np.zeros((len(signs), self.dim), np.float32), len(signs)
        places = np.searchsorted(self.signs, signs)
        np.minimum(places, len(self.signs) - 1, out=places)
        unknown = self.signs[places] != signs
        found = dequantize(self.weights[places], None if self.scales is None else self.scales[places])
        num_unknown = int(np.count_nonzero(unknown))
        if num_unknown:
            found[unknown] = 0
        return found, num_unknown


@dataclass(frozen=True)
class Tables:
    """The rows of all slots of one version of a bundle."""

    version: Version
    rows: Mapping[str, Rows]

    @property
    def manifest(self) -> Manifest:
        """Of that version."""
        return self.version.manifest

    @property
    def num_rows(self) -> int:
        """Of all slots."""
        return sum(len(rows.signs) for rows in self.rows.values())

    @property
    def nbytes(self) -> int:
        """Memory of all slots."""
        return sum(rows.nbytes for rows in self.rows.values())


def load_tables(path: Path, verify: bool = False) -> Tables:
    """The rows of the live version of the bundle in `path`; `verify`: the files' checksums too.

    Raises BundleError for a bundle that is damaged, or whose signs are not those of this flowps.
    """
    version = open_version(path, verify)
    check_vectors(version.folder, [slot.settings for slot in version.manifest.slots])
    return Tables(version, MappingProxyType({slot.name: read_slot(version.folder, slot) for slot in version.manifest.slots}))


def read_slot(folder: Path, slot: BundleSlot) -> Rows:
    """The rows of one slot of the version in `folder`. Raises BundleError."""
    path = folder / files.EMBEDDINGS / slot.file
    try:
        rows = _read(path, slot)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise BundleError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; copy the bundle again, or export again"
        ) from None
    if not (rows.signs[1:] > rows.signs[:-1]).all():
        raise BundleError(f"{path}: its signs are not in ascending order: is it a file of this bundle?")
    return rows


def _read(path: Path, slot: BundleSlot) -> Rows:
    signs, weights = np.empty(slot.rows, np.uint64), np.empty((slot.rows, slot.dim), DTYPES[slot.dtype])
    scales = np.empty(slot.rows, np.float32) if slot.dtype == "int8" else None
    columns = ["sign", "weights", *(["scale"] if scales is not None else [])]
    at = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        found = file.schema_arrow.field("weights").type
        wanted = pa.list_(pa.from_numpy_dtype(weights.dtype), slot.dim)
        if file.metadata.num_rows != slot.rows or found != wanted:
            raise BundleError(
                f"{path}: {file.metadata.num_rows:,} rows of {found}, not {slot.rows:,} rows of {wanted}; export again"
            )
        for batch in file.iter_batches(_BLOCK_ROWS, columns=columns):
            to = slice(at, at + len(batch))
            signs[to] = batch.column("sign").to_numpy()
            weights[to] = batch.column("weights").flatten().to_numpy().reshape(-1, slot.dim)
            if scales is not None:
                scales[to] = batch.column("scale").to_numpy()
            at += len(batch)
    return Rows(signs, weights, scales)
