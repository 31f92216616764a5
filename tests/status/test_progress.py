"""What a person sees: log lines anywhere, and the live line on a terminal."""

from __future__ import annotations

import re
from io import StringIO

import msgspec
import pytest
from rich.console import Console

from flowps.status.event import Event
from flowps.status.lines import lines
from flowps.status.progress import Display
from tests.status.samples import EVALUATED, FINISHED, INTERVAL, PROGRESS, REPORT, STARTED, VERDICT

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(console: Console, live: bool, *events: Event, epochs: int = 2, epoch_examples: int = 2_662_400) -> str:
    """What the console's file holds after the events."""
    with Display(console, live, epochs, epoch_examples) as display:
        for event in events:
            display(event)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def terminal(width: int = 120) -> Console:
    return Console(force_terminal=True, file=StringIO(), width=width)


def drawn(output: str) -> list[str]:
    """Every line ever drawn, without colours and cursor movements."""
    return [CONTROL.sub("", line) for line in re.split(r"[\r\n]+", output)]


@pytest.mark.parametrize("live", [True, False])
def test_elsewhere_there_are_plain_log_lines(live: bool):
    console = Console(file=StringIO(), force_terminal=False, width=80)
    output = shown(console, live, STARTED, PROGRESS, INTERVAL, REPORT, EVALUATED, FINISHED)
    expected = [line for event in (STARTED, INTERVAL, REPORT, EVALUATED, FINISHED) for line in lines(event)]
    found = output.splitlines()
    assert [line for line in found if line in expected] == expected, "each on a line of its own, not wrapped at 80"
    assert "\x1b" not in output
    if not live:
        assert found == expected


def test_log_lines_are_the_same_on_a_terminal():
    output = shown(terminal(80), True, PROGRESS, INTERVAL, REPORT)
    found = drawn(output)
    for line in [*lines(INTERVAL), *lines(REPORT)]:
        assert line in found


def test_brackets_in_a_log_line_are_no_markup():
    verdict = msgspec.structs.replace(VERDICT, evidence="[bold]see[/bold] slot[0]")
    event = msgspec.structs.replace(REPORT, verdict=verdict)
    output = shown(Console(file=StringIO(), force_terminal=False), False, event)
    assert f"[RunStatus]: {verdict}" in output.splitlines()
    assert "[bold]see[/bold] slot[0]" in str(verdict)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_live_line_holds_epoch_step_rate_queue_loss_and_auc(width: int):
    event = msgspec.structs.replace(PROGRESS, step=12_300, examples_per_s=240_000.4, queue_depth=4)
    output = shown(terminal(width), True, event)
    line = next(line for line in drawn(output) if "step" in line)
    for figure in ("epoch 1/2", "step 12300", "240,000 examples/sec", "queue 4", "loss 0.4512", "auc 0.6715"):
        assert figure in line
    assert len(line) <= width


def test_the_live_line_moves_on():
    second = msgspec.structs.replace(PROGRESS, epoch=2, step=2000, auc=None)
    output = shown(terminal(), True, PROGRESS, second)
    line = next(line for line in reversed(drawn(output)) if "step" in line)
    assert "epoch 2/2" in line
    assert "step 2000" in line
    assert "auc n/a" in line


def test_the_live_line_leaves_no_trace():
    output = shown(terminal(), True, PROGRESS)
    assert output.endswith("\x1b[1A\x1b[2K"), "one line up and erased"
    assert "\x1b[?25l" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is back"


def test_no_live_line_when_not_asked_for():
    output = shown(terminal(), False, PROGRESS, INTERVAL)
    assert output.splitlines() == list(lines(INTERVAL))


def test_the_bar_is_full_at_the_end_and_stays_where_a_stopped_run_left_it():
    console = terminal()
    for stopped, share in ((False, 1.0), (True, 0.25)):
        display = Display(console, False, 2, FINISHED.examples)
        with display:
            display(msgspec.structs.replace(PROGRESS, examples=FINISHED.examples // 2))
            display(msgspec.structs.replace(FINISHED, stopped=stopped, examples=2 * FINISHED.examples))
        (task,) = display._bar.tasks
        assert task.completed / task.total == share


def test_the_cursor_comes_back_after_an_error():
    console = terminal()
    with pytest.raises(KeyError), Display(console, True, 1, 10):
        raise KeyError
    assert isinstance(console.file, StringIO)
    assert "\x1b[?25h" in console.file.getvalue()
