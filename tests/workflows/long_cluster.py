"""Retraining with a process for every role: the same steps, on the cluster that the run's file asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

import flowps.serving
from tests.workflows.pipelines import Days, go, trained_rows

pytestmark = pytest.mark.timeout(400)


def test_two_days_with_two_shards(tmp_path: Path) -> None:
    days = Days(tmp_path, run={"cluster": {"mode": "processes", "threads": 1}, "ps": {"num_shards": 2}})
    days.day(1)
    days.day(2)
    assert go(days) == [("2024-09-01", "new", "published"), ("2024-09-02", "new", "published")]
    assert trained_rows(days, "2024-09-02-2") == 300
    assert days.registry.record(2).preview is not None
    flowps.serving.load(tmp_path / "registry" / "models", verify=True)
    assert go(days) == []
