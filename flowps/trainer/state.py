"""`State`: all that a trainer needs to go on exactly where it was at a cut, as plain numbers and arrays.

Covers the form and its way to bytes and back. Who has the parts gives and takes them (`Step`, `StepReporter`); the shards have the
rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowps.errors import CheckpointError

Arrays = dict[str, NDArray[Any]]

_COUNTS = "counts"  # the member with the numbers, as JSON


@dataclass
class State:
    """Of the trainer that speaks for all.

    steps, examples   so far, of all trainers
    epoch             the one being trained, from 0
    ends              epochs' ends that several trainers have met at
    best              of BestSoFar
    arrays            by name: the model's variables, the optimizer's, the metrics so far
    """

    steps: int
    examples: int
    epoch: int
    ends: int
    arrays: Arrays = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    def part(self, prefix: str) -> Arrays:
        """The arrays whose names begin with `prefix`, without it."""
        return only(self.arrays, prefix)

    def to_bytes(self) -> bytes:
        """As a NumPy archive (.npz)."""
        counts = json.dumps(
            {"steps": self.steps, "examples": self.examples, "epoch": self.epoch, "ends": self.ends, "best": self.best}
        )
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **{_COUNTS: np.array(counts)}, **self.arrays)
        return file.getvalue()

    @staticmethod
    def of_bytes(data: bytes) -> State:
        """The state that `to_bytes` made into `data`. Raises CheckpointError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            return State(**json.loads(str(arrays.pop(_COUNTS))), arrays=arrays)
        except Exception as error:  # zipfile's, NumPy's and json's are of many kinds
            raise CheckpointError(f"the trainer's state cannot be read: {type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Cut:
    """A trainer after a step, with nothing in flight.

    step, epoch, examples   so far, of all trainers
    samples                 of the epoch that this trainer itself has trained since it began to read it
    read                    samples that have come to this trainer since it began
    last                    whether the run ends here
    state                   of the trainer that speaks for all
    left_out                of the samples read, left out on purpose
    is_best                 whether the evaluation here was the best so far
    """

    step: int
    epoch: int
    examples: int
    samples: int
    read: int
    last: bool
    state: State | None
    left_out: int = 0
    is_best: bool = False


def only(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def named(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """The same with `prefix` before every name."""
    return {prefix + name: array for name, array in arrays.items()}
