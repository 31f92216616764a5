"""`Watch`: whether the workers that a run needs are still there. A worker that has gone, or gives no sign of life, is lost.

Covers what the scheduler knows of workers, and taking one that hangs from the cluster. What the run makes of a loss is `run`'s
business. Called by the thread that watches the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import distributed

from flowps.cluster.assign import Assignment
from flowps.cluster.offer import Offer, workers_now
from flowps.config import Cluster
from flowps.errors import ClusterError, LostRoleError

WATCH_S = 2.0  # between two looks at whether the workers are still there
_ANSWER_S = 60.0  # for the scheduler
_RESTART_S = 10.0  # for a nanny to end a worker that does not answer


class Watch:
    """Over the workers of `assignment`, which may change; `remark` is told what people should know."""

    def __init__(
        self, client: distributed.Client, knobs: Cluster, assignment: Assignment, remark: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._client, self._knobs, self._remark = client, knobs, remark
        self.assignment = assignment
        self._address = client.scheduler.address
        self._unread_since: float | None = None  # when it was seen first that partitions wait and nobody is there to read them
        # Of each worker its last sign of life, by the scheduler's clock, and when it was seen first, by ours.
        self._signs_of_life: dict[str, tuple[float, float]] = {}

    def there(self) -> Mapping[str, Mapping[str, Any]]:
        """The workers that the scheduler still has; none, where it does not answer."""
        if self._client.status != "running":  # Dask would wait for it to come back
            return {}
        try:
            return workers_now(self._client, timeout_s=_ANSWER_S)
        except (OSError, TimeoutError, RuntimeError):  # Dask's errors of a connection that is lost, or was given up
            return {}

    def check(self) -> None:
        """Raise LostRoleError when a worker that holds a shard or a trainer has gone; ClusterError when nobody reads any more."""
        there = self.there()
        if not there:
            raise ClusterError(f"the scheduler at {self._address} does not answer any more, or has lost all its workers")
        for what, offers in (("shard", self.assignment.shards), ("trainer", self.assignment.trainers)):
            for k, offer in enumerate(offers):
                if offer.address not in there:
                    raise LostRoleError(
                        f"worker {offer.name} at {offer.address} was lost, and {what} {k} with it: look into its log; was it "
                        "killed for its memory?",
                        self._only_shards(offer),
                    )
                silent_s = self._silent_s(offer.address, there[offer.address])
                if silent_s > self._knobs.lost_after_s:
                    self._expel(offer.address, there[offer.address])
                    raise LostRoleError(
                        f"worker {offer.name} at {offer.address} has given no sign of life for {silent_s:.0f} s, and {what} {k} is "
                        "lost with it; was it stopped, or its machine overloaded? (cluster.lost_after_s waits longer)",
                        self._only_shards(offer),
                    )
        self._check_silent_hubs(there)
        self._check_hubs(there)

    def _check_silent_hubs(self, there: Mapping[str, Mapping[str, Any]]) -> None:
        """Take workers that only read and hang from the cluster, so that Dask reads again what they had; the run goes on."""
        holders = {offer.address for offer in (*self.assignment.shards, *self.assignment.trainers)}
        for address, worker in there.items():
            if address in holders or not self.assignment.may_read({address: worker}):
                continue
            silent_s = self._silent_s(address, worker)
            if silent_s > self._knobs.lost_after_s:
                self._expel(address, worker)
                self._remark(
                    f"worker {worker['name']} at {address} has given no sign of life for {silent_s:.0f} s: what it had to read is "
                    "read by others (cluster.lost_after_s waits longer)"
                )

    def _only_shards(self, lost: Offer) -> tuple[int, ...]:
        """The shards of a worker; none if it has a trainer too."""
        assignment = self.assignment
        if lost.process in {offer.process for offer in assignment.trainers}:
            return ()
        return tuple(k for k, offer in enumerate(assignment.shards) if offer.address == lost.address)

    def _silent_s(self, address: str, worker: Mapping[str, Any]) -> float:
        """Seconds since a worker's last sign of life, as far as was looked."""
        now, sign = time.monotonic(), float(worker["last_seen"])
        if self._signs_of_life.get(address, (None,))[0] != sign:
            self._signs_of_life[address] = sign, now
        return now - self._signs_of_life[address][1]

    def _expel(self, address: str, worker: Mapping[str, Any]) -> None:
        """Take a worker that does not answer from the cluster; its nanny, if it has one, starts it anew.

        If it wakes, nobody listens: the next attempt has other addresses and another token.
        """
        with suppress(Exception):  # the loss is the error to raise
            if worker["nanny"]:
                self._client.restart_workers([address], timeout=_RESTART_S, raise_for_error=False)
                return

            async def remove(dask_scheduler: Any) -> None:
                await dask_scheduler.remove_worker(address, stimulus_id="flowps-lost", close=False)

            self._client.run_on_scheduler(remove)

    def _check_hubs(self, there: Mapping[str, Mapping[str, Any]]) -> None:
        """Say so when partitions wait and no worker may read them; give up when none has come within cluster.wait_s."""
        if self.assignment.may_read(there) or not self._waits_for_hub():
            self._unread_since = None
            return
        wait_s, now = self._knobs.wait_s, time.monotonic()
        if self._unread_since is None:
            self._unread_since = now
            self._remark(
                f"all workers that offer HUB are gone: waiting up to {wait_s:g} s for one to read on; start a worker with "
                "--resources HUB=2"
            )
        elif now - self._unread_since >= wait_s:
            raise ClusterError(
                f"all workers that offer HUB are gone, and none has come within {wait_s:g} s: look into their logs, start one with "
                "--resources HUB=2, or let the run wait longer with cluster.wait_s"
            )

    def _waits_for_hub(self) -> bool:
        """Whether a hub task waits for a worker that may run it."""
        # A lambda goes there whole: the scheduler's machine needs no flowps.
        waiting: bool = self._client.run_on_scheduler(
            lambda dask_scheduler: any("HUB" in (task.resource_restrictions or ()) for task in dask_scheduler.unrunnable)
        )
        return waiting
