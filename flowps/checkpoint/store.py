"""`Store`: the folder that a run's checkpoints are in, on a disk or at any URL that fsspec knows.

Files come whole or not at all, are counted and hashed while they are written, and compared while they are read. What is in
them, and which of them belong together, is the business of `part` and `manifest`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flowps.checkpoint.file import USE_ANOTHER, Bytes, FileEntry, check_size, refusing
from flowps.checkpoint.sink import LocalSink, ObjectSink, Sink, sync_folder
from flowps.checkpoint.source import Ranges, Readable, Source
from flowps.errors import CheckpointError


class Store:
    """A folder at `url`: a local path or an fsspec URL. Paths in it are relative, with slashes.

    Any thread and any process may use it, as long as no two write the same file. All methods raise CheckpointError that names
    what was tried with which file, the reason, and what to do.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with refusing(f"place for checkpoints {url!r}", "used"):
            fs, root = fsspec.core.url_to_fs(url)
        self._fs: Any = fs
        self._root: str = root.rstrip("/")
        self._folder = Path(root) if isinstance(fs, LocalFileSystem) else None

    def shown(self, path: str) -> str:
        """The file or folder as people know it."""
        return f"{self.url.rstrip('/')}/{path}"

    # --- writing ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder if it is not there, and find out whether it can be written, before anything depends on it.

        Only this makes it: one that goes away later, with the disk that it is on, is an error and not made again elsewhere.
        """
        if self._folder is not None:
            with refusing(self.url, "written"):
                self._folder.mkdir(parents=True, exist_ok=True)
                sync_folder(self._folder.parent)
        trial = f"trial-{os.getpid()}"
        self.put(trial, b"flowps")
        self.remove(trial)

    def create(self, path: str) -> Sink:
        """A file to be written, which replaces one of that name once it is whole; the folders above it are made."""
        shown, place = self.shown(path), self._place(path)
        with refusing(shown, "written"):
            if self._folder is None:
                return ObjectSink(path, shown, self._fs, place)
            self._make_folder(Path(place).parent)
            return LocalSink(path, shown, Path(place))

    @contextmanager
    def write(self, path: str) -> Iterator[Sink]:
        """The same; the file is whole when the block has ended, and not there if it ended by an exception. Its `entry` lives on."""
        sink = self.create(path)
        try:
            yield sink
        except BaseException:
            sink.abort()
            raise
        sink.commit()

    def put(self, path: str, content: Bytes) -> FileEntry:
        """Write one file of that content."""
        with self.write(path) as sink:
            sink.write(content)
        return sink.entry()

    def remove(self, path: str) -> None:
        """Delete one file, if it is there; for good when this returns."""
        place = self._place(path)
        with refusing(self.shown(path), "deleted"):
            with suppress(FileNotFoundError):
                self._fs.rm_file(place)
            if self._folder is not None and Path(place).parent.is_dir():
                sync_folder(Path(place).parent)

    def delete(self, folder: str) -> None:
        """Delete a folder and all that is in it, if it is there."""
        with refusing(self.shown(folder), "deleted"), suppress(FileNotFoundError):
            self._fs.invalidate_cache()  # others may have written there since it was listed
            self._fs.rm(self._place(folder), recursive=True)

    # --- reading ------------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, entry: FileEntry) -> Iterator[Source]:
        """Read a file that has the size that `entry` says; whoever has read it calls `finish`."""
        shown, place = self.shown(entry.path), self._place(entry.path)
        with ExitStack() as closing:
            with refusing(shown, "read"):
                try:
                    file, size = self._readable(place, closing)
                except (FileNotFoundError, NotADirectoryError):
                    raise CheckpointError(f"{shown}: is missing; bring it back, or {USE_ANOTHER}") from None
            check_size(shown, size, entry.size_bytes)
            yield Source(entry, shown, file)

    def get(self, entry: FileEntry) -> bytes:
        """All of a file, compared with its entry."""
        with self.open(entry) as source:
            content = source.read()
            source.finish()
        return content.tobytes()

    def read(self, path: str) -> bytes | None:
        """All of a file as it is; None if it is not there."""
        with refusing(self.shown(path), "read"):
            try:
                return bytes(self._fs.cat_file(self._place(path)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        with refusing(self.shown(path), "looked up"):
            self._fs.invalidate_cache()
            try:
                # Not fsspec's `exists`, which says no when it cannot tell.
                self._fs.info(self._place(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def folders(self) -> list[str]:
        """The names of the folders in the store, in order; none if it is not there itself."""
        with refusing(self.url, "listed"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root or "/", detail=True)
            except FileNotFoundError:
                return []
        return sorted(item["name"].rstrip("/").rpartition("/")[2] for item in found if item["type"] == "directory")

    def sizes(self, folder: str) -> dict[str, int]:
        """path → bytes of all files in `folder` and below; none if it is not there."""
        above = len(self._root) + 1
        with refusing(self.shown(folder), "listed"):
            self._fs.invalidate_cache()
            found = self._fs.find(self._place(folder), detail=True)
        return {path[above:]: int(found[path]["size"]) for path in sorted(found)}

    def _readable(self, place: str, closing: ExitStack) -> tuple[Readable, int]:
        """A file from its beginning, closed with `closing`; and its bytes."""
        if self._folder is None:
            self._fs.invalidate_cache()
            size = int(self._fs.info(place)["size"])
            return Ranges(self._fs, place, size), size
        file = closing.enter_context(FileIO(place))
        return file, os.fstat(file.fileno()).st_size

    def _place(self, path: str) -> str:
        """What fsspec calls it. Paths come out of files: none may lead out of the store."""
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise CheckpointError(f"{self.url}: {path!r} is no path of a file in it; {USE_ANOTHER}")
        return f"{self._root}/{path}"

    def _make_folder(self, folder: Path) -> None:
        assert self._folder is not None
        if not self._folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
