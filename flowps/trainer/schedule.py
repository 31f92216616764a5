"""`Schedule`: what all learning rates, of rows and dense weights alike, are multiplied by at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowps.config import Trainer


@dataclass(frozen=True)
class Schedule:
    """A linear rise over `warmup_steps`, then from 1 down to `decay_to` over `decay_steps`, and that from there on.

    decay   "none": stays at 1; "linear"; "cosine" (Loshchilov, Hutter, "SGDR", ICLR 2017, one half period)
    """

    warmup_steps: int
    decay: str
    decay_steps: int
    decay_to: float

    @staticmethod
    def of(knobs: Trainer) -> Schedule:
        """The schedule that the knobs describe."""
        return Schedule(knobs.warmup_steps, knobs.decay, knobs.decay_steps, knobs.decay_to)

    def at(self, step: int) -> float:
        """The factor at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "none":
            return 1.0
        passed = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        left = 1 - passed if self.decay == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return self.decay_to + (1 - self.decay_to) * left
