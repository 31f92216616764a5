"""The registry's command: what it shows, and that a rollback is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.scored import main_words
from tests.workflows.pipelines import Days
from tests.workflows.test_store import bundle, record_of
from workflows.registry import main
from workflows.store import Registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three models, the last one live."""
    registry = Registry(str(tmp_path / "registry"))
    registry.prepare()
    for version in (1, 2, 3):
        registry.put(bundle(tmp_path / f"b{version}"), record_of(version, version - 1), "")
        registry.promote(version, "published")
    return tmp_path / "registry"


def lines(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(main_words(*words)) == 0
    return [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]


def test_the_list_marks_the_live_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, "list", folder)
    assert next(line for line in said if line.startswith("2 ")).endswith("before")
    assert next(line for line in said if line.startswith("3 ")).endswith("live")
    Registry(str(folder)).prune(2)
    assert next(line for line in lines(capsys, "list", folder) if line.startswith("1 ")).endswith("deleted")


def test_one_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, "show", folder, 3)
    assert said[0].startswith("model 3, live: slot 2024-09-03 (new), 1970-01-01")
    assert "from model 2, 10 examples; run /runs/3, checkpoint step-1" in said
    assert "AUC 1.0000 1.0000 –" in said
    assert any(line.startswith("model 3 became live in place of model 2: published by ") for line in said)
    assert said[-1] == f"page: {folder}/reports/3.html"


def test_two_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys, "diff", folder, 1, 3)
    assert "from – 2" in said
    assert "AUC 1.0000 1.0000 +0.0000" in said


def test_back_and_to_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, "rollback", folder)[0].startswith("model 2 became live in place of model 3: rolled back by ")
    assert lines(capsys, "rollback", folder)[0].startswith("model 1 became live in place of model 2")
    assert main(main_words("rollback", folder)) == 1
    assert "there is no model before model 1, the live one" in capsys.readouterr().err
    assert lines(capsys, "promote", folder, 3)[0].startswith("model 3 became live in place of model 1: promoted by ")
    assert Registry(str(folder)).live() == 3


def test_what_is_not_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (("show", folder, 9), "has no model 9; there are 1, 2, 3"),
        (("promote", folder, 9), "has no model 9"),
        (("diff", folder, 1, 9), "has no model 9"),
        (("list", tmp_path / "none"), "no model was published there; is this a pipeline's publish.registry?"),
    ):
        assert main(main_words(*words)) == 1
        assert why in capsys.readouterr().err
    assert not (tmp_path / "none").exists(), "looking makes nothing"
    with pytest.raises(SystemExit):
        main(["shwo"])


def test_a_rollback_is_told_as_the_pipeline_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell = f"import sys, pathlib; pathlib.Path({str(tmp_path / 'told')!r}).write_text(sys.stdin.read())"
    (tmp_path / "p").mkdir()
    days = Days(tmp_path / "p", notify={"command": [sys.executable, "-c", tell]})
    path = folder / "records" / "2.json"
    path.write_text(path.read_text().replace("/p.toml", str(days.path)))
    lines(capsys, "rollback", folder)
    assert json.loads((tmp_path / "told").read_text()) == {"event": "rolled_back", "version": 2, "before": 3}
