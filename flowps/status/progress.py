"""What a terminal shows while a run goes on: a live line on a terminal, log lines in any case."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from flowps.errors import OutputError
from flowps.status.event import Event, Finished, Progress
from flowps.status.lines import auc, lines


class PlainConsole(Console):
    """Prints names of columns and files as they are, without markup and emoji. A closed output is an error like any other."""

    def __init__(self, **settings: Any) -> None:
        # Not as Jupyter's displays, of which every line would be one.
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, "force_jupyter": False, **settings})

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich prints; a full disk is an OutputError."""
        try:
            super().print(*objects, **how)
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror or error}") from error

    def on_broken_pipe(self) -> None:
        """Whoever read the output, like `head`, has gone. Rich would end the process."""
        self.quiet = True
        # Or Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        raise OutputError("standard output was closed by its reader; to run on unread, send it to a file")


class Display:
    """A subscriber that prints. A context manager: the live line lives inside.

    Parameters
    ----------
    console : where to print.
    live : show the live line; for terminals.
    epochs, epoch_examples : what there is to do.
    """

    def __init__(self, console: Console, live: bool, epochs: int, epoch_examples: int) -> None:
        self._console, self._live = console, live
        self._epochs = epochs
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        ]
        self._bar = RichProgress(*columns, console=console, transient=True, expand=True)
        self._task = self._bar.add_task("starting", total=epochs * epoch_examples, figures="")

    def __enter__(self) -> Display:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Progress):
            figures = (
                f"step {event.step}  {event.examples_per_s:,.0f} examples/sec  queue {event.queue_depth}  "
                f"loss {event.loss:.4f}  auc {auc(event.auc)}"
            )
            self._bar.update(
                self._task, description=f"epoch {event.epoch}/{self._epochs}", completed=event.examples, figures=figures
            )
        if isinstance(event, Finished) and not event.stopped:
            self._bar.update(self._task, completed=event.examples)
        for line in lines(event):
            # Plain text: a log line is grepped, and must be the same on a terminal and in a file.
            self._console.print(Text(line), soft_wrap=True)
