"""A small data set, its plan, and an embedded cluster to run it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowps.cluster.launch import embedded
from flowps.cluster.plan import Plan, plan
from flowps.knob import load

ROWS, USERS = 600, 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six row groups; the label depends on the user."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, ROWS)
    columns = {"label": (users % 2).astype(np.int8), "x": rng.random(ROWS, np.float32), "user": users}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet", row_group_size=100)
    return tmp_path / "data.parquet"


@pytest.fixture
def make_plan(data: Path) -> Callable[..., Plan]:
    """A plan over the data, with more knobs: `make_plan(("trainer.in_flight", 1))`."""

    def make(*knobs: tuple[str, object]) -> Plan:
        given = [
            ("data.train", str(data)),
            ("data.batch_size", 32),
            ("data.partition_rows", 100),
            ("cluster.dashboard", ""),
            *knobs,
        ]
        return plan(load(None, [(path, [str(value)]) for path, value in given]))

    return make


@pytest.fixture
def client(make_plan: Callable[..., Plan]) -> Iterator[distributed.Client]:
    with embedded(make_plan()) as (client, _):
        yield client
