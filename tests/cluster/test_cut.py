"""A trainer's side of a cut: it waits for every cut anew, and each cut's files have a name of their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowps.checkpoint.store import Store
from flowps.cluster import cut as module
from flowps.cluster.cut import Gate, TrainerCuts, checkpoint_name, gate_of
from flowps.errors import StoppedError
from flowps.hub.partition import Partition
from flowps.status.event import AtCut, Event, TrainerWritten
from flowps.trainer.state import Cut, State

WAIT_S = 30.0  # how long a test waits for what must happen; never reached unless it fails


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_gate_opens_for_its_step_whether_or_not_somebody_waits_yet(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    gate.go_on(5)
    gate.wait(5)
    waiting = pool.submit(gate.wait, 8)
    gate.go_on(8)
    waiting.result(WAIT_S)


def test_a_second_cut_after_the_same_step_is_waited_for_anew(pool: ThreadPoolExecutor) -> None:
    """That of a best evaluation at the end of an epoch: else training would go on while the shards copy."""
    gate = Gate()
    for _ in range(2):
        gate.go_on(5)
        gate.wait(5)
    waiting = pool.submit(gate.wait, 5)
    gate.give_up()
    with pytest.raises(StoppedError, match="waiting at a cut: the run was given up"):
        waiting.result(WAIT_S)


def test_a_gate_that_is_given_up_lets_through_who_may_go_on_and_nobody_else(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    waiting = pool.submit(gate.wait, 3)
    gate.give_up()
    with pytest.raises(StoppedError):
        waiting.result(WAIT_S)
    gate.go_on(4)
    gate.wait(4)
    with pytest.raises(StoppedError):
        gate.wait(4)


# --- what is written --------------------------------------------------------------------------------------------------


def test_names_sort_by_step_and_tell_runs_and_best_ones_apart() -> None:
    assert checkpoint_name("flowps-0123456789ab", 12, is_best=False) == "step-000000012-6789ab"
    assert checkpoint_name("flowps-0123456789ab", 12, is_best=True) == "step-000000012-6789ab_best"


def cut_of(step: int, samples: int = 0, is_best: bool = False, last: bool = False) -> Cut:
    state = State(step, 10 * step, 0, 0, {"step/model/0": np.full(2, float(is_best))})
    return Cut(step, 0, 10 * step, samples, 10 * step, last, state, 3, is_best)


def cuts_of(folder: Path, said: list[Event]) -> TrainerCuts:
    run_id = f"flowps-{folder.name[-12:]}"

    def model_to(path: Path) -> Any:
        return path.write_bytes(b"weights")

    def send(event: Event) -> None:
        said.append(event)
        if isinstance(event, AtCut):  # as the command does when the shards have copied their rows
            gate_of(run_id).go_on(event.step)

    return TrainerCuts(run_id, 0, str(folder), send, model_to)


def test_the_cut_of_a_best_evaluation_has_files_of_its_own(tmp_path: Path) -> None:
    """Also where there has just been one after the same step; the end of the run right after a cut has none."""
    said: list[Event] = []
    with cuts_of(tmp_path, said) as cuts:
        for cut in (cut_of(7), cut_of(7, is_best=True), cut_of(7, last=True), cut_of(9, is_best=True), cut_of(9, last=True)):
            cuts.cut(cut)
    written = [event for event in said if isinstance(event, TrainerWritten)]
    assert [(event.step, event.error, len(event.files)) for event in written] == [(7, "", 2), (7, "", 2), (9, "", 2)]
    names = [event.files[0]["path"].partition("/")[0] for event in written]
    assert [name.endswith("_best") for name in names] == [False, True, True]
    assert len(set(names)) == 3
    values = [
        State.of_bytes((tmp_path / event.files[0]["path"]).read_bytes()).arrays["step/model/0"][0] for event in written
    ]  # fmt: skip
    assert values == [0.0, 1.0, 1.0]
    assert sorted(Store(str(tmp_path)).folders()) == sorted(names)


def test_a_cut_says_what_was_left_out_and_how_far_partitions_are(tmp_path: Path) -> None:
    said: list[Event] = []
    parts = [Partition("a", (0,), 0, 30), Partition("a", (1,), 30, 20, skip=5), Partition("b", (0,), 0, 40)]
    with cuts_of(tmp_path, said) as cuts:
        assert list(cuts.follow(parts)) == parts
        cuts.cut(cut_of(4, samples=50, is_best=True))
    (at,) = (event for event in said if isinstance(event, AtCut))
    assert (at.left_out, at.is_best, at.last, at.read) == (3, True, False, 40)
    assert at.taken == [("a", 0, 30, 30), ("a", 30, 20, 20), ("b", 0, 40, 5)]


def test_files_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Event] = []

    class Full(Store):
        def put(self, path: str, data: bytes) -> Any:
            raise OSError("No space left on device")

    monkeypatch.setattr(module, "Store", Full)
    with cuts_of(tmp_path, said) as cuts:
        cuts.cut(cut_of(4))
    (written,) = (event for event in said if isinstance(event, TrainerWritten))
    assert (written.step, written.files) == (4, [])
    assert "No space left on device" in written.error
