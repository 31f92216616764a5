"""What one step of a row means: the optimizers, their state and their parameters.

A description only: which code a push runs (a tag of `kernels.step`), what state a row carries and how it begins, and the line of
parameters of each slot. A new optimizer adds a tag there, a name here, and its twin in `tests/ps/twins.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowps.batch import Float32
from flowps.config import Slot
from flowps.ps.kernels import step

_KERAS_DECAY = 0.004  # AdamW's where none is given
_DUAL = ("ftrl", "group_ftrl", "group_adagrad")  # their weights are made of sums of gradients, which the rate divides


@dataclass(frozen=True)
class Optimizer:
    """How rows of a table step. Slots whose optimizers are equal share a table.

    tag      of `kernels.step`; its type decides the code
    initial  first value of each part of a row's state
    per_row  the parts have one float, not one per weight
    """

    tag: Any
    initial: tuple[float, ...] = ()
    per_row: bool = False

    def state_width(self, dim: int) -> int:
        """Floats of state beside the `dim` weights of a row."""
        return len(self.initial) * (1 if self.per_row else dim)

    def first_state(self, dim: int) -> Float32:
        """The state of a new row, float32 [state width]."""
        return np.repeat(np.array(self.initial, np.float32), 1 if self.per_row else dim)


def of_slot(slot: Slot) -> Optimizer:
    """The optimizer that a slot's settings name."""
    first = slot.initial_accumulator
    return {
        "sgd": Optimizer(step.Sgd()),
        "momentum": Optimizer(step.Momentum(), (0.0,)),
        "adagrad": Optimizer(step.Adagrad(), (first,)),
        "rowwise_adagrad": Optimizer(step.RowWiseAdagrad(), (first,), per_row=True),
        "adam": Optimizer(step.Adam(), (0.0, 0.0)),
        "adamw": Optimizer(step.Adam(), (0.0, 0.0)),
        "amsgrad": Optimizer(step.AmsGrad(), (0.0, 0.0, 0.0)),
        "rmsprop": Optimizer(step.RmsProp(), (0.0,)),
        "ftrl": Optimizer(step.Ftrl(), (first, 0.0)),
        "group_ftrl": Optimizer(step.GroupFtrl(), (first, 0.0)),
        "group_adagrad": Optimizer(step.GroupFtrl(), (first, 0.0)),
        "lamb": Optimizer(step.Lamb(), (0.0, 0.0)),
    }[slot.optimizer]


class Params:
    """The parameters of the pushes of a table: the lines that `kernels.update.push` takes, for the slots `slots`.

    Called under the table's push lock, once per push: what does not change is not computed again.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._lines = np.zeros((len(slots), step.NUM_PARAMS), np.float32)
        for line, slot in zip(self._lines, slots, strict=True):
            _describe(slot, line)
        self._scale: float | None = None
        names = np.array([slot.optimizer for slot in slots])
        self._dual = np.isin(names, _DUAL)
        self._corrected = np.isin(names, ("adam", "adamw", "amsgrad"))
        self._corrects = names == "lamb"
        self._rates = np.array([slot.learning_rate for slot in slots])
        self._decays = np.array(
            [slot.weight_decay or (_KERAS_DECAY if slot.optimizer == "adamw" else 0.0) for slot in slots]
        ) * ~self._dual  # fmt: skip
        self._betas = np.array([(slot.beta1, slot.beta2) for slot in slots]).T

    def at(self, pushes: int, rate_scale: float) -> Float32:
        """Those of the push after `pushes` others: float32 [slots, NUM_PARAMS].

        rate_scale   what the trainer's schedule multiplies the slots' learning rates by
        """
        counted = self._corrected.any() or self._corrects.any()
        if rate_scale == self._scale and not counted:
            return self._lines
        rates = self._rates * np.where(self._dual, 1.0, rate_scale)
        self._lines[:, step.DECAY] = rates * self._decays
        if counted:
            first, second = 1 - self._betas ** (pushes + 1)
            rates = np.where(self._corrected, rates * np.sqrt(second) / first, rates)
            self._lines[:, step.CORRECT1], self._lines[:, step.CORRECT2] = 1 / first, 1 / second
        self._lines[:, step.RATE] = rates
        self._lines[:, step.SCALE] = rate_scale
        self._scale = rate_scale
        return self._lines


def _describe(slot: Slot, line: Float32) -> None:
    """Fill in the parameters of a slot that are the same in every push."""
    name = slot.optimizer
    line[step.EPSILON], line[step.BETA1], line[step.BETA2] = slot.epsilon, slot.beta1, slot.beta2
    line[step.REST1], line[step.REST2] = 1 - slot.beta1, 1 - (slot.rho if name == "rmsprop" else slot.beta2)
    line[step.L1], line[step.GROUP] = slot.l1, slot.l21
    line[step.L2 if name in _DUAL else step.PENALTY] = slot.l2
    line[step.CLIP_VALUE], line[step.CLIP_NORM] = slot.clip_value, slot.clip_norm
    line[step.BOUND] = slot.weight_bound or math.inf
    if name == "momentum":
        line[step.BETA1] = slot.momentum
    elif name == "rmsprop":
        line[step.BETA2] = slot.rho
    elif name in _DUAL:
        line[step.BETA1] = 0.0 if name == "group_adagrad" else slot.ftrl_beta
