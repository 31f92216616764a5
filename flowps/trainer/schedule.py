"""`Schedule`: what all learning rates, of rows and dense weights alike, are multiplied by at each step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import keras

from flowps.config import Trainer
from flowps.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """A linear rise over `warmup_steps`, then from 1 down to `decay_to` over `decay_steps`, and that from there on.

    decay   "none": stays at 1; "linear"; "cosine" (Loshchilov, Hutter, "SGDR", ICLR 2017, one half period)
    keras   a Keras schedule instead of the decay, from its step 0 after the warm-up; None: there is none
    """

    warmup_steps: int
    decay: str
    decay_steps: int
    decay_to: float
    keras: keras.optimizers.schedules.LearningRateSchedule | None = None

    @staticmethod
    def of(knobs: Trainer) -> Schedule:
        """The schedule that the knobs describe. Raises ConfigError where trainer.schedule is none."""
        schedule = _of_keras(knobs.schedule) if knobs.schedule else None
        if schedule is not None and knobs.decay != "none":
            raise ConfigError("trainer.schedule takes the place of trainer.decay: leave one of them out")
        return Schedule(knobs.warmup_steps, knobs.decay, knobs.decay_steps, knobs.decay_to, schedule)

    def at(self, step: int) -> float:
        """The factor at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.keras is not None:
            return float(self.keras(step - self.warmup_steps))
        if self.decay == "none":
            return 1.0
        passed = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        left = 1 - passed if self.decay == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return self.decay_to + (1 - self.decay_to) * left


def _of_keras(text: str) -> keras.optimizers.schedules.LearningRateSchedule:
    expected = 'expected JSON such as {"class_name": "ExponentialDecay", "config": {"initial_learning_rate": 1.0, ...}}'
    try:
        found = keras.optimizers.schedules.deserialize(json.loads(text))
        first = float(found(0))
    except Exception as error:  # Keras's are of many kinds
        raise ConfigError(f"trainer.schedule: {' '.join(str(error).split())[:200]}; {expected}") from None
    if not 0 <= first < math.inf:
        raise ConfigError(f"trainer.schedule: begins at {first}, expected a factor of the learning rates, at least 0")
    return found
