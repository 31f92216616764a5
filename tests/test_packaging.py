"""The files around the package keep step with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import flowps
from bench.table import DOCS, PICTURE, README, digest, filled

ROOT = Path(__file__).resolve().parents[1]
OTHER_NAMES = {"prometheus_client": "prometheus-client", "python-xxhash": "xxhash"}  # conda's → pip's; its xxhash is in C


def requirements() -> dict[str, str]:
    """Package → bounds, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(re.match(r"([a-z0-9-]+)(.*)", line).groups() for line in project["dependencies"])


def test_conda_environment_matches_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(re.match(r"([a-z0-9_-]+)(.*)", line).groups() for line in environment["dependencies"])
    found = {OTHER_NAMES.get(name, name): bounds for name, bounds in conda.items()}
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert found.pop("python") == python
    assert found.pop("pip") == ""
    assert found == requirements()


def test_every_requirement_is_bounded_below():
    assert all(bounds.startswith(">=") for bounds in requirements().values())


def test_ci_runs_make_test_and_nothing_else():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test"]


def test_changelog_has_this_version():
    assert f"## {flowps.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path: Path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- bench:" in text
    assert filled(text) == text, "run `python -m bench.table`"


def test_the_picture_is_that_of_the_results():
    assert digest("scale.json") in PICTURE.read_text(encoding="utf-8"), "run `python -m bench.table`"


def test_public_names_exist():
    assert all(hasattr(flowps, name) for name in flowps.__all__)
