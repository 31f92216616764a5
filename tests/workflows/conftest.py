"""A pipeline after three days, as often as it is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.pipelines import Days, go


@pytest.fixture(scope="module")
def _three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    days = Days(folder, validate={"least": 2})
    for number in (1, 2, 3):
        days.day(number)
    assert len(go(days)) == 3
    return folder


@pytest.fixture
def three_days(_three: Path) -> Any:
    """The pipeline after three days; the ledger and all else as they were, whatever a test has made of them."""
    kept = _three.with_name(f"{_three.name}-kept")
    if not kept.exists():
        shutil.copytree(_three, kept)

    def make() -> Days:
        shutil.rmtree(_three)
        shutil.copytree(kept, _three)
        return Days(_three, validate={"least": 2})

    return make
