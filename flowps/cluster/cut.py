"""A trainer's side of a cut: what it has trained of the epoch, the files of its dense part, and where it waits for the shards.

The trainer stands still with nothing in flight, says so (`AtCut`), and goes on when the command that watches the run lets it
(`go_on`), which is when every shard has copied its rows. Its own files are written beside training (`TrainerWritten`).
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowps.checkpoint.store import Store
from flowps.errors import StoppedError
from flowps.hub.partition import Partition
from flowps.status.event import AtCut, Event, TrainerWritten

if TYPE_CHECKING:  # importing it imports TensorFlow
    from flowps.trainer.state import Cut, State

STATE, WEIGHTS = "state", "weights"  # sections of the dense part


class Gate:
    """Where a trainer waits at a cut until every shard has copied its rows. One thread may wait, any may call the other methods."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed, self._is_given_up = -1, False

    def wait(self, step: int) -> None:
        """Until `go_on` is called for this step, once for each cut. Raises StoppedError once it is given up."""
        with self._changed:
            self._changed.wait_for(lambda: self._passed >= step or self._is_given_up)
            if self._passed < step:
                raise StoppedError("waiting at a cut: the run was given up")
            self._passed = -1  # there may be another cut after the same step, which is waited for anew

    def go_on(self, step: int) -> None:
        """Let the cut after `step` be over."""
        with self._changed:
            self._passed = max(self._passed, step)
            self._changed.notify_all()

    def give_up(self) -> None:
        """Nobody will call `go_on` any more."""
        with self._changed:
            self._is_given_up = True
            self._changed.notify_all()


# Of the runs with a trainer in this process.
_gates: dict[str, Gate] = {}


def gate_of(run_id: str) -> Gate:
    """Where the trainer of a run in this process waits."""
    return _gates.setdefault(run_id, Gate())


def go_on(run_id: str, step: int) -> None:
    """Let the trainer of a run in this process go on after its cut. Run on the trainer's worker."""
    gate_of(run_id).go_on(step)


def checkpoint_name(run_id: str, step: int, is_best: bool) -> str:
    """Of the cut after `step`. Another run, and this one after it has gone back, must not write to the same files.

    is_best   it is that of an evaluation, which may have come after another cut at the end of the same epoch
    """
    return f"step-{step:09d}-{run_id[-6:]}{'_best' * is_best}"


class TrainerCuts:
    """Of trainer `number` of run `run_id`. A context manager: leaving it waits for what is still being written.

    saves_to    folder of the checkpoints; "": there are none, and nothing is waited for
    send        tells the command an event; any thread may call it
    model_to    writes the dense weights to a file, as Keras saves them
    """

    def __init__(
        self, run_id: str, number: int, saves_to: str, send: Callable[[Event], None], model_to: Callable[[Path], Any]
    ) -> None:
        self._run_id, self._number, self._saves_to, self._send, self._model_to = run_id, number, saves_to, send, model_to
        self._given: list[Partition] = []
        self._written = -1  # the step of the last cut
        self._writer = ThreadPoolExecutor(1, "flowps-save-dense")

    def __enter__(self) -> TrainerCuts:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown(wait=True)
        _gates.pop(self._run_id, None)

    def follow(self, order: Iterable[Partition]) -> Iterator[Partition]:
        """The partitions of an epoch as they are given to this trainer, noted for the ledger."""
        self._given = given = []
        for partition in order:
            given.append(partition)
            yield partition

    def cut(self, cut: Cut) -> None:
        """Say what is trained, and wait until the shards have copied their rows. Raises StoppedError if the run is given up."""
        taken = list(self._taken(cut.samples))
        self._send(AtCut(self._number, cut.step, cut.epoch, cut.examples, cut.read, taken, cut.last, cut.left_out, cut.is_best))
        if not self._saves_to:
            return
        if cut.state is not None and (cut.step != self._written or cut.is_best):  # the run may end right after a cut
            self._written = cut.step
            # Here, not beside training: Keras reads the live model.
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "dense.weights.h5"
                self._model_to(path)
                weights = path.read_bytes()
            self._writer.submit(self._write, checkpoint_name(self._run_id, cut.step, cut.is_best), cut.state, weights)
        gate_of(self._run_id).wait(cut.step)

    def _taken(self, samples: int) -> Iterator[tuple[str, int, int, int]]:
        """Of each partition that was begun, how many samples are trained, those of an earlier run among them."""
        for partition in self._given:
            if samples <= 0:
                return
            yield partition.url, partition.first_row, partition.num_rows, partition.skip + min(samples, partition.rows_left)
            samples -= partition.rows_left

    def _write(self, name: str, state: State, weights: bytes) -> None:
        try:
            store = Store(self._saves_to)
            files = [
                msgspec.structs.replace(store.put(f"{name}/trainer/{file}", content), section=section)
                for section, file, content in ((STATE, "state.npz", state.to_bytes()), (WEIGHTS, "dense.weights.h5", weights))
            ]
            self._send(TrainerWritten(state.steps, msgspec.to_builtins(files)))
        except Exception as error:  # the command decides what it does to the run
            self._send(TrainerWritten(state.steps, [], str(error)))
