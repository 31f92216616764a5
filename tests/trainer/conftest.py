"""TensorFlow comes in here, quietly, and every test is checked for threads it left behind."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import closing

import pytest

with warnings.catch_warnings():
    # Its own deprecations are not ours to fix; test modules import it at their top, after this.
    warnings.simplefilter("ignore")
    import flowps.trainer.loop  # noqa: F401  imports TensorFlow after setting what that reads from the environment


from tests.trainer.members import Member, Members


@pytest.fixture(scope="module")
def processes() -> Iterator[Members]:
    """Two processes for trainers, the same for all tests of a file."""
    with closing(Members(2)) as processes:
        yield processes


@pytest.fixture
def pair(processes: Members) -> list[Member]:
    """Two members that are alive and idle."""
    return processes.renewed()


def flowps_threads() -> list[str]:
    """Names of the live threads that flowps has started."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("flowps-"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """No test of the trainer leaves a thread of flowps running."""
    before = flowps_threads()
    yield
    assert flowps_threads() == before
