"""`Manifest`: what a bundle says of itself, and that its files are those it says.

    manifest.json     written last
    schema.json       of the run, as it was
    hash.json         values and their signs: see `vectors`
    model.keras       the dense model, inputs → logits
    saved_model/      the same as a TensorFlow SavedModel
    embeddings/       a Parquet file for each slot: see `rows`

Covers one version of a bundle; `bundle` has the folder with all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from flowps.config import Pooling, Slot
from flowps.errors import BundleError
from flowps.hub.saved import Values
from flowps.version import __version__

FORMAT = 1
MANIFEST, SCHEMA, HASH, MODEL, SAVED_MODEL, EMBEDDINGS = (
    "manifest.json", "schema.json", "hash.json", "model.keras", "saved_model", "embeddings"
)  # fmt: skip
SIGNATURE, OUTPUT = "serving_default", "output_0"  # as Keras names them in a SavedModel
_CHUNK_BYTES = 1 << 20

Dtype = Literal["float32", "float16", "int8"]


class BundleFile(msgspec.Struct, frozen=True):
    """One file of a bundle; `path` relative to the manifest, with slashes."""

    path: str
    size_bytes: int
    sha256: str


class BundleSlot(msgspec.Struct, frozen=True, kw_only=True):
    """One slot.

    type            of the column that was trained on, in Arrow's words
    is_list         whether a sample has a list of values
    values          what the values are: strings and integers are hashed in different ways (booleans are integers)
    weights         the column with the weights of the values; "": all weigh 1
    column          where its floats begin in the model's input `embeddings`; there are `width` of them
    rows            signs with a row
    file            its rows
    dtype           what the weights of the rows are stored in
    max_error       the largest difference between a stored weight and the trained one
    relative_error  root of the mean square of the differences, divided by that of the trained weights
    """

    name: str
    type: str
    is_list: bool
    values: Values
    dim: int
    pooling: Pooling
    max_len: int
    hash_size: int
    weights: str
    column: int
    rows: int
    file: str
    size_bytes: int
    dtype: Dtype
    max_error: float
    relative_error: float

    @property
    def width(self) -> int:
        """Floats of a sample."""
        return self.settings.width

    @property
    def settings(self) -> Slot:
        """As the hub knows a slot, as far as reading needs."""
        return Slot(
            name=self.name, dim=self.dim, pooling=self.pooling, max_len=self.max_len, hash_size=self.hash_size, weights=self.weights
        )


class Quality(msgspec.Struct, frozen=True):
    """Of the run's test data, as the run measured it."""

    examples: int
    auc: float | None
    logloss: float | None


class Dense(msgspec.Struct, frozen=True):
    """The dense columns, in the order of the model's input: nulls become `fill`, then sign(x)·ln(1 + |x|) is taken if `log1p`."""

    columns: tuple[str, ...] = ()
    fill: float = 0.0
    log1p: bool = False


class Tensor(msgspec.Struct, frozen=True):
    """An input or output of the model: [batch, len]; `parts` says what stands from which column on, to which."""

    name: str
    dtype: str
    width: int
    parts: tuple[tuple[str, int, int], ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a bundle.

    format       of this file and of those that it names
    flowps       version that wrote it
    created      Unix time
    run          the run directory it was made from, as it was given
    steps        that were trained, and `examples`; 0 where the run has left no summary
    logit_shift  added to the logits in both models: ln(data.negative_rate)
    labels       of the logits, in order
    """

    created: float
    run: str
    steps: int
    examples: int
    test: Quality | None
    labels: tuple[str, ...]
    dense: Dense
    slots: tuple[BundleSlot, ...]
    logit_shift: float
    inputs: tuple[Tensor, ...]
    output: Tensor
    files: tuple[BundleFile, ...]
    format: int = FORMAT
    flowps: str = __version__

    @property
    def width(self) -> int:
        """Floats of the model's input `embeddings`."""
        return sum(slot.width for slot in self.slots)


class _Version(msgspec.Struct):
    """What every format of a manifest has."""

    format: int
    flowps: str


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, whole. Raises OSError."""
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def read_manifest(folder: Path, verify: bool = False) -> Manifest:
    """The manifest in `folder`, all of whose files are there and as long as it says; with `verify`, of the same content too.

    Raises BundleError.
    """
    path = folder / MANIFEST
    content = read_bytes(path)
    version: _Version = decode(path, content, _Version)
    if version.format != FORMAT:
        raise BundleError(
            f"{path}: has format {version.format}, written by flowps {version.flowps}; flowps {__version__} reads format {FORMAT}: "
            "install that version, or export the run again"
        )
    manifest: Manifest = decode(path, content, Manifest)
    for file in manifest.files:
        _check_file(folder / file.path, file, verify)
    return manifest


def list_files(folder: Path) -> tuple[BundleFile, ...]:
    """All files below `folder`, but the manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return tuple(BundleFile(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path)) for path in paths)


def tensor(name: str, dtype: str, parts: Sequence[tuple[str, int]]) -> Tensor:
    """Of parts that stand one after the other: the name and width of each."""
    found, at = [], 0
    for part, width in parts:
        found.append((part, at, at + width))
        at += width
    return Tensor(name, dtype, at, tuple(found))


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises BundleError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}; export the run again") from None


def decode(path: Path, content: bytes, kind: Any) -> Any:
    """A JSON file's content as `kind`. Raises BundleError."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: is damaged, or not a bundle's: {error}; export the run again") from None


def _check_file(path: Path, file: BundleFile, verify: bool) -> None:
    try:
        size_bytes = path.stat().st_size
        if size_bytes != file.size_bytes:
            raise BundleError(
                f"{path}: is damaged: {size_bytes:,} bytes, not {file.size_bytes:,}; copy the bundle again, or export again"
            )
        if verify and _sha256(path) != file.sha256:
            raise BundleError(
                f"{path}: is damaged: its SHA-256 is not that in the manifest; copy the bundle again, or export again"
            )
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}; copy the bundle again, or export again") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
