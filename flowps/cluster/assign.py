"""Which worker gets which role.

A decision without I/O: offers in, `Assignment` out, or a MissingWorkersError that says what is missing and what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowps.cluster.offer import ROLES, Offer
from flowps.errors import MissingWorkersError


@dataclass(frozen=True)
class Assignment:
    """Who does what.

    shards, trainers   the worker of each
    hubs               the workers that may run hub tasks now
    hub_resources      what a hub task asks of Dask: any worker that offers it may run it, one that joins later too
    remarks            what was chosen without being asked, for people
    """

    shards: tuple[Offer, ...]
    trainers: tuple[Offer, ...]
    hubs: tuple[Offer, ...]
    hub_resources: dict[str, float]
    remarks: tuple[str, ...] = ()

    @property
    def hub_placing(self) -> dict[str, Any]:
        """Keywords of Dask's `submit` that send a hub task where it may run."""
        if self.hub_resources:
            return {"resources": self.hub_resources}
        return {"workers": [hub.address for hub in self.hubs], "allow_other_workers": True}

    def may_read(self, workers: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether any of these workers, as Dask describes them, may run hub tasks."""
        return any(
            all(worker["resources"].get(name, 0) >= amount for name, amount in self.hub_resources.items())
            for worker in workers.values()
        )

    @property
    def is_one_process(self) -> bool:
        """Whether every trainer can call every shard directly."""
        return len({offer.process for offer in (*self.shards, *self.trainers)}) == 1

    def has_process(self, shard: int) -> bool:
        """Whether the shard shares its process with no other role."""
        own = self.shards[shard].process
        return [offer.process for offer in (*self.shards, *self.trainers, *self.hubs)].count(own) == 1

    @property
    def is_read_here(self) -> bool:
        """Whether partitions are decoded in the process of the only trainer."""
        return {offer.process for offer in (*self.hubs, *self.trainers)} == {self.trainers[0].process}

    @property
    def hub_threads(self) -> int:
        """Hub tasks that can run at once."""
        threads = (min(hub.threads, hub.resources["HUB"]) if self.hub_resources else hub.threads for hub in self.hubs)
        return max(1, int(sum(threads)))


def assign(offers: Sequence[Offer], num_shards: int, num_trainers: int) -> Assignment:
    """Give every role to a worker that offers it as a Dask resource.

    PS = n is room for n shards, TRAINER for one trainer whatever its number (a trainer needs a process of its own), HUB = n for n
    hub tasks at once. Shards go where most room is left, trainers first where there is a GPU. When no worker declares any of the
    three, every worker may do anything: the first ones train, the others, if there are any, hold the shards and read.
    """
    if not offers:
        raise MissingWorkersError(
            "the cluster has no workers: start some, as in dask worker SCHEDULER --resources 'HUB=2 PS=1 TRAINER=1', or raise "
            "cluster.wait_s if they are on their way"
        )
    if not any(offer.resources.get(role) for offer in offers for role in ROLES):
        return _by_default(offers, num_shards, num_trainers)
    able = {role: [offer for offer in offers if offer.resources.get(role, 0) >= 1] for role in ROLES}
    room = {offer.address: int(offer.resources["PS"]) for offer in able["PS"]}
    missing = []
    if sum(room.values()) < num_shards:
        missing.append(
            f"{num_shards} PS {_plural('shard', num_shards)} requested (ps.num_shards), workers offer {sum(room.values())}: "
            "start a worker with --resources PS=1"
        )
    trainers = _trainers(able["TRAINER"], num_trainers)
    if len(trainers) < num_trainers:
        missing.append(
            f"{num_trainers} {_plural('trainer', num_trainers)} requested (trainer.count), {len(trainers)} "
            f"worker {_plural('process', len(trainers))} offer TRAINER{_busy(able['TRAINER'])}: start a worker process with "
            "--resources TRAINER=1 for each"
        )
    if not able["HUB"]:
        missing.append("no worker offers HUB: start a worker with --resources HUB=2, for two hub tasks at once")
    if missing:
        raise MissingWorkersError("; ".join(missing))
    shards = []
    for _ in range(num_shards):
        chosen = max(able["PS"], key=lambda offer: room[offer.address])  # the first of those with most
        room[chosen.address] -= 1
        shards.append(chosen)
    return Assignment(tuple(shards), tuple(trainers), tuple(able["HUB"]), {"HUB": 1})


def reassign(offers: Sequence[Offer], assignment: Assignment, lost: Collection[int]) -> Assignment:
    """The assignment with other workers for the shards `lost`, those that have most room; everything else stays where it is."""
    shards = list(assignment.shards)
    kept = [offer.address for k, offer in enumerate(shards) if k not in lost]
    training = {offer.process for offer in assignment.trainers}
    if assignment.hub_resources:  # workers declare what they offer
        room = {offer.address: int(offer.resources.get("PS", 0)) - kept.count(offer.address) for offer in offers}
        able = [offer for offer in offers if room[offer.address] > 0]
        missing = len(lost) - sum(room[offer.address] for offer in able)
        if missing > 0:
            raise MissingWorkersError(
                f"{missing} PS {_plural('shard', missing)} to be started anew, and no worker has room for "
                f"{'it' if missing == 1 else 'them'}: start a worker with --resources PS=1"
            )
    else:
        able = [offer for offer in offers if offer.process not in training]
        room = {offer.address: -kept.count(offer.address) for offer in able}
        if not able:
            raise MissingWorkersError("no worker is left for a shard besides those that train: start another")
    for k in sorted(lost):
        shards[k] = max(able, key=lambda offer: room[offer.address])
        room[shards[k].address] -= 1
    return replace(assignment, shards=tuple(shards))


def _by_default(offers: Sequence[Offer], num_shards: int, num_trainers: int) -> Assignment:
    trainers = _trainers(offers, num_trainers)
    if len(trainers) < num_trainers:
        raise MissingWorkersError(
            f"{num_trainers} {_plural('trainer', num_trainers)} requested (trainer.count), the cluster has {len(trainers)} "
            f"worker {_plural('process', len(trainers))}{_busy(offers)}, and each trainer needs one of its own: start more"
        )
    others = [offer for offer in offers if offer not in trainers] or list(offers)
    shards = [others[k % len(others)] for k in range(num_shards)]
    remarks: tuple[str, ...] = ()
    if len(offers) > 1:
        remarks = (
            f"no worker declares HUB, PS or TRAINER (--resources): training on {_names(trainers)}, "
            f"shards on {_names(shards)}, reading on {_names(others)}",
        )
    return Assignment(tuple(shards), tuple(trainers), tuple(others), {}, remarks)


def _trainers(offers: Sequence[Offer], count: int) -> list[Offer]:
    """Up to `count` workers, each in another process and training for no other run, those with a GPU first."""
    found: dict[str, Offer] = {}
    free = [offer for offer in offers if not offer.trains]
    for offer in sorted(free, key=lambda offer: -min(1.0, offer.resources.get("GPU", 0))):
        found.setdefault(offer.process, offer)
    return list(found.values())[:count]


def _busy(offers: Sequence[Offer]) -> str:
    busy = len({offer.process for offer in offers if offer.trains})
    return f" ({busy} more {'is' if busy == 1 else 'are'} training for another run)" if busy else ""


def _names(offers: Sequence[Offer]) -> str:
    found = list(dict.fromkeys(offer.name for offer in offers))
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}{'e' * word.endswith('s')}s"
