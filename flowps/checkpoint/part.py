"""One shard's part of a checkpoint: arrays → Arrow files, one per section, and back.

The files are in Arrow's IPC format, not compressed: rows of floats hardly shrink, and the memory of the arrays goes to the
file as it is. Which sections there are and what they mean is the business of whoever gives the arrays.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flowps.checkpoint.file import USE_ANOTHER, FileEntry
from flowps.checkpoint.sink import Sink
from flowps.checkpoint.store import Store
from flowps.errors import CheckpointError, FlowpsError

_MAGIC_BYTES = 8  # what precedes the stream of batches in an Arrow file


@dataclass
class _Section:
    """A file that is being written."""

    sink: Sink
    writer: Any
    rows: int = 0


class PartWriter:
    """Writes sections to `<prefix>/<section>.arrow`, several side by side if need be. Used by one thread.

    Holds no more than the arrays of one call. All methods raise CheckpointError that names the file. As a context manager it
    removes in the end what `close` has not finished.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._open: dict[str, _Section] = {}

    def write(self, section: str, columns: Mapping[str, NDArray[Any]]) -> None:
        """Append arrays to a section, as one chunk that `read_section` will give back as it is.

        columns  numbers of any kind, of equal length; 1-D, or 2-D with any width; not copied if contiguous. Names, types and
                 widths are the same in every call for a section
        """
        batch = pa.record_batch({name: _to_arrow(values) for name, values in columns.items()})
        found = self._open.get(section)
        if found is None:
            sink = self._store.create(f"{self._prefix}/{quote(section, safe=' ')}.arrow")
            # The sink is known before anything is written to it, so that `abort` finds it.
            found = self._open[section] = _Section(sink, None)
            found.writer = pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema)
        found.writer.write_batch(batch)
        found.rows += batch.num_rows

    def close(self) -> list[FileEntry]:
        """Finish the files: they are there and stay there. In the order in which the sections were begun."""
        entries = []
        try:
            for name, section in self._open.items():
                section.writer.close()
                section.sink.commit()
                entries.append(section.sink.entry(name, section.rows))
        except BaseException:
            self.abort()
            raise
        self._open.clear()
        return entries

    def abort(self) -> None:
        """Remove what is unfinished. Raises nothing. Idempotent."""
        for section in self._open.values():
            section.sink.abort()
        self._open.clear()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


def read_section(store: Store, entry: FileEntry) -> Iterator[dict[str, NDArray[Any]]]:
    """The chunks that were written to a section, one after the other: column → array, read-only, each chunk in memory of its own.

    While one is looked at, a thread reads the next. The checksum is known, and a damaged file found, only at the end: what came
    before is worth something only if the iteration ends without an error. Raises CheckpointError that names the file.
    """
    with closing(_chunks(store, entry)) as chunks, ThreadPoolExecutor(1, "flowps-read") as reader:
        following = reader.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = reader.submit(next, chunks, None)
            yield chunk


def _chunks(store: Store, entry: FileEntry) -> Generator[dict[str, NDArray[Any]], None, None]:
    rows = 0
    with store.open(entry) as source:
        try:
            source.read(_MAGIC_BYTES)
            with pa.ipc.open_stream(pa.PythonFile(source, mode="r")) as reader:
                for batch in reader:
                    batch.validate()
                    rows += batch.num_rows
                    columns = {name: _to_numpy(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
                    yield columns
        except FlowpsError:
            raise
        except Exception as error:  # Arrow's, in many kinds, for a damaged file
            source.finish()
            text = " ".join(str(error).split())
            raise CheckpointError(f"{source.shown}: is no section of a checkpoint: {text}; {USE_ANOTHER}") from error
        source.finish()
    if rows != entry.rows:
        raise CheckpointError(f"{source.shown}: {rows:,} rows found, expected {entry.rows:,}; {USE_ANOTHER}")


def verify(store: Store, entries: Sequence[FileEntry], threads: int = 2) -> None:
    """Read all files and compare sizes and checksums, several files at once.

    Raises CheckpointError for the first of `entries` that is missing, truncated or damaged, or cannot be read.
    """

    def compare(entry: FileEntry) -> None:
        with store.open(entry) as source:
            source.finish()

    with ThreadPoolExecutor(threads, thread_name_prefix="flowps-verify") as pool:
        try:
            for _ in pool.map(compare, entries):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _to_arrow(values: NDArray[Any]) -> pa.Array:
    assert values.dtype.kind in "iuf", f"{values.dtype} is no type of a section"
    if values.ndim == 1:
        return pa.array(values)
    rows, width = values.shape
    flat = pa.array(values.reshape(-1))
    # Not `from_arrays`, which cannot tell how many rows there are if they are empty.
    return pa.FixedSizeListArray.from_buffers(pa.list_(flat.type, width), rows, [None], children=[flat])


def _to_numpy(column: pa.Array) -> NDArray[Any]:
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=True))
    return np.asarray(column.flatten().to_numpy(zero_copy_only=True)).reshape(len(column), column.type.list_size)
