"""`PredictionFolder`: where predictions go: a Parquet file for each file that is scored, in the same folders below.

Covers names, what is there already, who scores which file, and writing: a file is written beside and appears when it is whole. On a
disk that is a rename; an object store shows an object when it has all of it. A file says in its metadata what it was made from, so
that one of another model is not taken for done.
"""

from __future__ import annotations

import posixpath
import re
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from flowps.batch import Float32
from flowps.cluster.scoring import Share
from flowps.errors import OutputError
from flowps.hub.partition import Partition, SampleFile, partitions

_DONE = "_SUCCESS"  # as Spark writes it, for whoever waits for all of it
_HIVE_FOLDER = re.compile(r"(^|/)[^/=]+=[^/]*")
_FROM, _DIGEST, _ROWS = "flowps.source", "flowps.source_digest", "flowps.rows"
_CHECKPOINT, _COLUMNS = "flowps.checkpoint", "flowps.columns"


@dataclass(frozen=True)
class PredictionFolder:
    """The folder `url`, a path or an fsspec URL, with predictions of `checkpoint`.

    labels          that are predicted
    columns         copied beside
    partition_rows  how files are cut into partitions; each is a row group
    """

    url: str
    checkpoint: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    partition_rows: int

    def prepare(self, files: Sequence[SampleFile], overwrite: bool) -> list[SampleFile]:
        """The files that are still to be scored. Raises OutputError where the folder cannot be used, or has other predictions."""
        twice = sorted({*self._names()} & {*self.columns})
        if twice:
            raise OutputError(f"--columns: {twice[0]!r} is what a column of predictions is called; leave it out, or rename it")
        names = self._paths(files)
        fs, root = self._opened()
        sources = {fsspec.core.url_to_fs(file.url)[1] for file in files}
        for name in names.values():
            if f"{root}/{name}" in sources:
                raise OutputError(f"OUT {self.url}: {name} is a file of DATA; choose another folder for the predictions")
        try:
            if fs.exists(f"{root}/schema.json") and fs.exists(f"{root}/config.toml"):
                raise OutputError(f"OUT {self.url}: is the directory of a run; choose another folder for the predictions")
            fs.makedirs(root, exist_ok=True)
            with suppress(FileNotFoundError):
                fs.rm_file(f"{root}/{_DONE}")
        except OutputError:
            raise
        except (FileExistsError, NotADirectoryError):
            raise OutputError(f"OUT {self.url}: is a file; choose another folder for the predictions") from None
        except Exception as error:  # every object store has errors of its own
            raise OutputError(f"OUT {self.url}: cannot be written: {_said(error)}") from None
        for file in files:
            differs = self._differs(file, names[file.url])
            if differs and not overwrite:
                raise OutputError(
                    f"{self.url}: {names[file.url]} has other predictions ({differs}); choose another OUT, or replace them with "
                    "--overwrite (in Python overwrite=True)"
                )
            if differs:
                try:
                    fs.rm_file(f"{root}/{names[file.url]}")
                except Exception as error:
                    raise OutputError(f"{self.url}: {names[file.url]} cannot be replaced: {_said(error)}") from None
        for file in self.missing(files):
            if not file.num_rows:
                self._put_empty(file, names[file.url])
        return self.missing(files)

    def missing(self, files: Sequence[SampleFile]) -> list[SampleFile]:
        """The files that have no predictions yet."""
        fs, root = self._opened()
        names = self._paths(files)
        return [file for file in files if not fs.exists(f"{root}/{names[file.url]}")]

    def others(self, files: Sequence[SampleFile]) -> list[str]:
        """Parquet files below the folder that are not predictions of `files`: of other data, scored before, or somebody else's."""
        fs, root = self._opened()
        own = set(self._paths(files).values())
        found = (str(path)[len(root) + 1 :] for path in fs.find(root))
        return sorted(name for name in found if name.endswith((".parquet", ".pq")) and name not in own)

    def shares(self, count: int, files: Sequence[SampleFile]) -> list[Share]:
        """Files for each of `count` scorers, whole ones, about as many samples for each."""
        names = self._paths(files)
        of_scorers: list[list[SampleFile]] = [[] for _ in range(count)]
        for file in sorted(files, key=lambda file: -file.num_rows):
            min(of_scorers, key=lambda own: sum(of.num_rows for of in own)).append(file)
        return [
            Share(
                tuple(partitions(own, self.partition_rows)),
                partial(PredictionSink, self, {file.url: (names[file.url], file.num_rows, file.digest) for file in own}),
            )
            for own in of_scorers
        ]

    def finish(self) -> None:
        """Say that all predictions are there."""
        fs, root = self._opened()
        try:
            fs.touch(f"{root}/{_DONE}")
        except Exception as error:
            raise OutputError(f"OUT {self.url}: cannot be written: {_said(error)}") from None

    def metadata(self, source: str, rows: int, digest: str) -> dict[str, str]:
        """What a file says of itself."""
        return {_FROM: source, _DIGEST: digest, _ROWS: str(rows), _CHECKPOINT: self.checkpoint, _COLUMNS: "\n".join(self.columns)}

    def put(self, local: Path, name: str) -> None:
        """Let the file that was written to `local` appear as `name`."""
        fs, root = self._opened()
        path = f"{root}/{name}"
        try:
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
            if isinstance(fs, LocalFileSystem):
                unfinished = f"{posixpath.dirname(path)}/.{posixpath.basename(path)}.unfinished"
                fs.put_file(str(local), unfinished)
                Path(unfinished).rename(path)
            else:
                fs.put_file(str(local), path)
        except Exception as error:
            raise OutputError(f"{self.url}: {name} cannot be written: {_said(error)}") from None

    def _put_empty(self, file: SampleFile, name: str) -> None:
        """Write the predictions of a file without samples, of which there is no partition."""
        columns = pa.table({column: pa.array([], file.columns[column]) for column in self.columns})
        table = self.table(columns, np.empty((0, len(self.labels)), np.float32))
        with tempfile.TemporaryDirectory(prefix="flowps-predictions-") as scratch:
            path = Path(scratch) / "predictions.parquet"
            pq.write_table(table.replace_schema_metadata(self.metadata(file.url, 0, file.digest)), path)
            self.put(path, name)

    def _names(self) -> list[str]:
        """Of the columns of predictions."""
        return ["prediction"] if len(self.labels) == 1 else [f"prediction_{label}" for label in self.labels]

    def table(self, columns: pa.Table | None, logits: Float32) -> pa.Table:
        """What is written of a partition: logits [n] or [n, labels] as probabilities, float32."""
        found = {} if columns is None else {name: columns.column(name) for name in self.columns}
        with np.errstate(over="ignore"):  # the probability is 0 then
            probabilities = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        probabilities = probabilities.reshape(len(logits), len(self.labels))
        return pa.table({**found, **{name: probabilities[:, k] for k, name in enumerate(self._names())}})

    def _opened(self) -> tuple[Any, str]:
        try:
            fs, root = fsspec.core.url_to_fs(self.url)
        except Exception as error:
            raise OutputError(f"OUT {self.url}: {_said(error)}; give a path or an fsspec URL") from None
        return fs, str(root).rstrip("/")

    @staticmethod
    def _paths(files: Sequence[SampleFile]) -> dict[str, str]:
        """url → path of its predictions below the folder: what the files' own paths do not have in common, and all hive keys."""
        paths = {file.url: _path_of(file.url) for file in files}
        common = posixpath.commonprefix([posixpath.dirname(path) + "/" for path in paths.values()]).rpartition("/")[0]
        if hive := _HIVE_FOLDER.search(common):
            common = common[: hive.start()]
        return {url: path[len(common) :].lstrip("/") for url, path in paths.items()}

    def _differs(self, file: SampleFile, name: str) -> str:
        """What is other in predictions that are there already; "": nothing, or there are none."""
        fs, root = self._opened()
        path = f"{root}/{name}"
        if not fs.exists(path):
            return ""
        try:
            with fs.open(path, "rb") as opened:
                metadata = pq.ParquetFile(opened).metadata.metadata or {}
        except Exception as error:
            return f"it cannot be read: {_said(error)}"
        there = {key.decode(): value.decode(errors="replace") for key, value in metadata.items()}
        wanted = self.metadata(file.url, file.num_rows, file.digest)
        differ = [key for key, value in wanted.items() if there.get(key) != value]
        if differ and {*differ} <= {_DIGEST, _ROWS} and _DIGEST in there:
            return f"of {file.url} as it was before it was written anew"
        return "; ".join(f"{key} {_shown(there.get(key, 'none'))} there, {_shown(wanted[key])} now" for key in differ)


class PredictionSink(AbstractContextManager["PredictionSink"]):
    """Writes the predictions of whole files, one after the other.

    names   url of each file → the name of its predictions, how many samples it has, and its digest
    """

    def __init__(self, folder: PredictionFolder, names: dict[str, tuple[str, int, str]]) -> None:
        self._folder, self._names = folder, names
        self._scratch = tempfile.TemporaryDirectory(prefix="flowps-predictions-")
        self._path = Path(self._scratch.name) / "predictions.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._rows = self._samples = 0

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            with suppress(Exception):  # the error that ends scoring is the one to show
                self._writer.close()
        self._scratch.cleanup()

    def take(self, partition: Partition, columns: pa.Table | None, labels: Float32, logits: Float32) -> None:
        """See Sink. Raises OutputError."""
        name, rows, digest = self._names[partition.url]
        table = self._folder.table(columns, logits)
        try:
            if self._writer is None:
                schema = table.schema.with_metadata(self._folder.metadata(partition.url, rows, digest))
                self._writer, self._rows = pq.ParquetWriter(self._path, schema, compression="zstd"), 0
            self._writer.write_table(table.cast(self._writer.schema), row_group_size=max(1, table.num_rows))
            self._rows += table.num_rows
            if self._rows < rows:
                return
            writer, self._writer = self._writer, None
            writer.close()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror or error}; is the disk full? (TMPDIR)") from None
        self._folder.put(self._path, name)
        self._samples += rows

    def result(self) -> int:
        """How many samples were written."""
        return self._samples


def _path_of(url: str) -> str:
    """Where a file is, as a path: of a member of an archive, below the archive."""
    inner, chained, outer = url.partition("::")
    return f"{outer}/{inner.partition('://')[2]}" if chained else url


def _shown(value: str) -> str:
    """A value of the metadata in one line."""
    return repr(value.replace("\n", ", "))


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())[:200]
