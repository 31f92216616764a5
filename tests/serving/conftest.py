"""One small run and its bundle for all tests of a package."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowps.export import export
from tests.serving.samples import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run. Not to be changed."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle in float32. Not to be changed."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    export(run, out)
    return out
