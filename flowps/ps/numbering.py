"""The numbers of batches: a trainer's own among all trainers of a run."""

from __future__ import annotations

_TRAINER_BITS = 40


def batch_id(trainer: int, ticket: int) -> int:
    """The number of a trainer's batch, its own among all trainers of a run."""
    return (trainer << _TRAINER_BITS) | ticket


def trainer_of(batch: int) -> int:
    """The trainer of a batch."""
    return batch >> _TRAINER_BITS


def step_of(batch: int) -> int:
    """A batch's number within its trainer."""
    return batch & ((1 << _TRAINER_BITS) - 1)
