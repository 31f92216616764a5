"""Logs as JSON: all that a run prints, one object a line, for collectors of logs.

Every object has `time` (ISO 8601, UTC), `level` (info, warning, error), `event` (what kind) and `message` (what is printed for
people, which may be several lines); an event of the run has its own fields besides. ASCII alone, so that no terminal or locale
breaks a line. Covers the console and the display that write them; the command chooses between these and those of `progress`.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from io import StringIO
from types import TracebackType
from typing import Any

import msgspec
from rich.table import Table

from flowps.status.event import Event, Remark
from flowps.status.lines import lines
from flowps.status.progress import PlainConsole

ANNOUNCEMENT = "Announcement"
_WIDTH = 160  # of tables


def json_line(level: str, event: str, message: str, **fields: object) -> str:
    """One object, without a line's end. NaN and infinity, which JSON does not have, are null."""
    content = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "event": event, "message": message}
    return json.dumps({**content, **_sound(msgspec.to_builtins(fields, str_keys=True))}, allow_nan=False)


class JsonConsole(PlainConsole):
    """Prints each call as an object of its own. A table is one, with its `rows` as objects too. Any thread may call it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"force_terminal": False, "color_system": None, "width": _WIDTH, **settings})

    def print(self, *objects: Any, **how: Any) -> None:
        """See PlainConsole."""
        shown, fields = StringIO(), {}
        for table in [of for of in objects if isinstance(of, Table)]:
            table.box = None  # lines between cells are for eyes
            fields = {"title": str(table.title or ""), "rows": _rows(table)}
        PlainConsole(file=shown, force_terminal=False, color_system=None, width=_WIDTH).print(*objects, **how)
        text = "\n".join(line.rstrip() for line in shown.getvalue().rstrip("\n").split("\n"))
        self.write(json_line("info", ANNOUNCEMENT, text, **fields))

    def write(self, line: str) -> None:
        """Print a line as it is."""
        super().print(line, soft_wrap=True)


class JsonDisplay:
    """A subscriber that prints every event for which there are lines. A context manager, as Display is."""

    def __init__(self, console: JsonConsole) -> None:
        self._console = console

    def __enter__(self) -> JsonDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def __call__(self, event: Event) -> None:
        """Show one event."""
        message = "\n".join(lines(event))
        if message:
            fields = msgspec.to_builtins(event, str_keys=True)
            kind = fields.pop("type")
            self._console.write(json_line("warning" if isinstance(event, Remark) else "info", kind, message, **fields))


def _rows(table: Table) -> list[dict[str, str]]:
    """Of each row: column's name → cell."""
    names = [str(column.header) for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _sound(value: Any) -> Any:
    """With None for numbers that are none."""
    if isinstance(value, dict):
        return {key: _sound(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_sound(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
