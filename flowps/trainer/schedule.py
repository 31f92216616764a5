"""`Schedule`: what all learning rates, of rows and dense weights alike, are multiplied by at each step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import keras

from flowps.config import Trainer
from flowps.errors import ConfigError

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Schedule:
    """A linear rise over `warmup_steps`, then from 1 down to `decay_to` over `decay_steps`, and that from there on.

    decay   "none": stays at 1; "linear"; "cosine" (Loshchilov, Hutter, "SGDR", ICLR 2017, one half period)
    keras   a Keras schedule instead of the decay, from its step 0 after the warm-up; None: there is none
    above_0 whether the optimizer divides by the rate
    """

    warmup_steps: int
    decay: str
    decay_steps: int
    decay_to: float
    keras: keras.optimizers.schedules.LearningRateSchedule | None = None
    above_0: bool = False

    @staticmethod
    def of(knobs: Trainer) -> Schedule:
        """The schedule that the knobs describe. Raises ConfigError where there is none, or none for their optimizer."""
        above_0 = knobs.optimizer.lower() == "ftrl"
        if above_0 and knobs.decay != "none" and not knobs.decay_to:
            raise ConfigError(
                "trainer.optimizer ftrl divides by the learning rate, which trainer.decay takes to 0; set trainer.decay_to"
            )
        schedule = _of_keras(knobs.schedule) if knobs.schedule else None
        if schedule is not None and knobs.decay != "none":
            raise ConfigError("trainer.schedule takes the place of trainer.decay: leave one of them out")
        return Schedule(knobs.warmup_steps, knobs.decay, knobs.decay_steps, knobs.decay_to, schedule, above_0)

    def at(self, step: int) -> float:
        """The factor at a step, counted from 0. Raises ConfigError where a Keras schedule gives none."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.keras is not None:
            return self._of_keras(step)
        if self.decay == "none":
            return 1.0
        passed = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        left = 1 - passed if self.decay == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return self.decay_to + (1 - self.decay_to) * left

    def _of_keras(self, step: int) -> float:
        assert self.keras is not None
        found = float(self.keras(step - self.warmup_steps))
        if -_ROUNDING < found < 0:
            found = 0.0
        if not 0 <= found < math.inf:
            raise ConfigError(f"trainer.schedule: is {found} at step {step:,}, expected a factor of the learning rates, at least 0")
        if self.above_0 and not found:
            raise ConfigError(
                f"trainer.schedule: is 0 at step {step:,}, and trainer.optimizer ftrl divides by the learning rate; take a "
                "schedule that ends above 0"
            )
        return found


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
