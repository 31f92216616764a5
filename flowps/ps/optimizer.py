"""What one step of a row means: the optimizers, their state and their parameters.

An optimizer here is a description: how many floats of state a row carries, their first value, and the code and parameters with
which `kernels.update.push` steps rows. A new one adds a class, a branch in that kernel, and its twin in `tests/ps/naive.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flowps.config import Slot
from flowps.ps.kernels import update


class Optimizer(Protocol):
    """How rows of a table step. Hashable: slots whose optimizers are equal in kind and state share a table."""

    @property
    def kind(self) -> int:
        """Code of the kernel's branch."""

    @property
    def initial_state(self) -> float:
        """First value of every float of state."""

    def state_width(self, dim: int) -> int:
        """Floats of state beside the `dim` weights of a row."""


@dataclass(frozen=True)
class Sgd:
    """w -= learning_rate · g. No state."""

    kind: int = update.SGD
    initial_state: float = 0.0

    def state_width(self, dim: int) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class Adagrad:
    """a += g²; w -= learning_rate · g / √(a + epsilon); Duchi et al. 2011, epsilon as in Keras."""

    initial_state: float
    kind: int = update.ADAGRAD

    def state_width(self, dim: int) -> int:
        """One sum of squares per weight."""
        return dim


def of_slot(slot: Slot) -> Optimizer:
    """The optimizer that a slot's settings name."""
    if slot.optimizer == "sgd":
        return Sgd()
    return Adagrad(initial_state=slot.initial_accumulator)


def params_of_slot(slot: Slot) -> tuple[float, float]:
    """The line of parameters that `kernels.update.push` takes for a slot: learning rate, epsilon."""
    return slot.learning_rate, slot.epsilon
