"""`show_run`: what the command does to show a run on the scheduler's dashboard. Whatever becomes of that, the run goes on."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from flowps.checkpoint.ledger import Ledger
from flowps.cluster.dashboard.board import PAGE, register
from flowps.cluster.dashboard.courier import Courier
from flowps.cluster.dashboard.follower import Follower
from flowps.cluster.dashboard.glance import Glance
from flowps.cluster.offer import scheduler_lacks
from flowps.cluster.plan import Plan
from flowps.errors import StoppedError
from flowps.status.event import Event, Finished


class Shown:
    """A run that is shown: a subscriber of its events, for the thread that watches it."""

    def __init__(self, follower: Follower, courier: Courier | None, seconds: Callable[[], float]) -> None:
        self._follower, self._courier, self._seconds = follower, courier, seconds
        self._stopped = False

    def __call__(self, event: Event) -> None:
        """Show one event; returns at once."""
        if self._courier is None:
            return
        if isinstance(event, Finished):
            self._stopped = event.stopped
        point = self._follower.see(event, self._seconds())
        self._courier.put(self._follower.glance, point)

    def conclude(self, ledger: Ledger) -> None:
        """The run has come to an end, with this ledger."""
        self._follower.conclude(ledger.explain())

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come of the run; `error`: what has ended it. Waits a little for the scheduler to hear of it."""
        if self._courier is None:
            return
        stopped = self._stopped or isinstance(error, StoppedError | KeyboardInterrupt)
        self._follower.end(self._seconds(), stopped, "" if error is None else str(error) or type(error).__name__)
        self._courier.put(self._follower.glance)
        self._courier.close()


@contextmanager
def show_run(
    client: Any, dashboard: str, plan: Plan, run_dir: Path, ledger: Ledger, say: Callable[[str], None]
) -> Iterator[Shown]:  # fmt: skip
    """Show a run while it goes on. Says where, or why it cannot be shown.

    dashboard   the address of Dask's; "": there is none, as far as the command knows
    ledger      at the beginning
    """
    config = plan.config
    glance = Glance(
        run_dir.name, str(run_dir), time.time(), config.epochs, config.epochs * plan.train_rows,
        config.trainer.in_flight * config.trainer.count, config.status.interval_s,
    )  # fmt: skip
    courier, began = None, time.monotonic()

    def seconds() -> float:
        return time.monotonic() - began

    if dashboard or config.cluster.scheduler:  # else none was asked for
        why = refusal(client)
        if why:
            say(f"no page of this run on the scheduler's dashboard: {why}")
        else:
            say(f"this run: {urljoin(dashboard or client.dashboard_link, PAGE)}")
            courier = Courier(client, uuid.uuid4().hex, glance, seconds)
    shown = Shown(Follower(glance, config.trainer.count, ledger), courier, seconds)
    try:
        yield shown
    except BaseException as error:
        shown.end(error)
        raise
    shown.end()


def refusal(client: Any) -> str:
    """Have the scheduler serve the page; why it does not, or else ""."""

    try:
        return scheduler_lacks(client) or str(client.run_on_scheduler(register))
    except Exception as error:  # whatever it is, of a scheduler that this command knows nothing of, the run can do without
        return f"{type(error).__name__}: {error}"
