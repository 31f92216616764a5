"""The folder of a bundle: its versions side by side, and which of them is live.

    OUT/current        the number of the live version, as text
    OUT/1, OUT/2, …    versions, each complete and never changed again: see `manifest`

A version is written under another name, verified, and renamed; then `current` is replaced by a rename. So a reader finds the
version before or the new one, and never a part. To go back, write the number of an earlier version into `current`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowps.errors import BundleError
from flowps.serving.manifest import MANIFEST, Manifest, read_bytes, read_manifest

_CURRENT = "current"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Version:
    """One version, its files looked at; `number` is 0 for a folder that is no OUT/N."""

    folder: Path
    number: int
    manifest: Manifest


def open_version(path: Path, verify: bool = False) -> Version:
    """The live version of the bundle in `path`, or the version that `path` itself is. `verify`: see read_manifest.

    Raises BundleError.
    """
    folder = live_folder(path)
    return Version(folder, int(folder.name) if folder.name.isdecimal() else 0, read_manifest(folder, verify))


def live_folder(path: Path) -> Path:
    """Where the live version is. Raises BundleError."""
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; make a bundle with python -m flowps.export RUN {path}")
    if (path / MANIFEST).exists():
        return path
    if not (path / _CURRENT).exists():
        raise BundleError(f"{path}: is no bundle: it has no file {_CURRENT}; make one with python -m flowps.export RUN {path}")
    named = read_bytes(path / _CURRENT).decode(errors="replace").strip()
    if not (named.isascii() and named.isdecimal()):
        raise BundleError(f"{path / _CURRENT}: holds {named[:40]!r}, expected the number of a version, as in 1")
    if not (path / named).is_dir():
        raise BundleError(f"{path / _CURRENT}: names version {named}, but there is no {path / named}; name one that is there")
    return path / named


class Publication:
    """A version that is being written to `folder`; nobody sees it until `publish`."""

    def __init__(self, out: Path, number: int) -> None:
        self._out, self.number = out, number
        self.folder = out / f"{number}{_UNFINISHED}"
        self.folder.mkdir()

    def publish(self, keep: int) -> Version:
        """Verify what was written, make it the live version, and remove all older ones but the newest `keep` (0: none is removed).

        Raises BundleError, and the live version stays what it was.
        """
        read_manifest(self.folder, verify=True)
        for path in [*self.folder.rglob("*"), self.folder]:
            _sync(path)
        final = self._out / str(self.number)
        self.folder.rename(final)
        following = self._out / f"{_CURRENT}{_UNFINISHED}"
        following.write_text(f"{self.number}\n")
        _sync(following)
        following.replace(self._out / _CURRENT)
        _sync(self._out)
        if keep:
            for number in _versions(self._out)[:-keep]:
                shutil.rmtree(self._out / str(number), ignore_errors=True)
        return open_version(self._out)


@contextmanager
def publication(out: Path) -> Iterator[Publication]:
    """The next version of the bundle in `out`, which is made if it is not there; what is not published goes.

    Raises BundleError where `out` cannot be written, is no bundle, or has another export at work.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_is_bundle(out)
        with _locked(out):
            for left in out.glob(f"*{_UNFINISHED}"):
                _remove(left)
            found = Publication(out, (_versions(out) or [0])[-1] + 1)
            try:
                yield found
            finally:
                _remove(found.folder)
    except OSError as error:
        what = "is a file" if isinstance(error, FileExistsError | NotADirectoryError) else f"cannot be written: {_said(error)}"
        raise BundleError(f"{out}: {what}; choose another folder") from None


def _check_is_bundle(out: Path) -> None:
    """Refuse to write into a folder that holds anything else."""
    names = {path.name for path in out.iterdir()}
    others = {name for name in names if not (name == _CURRENT or name.isdecimal() or name.endswith(_UNFINISHED))}
    if others or (names and _CURRENT not in names and any(name.isdecimal() for name in names)):
        shown = ", ".join(sorted(others or names)[:3])
        raise BundleError(f"{out}: holds something that is no bundle ({shown}); choose an empty folder, or that of a bundle")


def _versions(out: Path) -> list[int]:
    return sorted(int(path.name) for path in out.iterdir() if path.name.isascii() and path.name.isdecimal())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(f"{folder}: another export is writing there; wait until it has ended") from None
        yield
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _said(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
