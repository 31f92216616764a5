"""What `make faults` has found: how long a run takes to train again after something of it was killed.

The kills themselves are tests, in tests/faults/long_faults.py; this is their result, and its table.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Kill:
    """One of them.

    recovery      checkpoint.recovery of the run
    role          that was killed, or stopped (SIGSTOP)
    while_saving  whether files of a checkpoint were there whose manifest was not
    step          of the next checkpoint
    seconds       until the next step was printed; None for a hub, without which training goes on
    """

    recovery: str
    role: str
    while_saving: bool
    step: int
    seconds: float | None

    def __str__(self) -> str:
        saving = ", while a checkpoint was written" if self.while_saving else ""
        again = "training goes on" if self.seconds is None else f"training again after {self.seconds:.1f} s"
        return f"{self.role}{saving}: {again}, saved at step {self.step:,}"

    def to_json(self) -> dict[str, object]:
        """Its fields."""
        return asdict(self)


def markdown(result: dict[str, Any]) -> str:
    """By recovery and role, how many were killed and how long it took, as a Markdown table."""
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kill in result["kills"]:
        of.setdefault((kill["recovery"], kill["role"]), []).append(kill)
    lines = [
        "| `checkpoint.recovery` | killed | times | – while a checkpoint was written | training again after, median | worst |",
        "|---|---|---|---|---|---|",
    ]
    for (recovery, role), kills in sorted(of.items(), reverse=True):
        seconds = [kill["seconds"] for kill in kills if kill["seconds"] is not None]
        saving = sum(kill["while_saving"] for kill in kills)
        took = f"{statistics.median(seconds):.1f} s | {max(seconds):.1f} s" if seconds else "it goes on | "
        lines.append(f"| {recovery} | {role} | {len(kills)} | {saving} | {took} |")
    return "\n".join(lines)
