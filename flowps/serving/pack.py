"""The rows that a run has left → the Parquet files of a bundle: sorted by sign, without the optimizer's state, in fewer bits.

    sign     uint64, ascending, none twice
    slot     string (dictionary): the same in all of a file, so that files can be put together
    weights  list<float32 | float16 | int8>[dim]
    scale    float32, of int8 only: weight = number · scale

Slot by slot: memory is bounded by the weights and signs of one slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flowps.batch import Float32, Uint64
from flowps.errors import BundleError, RunDirError
from flowps.ps.export import file_name
from flowps.serving.manifest import Dtype
from flowps.serving.quantize import DTYPES, Error, quantize

_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Packed:
    """What was written of a slot."""

    file: str
    rows: int
    size_bytes: int
    error: Error


def files_of(embeddings: Path) -> dict[str, list[Path]]:
    """Slot → its files in a run's `embeddings`, several where it was split over shards. Raises RunDirError."""
    found: dict[str, list[Path]] = {}
    for path in sorted(embeddings.glob("*.parquet")):
        metadata = _footer(path).schema.to_arrow_schema().metadata or {}
        if b"flowps.slot" not in metadata:
            raise RunDirError(f"{path}: does not say which slot its rows are of; is it a file of this run?")
        found.setdefault(metadata[b"flowps.slot"].decode(), []).append(path)
    return found


def pack(slot: str, dim: int, files: Sequence[Path], folder: Path, dtype: Dtype) -> Packed:
    """Write the rows of `slot`, of `dim` floats, to its file in `folder`.

    Raises RunDirError for files that do not fit together, BundleError for weights that `dtype` cannot hold, and OSError.
    """
    signs, weights = read_rows(files, dim)
    order = np.argsort(signs, kind="stable")
    signs = signs[order]
    twice = signs[1:][signs[1:] == signs[:-1]]
    if len(twice):
        raise RunDirError(
            f"{', '.join(map(str, files))}: slot {slot!r} has sign {int(twice[0])} more than once; are files of another run "
            "among them?"
        )
    path = folder / file_name(slot)
    error = Error()
    try:
        write_rows(path, slot, dim, dtype, ((signs[at], weights[order[at]]) for at in _blocks(len(signs))), error)
    except BundleError as refused:
        raise BundleError(f"slot {slot!r}: {refused}") from None
    return Packed(path.name, len(signs), path.stat().st_size, error)


def write_rows(
    path: Path, slot: str, dim: int, dtype: Dtype, blocks: Iterable[tuple[Uint64, Float32]], error: Error
) -> None:  # fmt: skip
    """Write blocks of rows, which are in order, and add to `error` what is lost. Raises BundleError and OSError."""
    weights = pa.list_(pa.from_numpy_dtype(DTYPES[dtype]), dim)
    fields = [("sign", pa.uint64()), ("slot", pa.dictionary(pa.int32(), pa.string())), ("weights", weights)]
    if dtype == "int8":
        fields.append(("scale", pa.float32()))
    schema = pa.schema(fields, metadata={"flowps.slot": slot, "flowps.dtype": dtype})
    # A dictionary holds each of the 256 numbers of an int8 in 8 bits; Parquet's plain encoding takes 32.
    coded = ["slot", "weights.list.element"] if dtype == "int8" else ["slot"]
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=coded, write_page_checksum=True) as writer:
        for signs, given in blocks:
            stored, scales = quantize(given, dtype)
            error.add(given, stored, scales)
            columns: list[Any] = [
                pa.array(signs), pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(signs), np.int32)), [slot]),
                pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), dim),
            ]  # fmt: skip
            if scales is not None:
                columns.append(pa.array(scales))
            writer.write_table(pa.table(columns, schema=schema))


def read_rows(files: Sequence[Path], dim: int) -> tuple[Uint64, Float32]:
    """The signs [n] and weights [n, dim] of a run's files of one slot, in no order. Raises RunDirError."""
    total = sum(_footer(path).num_rows for path in files)
    signs, weights = np.empty(total, np.uint64), np.empty((total, dim), np.float32)
    at = 0
    for path in files:
        for batch in _batches(path):
            if not len(batch):
                continue
            found = batch.column("weights")
            if batch.column("sign").type != pa.uint64() or found.type != pa.list_(pa.float32(), dim):
                raise RunDirError(f"{path}: weights are {found.type}, but schema.json says dim {dim}: is it a file of this run?")
            to = slice(at, at + len(batch))
            signs[to] = batch.column("sign").to_numpy()
            weights[to] = found.flatten().to_numpy().reshape(-1, dim)
            at += len(batch)
    return signs, weights


def check_parts(files: Mapping[str, Sequence[Path]]) -> None:
    """Raise RunDirError where a part of a split slot is missing: its files are named `….part-2-of-3.parquet`."""
    for slot, paths in files.items():
        for path in paths:
            _, found, of = path.name.removesuffix(".parquet").rpartition(".part-")
            parts = of.partition("-of-")[2]
            if found and parts.isdecimal() and len(paths) != int(parts):
                raise RunDirError(f"{path.parent}: slot {slot!r} was split into {parts} files, but {len(paths)} are there")


def _blocks(rows: int) -> Iterator[slice]:
    for at in range(0, rows, _BLOCK_ROWS):
        yield slice(at, at + _BLOCK_ROWS)


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunDirError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(_BLOCK_ROWS, columns=["sign", "weights"])
    except (OSError, pa.ArrowInvalid) as error:
        raise RunDirError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
