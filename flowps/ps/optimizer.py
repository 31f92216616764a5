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


def params_at(slots: Sequence[Slot], pushes: int, rate_scale: float) -> Float32:
    """The parameters of the push after `pushes` others: float32 [slots, NUM_PARAMS], as `kernels.update.push` takes them.

    rate_scale   what the trainer's schedule multiplies the slots' learning rates by
    """
    params = np.zeros((len(slots), step.NUM_PARAMS), np.float32)
    for line, slot in zip(params, slots, strict=True):
        name, rate, steps = slot.optimizer, slot.learning_rate * rate_scale, pushes + 1
        dual = name in ("ftrl", "group_ftrl", "group_adagrad")
        if dual:
            rate = slot.learning_rate
            line[step.SCALE] = rate_scale
        line[step.REST1], line[step.REST2] = 1 - slot.beta1, 1 - (slot.rho if name == "rmsprop" else slot.beta2)
        decay = slot.weight_decay or (_KERAS_DECAY if name == "adamw" else 0.0)
        line[step.EPSILON], line[step.BETA1], line[step.BETA2] = slot.epsilon, slot.beta1, slot.beta2
        line[step.DECAY] = 0.0 if dual else rate * decay
        line[step.L1], line[step.GROUP] = slot.l1, slot.l21
        line[step.L2 if dual else step.PENALTY] = slot.l2
        line[step.CLIP_VALUE], line[step.CLIP_NORM] = slot.clip_value, slot.clip_norm
        line[step.BOUND] = slot.weight_bound or math.inf
        if name in ("adam", "adamw", "amsgrad"):
            rate *= math.sqrt(1 - slot.beta2**steps) / (1 - slot.beta1**steps)
        elif name == "momentum":
            line[step.BETA1] = slot.momentum
        elif name == "rmsprop":
            line[step.BETA2] = slot.rho
        elif dual:
            line[step.BETA1] = 0.0 if name == "group_adagrad" else slot.ftrl_beta
        elif name == "lamb":
            line[step.CORRECT1], line[step.CORRECT2] = 1 / (1 - slot.beta1**steps), 1 / (1 - slot.beta2**steps)
        line[step.RATE] = rate
    return params
