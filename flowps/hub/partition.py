"""Sample files → partitions: what there is to read, and reading one of it as an Arrow table.

Covers listing (paths, globs, directories with hive keys, any fsspec URL), the files' footers, and the order of partitions in
an epoch. Does not look at values (decode) and does not run tasks (stream).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from flowps.errors import DataError, SchemaError
from flowps.hub.schema import HIVE_TYPE, check_same, matches

_FOOTER_THREADS = 16  # footers are small and far away: latency, not bandwidth
# Up to about a third of the values are distinct: decoding and hashing each of them once is faster then, else slower. A million
# samples of `criteo` are read and decoded in two thirds of the time (`python -m bench.stages criteo`).
_REPEATING_BYTES = 5  # for a value, of dictionary and indices
_DICTIONARIES = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_HIVE_KEY = re.compile(r"([^/=]+)=([^/]*)/")


@dataclass(frozen=True)
class SampleFile:
    """One Parquet file and what its footer says.

    url            as fsspec opens it
    hive           key → value of all folders above it, also of those above the source that named it: a file has the same
                   columns whether one names it, its folder or a glob
    columns        name → Arrow type as read, hive keys included
    row_groups     rows of each row group
    values_per_row values of a row, those in lists counted, in the largest row group
    metadata       the file's key-value metadata
    digest         of the whole footer, with sizes and statistics of every column: what other samples hardly share
    """

    url: str
    hive: Mapping[str, str]
    columns: Mapping[str, pa.DataType]
    row_groups: tuple[int, ...]
    values_per_row: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    @property
    def num_rows(self) -> int:
        """Samples in the file."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class Partition:
    """Some neighbouring row groups of one file: what one hub task reads. `first_row` counts from the start of the file.

    skip   rows that come first in the order in which an epoch reads them, and are left out: they were trained before
    """

    url: str
    row_groups: tuple[int, ...]
    first_row: int
    num_rows: int
    hive: tuple[tuple[str, str], ...] = ()
    skip: int = 0

    @property
    def rows_left(self) -> int:
        """Rows that are read."""
        return self.num_rows - self.skip


def list_files(
    sources: Sequence[str], knob: str, exclude: Sequence[str] = (), only: Collection[str] | None = None, allow_empty: bool = False
) -> list[SampleFile]:  # fmt: skip
    """The Parquet files that `sources` (paths, globs, directories, fsspec URLs) name, in a stable order, footers read.

    Raises DataError, naming `knob`, for a source that is not there or holds no Parquet, for a file that cannot be read, and, but
    with `allow_empty`, when there is no row in all; SchemaError when the files' columns differ, but for those that match a glob of
    `exclude`, and those that are not in `only`, if it is given.
    """
    found: dict[str, Mapping[str, str]] = {}
    for source in sources:
        found.update(_expand(source, knob))
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        files = list(pool.map(lambda item: _read_footer(*item), found.items()))
    for file in files[1:]:
        all_names = {**files[0].columns, **file.columns}
        names = [name for name in all_names if not matches(name, exclude) and (only is None or name in only)]
        check_same(files[0].columns, file.columns, names, file.url, files[0].url)
    if not allow_empty and not sum(file.num_rows for file in files):
        raise DataError(f"{knob}: {', '.join(sources)}: {len(files)} file(s), but no rows in them; nothing to read")
    return files


def partitions(files: Sequence[SampleFile], target_rows: int) -> list[Partition]:
    """Cut `files` into partitions: neighbouring row groups of a file joined up to `target_rows`; empty ones are passed over."""
    cut = []
    for file in files:
        hive = tuple((k, v) for k, v in file.hive.items())
        group: list[int] = []
        first_row = rows = at = 0
        for index, size in enumerate(file.row_groups):
            if group and rows + size > target_rows:
                cut.append(Partition(file.url, tuple(group), first_row, rows, hive))
                group, rows = [], 0
            if size:
                if not group:
                    first_row = at
                group.append(index)
                rows += size
            at += size
        if group:
            cut.append(Partition(file.url, tuple(group), first_row, rows, hive))
    return cut


def epoch_order(parts: Sequence[Partition], seed: int, epoch: int, shuffle: bool) -> list[Partition]:
    """The partitions in the order in which `epoch` reads them."""
    if not shuffle:
        return list(parts)
    return [parts[i] for i in np.random.default_rng([seed, epoch]).permutation(len(parts))]


def read_table(partition: Partition, columns: Sequence[str], strings: Collection[str] = ()) -> pa.Table:
    """The partition's `columns` (hive keys are filled in), read on the calling thread without the GIL.

    strings   columns of strings that come as dictionaries where they are stored so and repeat their values: nobody makes the
              strings of all rows then
    """
    hive = dict(partition.hive)
    stored = [name for name in columns if name not in hive]
    try:
        with _open(partition.url, lambda footer: _repeating(footer, partition.row_groups, strings)) as file:
            table = _read_row_groups(file, partition.row_groups, stored)
    except Exception as error:  # every object store has errors of its own
        raise DataError(f"{partition.url}: row groups {list(partition.row_groups)} cannot be read: {_one_line(error)}") from error
    if table.num_rows != partition.num_rows:
        raise DataError(
            f"{partition.url}: {table.num_rows} rows found where the footer promised {partition.num_rows}: the file changed"
        )
    for name in columns:
        if name in hive:
            value = None if hive[name] == _HIVE_NULL else hive[name]
            table = table.append_column(name, pa.repeat(pa.scalar(value, HIVE_TYPE), table.num_rows))
    return table


def _read_row_groups(file: pq.ParquetFile, row_groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Arrow cannot join lists of dictionaries of several row groups: they are read one by one, as lists of the values."""
    nested = {
        field.name: _plain(field.type) for field in file.schema_arrow if field.name in columns and _plain(field.type) != field.type
    }
    if not nested:
        return file.read_row_groups(list(row_groups), columns=list(columns), use_threads=False)
    groups = [file.read_row_group(i, columns=list(columns), use_threads=False) for i in row_groups]
    return pa.concat_tables(
        [group.cast(pa.schema([(field.name, nested.get(field.name, field.type)) for field in group.schema])) for group in groups]
    )


def _repeating(footer: pq.FileMetaData, row_groups: Sequence[int], names: Collection[str]) -> list[str]:
    """The columns that these row groups store as dictionaries, with few bytes for each value."""
    found = set(names)
    for group in map(footer.row_group, row_groups) if found else ():
        chunks = map(group.column, range(group.num_columns))
        found &= {
            chunk.path_in_schema
            for chunk in chunks
            if chunk.path_in_schema in found
            and _DICTIONARIES.intersection(chunk.encodings)
            and chunk.total_uncompressed_size <= _REPEATING_BYTES * chunk.num_values
        }
    return sorted(found)


def _plain(found: pa.DataType) -> pa.DataType:
    """The type as which a column is read: a list of dictionaries as a list of their values."""
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    return pa.large_list(found.value_type.value_type) if is_list and pa.types.is_dictionary(found.value_type) else found


def _expand(source: str, knob: str) -> dict[str, Mapping[str, str]]:
    """url → hive keys of every Parquet file that one source names."""
    if not source.strip():
        raise DataError(f"{knob}: a path is empty; give Parquet files, a glob, a directory or an fsspec URL")
    try:
        fs, path = fsspec.core.url_to_fs(source)
        if isinstance(fs, LocalFileSystem):
            path = os.path.normpath(path)  # one file, one spelling
        is_glob = any(c in path for c in "*?[") and not fs.exists(path)
        if is_glob:
            hits: list[str] = []
            for hit in sorted(fs.glob(path)):
                # A wildcard does not mean hidden names; a folder means the files below it.
                parts = zip(reversed(hit.split("/")), reversed(path.split("/")), strict=False)
                if not any(_is_hidden(part) and not _is_hidden(asked) for part, asked in parts):
                    hits += _find(fs, hit) if fs.isdir(hit) else [hit]
        elif fs.isdir(path):
            hits = _find(fs, path)
            if not hits:
                raise DataError(f"{knob}: {source}: the directory holds no .parquet file")
        else:
            hits = [path] if fs.exists(path) else []
    except DataError:
        raise
    except Exception as error:  # every object store has errors of its own
        raise DataError(f"{knob}: {source}: cannot be listed: {type(error).__name__}: {_one_line(error)}") from error
    if not hits:
        kind = "matches no file" if is_glob else "no such file or directory"
        raise DataError(f"{knob}: {source}: {kind}; give Parquet files, a glob, a directory or an fsspec URL")
    return {_url(fs, p, source): _hive_keys(p) for p in hits}


def _url(fs: Any, path: str, source: str) -> str:
    """How fsspec opens a path that was found below `source`."""
    if isinstance(fs, LocalFileSystem):
        return path
    first, chained, rest = source.partition("::")
    # In a chain like zip://part.parquet::s3://bucket/a.zip the path is that of the first link.
    return f"{first.partition('://')[0]}://{path}::{rest}" if chained and "://" in first else str(fs.unstrip_protocol(path))


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _find(fs: Any, folder: str) -> list[str]:
    """Parquet files below a folder, without hidden and underscored ones, as Spark and pyarrow skip them."""
    below = (p for p in fs.find(folder) if p.endswith((".parquet", ".pq")))
    return sorted(p for p in below if not any(_is_hidden(part) for part in p[len(folder) :].split("/") if part))


def _hive_keys(path: str) -> dict[str, str]:
    return {unquote(key): unquote(value) for key, value in _HIVE_KEY.findall(path)}


def _read_footer(url: str, hive: Mapping[str, str]) -> SampleFile:
    try:
        with _open(url) as file:
            footer = file.metadata
            schema = file.schema_arrow
            rows = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            values_per_row = _values_per_row(footer, rows)
            digest = _digest(footer)
    except FileNotFoundError:
        raise DataError(f"{url}: the file has gone since it was listed") from None
    except Exception as error:  # every object store has errors of its own
        raise DataError(f"{url}: not a readable Parquet file (not Parquet, or truncated): {_one_line(error)}") from error
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise SchemaError(f"{url}: more than one column is named {twice}; every column needs a name of its own: rename them")
    columns = dict.fromkeys(hive, HIVE_TYPE) | {f.name: _plain(f.type) for f in schema}
    metadata = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (footer.metadata or {}).items()}
    hive = {k: v for k, v in hive.items() if k not in schema.names}
    return SampleFile(url, hive, columns, rows, values_per_row + len(hive), metadata, digest)


def _digest(footer: pq.FileMetaData) -> str:
    written = io.BytesIO()
    footer.write_metadata_file(written)
    return hashlib.blake2b(written.getbuffer(), digest_size=16).hexdigest()


def _values_per_row(footer: pq.FileMetaData, rows: Sequence[int]) -> float:
    """Values per row in the largest row group: what lists hold is counted, not the lists."""
    if not any(rows):
        return 0.0
    largest = footer.row_group(max(range(len(rows)), key=rows.__getitem__))
    return sum(largest.column(i).num_values for i in range(largest.num_columns)) / largest.num_rows


@contextmanager
def _open(url: str, dictionaries: Callable[[pq.FileMetaData], list[str]] = lambda footer: []) -> Iterator[pq.ParquetFile]:
    """Local files through Arrow's own reader, which holds no GIL; everything else through fsspec.

    dictionaries   which columns of strings come as dictionaries
    Not mapped into memory: a file that somebody overwrites would end the process (SIGBUS) instead of the read.
    """
    fs, path = fsspec.core.url_to_fs(url)
    is_local = isinstance(fs, LocalFileSystem)
    # `fs` lives as long as the file: that of an archive closes the archive when it goes.
    source = path if is_local else fs.open(path, "rb")
    with pq.ParquetFile(source, pre_buffer=not is_local) as opened:
        names = dictionaries(opened.metadata)
        if not names:
            yield opened
            return
        with pq.ParquetFile(source, metadata=opened.metadata, read_dictionary=names, pre_buffer=not is_local) as again:
            yield again


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
