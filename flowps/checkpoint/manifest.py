"""`Manifest`: the file whose presence makes a checkpoint exist, and what can be told from the manifests of a store.

    <store>/step-000000100/manifest.json     written last
    <store>/step-000000100/...               the files that it names

Covers publishing, listing, chains of deltas, finding the newest that can be trusted, and pruning. What the files hold, and
whether a run may go on from them, is decided elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import xxhash

from flowps.checkpoint.file import USE_ANOTHER, FileEntry, check_size
from flowps.checkpoint.part import verify
from flowps.checkpoint.store import Store
from flowps.errors import CheckpointError
from flowps.version import __version__

FORMAT = 1

_FILE = "manifest.json"
_STEP = re.compile(r"step-(\d+)(?:-\w+)?")
# Around the content, so that not a byte of the file can change unnoticed.
_HEAD, _MIDDLE, _TAIL = b'{"checksum": "', b'",\n"manifest": ', b"}\n"
_DIGITS = 32
Say = Callable[[str], None]


class ShardPart(msgspec.Struct, frozen=True):
    """What one shard has written.

    pieces  [slot's name, part, parts] of each piece that it held
    states  JSON objects, of whatever the shard needs besides its rows
    """

    pieces: list[tuple[str, int, int]]
    states: list[dict[str, Any]]
    files: list[FileEntry]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint.

    format    version of this file and of those that it names
    flowps    version that wrote it
    name      its folder: step-<step>, and -<letters or digits> where several runs, or tries, come by that step
    created   Unix time
    base      name of the checkpoint that this one, a delta, is to be added to, which may be a delta itself; "" for a full one
    schema    of the run: what the rows mean
    settings  of the run, that a run which goes on from here must share
    trainer   dense weights, the optimizer's state, the metrics' state
    ledger    what was read and trained until here
    is_best   whether the evaluation on the validation data here was the best of the run so far
    rows      how many this checkpoint's own files hold
    seconds   from the cut to here
    """

    name: str
    step: int
    epoch: int
    created: float
    base: str = ""
    schema: dict[str, Any]
    settings: dict[str, Any]
    shards: list[ShardPart]
    trainer: list[FileEntry]
    ledger: dict[str, Any]
    rows: int
    seconds: float
    is_best: bool = False
    format: int = FORMAT
    flowps: str = __version__

    def files(self) -> Iterator[FileEntry]:
        """All files of this checkpoint itself, not those of its base."""
        for shard in self.shards:
            yield from shard.files
        yield from self.trainer


class Found(msgspec.Struct, frozen=True):
    """A folder in a store: a checkpoint, or the reason why it is none."""

    name: str
    manifest: Manifest | None = None
    reason: str = ""
    unfinished: bool = False


class _Version(msgspec.Struct):
    """What every format of a manifest has."""

    format: int
    flowps: str


def publish(store: Store, manifest: Manifest) -> None:
    """Make the checkpoint exist. Its files are in place; that they are, and its base too, is looked up first.

    Raises CheckpointError, and there is no checkpoint, if one of them is not, if the manifest cannot be written, or if there is
    one of that name already.
    """
    path = f"{manifest.name}/{_FILE}"
    if store.exists(path):
        raise CheckpointError(f"{store.shown(path)}: is there already; write the checkpoint under another name")
    sizes = store.sizes(manifest.name)
    for entry in manifest.files():
        if entry.path not in sizes:
            raise CheckpointError(
                f"{store.shown(entry.path)}: is missing, so there is no checkpoint {manifest.name}; write it again"
            )
        check_size(store.shown(entry.path), sizes[entry.path], entry.size_bytes)
    chain(store, manifest)
    store.put(path, _frame(msgspec.json.format(msgspec.json.encode(manifest), indent=1)))


def load(store: Store, name: str) -> Manifest:
    """The manifest of the checkpoint `name`. Raises CheckpointError if there is none, or it is damaged or of another format."""
    data = store.read(f"{name}/{_FILE}")
    if data is None:
        shown = store.shown(f"{name}/{_FILE}")
        raise CheckpointError(f"{shown}: is missing, so {name} is no checkpoint, or an unfinished one; {USE_ANOTHER}")
    return _parse(store, name, data)


def found(store: Store) -> list[Found]:
    """All folders of a store, newest first: by step, then by time. Raises CheckpointError only if the store cannot be listed."""
    return sorted((_look(store, name) for name in store.folders()), key=_age, reverse=True)


def chain(store: Store, manifest: Manifest) -> list[Manifest]:
    """The full checkpoint that this one builds on, the deltas after it in order, and itself. Raises CheckpointError."""
    links = [manifest]
    while base := links[-1].base:
        if base in {link.name for link in links}:
            raise CheckpointError(f"{store.shown(manifest.name)}: needs itself, by way of {base}; {USE_ANOTHER}")
        try:
            links.append(load(store, base))
        except CheckpointError as error:
            raise CheckpointError(f"{store.shown(links[-1].name)}: needs {base}, which cannot be had: {error}") from None
    return links[::-1]


def check(store: Store, manifest: Manifest, threads: int = 2) -> list[Manifest]:
    """The chain, with all files of all its links read and compared. Raises CheckpointError that names the file."""
    links = chain(store, manifest)
    verify(store, [entry for link in links for entry in link.files()], threads)
    return links


def newest_valid(store: Store, say: Say, threads: int = 2) -> Manifest:
    """The newest checkpoint that `check` finds no fault with; `say` is told of each newer one, which file and what is wrong.

    Raises CheckpointError if there is none.
    """
    folders = found(store)
    for folder in folders:
        try:
            if folder.manifest is None:
                raise CheckpointError(folder.reason)
            check(store, folder.manifest, threads)
        except CheckpointError as error:
            say(f"checkpoint {folder.name} is passed over: {error}")
        else:
            return folder.manifest
    seen = f"none of {len(folders)} folders is a whole checkpoint" if folders else "there is no checkpoint"
    raise CheckpointError(f"{store.url}: {seen}")


def best(store: Store, step: int) -> Manifest | None:
    """The newest checkpoint of the best evaluation, after `step`; None: there is none."""
    of_step = (folder.manifest for folder in found(store) if folder.manifest is not None and folder.manifest.step == step)
    return next((manifest for manifest in of_step if manifest.is_best), None)


def prune(store: Store, keep: int, in_use: Collection[str] = ()) -> list[str]:
    """Delete all but the newest `keep` checkpoints, the newest of a best evaluation, those `in_use`, and what their chains need.

    And what unfinished ones left.

    Only whole chains count as kept; their files are not read. Unfinished folders go if they are no newer than the newest
    checkpoint. Whatever cannot be read or is no folder of a checkpoint stays, with all that may build on it: it may be of use to
    another version of flowps, or tomorrow. Returns the names deleted; raises CheckpointError.
    """
    assert keep > 0
    folders = found(store)
    manifests = {folder.name: folder.manifest for folder in folders if folder.manifest is not None}
    unknown = {folder.name for folder in folders if folder.manifest is None and not folder.unfinished}
    whole = [name for name in manifests if _ends(name, manifests, {""})]
    of_best = [name for name in whole if manifests[name].is_best][:1]
    kept = {name for start in [*whole[:keep], *of_best, *in_use] for name in _links(start, manifests)}
    gone = [name for name in manifests if name not in kept and not _ends(name, manifests, unknown)]
    newest = max((manifests[name].step for name in whole), default=-1)
    left = [
        folder.name for folder in folders if folder.unfinished and folder.name not in in_use and -1 < _step(folder.name) <= newest
    ]
    # Newest first and manifests first: whenever this is interrupted, no manifest needs what has gone.
    for name in gone:
        store.remove(f"{name}/{_FILE}")
    for name in [*gone, *left]:
        store.delete(name)
    return [*gone, *left]


def _look(store: Store, name: str) -> Found:
    try:
        data = store.read(f"{name}/{_FILE}")
        if data is None:
            return Found(name, reason=f"{store.shown(name)}: is unfinished: it has no {_FILE}", unfinished=True)
        return Found(name, _parse(store, name, data))
    except CheckpointError as error:
        return Found(name, reason=str(error))


def _parse(store: Store, name: str, data: bytes) -> Manifest:
    shown = store.shown(f"{name}/{_FILE}")
    content = data[len(_HEAD) + _DIGITS + len(_MIDDLE) : -len(_TAIL)]
    if _frame(content) != data:
        raise CheckpointError(f"{shown}: is damaged, or no manifest of a checkpoint; {USE_ANOTHER}")
    try:
        version = msgspec.json.decode(content, type=_Version)
        if version.format != FORMAT:
            raise CheckpointError(
                f"{shown}: has format {version.format}, of flowps {version.flowps}; this is flowps {__version__}, which reads "
                f"format {FORMAT}: use that version, or another checkpoint"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{shown}: is no manifest of a checkpoint: {error}; {USE_ANOTHER}") from None
    if manifest.name != name:
        raise CheckpointError(f"{shown}: is that of {manifest.name}; give the folder that name, or {USE_ANOTHER}")
    return manifest


def _age(folder: Found) -> tuple[int, float, str]:
    manifest = folder.manifest
    return (_step(folder.name), 0.0, folder.name) if manifest is None else (manifest.step, manifest.created, folder.name)


def _step(name: str) -> int:
    """Of a folder without a manifest; -1 if it is no checkpoint's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else -1


def _links(name: str, manifests: Mapping[str, Manifest]) -> Iterable[str]:
    """The names in a chain, from this one down, as far as there are manifests; then the one that is missing, "" if none is."""
    seen: list[str] = []
    while name in manifests and name not in seen:
        seen.append(name)
        name = manifests[name].base
    return [*seen, name]


def _ends(name: str, manifests: Mapping[str, Manifest], ends: Collection[str]) -> bool:
    """Whether a chain leads to one of `ends`."""
    *_, end = _links(name, manifests)
    return end in ends


def _frame(content: bytes) -> bytes:
    return _HEAD + xxhash.xxh3_128(content).hexdigest().encode() + _MIDDLE + content + _TAIL
