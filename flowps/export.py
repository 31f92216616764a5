"""Make a bundle for serving from a finished run: `python -m flowps.export RUN OUT [--dtype float16]`.

OUT gets a new version of the bundle: the dense model (Keras and TensorFlow SavedModel), the embedding rows of every slot as
Parquet, schema, hash with test vectors, and a manifest. It is verified before it becomes the live version; servers that watch OUT
then load it. With --dtype the rows are stored in fewer bits, and what that costs is printed for each slot.

    python -m flowps.export runs/ctr bundles/ctr
    python -m flowps.export runs/ctr bundles/ctr --dtype int8

Exit status: 0, or 1 for a directory that is no finished run's, or an OUT that cannot be written or is no bundle.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
from rich.console import Console
from rich.table import Table

from flowps import knob
from flowps.arguments import run_command
from flowps.config import Config, Slot
from flowps.errors import ConfigError, RunDirError
from flowps.hub.saved import kind_of
from flowps.run_record import Ending, read_run
from flowps.serving import manifest as files
from flowps.serving.bundle import Publication, Version, publication
from flowps.serving.manifest import BundleFile, BundleSlot, Dense, Dtype, Manifest, Quality, list_files, tensor, write_manifest
from flowps.serving.pack import Packed, check_parts, files_of, pack
from flowps.serving.vectors import RULE, check_seed, check_vectors, write_vectors
from flowps.status.lines import auc
from flowps.status.progress import PlainConsole

_SHOWN_SLOTS = 60


class _SavedSlot(msgspec.Struct):
    """Of a slot in schema.json, what is no setting."""

    type: str
    seed: str


class _SavedSchema(msgspec.Struct):
    """What is read of schema.json."""

    label: str
    dense: tuple[str, ...]
    slots: list[dict[str, Any]]
    hash: str
    labels: tuple[str, ...] = ()  # of runs from before there were several there is only `label`


@dataclass(frozen=True)
class _Run:
    """A run as far as an export needs it. `types`: of the slots, in Arrow's words."""

    path: Path
    config: Config
    labels: tuple[str, ...]
    dense: tuple[str, ...]
    slots: tuple[Slot, ...]
    types: tuple[str, ...]
    ending: Ending | None
    files: dict[str, list[Path]]

    @property
    def logit_shift(self) -> float:
        """Of a model that saw only a share of the negatives: odds are too high by 1 / share (He et al., "Practical lessons from
        predicting clicks on ads at Facebook", ADKDD 2014, section 6.3)."""
        return math.log(getattr(self.config.data, "negative_rate", 1.0))


def export(run_dir: Path, out: Path, dtype: Dtype = "float32", keep: int = 2) -> Version:
    """Make the next version of the bundle in `out` from the run in `run_dir`, and let it be the live one.

    keep   versions that stay, the new one among them; 0: all

    Raises RunDirError for a run that has not finished or whose files do not fit together, BundleError where `out` cannot be written
    or `dtype` cannot hold the weights, ModelError for a model that TensorFlow cannot export.
    """
    with _unused(run_dir):
        run = _read(run_dir)
        with publication(out) as publishing:
            _write(run, run_dir, publishing, dtype)
            return publishing.publish(keep)


def _write(run: _Run, run_dir: Path, publishing: Publication, dtype: Dtype) -> None:
    from flowps.serving.model import read_model, write_model  # here: TensorFlow takes seconds to import
    from flowps.trainer.models import ModelSpec

    folder, slots = publishing.folder, run.slots
    max_lens = [slot.max_len if slot.pooling == "none" else 0 for slot in slots]
    spec = ModelSpec.of(
        [slot.name for slot in slots], [slot.dim for slot in slots], len(run.dense), max_lens=max_lens, net=run.config.net,
        labels=run.labels, dense_names=run.dense,
    )  # fmt: skip
    model = read_model(run_dir / files.MODEL, run.config.model, spec, run.config.trainer.precision)
    write_model(model, spec, run.logit_shift, folder)
    (folder / files.SCHEMA).write_bytes((run_dir / files.SCHEMA).read_bytes())
    write_vectors(folder, slots)
    check_vectors(folder, slots)
    rows = folder / files.EMBEDDINGS
    rows.mkdir()
    packed = [pack(slot.name, slot.dim, run.files[slot.name], rows, dtype) for slot in slots]
    write_manifest(folder, _manifest(run, packed, dtype, list_files(folder)))


def _manifest(run: _Run, packed: Sequence[Packed], dtype: Dtype, written: tuple[BundleFile, ...]) -> Manifest:
    slots, column = [], 0
    for slot, found_type, rows in zip(run.slots, run.types, packed, strict=True):
        is_list, values = kind_of(found_type)
        slots.append(
            BundleSlot(
                name=slot.name, type=found_type, is_list=is_list, values=values, dim=slot.dim, pooling=slot.pooling,
                max_len=slot.max_len, hash_size=slot.hash_size, weights=slot.weights, column=column, rows=rows.rows, file=rows.file,
                size_bytes=rows.size_bytes, dtype=dtype, max_error=rows.error.most, relative_error=rows.error.relative,
            )
        )  # fmt: skip
        column += slot.width
    inputs = [
        tensor("embeddings", "float32", [(slot.name, slot.width) for slot in run.slots]),
        tensor("dense_columns", "float32", [(name, 1) for name in run.dense]),
        tensor("lengths", "int32", [(slot.name, 1) for slot in run.slots if slot.pooling == "none"]),
    ]
    ending, data = run.ending, run.config.data
    test = None if ending is None else ending.test
    return Manifest(
        created=time.time(), run=str(run.path), steps=ending.finished.steps if ending else 0,
        examples=ending.finished.examples if ending else 0,
        test=None if test is None else Quality(test.examples, test.auc, test.logloss), labels=run.labels,
        dense=Dense(run.dense, data.dense_fill, data.log1p), slots=tuple(slots), logit_shift=run.logit_shift,
        inputs=tuple(of for of in inputs if of.width), output=tensor(files.OUTPUT, "float32", [(name, 1) for name in run.labels]),
        files=written,
    )  # fmt: skip


def _read(path: Path) -> _Run:
    """Check that the run is whole. Raises RunDirError."""
    record = read_run(path)
    if not (path / files.MODEL).exists():
        where = f"{path / 'previous'} has what an earlier run left; " if (path / "previous" / files.MODEL).exists() else ""
        raise RunDirError(f"{path}: has no {files.MODEL}: the run has not finished; {where}finish it with --resume, then export")
    try:
        schema = msgspec.json.decode((path / files.SCHEMA).read_bytes(), type=_SavedSchema)
        kept = [msgspec.convert(slot, _SavedSlot) for slot in schema.slots]
        known = set(Slot.__struct_fields__)
        slots = tuple(msgspec.convert({k: v for k, v in slot.items() if k in known}, Slot) for slot in schema.slots)
    except (OSError, msgspec.MsgspecError) as error:
        raise RunDirError(f"{path / files.SCHEMA}: cannot be read, or is no file of this version of flowps: {error}") from None
    if schema.hash != RULE or not all(check_seed(slot.name, of.seed) for slot, of in zip(slots, kept, strict=True)):
        raise RunDirError(
            f"{path / files.SCHEMA}: the run hashed with {schema.hash!r} in another way than this flowps; install its version"
        )
    found = files_of(path / files.EMBEDDINGS)
    missing = [slot.name for slot in slots if slot.name not in found]
    if missing:
        raise RunDirError(
            f"{path / files.EMBEDDINGS}: no file of slot {', '.join(map(repr, missing[:5]))}; finish the run with --resume"
        )
    check_parts(found)
    try:
        config = knob.load(path / "config.toml")
    except ConfigError as error:
        raise RunDirError(f"{path / 'config.toml'}: cannot be read by this version of flowps: {error}") from None
    return _Run(
        path, config, schema.labels or (schema.label,), schema.dense, slots, tuple(of.type for of in kept),
        record.ending, found,
    )  # fmt: skip


@contextmanager
def _unused(path: Path) -> Iterator[None]:
    """Keep runs out of the directory, or refuse it while one is there: it would be read half old, half new."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read: {error.strerror}; is this the directory of a run?") from None
    try:
        with suppress(OSError):  # file systems without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunDirError(f"{path}: a run is using it; wait until it has ended, then export") from None
        yield
    finally:
        os.close(handle)


def announce(console: Console, version: Version, out: Path) -> None:
    """What the bundle has: each slot's rows, their size, and what fewer bits have cost."""
    manifest = version.manifest
    table = Table("slot", "dim", "rows", "bytes", "stored as", "largest error", "relative RMS error", title="embeddings",
                  title_justify="left")  # fmt: skip
    for slot in manifest.slots[:_SHOWN_SLOTS]:
        table.add_row(slot.name, str(slot.dim), f"{slot.rows:,}", f"{slot.size_bytes:,}", slot.dtype, f"{slot.max_error:.3g}",
                      f"{slot.relative_error:.3%}")  # fmt: skip
    if manifest.slots:
        console.print(table)
    if len(manifest.slots) > _SHOWN_SLOTS:
        console.print(f"… and {len(manifest.slots) - _SHOWN_SLOTS} more slots, all in manifest.json")
    if manifest.logit_shift:
        console.print(
            f"logits are shifted by {manifest.logit_shift:.4f}, in both models: data.negative_rate left out negative samples",
            soft_wrap=True,
        )
    tested = f", test auc = {auc(manifest.test.auc)}" if manifest.test is not None else ""
    size = sum(file.size_bytes for file in manifest.files)
    console.print(
        f"{out}: version {version.number} of {manifest.run} (step {manifest.steps:,}{tested}): "
        f"{sum(slot.rows for slot in manifest.slots):,} rows of {len(manifest.slots)} slots, {size / 1e6:,.1f} MB, verified, live",
        soft_wrap=True,
    )


def _keep(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m flowps.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the directory that a finished run has left")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle's folder: a new one, or one with earlier versions")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="float32", help="what rows are stored in (default: %(default)s)"
    )
    keep = "versions that stay in OUT, the new one among them; 0: all (default: %(default)s)"
    parser.add_argument("--keep", type=_keep, default=2, metavar="N", help=keep)
    options = parser.parse_args(argv)

    def work() -> None:
        announce(PlainConsole(), export(options.run_dir, options.out, options.dtype, options.keep), options.out)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
