"""Who gets which role: by what workers declare, by default where none declares anything, and what is said when some miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowps.cluster.assign import Assignment, assign, reassign
from flowps.cluster.offer import ROLES, Offer
from flowps.errors import ClusterError, MissingWorkersError


def worker(name: str, process: str = "", threads: int = 4, **resources: float) -> Offer:
    """A worker in a process of its own, or in the one named."""
    return Offer(name, f"tcp://{name}:1", f"{name}.net", threads, 1 << 30, process or f"{name}:1", resources)


def names(offers: Sequence[Offer]) -> list[str]:
    return [offer.name for offer in offers]


def roles(found: Assignment) -> tuple[list[str], list[str], list[str]]:
    return names(found.hubs), names(found.shards), names(found.trainers)


# --- by resources -----------------------------------------------------------------------------------------------------


def test_each_role_goes_where_it_is_offered() -> None:
    offers = [worker("a", HUB=2), worker("b", PS=1), worker("c", TRAINER=1), worker("d", HUB=4), worker("e", PS=1), worker("f")]
    found = assign(offers, 2, 1)
    assert roles(found) == (["a", "d"], ["b", "e"], ["c"])
    assert found.remarks == ()
    assert not found.is_one_process


def test_a_worker_may_have_several_roles() -> None:
    found = assign([worker("all", HUB=2, PS=2, TRAINER=1)], 2, 1)
    assert roles(found) == (["all"], ["all", "all"], ["all"])
    assert found.is_one_process
    assert found.is_read_here


def test_shards_go_where_most_room_is_left() -> None:
    offers = [worker("hub", HUB=1, TRAINER=1), worker("small", PS=1), worker("large", PS=3)]
    assert names(assign(offers, 4, 1).shards) == ["large", "large", "small", "large"]
    assert names(assign(offers, 1, 1).shards) == ["large"]


def test_trainers_go_first_where_a_gpu_is() -> None:
    offers = [worker("hub", HUB=1, PS=1), worker("a", TRAINER=1), worker("b", TRAINER=1, GPU=2), worker("c", TRAINER=1, GPU=1)]
    assert names(assign(offers, 1, 1).trainers) == ["b"]
    assert names(assign(offers, 1, 3).trainers) == ["b", "c", "a"]


def test_a_process_that_trains_for_another_run_is_left_to_it() -> None:
    busy = replace(worker("a", TRAINER=1), trains=True)
    offers = [worker("hub", HUB=1, PS=1), busy, worker("b", TRAINER=1)]
    assert names(assign(offers, 1, 1).trainers) == ["b"]
    with pytest.raises(MissingWorkersError, match=r"1 worker process offer TRAINER \(1 more is training for another run\): "):
        assign(offers, 1, 2)
    with pytest.raises(MissingWorkersError, match=r"the cluster has 0 worker processes \(1 more is training for another run\)"):
        assign([replace(worker("a"), trains=True)], 1, 1)


def test_a_gpu_alone_is_no_role() -> None:
    with pytest.raises(MissingWorkersError, match="no worker offers HUB"):
        assign([worker("a", PS=1, TRAINER=1), worker("b", GPU=1)], 1, 1)


def test_hub_tasks_run_on_whoever_offers_hub_also_if_it_joins_later() -> None:
    found = assign([worker("a", threads=2, HUB=8), worker("b", threads=8, HUB=3), worker("c", PS=1, TRAINER=1)], 1, 1)
    assert found.hub_placing == {"resources": {"HUB": 1}}
    assert found.hub_threads == 2 + 3  # no more than threads, no more than offered


ALL = (worker("hub", HUB=1), worker("trainer", TRAINER=1), worker("ps-0", PS=1), worker("ps-1", PS=1))
MISSING = {
    "workers": ([], 1, 1, "the cluster has no workers: start some, as in dask worker SCHEDULER --resources 'HUB=2 PS=1 TRAINER=1'"),
    "shards": (ALL, 3, 1, "3 PS shards requested (ps.num_shards), workers offer 2: start a worker with --resources PS=1"),
    "a shard": (ALL[:2], 1, 1, "1 PS shard requested (ps.num_shards), workers offer 0: start a worker with --resources PS=1"),
    "half a shard": ((*ALL[:2], worker("half", PS=0.5)), 1, 1, "1 PS shard requested (ps.num_shards), workers offer 0"),
    "trainers": (
        ALL, 1, 2,
        "2 trainers requested (trainer.count), 1 worker process offer TRAINER: start a worker process with --resources TRAINER=1 "
        "for each",
    ),
    "a process for each trainer": (
        (*ALL, worker("twin", process="trainer:1", TRAINER=1)), 1, 2, "2 trainers requested (trainer.count), 1 worker process",
    ),
    "hubs": (ALL[1:], 1, 1, "no worker offers HUB: start a worker with --resources HUB=2, for two hub tasks at once"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_said_with_what_to_do(what: str) -> None:
    offers, num_shards, num_trainers, said = MISSING[what]
    with pytest.raises(MissingWorkersError) as refusal:
        assign(offers, num_shards, num_trainers)
    assert str(refusal.value).startswith(said)
    assert isinstance(refusal.value, ClusterError)


def test_all_that_is_missing_is_said_at_once() -> None:
    with pytest.raises(MissingWorkersError) as refusal:
        assign([worker("a", HUB=0, PS=1)], 2, 1)
    said = str(refusal.value).split("; ")
    assert [line.split(":")[0] for line in said] == [
        "2 PS shards requested (ps.num_shards), workers offer 1",
        "1 trainer requested (trainer.count), 0 worker processes offer TRAINER",
        "no worker offers HUB",
    ]


# --- by default -------------------------------------------------------------------------------------------------------


def test_one_worker_that_declares_nothing_does_everything() -> None:
    found = assign([worker("only")], 3, 1)
    assert roles(found) == (["only"], ["only"] * 3, ["only"])
    assert found.is_one_process
    assert found.remarks == ()  # nothing was chosen


def test_of_several_one_trains_and_the_others_hold_shards_and_read_and_it_is_said() -> None:
    found = assign([worker("a"), worker("b", threads=3), worker("c", threads=2)], 3, 1)
    assert roles(found) == (["b", "c"], ["b", "c", "b"], ["a"])
    assert found.remarks == ("no worker declares HUB, PS or TRAINER (--resources): training on a, shards on b, c, reading on b, c",)
    assert found.hub_placing == {"workers": ["tcp://b:1", "tcp://c:1"], "allow_other_workers": True}
    assert found.hub_threads == 5
    assert not found.is_read_here


def test_many_names_are_cut() -> None:
    found = assign([worker(f"w{k}") for k in range(7)], 1, 1)
    assert found.remarks[0].endswith("training on w0, shards on w1, reading on w1, w2, w3, w4 and 2 more")


def test_other_resources_declare_no_role() -> None:
    found = assign([worker("a", MEMORY=1e9), worker("b", GPU=1), worker("c", HUB=0)], 1, 1)
    assert roles(found) == (["a", "c"], ["a"], ["b"])


def test_as_many_trainers_as_processes_leave_the_rest_to_all() -> None:
    found = assign([worker("a"), worker("b")], 2, 2)
    assert roles(found) == (["a", "b"], ["a", "b"], ["a", "b"])


def test_each_trainer_needs_a_process_by_default_too() -> None:
    with pytest.raises(MissingWorkersError) as refusal:
        assign([worker("a", process="one:1"), worker("b", process="one:1")], 1, 2)
    assert str(refusal.value) == (
        "2 trainers requested (trainer.count), the cluster has 1 worker process, and each trainer needs one of its own: start more"
    )


# --- whatever is offered ----------------------------------------------------------------------------------------------

some = st.sampled_from([0, 0.5, 1, 2, 3])
OFFERS = st.lists(st.tuples(some, some, some, st.integers(0, 3)), min_size=1, max_size=6)


@given(OFFERS, st.integers(1, 5), st.integers(1, 3))
def test_nobody_gets_what_it_has_not_offered(
    drawn: list[tuple[float, float, float, int]], num_shards: int, num_trainers: int
) -> None:
    offers = [
        worker(f"w{k}", process=f"p{process}", HUB=hub, PS=ps, TRAINER=trainer)
        for k, (hub, ps, trainer, process) in enumerate(drawn)
    ]  # fmt: skip
    declared = any(offer.resources[role] for offer in offers for role in ROLES)
    room = sum(int(offer.resources["PS"]) for offer in offers)
    processes = {offer.process for offer in offers if offer.resources["TRAINER"] >= 1 or not declared}
    has_hub = any(offer.resources["HUB"] >= 1 for offer in offers)
    enough = len(processes) >= num_trainers and (not declared or (room >= num_shards and has_hub))
    try:
        found = assign(offers, num_shards, num_trainers)
    except MissingWorkersError:
        assert not enough
        return
    assert enough
    assert (len(found.shards), len(found.trainers)) == (num_shards, num_trainers)
    assert len({trainer.process for trainer in found.trainers}) == num_trainers
    assert found.hubs
    if declared:
        assert all(found.shards.count(offer) <= offer.resources["PS"] for offer in offers)
        assert all(offer.resources["TRAINER"] >= 1 for offer in found.trainers)
        assert all(offer.resources["HUB"] >= 1 for offer in found.hubs)


# --- shards that were lost ----------------------------------------------------------------------------------------------


def test_a_lost_shard_goes_where_room_is_left() -> None:
    hub, small, large = worker("hub", HUB=1, TRAINER=1), worker("small", PS=1), worker("large", PS=3)
    before = assign([hub, small, large], 4, 1)
    anew = replace(small, address="tcp://small:2")
    found = reassign([hub, anew, large], before, {2})
    assert found.shards == (large, large, anew, large)
    assert roles(found)[::2] == roles(before)[::2]


def test_a_lost_shard_waits_where_no_room_is_left() -> None:
    hub, small, large = worker("hub", HUB=1, TRAINER=1), worker("small", PS=1), worker("large", PS=3)
    before = assign([hub, small, large], 4, 1)
    with pytest.raises(MissingWorkersError, match="1 PS shard to be started anew, and no worker has room for it: start a worker"):
        reassign([hub, large], before, {2})
    with pytest.raises(MissingWorkersError, match="3 PS shards to be started anew, and no worker has room for them"):
        reassign([hub, small], before, {0, 1, 3})


def test_a_lost_shard_goes_to_any_worker_that_does_not_train_where_none_declares_anything() -> None:
    first, second, third = worker("a"), worker("b"), worker("c")
    before = assign([first, second, third], 3, 1)
    assert names(before.shards) == ["b", "c", "b"]
    assert names(reassign([first, second], before, {1}).shards) == ["b", "b", "b"]
    assert names(reassign([first, third], before, {0, 2}).shards) == ["c", "c", "c"]
    with pytest.raises(MissingWorkersError, match="no worker is left for a shard besides those that train"):
        reassign([first], before, {0, 1, 2})
