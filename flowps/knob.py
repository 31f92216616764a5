"""How a run is read: the knobs of `config` as a flat list, from TOML files and overrides to a checked Config, and back.

All readers end in :func:`load`, which refuses what is unknown, of the wrong type or out of range, with the path of the key, what
was found and what to do. Called by `arguments` and by Python code that starts a run.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
import tomli_w
from msgspec import Meta

from flowps.config import Config, Slot
from flowps.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


class Knob(msgspec.Struct, frozen=True):
    """One leaf of :class:`Config`: `path` as in `data.batch_size`."""

    path: str
    type: Any
    default: Any
    description: str
    range: str

    @property
    def is_list(self) -> bool:
        """Whether the knob takes several values."""
        return get_origin(_bare(self.type)) is tuple

    @property
    def is_bool(self) -> bool:
        """Whether the knob is a switch, so that `--knob` alone means true."""
        return _bare(self.type) is bool


@functools.cache
def knobs(of: type[msgspec.Struct] = Config) -> tuple[Knob, ...]:
    """Every knob but those of the `[[slot]]` entries, which `slot_knob` knows by the slot's name.

    of   described as Config is: tables in tables; what must be given has the default msgspec.NODEFAULT
    """
    return tuple(_knobs(of, ""))


def slot_knob(path: str) -> Knob | None:
    """The knob of one slot, `slot.NAME.key` (NAME may hold dots), or None for a path that is none."""
    section, _, key = path.rpartition(".")
    if not section.startswith("slot.") or section == "slot.":
        return None
    knob = next((k for k in knobs(Slot) if k.path == key), None)
    return None if knob is None else msgspec.structs.replace(knob, path=path)


def _knobs(section: type[msgspec.Struct], prefix: str) -> Iterator[Knob]:
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _knobs(field.type, f"{prefix}{field.name}.")
            continue
        if field.name == "slot" or (section is Slot and field.required):  # a slot's name is what finds the entry
            continue
        has_none = field.required or field.default is not msgspec.NODEFAULT
        default = field.default if has_none else field.default_factory()
        yield Knob(f"{prefix}{field.name}", field.type, default, *_describe(field.type))


def _describe(annotated: Any) -> tuple[str, str]:
    """Description and range of an annotated type."""
    metas = [m for m in getattr(annotated, "__metadata__", ()) if isinstance(m, Meta)]
    description = next((m.description for m in metas if m.description), "")
    bounds = [
        f"{sign} {getattr(m, name)}"
        for m in metas
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(m, name) is not None
    ]
    if get_origin(_bare(annotated)) is Literal:
        bounds.append(" | ".join(str(v) for v in get_args(_bare(annotated))))
    return description, ", ".join(bounds)


def _bare(annotated: Any) -> Any:
    """The type under all `Annotated`."""
    return _bare(get_args(annotated)[0]) if get_origin(annotated) is Annotated else annotated


def load(toml: Path | None = None, overrides: Sequence[tuple[str, list[str]]] = ()) -> Config:
    """The run described by a TOML file (or none) and overrides `(path, values as typed)`, later ones winning.

    Raises :class:`ConfigError` for a file that cannot be read or parsed and for every unknown, ill-typed or out-of-range key.
    """
    tree = _read_toml(toml) if toml is not None else {}
    known = {knob.path: knob for knob in knobs()}
    for path, values in overrides:
        knob = known.get(path) or slot_knob(path)
        if knob is None:
            raise ConfigError(f"--{path}: no such knob{closest(path, list(known))}")
        _set(tree, path, _parse(knob, values))
    return _checked(tree)


def load_as(of: type[T], toml: Path) -> T:
    """What a TOML file says of another description than a run's, made as Config is. Raises ConfigError as `load`."""
    return _convert(_read_toml(toml), of)


def _checked(tree: dict[str, Any]) -> Config:
    """The run of a tree as TOML gives it."""
    defaults = tree.get("slot_default", {})
    if isinstance(defaults, dict) and isinstance(tree.get("slot"), list):
        tree["slot"] = [{**defaults, **entry} if isinstance(entry, dict) else entry for entry in tree["slot"]]
    config = _convert(tree, Config)
    names = [slot.name for slot in config.slot]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"slot: {names.count(name)} entries are named {name!r}; give each slot one [[slot]] entry")
    return config


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """The run described by nested mappings, as a TOML file would: `{"data": {"train": ["clicks/*.parquet"]}, "epochs": 2}`.

    Where a knob takes several values, one may stand for a list of one. Raises ConfigError as `load`.
    """
    several = {knob.path for knob in knobs() if knob.is_list}

    def copied(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {str(key): copied(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()}
        if path in several and isinstance(value, str | int | os.PathLike):
            return copied([value], path)
        if isinstance(value, list | tuple):
            return [copied(inner, "") for inner in value]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    for key in tree:
        section, dot, name = str(key).partition(".")
        if dot:
            raise ConfigError(f"{key}: no such knob; write nested mappings, as in {{{section!r}: {{{name!r}: …}}}}")
    return _checked(copied(tree, ""))


def dump(config: Config) -> str:
    """The resolved run as TOML, every knob written out; `load` reads it back to an equal Config."""
    return tomli_w.dumps(msgspec.to_builtins(config))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a run's TOML file, or none and set --data.train") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _parse(knob: Knob, values: list[str]) -> Any:
    """Values as typed on a command line → the knob's type."""
    found: Any = values
    if knob.is_list:
        if len(values) == 1 and values[0].startswith("["):
            try:
                found = tomllib.loads(f"v = {values[0]}")["v"]
            except tomllib.TOMLDecodeError as error:
                raise ConfigError(f"--{knob.path}: {values[0]!r} is not a TOML list: {error}") from None
    elif len(values) != 1:
        raise ConfigError(f"--{knob.path}: expected one value, found {len(values)}: {' '.join(values)}")
    else:
        found = values[0]
    try:
        return msgspec.convert(found, knob.type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_refusal(f"--{knob.path}", str(error).split(" - at ")[0], found, knob)) from None


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    if section.startswith("slot."):
        _slot_entry(tree, section.removeprefix("slot."))[key] = value
        return
    if section:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{section}: expected a table in the TOML file, found {tree!r}")
    tree[key] = value


def _slot_entry(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The `[[slot]]` entry of that name, added if there is none."""
    entries = tree.setdefault("slot", [])
    if not isinstance(entries, list):
        raise ConfigError(f"slot: expected [[slot]] entries in the TOML file, found {entries!r}")
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == name:
            return entry
    entries.append({"name": name})
    added: dict[str, Any] = entries[-1]
    return added


def _convert(tree: dict[str, Any], of: type[T]) -> T:
    try:
        return msgspec.convert(tree, of)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        path = where.rstrip("`").lstrip(".")
        unknown = re.search(r"unknown field `(.+)`", what)
        if unknown:
            key = unknown[1]
            full = f"{path}.{key}" if path else key
            candidates = [k.path for k in knobs(of)] if "slot[" not in path else [f"{path}.{f}" for f in Slot.__struct_fields__]
            raise ConfigError(f"{full}: no such knob{closest(full, candidates)}") from None
        found: Any = tree
        for part in re.findall(r"[^.\[\]]+", path):
            found = found[int(part) if part.isdigit() else part]
        name = re.sub(r"\[\d+\]$", "", re.sub(r"^slot\[\d+\]\.", "slot.NAME.", path))
        knob = next((k for k in knobs(of) if k.path == name), None) or slot_knob(name)
        raise ConfigError(_refusal(path or "the file", what, found, knob)) from None


def _refusal(path: str, what: str, found: Any, knob: Knob | None) -> str:
    what = what[0].lower() + what[1:]
    # The words of TOML, not of JSON.
    what = what.split(", got")[0].replace("`", "").replace("expected object", "expected a table")
    what = "expected one of the choices" if what.startswith("invalid enum value") else what
    message = f"{path}: {what}" if "missing" in what else f"{path}: {what}, found {found!r}"
    if knob is not None and knob.is_list and isinstance(found, str) and not path.startswith("--"):
        message += f"; write [{json.dumps(found, ensure_ascii=False)}]"
    if knob is not None:
        bounds = f"; range {knob.range}" if knob.range else ""
        message += f" ({knob.description}; default {knob.default!r}{bounds})"
    return message


def closest(path: str, candidates: Sequence[str]) -> str:
    """`; did you mean …?` for the most likely candidates, by the whole path and by its last part."""
    near = difflib.get_close_matches(path, candidates, n=2, cutoff=0.6)
    leaf = path.rsplit(".", 1)[-1]
    same_leaf = [c for c in candidates if difflib.SequenceMatcher(None, c.rsplit(".", 1)[-1], leaf).ratio() > 0.75]
    found = list(dict.fromkeys(near + same_leaf))[:3]
    return f"; did you mean {' or '.join(found)}?" if found else "; --help lists all of them"
