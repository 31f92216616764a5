"""A small data set, its plan, and an embedded cluster to run it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import distributed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster.assign import assign
from flowps.cluster.launch import gather_workers, launch
from flowps.cluster.offer import Offer
from flowps.cluster.plan import Plan, plan
from flowps.config import Config
from flowps.knob import load

ROWS, USERS = 600, 20
Started = Callable[..., tuple[distributed.Client, Plan]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six row groups; the label depends on the user."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, ROWS)
    columns = {"label": (users % 2).astype(np.int8), "x": rng.random(ROWS, np.float32), "user": users}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet", row_group_size=100)
    return tmp_path / "data.parquet"


@pytest.fixture
def make_config(data: Path) -> Callable[..., Config]:
    """A run over the data, with more knobs: `make_config(("trainer.in_flight", 1))`."""

    def make(*knobs: tuple[str, object]) -> Config:
        given = [
            ("data.train", str(data)),
            ("data.batch_size", 32),
            ("data.partition_rows", 100),
            ("cluster.dashboard", ""),
            *knobs,
        ]
        return load(None, [(path, [str(value)]) for path, value in given])

    return make


def one_machine(threads: int = 2, available: int = 8 << 30) -> Offer:
    """A worker that may do everything, as the embedded mode has it."""
    return Offer("all", "inproc://here", "127.0.0.1", threads, available, "machine:1")


@pytest.fixture
def make_plan(make_config: Callable[..., Config]) -> Callable[..., Plan]:
    """The plan of such a run on one machine, or on the workers given."""

    def make(*knobs: tuple[str, object], offers: Sequence[Offer] = ()) -> Plan:
        config = make_config(*knobs)
        return plan(config, assign(offers or [one_machine()], config.ps.num_shards, config.trainer.count))

    return make


@pytest.fixture
def started(make_config: Callable[..., Config]) -> Iterator[Started]:
    """Start what a config asks for, and plan on it; gone at the end of the test."""
    with ExitStack() as opened:

        def start(*knobs: tuple[str, object]) -> tuple[distributed.Client, Plan]:
            config = make_config(*knobs)
            client, _ = opened.enter_context(launch(config))
            return client, plan(config, gather_workers(client, config, print, lambda: False))

        yield start
