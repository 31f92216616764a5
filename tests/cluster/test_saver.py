"""The command's side of checkpoints, told of cuts by hand: what it has the shards do, and the ledger that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowps.checkpoint.ledger import Ledger
from flowps.checkpoint.manifest import ShardPart, best, found
from flowps.checkpoint.store import Store
from flowps.cluster.cut import checkpoint_name
from flowps.cluster.plan import Plan
from flowps.cluster.saver import NEGATIVES, Saver
from flowps.cluster.shard_role import SaveTask
from flowps.status.event import AtCut, Event, Remark, Saved, TrainerWritten
from tests.checkpoint.samples import part

RUN = "flowps-abcdef"


class Roles:
    """One shard, which has written when a test says so, and the trainers, who are let go on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.tasks: list[SaveTask] = []
        self.gone_on: list[int] = []
        self.is_slow = False

    def ask_shards(self, method: str, *arguments: object) -> list[Any]:
        if method == "save":
            (task,) = arguments
            assert isinstance(task, SaveTask)
            self.tasks.append(task)
            return [None]
        if self.is_slow:
            return [None]
        return [ShardPart([("user", 0, 1)], [{"rows": 5}], part(self._store, f"{self.tasks[-1].name}/shard-0"))]

    def go_on(self, step: int) -> None:
        self.gone_on.append(step)


class Told:
    """A saver with its roles."""

    def __init__(self, plan: Plan, folder: Path, url: str = "") -> None:
        self.store = Store(str(folder))
        self.store.prepare()
        self.roles, self.events = Roles(self.store), list[Event]()
        self.saver = Saver(plan, url or str(folder), RUN, Ledger(), self.events.append)

    def at(self, step: int, *, is_best: bool = False, last: bool = False, **more: Any) -> None:
        given = {"epoch": 0, "examples": 10 * step, "read": 10 * step, "taken": [("a", 0, 600, 10 * step)], **more}
        self.saver.see(AtCut(trainer=0, step=step, last=last, is_best=is_best, **given), self.roles)

    def write(self, step: int, is_best: bool = False) -> None:
        """The trainer has written its files."""
        name = checkpoint_name(RUN, step, is_best)
        files = [self.store.put(f"{name}/trainer/state.npz", b"state"), self.store.put(f"{name}/trainer/w.h5", b"weights")]
        self.saver.see(TrainerWritten(step, msgspec.to_builtins(files)), self.roles)
        self.saver.tick(self.roles)

    @property
    def saved(self) -> list[tuple[int, str]]:
        return [(event.step, event.kind) for event in self.events if isinstance(event, Saved)]


@pytest.fixture
def told(make_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Told]:
    def make(*knobs: tuple[str, object]) -> Told:
        return Told(make_plan(*knobs), tmp_path / "checkpoints")

    return make


# --- of a best evaluation -----------------------------------------------------------------------------------------------


def test_the_manifest_says_that_it_is_of_the_best_evaluation(told: Callable[..., Told]) -> None:
    run = told()
    run.at(8, is_best=True)
    run.write(8, is_best=True)
    run.at(16)
    run.write(16)
    assert run.roles.gone_on == [8, 16]
    assert [(of.manifest.step, of.manifest.is_best) for of in found(run.store) if of.manifest] == [(16, False), (8, True)]
    assert best(run.store, 8) is not None
    assert best(run.store, 16) is None


@pytest.mark.parametrize(("full_every", "kind", "since"), [(1, "full", None), (5, "delta", 19)])
def test_a_best_evaluation_right_after_a_cut_has_a_checkpoint_of_its_own(
    told: Callable[..., Told], full_every: int, kind: str, since: int | None
) -> None:
    """At the end of an epoch: the checkpoint before it knows nothing of the evaluation."""
    run = told(("checkpoint.full_every", full_every))
    run.at(19)
    run.write(19)
    run.at(19, is_best=True)
    run.write(19, is_best=True)
    run.at(19, last=True)
    assert not run.saver.is_writing, "the end right after a cut has none of its own"
    assert run.saved == [(19, "full"), (19, kind)]
    assert [task.since for task in run.roles.tasks] == [None, since]
    assert run.roles.gone_on == [19, 19, 19]
    manifest = best(run.store, 19)
    assert manifest is not None
    assert manifest.name.endswith("_best")
    assert run.saver.newest is not None
    assert run.saver.newest.last == manifest
    assert run.saver.ledger.adds_up


@pytest.mark.parametrize(("is_best", "last", "saved"), [(True, False, [8, 9]), (False, True, [8, 9]), (False, False, [8])])
def test_while_one_is_being_written_a_best_or_last_cut_waits_and_others_are_passed_over(
    told: Callable[..., Told], is_best: bool, last: bool, saved: list[int]
) -> None:
    run = told()
    run.roles.is_slow = True
    run.at(8)
    run.at(9, is_best=is_best, last=last)
    assert run.roles.gone_on == ([8] if is_best or last else [8, 9])
    assert [task.step for task in run.roles.tasks] == [8]
    run.roles.is_slow = False
    run.write(8)
    run.saver.tick(run.roles)
    assert run.roles.gone_on == [8, 9]
    if is_best or last:
        run.write(9, is_best=is_best)
    assert [step for step, _ in run.saved] == saved
    remarks = [event.text for event in run.events if isinstance(event, Remark)]
    assert remarks == ([] if len(saved) == 2 else ["no checkpoint after step 9: the one before is still being written"])


def test_old_ones_go_but_not_that_of_the_best_evaluation(told: Callable[..., Told]) -> None:
    run = told(("checkpoint.keep", 1))
    for step in (1, 2, 3, 4):
        run.at(step, is_best=step == 2)
        run.write(step, is_best=step == 2)
    assert [of.manifest.step for of in found(run.store) if of.manifest] == [4, 2]


# --- the ledger of samples left out -------------------------------------------------------------------------------------


def test_negatives_left_out_are_dropped_for_that_reason(told: Callable[..., Told]) -> None:
    """`read` is all that came, `taken` counts them too: they do not come again in this epoch."""
    run = told()
    run.at(4, examples=30, read=100, left_out=70, taken=[("a", 0, 600, 100)])
    assert run.saver.ledger == Ledger(
        read=100, trained=30, dropped={NEGATIVES: 70}, done=run.saver.ledger.done
    )  # fmt: skip
    assert run.saver.ledger.adds_up
    run.write(4)
    run.at(8, examples=200, read=600, left_out=400, taken=[("a", 0, 600, 600)])
    assert (run.saver.ledger.trained, run.saver.ledger.dropped) == (200, {"negatives": 400})
    run.write(8)
    run.at(9, epoch=1, examples=210, read=640, left_out=430, taken=[("a", 0, 600, 40)])
    ledger = run.saver.ledger
    assert (ledger.epoch, ledger.ended, ledger.read, ledger.trained, ledger.dropped) == (1, 600, 640, 210, {"negatives": 430})
    assert ledger.adds_up
    assert ledger.explain() == "ledger: 640 read = 210 trained + 430 dropped (430 negatives) + 0 replayed"


def test_a_run_that_goes_on_counts_what_was_left_out_before_too(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    before = Ledger(read=100, trained=30, dropped={NEGATIVES: 70, "other": 0}, ended=100)
    saver = Saver(make_plan(), "", RUN, before, lambda event: None)
    roles = Roles(Store(str(tmp_path)))
    saver.see(AtCut(0, 8, 0, 55, 60, [("a", 0, 600, 60)], False, left_out=35), roles)
    assert (saver.ledger.read, saver.ledger.trained, saver.ledger.dropped[NEGATIVES]) == (160, 55, 105)
    assert saver.ledger.adds_up


def test_what_was_looked_up_in_vain_at_a_stop_is_read_again_and_not_counted_as_left_out(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """Of several trainers: one of them had read 20 samples more, of which 15 were left out."""
    saver = Saver(make_plan(), "", RUN, Ledger(), lambda event: None)
    saver.see(
        AtCut(0, 8, 0, 30, 120, [("a", 0, 600, 100)], True, left_out=70), Roles(Store(str(tmp_path)))
    )  # fmt: skip
    ledger = saver.ledger
    assert (ledger.read, ledger.trained, ledger.dropped, ledger.replayed) == (120, 30, {NEGATIVES: 70}, 20)
    assert ledger.adds_up
