"""`Registry`: published models, on a disk or at any URL that fsspec knows, and which of them is live.

    models/current          the number of the live model, as text: replaced at once, and last
    models/1, models/2, …   bundles for serving, each complete: `python -m flowps.serve FOLDER/models` watches them
    records/1.json, …       what each was trained on, and how it was judged
    reports/1.html, …       the same as a page
    promotions/1.json, …    which model became live when, and why

A model's files come first, its manifest last of them, then its record; so a number that has a record is a whole model, and what a
killed command has left under a number without one is replaced. One command at a time writes (the pipeline's lease); anyone reads.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from flowps.checkpoint.store import Store
from flowps.errors import BundleError, CheckpointError
from flowps.quality import Quality
from flowps.serving.manifest import MANIFEST, Manifest

_CURRENT = "models/current"
_CHUNK_BYTES = 1 << 20

T = TypeVar("T")
Reason = Literal["published", "promoted", "rolled back"]


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """What is known of a published model.

    attempt, slot, kind   of the ledger
    parent                the model whose rows it began with; 0: none
    run, checkpoint       the run directory and the checkpoint that it ended with
    pipeline              the pipeline's file
    quality, live         on the fixed set, of this model and of the one that was live; the latter None if there was none
    preview               of the model that was live, on the slot, before it was trained
    profile               of the slot's samples
    reasons               of the gate
    """

    version: int
    created: float
    attempt: int
    slot: str
    kind: str
    parent: int
    run: str
    checkpoint: str
    examples: int
    pipeline: str
    quality: Quality
    live: Quality | None
    preview: Quality | None
    profile: dict[str, Any]
    reasons: list[str]


class Promotion(msgspec.Struct, frozen=True):
    """`version` has become live at `at` (Unix time) in place of `before`; 0: of none."""

    version: int
    before: int
    at: float
    why: Reason
    by: str


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:  # the store's own word for what cannot be read or written
        raise BundleError(str(error)) from None


class Registry:
    """The registry at `url`. All methods raise BundleError."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._store = Store(url)

    # --- reading ------------------------------------------------------------------------------------------------------

    def live(self) -> int:
        """The number of the live model; 0: there is none."""
        found = self._read(_CURRENT)
        if found is None:
            return 0
        text = found.decode(errors="replace").strip()
        if not (text.isascii() and text.isdecimal()):
            raise BundleError(f"{self._store.shown(_CURRENT)}: holds {text[:40]!r}, expected the number of a model")
        return int(text)

    def versions(self) -> list[int]:
        """The models that are whole, the oldest first."""
        return self._numbers("records")

    def kept(self) -> list[int]:
        """The models whose bundles are there."""
        whole = set(self.versions())
        return [version for version in self._models() if version in whole]

    def record(self, version: int) -> Record:
        """What is known of a model."""
        found = self._read(f"records/{version}.json")
        if found is None:
            known = self.versions()
            raise BundleError(f"{self.url}: has no model {version}; there are {', '.join(map(str, known)) or 'none'}")
        return self._decoded(f"records/{version}.json", found, Record)

    def manifest(self, version: int) -> Manifest:
        """Of a model's bundle."""
        path = f"models/{version}/{MANIFEST}"
        found = self._read(path)
        if found is None:
            raise BundleError(f"{self._store.shown(path)}: is missing")
        return self._decoded(path, found, Manifest)

    def promotions(self) -> list[Promotion]:
        """All, the oldest first."""
        paths = [f"promotions/{number}.json" for number in self._numbers("promotions")]
        return [self._decoded(path, self._read(path) or b"", Promotion) for path in paths]

    def before_live(self) -> int:
        """The model that a rollback makes live: the one before the live one, those that were rolled back left out; 0: none."""
        stack = self._stack()
        return stack[-2] if len(stack) > 1 else 0

    def report_place(self, version: int) -> str:
        """Where the page of a model is."""
        return self._store.shown(f"reports/{version}.html")

    # --- writing ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder, and find out whether it can be written."""
        with _refusing():
            self._store.prepare()

    def next_version(self) -> int:
        """A number that no model has had."""
        return max([0, *self.versions(), *self._models(), *(of.version for of in self.promotions())]) + 1

    def put(self, bundle: Path, record: Record, page: str) -> None:
        """Add a model, from a folder with one version of a bundle; what is there of it, without a record, is replaced."""
        folder = f"models/{record.version}"
        with _refusing():
            if self._store.exists(f"records/{record.version}.json"):
                there = self.record(record.version)
                if (there.attempt, there.slot, there.pipeline) != (record.attempt, record.slot, record.pipeline):
                    raise BundleError(
                        f"{self.url}: model {record.version} is there already, of slot {there.slot} and {there.pipeline}; give "
                        "every pipeline a registry of its own"
                    )
                return
            self._store.delete(folder)
            files = sorted(path for path in bundle.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name == MANIFEST and path.parent == bundle):
                with self._store.write(f"{folder}/{path.relative_to(bundle).as_posix()}") as sink, path.open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        sink.write(chunk)
            self._store.put(f"reports/{record.version}.html", page.encode())
            self._store.put(f"records/{record.version}.json", msgspec.json.format(msgspec.json.encode(record)))

    def promote(self, version: int, why: Reason) -> Promotion:
        """Make a model live. It is noted first: what is noted and not done is done by whoever asks again."""
        self.record(version)
        self.manifest(version)
        before, history = self.live(), self.promotions()
        last = history[-1] if history else None
        if before == version and last is not None:
            return last
        found = Promotion(version, before, time.time(), why, f"{getpass.getuser()}@{socket.gethostname()}")
        with _refusing():
            if last is None or (last.version, last.before, last.why) != (version, before, why):
                self._store.put(f"promotions/{len(history) + 1}.json", msgspec.json.encode(found))
            self._store.put(_CURRENT, f"{version}\n".encode())
        return found

    def prune(self, keep: int) -> list[int]:
        """Delete the oldest models but `keep`, and never the live one nor the one before; their records stay. Returns them."""
        spared = {self.live(), self.before_live(), *self.versions()[-keep:]}
        gone = [version for version in self._models() if version not in spared]
        for version in gone:
            with _refusing():
                # First what makes it a model: a kill here must leave none that could be promoted.
                self._store.remove(f"models/{version}/{MANIFEST}")
                self._store.delete(f"models/{version}")
        return gone

    def _stack(self) -> list[int]:
        """The models that have become live and were not rolled back, the live one last."""
        stack: list[int] = []
        for promotion in self.promotions():
            if promotion.why == "rolled back" and promotion.version in stack:
                del stack[stack.index(promotion.version) + 1 :]
            elif not stack or stack[-1] != promotion.version:
                stack.append(promotion.version)
        there = set(self._models())
        return [version for version in stack if version in there]

    def _models(self) -> list[int]:
        with _refusing():
            names = {path.split("/")[1] for path in self._store.sizes("models")}
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def _numbers(self, folder: str) -> list[int]:
        with _refusing():
            names = [path.split("/")[1].removesuffix(".json") for path in self._store.sizes(folder)]
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def _read(self, path: str) -> bytes | None:
        with _refusing():
            return self._store.read(path)

    def _decoded(self, path: str, content: bytes, of: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=of)
        except msgspec.MsgspecError as error:
            raise BundleError(f"{self._store.shown(path)}: cannot be read: {error}") from None
