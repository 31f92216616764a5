"""Retraining: what is due, once; late, more and duplicate files; bad days. `long_kills` has kills at every step."""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flowps.serving
from tests.scored import columns_of, snapshot, write
from tests.workflows.pipelines import ROWS, Days, go, ledger_of, quiet, said, trained_rows
from workflows.retrain import Wanted, main, retrain, show_plan
from workflows.store import Registry

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Days, str]:
    """Two days, and what was said. Nobody changes it."""
    days = Days(tmp_path_factory.mktemp("retrained"))
    days.day(1)
    days.day(2)
    days.day(3, ready=False)
    console = quiet()
    attempts = retrain(days.read(), Wanted(), console)
    assert [(of.slot, of.kind, of.status, of.base, of.version) for of in attempts] == [
        ("2024-09-01", "new", "published", 0, 1), ("2024-09-02", "new", "published", 1, 2)
    ]  # fmt: skip
    return days, said(console)


TELL = "import sys, pathlib; pathlib.Path('told').open('a').write(sys.stdin.read() + '\\n')"


class TestTwoDays:
    def test_models_are_published_one_from_the_other(self, retrained: tuple[Days, str]) -> None:
        days, text = retrained
        registry = days.registry
        assert (registry.live(), registry.versions()) == (2, [1, 2])
        first, second = registry.record(1), registry.record(2)
        assert (first.slot, first.parent, first.examples, first.live, first.preview) == ("2024-09-01", 0, ROWS, None, None)
        assert (second.slot, second.parent, second.examples) == ("2024-09-02", 1, ROWS)
        assert second.preview is not None
        assert second.preview.samples == ROWS
        assert second.live == first.quality, "on the fixed set, as it was measured when it was new"
        assert second.profile["rows"] == ROWS
        assert second.profile["new_signs"]["user"] == 0
        assert 0.05 < second.profile["nulls"]["spent"] < 0.15
        assert "2024-09-02: live model 1 on the slot, before it is trained: AUC 0." in text
        assert text.endswith("2 published\nlive model: 2\n")

    def test_rows_go_on_from_the_live_model(self, retrained: tuple[Days, str]) -> None:
        """The optimizer's sums of squares have grown from those of the day before."""
        days, _ = retrained

        def state(name: str) -> dict[int, float]:
            table = pq.read_table(days.folder / "state" / "runs" / name / "embeddings" / "user.parquet")
            return {sign: sum(of) for sign, of in zip(table["sign"].to_pylist(), table["state"].to_pylist(), strict=True)}

        before, after = state("2024-09-01-1"), state("2024-09-02-2")
        assert len(before) == 20
        assert all(after[sign] > value > 0 for sign, value in before.items())

    def test_the_live_model_can_be_served(self, retrained: tuple[Days, str]) -> None:
        days, _ = retrained
        scorer = flowps.serving.load(days.folder / "registry" / "models", verify=True)
        samples = pa.table(columns_of(50, seed=7))
        scores = scorer.score(samples.drop(["label"]))
        assert scores.shape == (50,)
        assert scores[samples["label"].to_numpy() == 1].mean() > scores[samples["label"].to_numpy() == 0].mean()

    def test_a_second_start_does_nothing(self, retrained: tuple[Days, str]) -> None:
        days, _ = retrained
        before = snapshot(days.folder / "registry"), snapshot(days.folder / "state" / "runs")
        console = quiet()
        assert retrain(days.read(), Wanted(), console) == []
        assert said(console) == "nothing is due\nlive model: 2\n"
        assert (snapshot(days.folder / "registry"), snapshot(days.folder / "state" / "runs")) == before

    def test_the_plan_says_what_would_be_done(self, retrained: tuple[Days, str]) -> None:
        days, _ = retrained
        console = quiet()
        show_plan(days.read(), Wanted(), console)
        lines = [" ".join(line.replace("│", " ").split()) for line in said(console).splitlines()]
        assert "2024-09-01 1 published as model 1" in lines
        assert "2024-09-03 1 waits for _SUCCESS" in lines
        assert lines[-1] == "live model: 2"

    def test_the_page_says_how_it_was_judged(self, retrained: tuple[Days, str]) -> None:
        days, _ = retrained
        page = (days.folder / "registry" / "reports" / "2.html").read_text()
        record = days.registry.record(2)
        assert f"{record.quality.auc:.4f}" in page
        for reason in record.reasons:
            assert reason in html.unescape(page)
        assert page.count("<circle") == 3, "two new models on the fixed set, one preview"

    def test_the_command_works_and_tells(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        days = Days(tmp_path, notify={"command": [sys.executable, "-c", TELL]})
        days.day(1)
        assert main([str(days.path), "--dry-run"]) == 0
        assert "train (new, 1 file(s))" in capsys.readouterr().out
        assert main([str(days.path)]) == 0
        told = json.loads((tmp_path / "told").read_text())
        assert (told["event"], told["slot"], told["version"]) == ("published", "2024-09-01", 1)
        assert told["quality"]["samples"] == 400
        with closing(ledger_of(days)) as ledger, closing(ledger.lease(60)):
            assert main([str(days.path)]) == 3
        assert "is at work on this pipeline" in capsys.readouterr().err


# --- which slots --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_late_slots_and_more_files_are_trained_and_duplicates_are_not(tmp_path: Path) -> None:
    days = Days(
        tmp_path, notify={"command": [sys.executable, "-c", TELL.replace("'told'", repr(str(tmp_path / "told")))], "on": ["late"]}
    )
    days.day(2)
    days.day(3)
    assert go(days, last=days.slot(2)) == [("2024-09-02", "new", "published")]
    days.day(1)
    assert go(days, last=days.slot(2)) == [("2024-09-01", "late", "published")]
    assert go(days) == [("2024-09-03", "new", "published")]
    days.day(2, part=1)
    assert go(days) == [("2024-09-02", "more", "published")]
    assert trained_rows(days, "2024-09-02-4") == ROWS, "the new file alone"
    twin = days.day(3, part=1, columns=columns_of(ROWS, seed=100))
    console = quiet()
    (ended,) = retrain(days.read(), Wanted(), console)
    assert (ended.kind, ended.status) == ("more", "skipped")
    assert f"{twin} is left out: it has the content of {tmp_path}/days/date=2024-09-01/part-0.parquet" in said(console)
    days.day(1, part=7, columns=columns_of(ROWS, seed=100))
    assert go(days) == [("2024-09-01", "more", "skipped")], "of a job that ran twice"
    days.day(3, part=9, columns=columns_of(20, seed=77))
    assert go(days) == [("2024-09-03", "more", "published")], "few rows are no fault of files that came later"
    assert days.registry.live() == 5
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [(of["slot"], of["kind"]) for of in told] == [
        ("2024-09-01", "late"),
        ("2024-09-02", "more"),
        ("2024-09-03", "more"),
        ("2024-09-01", "more"),
        ("2024-09-03", "more"),
    ]
    assert go(days) == []


def test_an_empty_slot_is_passed_over_and_may_get_files_later(tmp_path: Path) -> None:
    days = Days(tmp_path)
    (tmp_path / "days" / "date=2024-09-01").mkdir()
    (tmp_path / "days" / "date=2024-09-01" / "_SUCCESS").touch()
    days.day(2, columns=pa.table(columns_of(10)).slice(0, 0))
    assert go(days) == [("2024-09-01", "new", "skipped"), ("2024-09-02", "new", "skipped")]
    assert go(days) == []
    days.day(1)
    assert go(days) == [("2024-09-01", "more", "published")]


def test_partitions_and_registry_in_an_object_store(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        days = Days(
            tmp_path, partitions={"root": "memory://retrain-bucket/days"}, publish={"registry": "memory://retrain-bucket/models"},
            gate={"fixed": ["memory://retrain-bucket/fixed.parquet"]},
        )  # fmt: skip
        memory.pipe("/retrain-bucket/fixed.parquet", (tmp_path / "fixed.parquet").read_bytes())
        for number in (1, 2):
            path = days.day(number)
            folder = f"/retrain-bucket/days/date={days.slot(number)}"
            memory.pipe(f"{folder}/part-0.parquet", path.read_bytes())
            memory.pipe(f"{folder}/_SUCCESS", b"")
        assert go(days) == [("2024-09-01", "new", "published"), ("2024-09-02", "new", "published")]
        registry = Registry("memory://retrain-bucket/models")
        assert (registry.live(), registry.versions(), registry.record(2).parent) == (2, [1, 2], 1)
        memory.get("/retrain-bucket/models/models", str(tmp_path / "copied"), recursive=True)
        scorer = flowps.serving.load(tmp_path / "copied", verify=True)
        assert scorer.score(pa.table(columns_of(5)).drop(["label"])).shape == (5,)
        assert go(days) == []
    finally:
        memory.rm("/retrain-bucket", recursive=True)


# --- what is refused ----------------------------------------------------------------------------------------------------


def evidence(days: Days, name: str) -> dict[str, Any]:
    return json.loads((days.folder / "state" / "evidence" / f"{name}.json").read_text())


def test_a_bad_day_is_rejected_and_the_next_goes_on_from_the_live_model(tmp_path: Path) -> None:
    days = Days(tmp_path, gate={"auc_drop": 0.01})
    days.day(1)
    days.bad_day(2)
    days.day(3)
    assert go(days) == [
        ("2024-09-01", "new", "published"), ("2024-09-02", "new", "rejected"), ("2024-09-03", "new", "published")
    ]  # fmt: skip
    registry = days.registry
    assert [registry.record(version).slot for version in registry.versions()] == ["2024-09-01", "2024-09-03"]
    assert registry.record(2).parent == 1
    found = evidence(days, "2024-09-02-2")
    assert "gate.auc_drop" in found["reasons"][0]
    assert found["steps"]["preview"]["of"]["auc"] < 0.4, "the live model was wrong on it before it was trained"
    assert found["steps"]["judge"]["of"]["accepted"] is False
    assert go(days) == [], "it is not tried again"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda of: of.drop(["city"]), "no column 'city', which the run was trained on"),
        (
            lambda of: of.set_column(3, "user", of["user"].cast(pa.string())),
            "column 'user' is string, but the run was trained on int64",
        ),
        (lambda of: of.slice(0, 20), "20 rows; the median of the last 3 slots is 300"),
        (lambda of: of.set_column(0, "label", pa.array(np.ones(len(of), np.int8))), "100.00% positive labels; the median is"),
        (
            lambda of: of.set_column(1, "price", pa.nulls(len(of), pa.float32())),
            "column 'price': 100.0% null; the most so far is 0.0%",
        ),
        (
            lambda of: of.set_column(3, "user", pa.array(np.arange(len(of)) + 1000)),
            "column 'user': 100.0% values that the live model",
        ),
        (lambda of: of.set_column(0, "label", pa.array(np.full(len(of), 7, np.int8))), "column 'label', row 0: found 7"),
        (lambda of: b"no Parquet", "not a readable Parquet file"),
    ],
    ids=["a column less", "another type", "few rows", "labels", "nulls", "new values", "bad values", "a broken file"],
)
def test_samples_that_are_not_like_the_last_ones_are_refused(
    three_days: Callable[[], Days], change: Callable[[pa.Table], Any], why: str
) -> None:
    days = three_days()
    found = change(pa.table(columns_of(ROWS, seed=400)))
    path = days.day(4, columns=columns_of(5) if isinstance(found, bytes) else found)
    if isinstance(found, bytes):
        path.write_bytes(found)
    console = quiet()
    (ended,) = retrain(days.read(), Wanted(), console)
    assert ended.status == "rejected"
    assert why in ended.why
    assert why in evidence(days, "2024-09-04-4")["reasons"][0]
    assert days.registry.live() == 3
    assert go(days) == []


def test_command_lines_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = Days(tmp_path)
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([str(days.path), "--until", "tomorrow"]) == 2
    assert "'tomorrow': is no slot; expected one as in 2024-09-21" in capsys.readouterr().err
    for words in (["--again"], ["--until", "2024", "--backfill", "2024", "2024"], ["--backfill", "2024-09-02", "2024-09-01"]):
        with pytest.raises(SystemExit) as ended:
            main([str(days.path), *words])
        assert ended.value.code == 2
    write(tmp_path / "x.parquet", columns_of(3))
