"""The docstrings of flowps as Markdown, for the pages that mkdocstrings makes of them: an extension of griffe.

A paragraph whose lines are names and, two spaces or more behind, what they mean, becomes a table, and so does a list of
`name : meaning` below an underlined title; doctests become code. What would be taken for HTML is escaped. A msgspec.Struct shows
its fields, and a model of the zoo has the docstring of its module, which names the paper, before its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROW = re.compile(r"(?P<name>\S(?:.*?\S)?) {2,}(?P<meaning>\S.*)")
_ITEM = re.compile(r"(?P<name>[\w`*]+(?:, [\w`*]+)*) : (?P<meaning>\S.*)")
_ZOO = "flowps.trainer.models."
_TITLE = re.compile(r"(?P<title>\w+)\n(?P<line>-{3,})(?:\n|$)")


class Docstrings(griffe.Extension):
    """What griffe calls for every object it has found."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Give the object its docstring anew."""
        if obj.docstring is None:
            return
        found = markdown(obj.docstring.value)
        module = obj.parent
        if obj.path.startswith(_ZOO) and module is not None and module.name == obj.name and module.docstring:
            found = f"{module.docstring.value}\n\n{found}"  # it comes first, and so is Markdown already
        fields = _fields(obj)
        if fields:
            about, _, rest = found.partition("\n\n")
            found = f"{about}\n\n```python\n{fields}\n```\n\n{rest}"
        obj.docstring.value = found


def _fields(obj: griffe.Object) -> str:
    """The annotated fields of a msgspec.Struct, a line each; "" for what is none."""
    if not isinstance(obj, griffe.Class) or not any(str(base).endswith("Struct") for base in obj.bases):
        return ""
    of = [member for member in obj.members.values() if member.is_attribute and "instance-attribute" in member.labels]
    return "\n".join(f"{one.name}: {one.annotation}{'' if one.value is None else f' = {one.value}'}" for one in of)


def markdown(docstring: str) -> str:
    """A docstring, without its indentation, as Markdown."""
    return "\n\n".join(_blocks(docstring))


def rows_of(block: str) -> list[tuple[str, str]] | None:
    """Names and meanings, if that is what every line of the block has, or goes on with below the meaning; else None."""
    first = _ROW.fullmatch(block.split("\n", 1)[0])
    if first is None:
        return None
    at, rows = first.start("meaning"), []
    for line in block.split("\n"):
        found = _ROW.fullmatch(line)
        if found is not None and found.start("meaning") == at:
            rows.append((found["name"], found["meaning"]))
        elif rows and line[:at].strip() == "" and line.strip():
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
        else:
            return None
    return rows


def table(rows: list[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    """A Markdown table of names, as code, and their meanings."""
    names = [", ".join(part if part.startswith("`") else f"`{part}`" for part in name.split(", ")) for name, _ in rows]
    cells = [(name, escaped(meaning)) for name, (_, meaning) in zip(names, rows, strict=True)]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _blocks(text: str) -> Iterator[str]:
    """Each paragraph as Markdown; an underlined title is one of its own."""
    for block in re.split(r"\n{2,}", text.strip("\n")):
        title = _TITLE.match(block)
        if title is not None:
            yield f"**{title['title']}**"
            block = block[title.end() :]
        if block:
            yield _block(block)


def _block(block: str) -> str:
    if block.startswith(">>> "):
        return f"```pycon\n{re.sub(r' *# doctest: .*', '', block)}\n```"
    if block.startswith("    "):
        return block
    rows = rows_of(block) or _items(block)
    return escaped(block) if rows is None else table(rows)


def _items(block: str) -> list[tuple[str, str]] | None:
    """As `rows_of`, of lines `name : meaning`, that go on indented."""
    rows: list[tuple[str, str]] = []
    for line in block.split("\n"):
        found = _ITEM.fullmatch(line)
        if found is not None:
            rows.append((found["name"], found["meaning"]))
        elif rows and line.startswith("    "):
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
        else:
            return None
    return rows or None


def escaped(text: str) -> str:
    """Outside of code: no tags, and the names of roles left away."""
    text = re.sub(r":(?:class|func|meth):(`[^`]+`)", r"\1", text)
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(part if k % 2 else part.replace("<", "&lt;").replace("*", "\\*") for k, part in enumerate(parts))
