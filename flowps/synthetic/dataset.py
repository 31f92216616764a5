"""Writes a synthetic data set to a directory of Parquet files, or finds it there already.

Covers: the layout on disk, its metadata, reuse, and what an interruption leaves behind. Does not cover: what the
examples are (`truth`). Called by the command and by examples, benchmarks and tests. One process at a time may generate
into a directory.

    OUT_DIR/train-00000.parquet ...  a few row groups each, in the order of the chunks
    OUT_DIR/test-00000.parquet       its key-value metadata: flowps.workload, flowps.best_auc, flowps.best_logloss
    OUT_DIR/dataset.json             description, versions and figures; written last, so its presence means: complete
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from flowps.errors import ConfigError, DataError, StoppedError
from flowps.synthetic.description import Description
from flowps.synthetic.truth import DoubleArray, GroundTruth, Split, chunk_rows, rank_auc

# Raised whenever the same description would give other bytes than before.
FORMAT = "flowps.synthetic/1"
_SUMMARY = "dataset.json"
_WORKLOAD_KEY = b"flowps.workload"
_KEYS = {"description", "files_bytes", "train_label_rate", "test_label_rate", "best_auc", "best_logloss"}
_PARQUET_NAME = re.compile(r"(train|test)-\d{5,}\.parquet")
_PARTIAL_NAME = re.compile(r"\.((train|test)-\d{5,}\.parquet|dataset\.json)\.partial")
_ROW_GROUPS_PER_FILE = 4
# Each thread holds one row group and what Parquet has encoded of it.
_MAX_THREADS = 4


@dataclass(frozen=True)
class Dataset:
    """A complete data set on disk.

    `best_auc` and `best_logloss` are those of the true probabilities on the test rows: no model can be expected to do
    better. `reused`: it was there already.
    """

    directory: Path
    description: Description
    train_files: tuple[Path, ...]
    test_files: tuple[Path, ...]
    size_bytes: int
    train_label_rate: float
    test_label_rate: float
    best_auc: float
    best_logloss: float
    reused: bool


def generate(
    description: Description,
    out_dir: str | os.PathLike[str],
    rows: int | None = None,
    test_rows: int | None = None,
    seed: int | None = None,
    *,
    threads: int | None = None,
) -> Dataset:
    """Write the data set `description` to `out_dir`, or return what is there if it is exactly that, complete.

    `rows`, `test_rows` and `seed` replace those of the description. `threads` (by default one per CPU, at most 4)
    changes the speed and the memory, never the data. An earlier data set of this module in `out_dir` is replaced.
    Raises ConfigError for sizes that make no sense, and DataError if `out_dir` cannot be written, holds files that
    are not from here, or if the test labels are all alike, so that they have no AUC.
    """
    description = replace(
        description,
        train_rows=description.train_rows if rows is None else rows,
        test_rows=description.test_rows if test_rows is None else test_rows,
        seed=description.seed if seed is None else seed,
    )
    if threads is not None and threads < 1:
        raise ConfigError(f"threads = {threads}; expected at least 1")
    directory = Path(out_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (found := _find(directory, description)) is not None:
            return found
        _clear(directory)
        return _write(directory, description, threads or min(os.cpu_count() or 1, _MAX_THREADS))
    except OSError as error:
        raise DataError(
            f"writing the data set '{description.name}' to {directory}: {error}; name a directory that can be written"
        ) from error


class _File(NamedTuple):
    name: str
    split: Split
    first_chunk: int
    sizes: list[int]  # rows of each of its row groups


class _Best(NamedTuple):
    auc: float
    logloss: float


def _files(description: Description, split: Split) -> list[_File]:
    rows = description.train_rows if split == "train" else description.test_rows
    sizes = chunk_rows(rows, description.row_group_rows)
    # The test rows stay in one file: their best figures are known only after the last of them, and go into its footer.
    step = _ROW_GROUPS_PER_FILE if split == "train" else len(sizes)
    return [
        _File(f"{split}-{i:05}.parquet", split, first, sizes[first : first + step])
        for i, first in enumerate(range(0, len(sizes), step))
    ]


def _write(directory: Path, description: Description, threads: int) -> Dataset:
    truth = GroundTruth(description)
    stop = threading.Event()
    (test_file,) = _files(description, "test")
    test_label_rate, best = _write_file(directory, test_file, truth, None, stop)
    train_files = _files(description, "train")
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(_write_file, directory, file, truth, best, stop) for file in train_files]
        try:
            # The first failure stops the other files, and is the one that is raised.
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        label_rates = [job.result()[0] for job in jobs]

    names = [test_file.name, *(file.name for file in train_files)]
    sizes_bytes = {name: (directory / name).stat().st_size for name in names}
    content = {
        "format": FORMAT,
        "description": asdict(description),
        "versions": {"numpy": np.__version__, "pyarrow": pa.__version__, "python": platform.python_version()},
        "files_bytes": sizes_bytes,
        "train_label_rate": float(np.average(label_rates, weights=[sum(file.sizes) for file in train_files])),
        "test_label_rate": test_label_rate,
        "best_auc": best.auc,
        "best_logloss": best.logloss,
    }
    partial = _partial(directory / _SUMMARY)
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, directory / _SUMMARY)
    return _dataset(directory, description, content, reused=False)


def _write_file(directory: Path, file: _File, truth: GroundTruth, best: _Best | None, stop: threading.Event) -> tuple[float, _Best]:
    """Write one file, a row group at a time. Returns its label rate and `best`, or its own best figures for None."""
    path = directory / file.name
    partial = _partial(path)
    labels: list[npt.NDArray[np.int8]] = []
    probabilities: list[DoubleArray] = []
    try:
        with pq.ParquetWriter(partial, truth.schema, compression="snappy", store_schema=False) as writer:
            for chunk, size in enumerate(file.sizes, start=file.first_chunk):
                if stop.is_set():
                    raise StoppedError(f"generating {path}: stopped")
                table, probability = truth.examples(file.split, chunk, size)
                writer.write_table(table, row_group_size=size)
                labels.append(table["label"].to_numpy())
                probabilities.append(probability)
            if best is None:
                best = _best_figures(np.concatenate(labels), np.concatenate(probabilities))
            figures = {"flowps.best_auc": repr(best.auc), "flowps.best_logloss": repr(best.logloss)}
            writer.add_key_value_metadata({_WORKLOAD_KEY.decode(): truth.description.name, **figures})
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return float(np.concatenate(labels).mean()), best


def _best_figures(labels: npt.NDArray[np.int8], probability: DoubleArray) -> _Best:
    auc = rank_auc(probability, labels)
    if np.isnan(auc):
        raise DataError(f"test_rows = {len(labels)}: all their labels are {labels[0]}, so no AUC exists; ask for more")
    certain = np.finfo(np.float64).eps
    probability = np.clip(probability, certain, 1 - certain)
    return _Best(auc, -float(np.where(labels == 1, np.log(probability), np.log1p(-probability)).mean()))


def _partial(path: Path) -> Path:
    # Hidden, so that a reader listing *.parquet never sees a file that is still being written.
    return path.with_name(f".{path.name}.partial")


def _find(directory: Path, description: Description) -> Dataset | None:
    """The data set in `directory` if it is complete and has this very description."""
    content = _read_summary(directory)
    if content is None or content.get("description") != json.loads(json.dumps(asdict(description))):
        return None
    sizes_bytes: Mapping[str, int] = content["files_bytes"]
    for name, size_bytes in sizes_bytes.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size_bytes:
            return None
    return _dataset(directory, description, content, reused=True)


def _dataset(directory: Path, description: Description, content: Mapping[str, Any], *, reused: bool) -> Dataset:
    names = sorted(content["files_bytes"])
    return Dataset(
        directory=directory,
        description=description,
        train_files=tuple(directory / name for name in names if name.startswith("train-")),
        test_files=tuple(directory / name for name in names if name.startswith("test-")),
        size_bytes=sum(content["files_bytes"].values()),
        train_label_rate=content["train_label_rate"],
        test_label_rate=content["test_label_rate"],
        best_auc=content["best_auc"],
        best_logloss=content["best_logloss"],
        reused=reused,
    )


def _read_summary(directory: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((directory / _SUMMARY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.keys() >= _KEYS:
        return None
    return content


def _clear(directory: Path) -> None:
    """Remove an earlier data set, complete or not. Refuses, touching nothing, if there is anything else."""
    entries = sorted(directory.iterdir())
    known: Mapping[str, int] = (_read_summary(directory) or {}).get("files_bytes", {})
    if foreign := [entry.name for entry in entries if entry.name not in known and not _is_ours(entry)]:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise DataError(
            f"{directory} holds files that are not from a synthetic data set ({', '.join(foreign[:3])}{more}); "
            "name a new or empty directory"
        )
    # The summary goes first: from here on the directory is not a data set.
    for entry in sorted(entries, key=lambda entry: entry.name != _SUMMARY):
        entry.unlink()


def _is_ours(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    if path.name == _SUMMARY:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
        return isinstance(content, dict) and str(content.get("format")).startswith("flowps.synthetic/")
    if _PARQUET_NAME.fullmatch(path.name):
        try:
            return _WORKLOAD_KEY in (pq.read_metadata(path).metadata or {})
        except (pa.ArrowInvalid, OSError):
            return False
    return _PARTIAL_NAME.fullmatch(path.name) is not None
