"""A trainer's side of a shard that is lost and comes back elsewhere while training goes on (`checkpoint.recovery = "partial"`).

The command calls `lose` and `reroute` on every trainer's worker; the trainer's task registers what they act on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flowps.ps.replaceable import Closable, Replaceable


@dataclass(frozen=True)
class Ways:
    """From a trainer to its shards in other processes.

    connect   shard and address → its endpoint, once it has answered
    shards    those that have been reached, by number
    """

    connect: Callable[[int, str], Closable]
    shards: dict[int, Replaceable] = field(default_factory=dict)

    def cut(self, step: int) -> None:
        """See Replaceable."""
        for shard in self.shards.values():
            shard.cut(step)


# Of the runs with a trainer in this process, once it has reached all shards.
_ways: dict[str, Ways] = {}


@contextmanager
def registered(run_id: str, ways: Ways) -> Iterator[None]:
    """Let the command replace shards of a run."""
    _ways[run_id] = ways
    try:
        yield
    finally:
        _ways.pop(run_id, None)


def lose(run_id: str, shards: Sequence[int]) -> bool:
    """These shards are gone, let whoever asks them wait. Run on the trainer's worker; returns whether all of them can wait."""
    ways = _ways.get(run_id)
    if ways is None or not all(number in ways.shards for number in shards):
        return False
    for number in shards:
        ways.shards[number].lose()
    return True


def reroute(run_id: str, number: int, address: str, step: int) -> int:
    """The shard is at `address` now, with its rows of the cut after `step`. Run on the trainer's worker.

    Returns of how many samples of this trainer its rows have not learned.
    """
    ways = _ways[run_id]
    return ways.shards[number].replace(ways.connect(number, address), step)
