"""Rows → Parquet, one file per slot: `sign` uint64, `weights` list<float32>[dim], `state` list<float32>[state width]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from itertools import chain, groupby
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from flowps.batch import Float32
from flowps.ps.shard import SlotRows

_LONGEST_NAME = 200  # bytes; file systems take 255, and there are endings to add


def export_rows(chunks: Iterable[SlotRows], folder: Path, parts: Mapping[str, str] = MappingProxyType({})) -> dict[str, int]:
    """Write each slot's rows to the file `file_name` in `folder` and return each slot's number of rows.

    `chunks` come slot by slot, as `Shard.rows` gives them. A file appears whole or not at all. The slot's name and pooling are in
    its metadata. Raises OSError where the files cannot be written.

    parts   for a slot that is split over several shards, what to add to its file's name
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, int] = {}
    for slot, of_slot in groupby(chunks, key=lambda chunk: chunk.slot):
        path = folder / file_name(slot.name, parts.get(slot.name, ""))
        found[slot.name] = 0
        unfinished = folder / f"{path.name}.unfinished"
        metadata = {"flowps.slot": slot.name, "flowps.pooling": slot.pooling}
        first = _table(next(of_slot), metadata)
        try:
            with pq.ParquetWriter(unfinished, first.schema, compression="zstd") as writer:
                for table in chain([first], (_table(chunk, metadata) for chunk in of_slot)):
                    writer.write_table(table)
                    found[slot.name] += table.num_rows
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return found


def file_name(slot: str, part: str = "") -> str:
    """`<slot, percent-encoded><part>.parquet`; of a name too long for a file its beginning and, so that all differ, a hash."""
    encoded = quote(slot, safe=" ")
    if len(encoded) > _LONGEST_NAME:
        encoded = f"{encoded[: _LONGEST_NAME - 33]}-{blake2b(slot.encode(), digest_size=16).hexdigest()}"
    return f"{encoded}{part}.parquet"


def _table(rows: SlotRows, metadata: dict[str, str]) -> pa.Table:
    columns = {"sign": rows.signs, "weights": _vectors(rows.weights), "state": _vectors(rows.state)}
    return pa.table(columns).replace_schema_metadata(metadata)


def _vectors(values: Float32) -> pa.Array:
    if not values.shape[1]:
        return pa.nulls(len(values), pa.list_(pa.float32()))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
