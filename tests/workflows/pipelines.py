"""Pipelines over small data: days of samples whose label depends on the user, a fixed set, and what retraining makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tomli_w
from rich.console import Console

from tests.scored import columns_of, config_of, write
from workflows.ledger import Ledger
from workflows.pipeline import Read, read_pipeline
from workflows.retrain import Wanted, retrain
from workflows.slots import Slot
from workflows.store import Registry

ROWS, FIXED_ROWS = 300, 400


class Days:
    """A pipeline in `folder`, with a slot a day. `more`: sections of its file to add to."""

    def __init__(self, folder: Path, run: dict[str, Any] | None = None, **more: Any) -> None:
        self.folder = folder
        run_config = config_of(Path("unused"), Path("unused"), slot_default={"learning_rate": 0.2}, **(run or {}))
        del run_config["run_dir"], run_config["data"]["train"]
        write(folder / "fixed.parquet", columns_of(FIXED_ROWS, seed=99))
        sections: dict[str, Any] = {
            "config": "run.toml", "state": "state",
            "partitions": {"root": "days", "slots": "date=%Y-%m-%d"},
            "gate": {"fixed": ["fixed.parquet"], "auc_drop": 0.05, "ne_rise": 0.2, "calibration": 0.5, "least_auc": 0.4},
            "publish": {"registry": "registry"},
        }  # fmt: skip
        for name, value in more.items():
            sections[name] = {**sections.get(name, {}), **value} if isinstance(value, dict) else value
        (folder / "run.toml").write_text(tomli_w.dumps(run_config), encoding="utf-8")
        (folder / "pipeline.toml").write_text(tomli_w.dumps(sections), encoding="utf-8")
        (folder / "days").mkdir(exist_ok=True)

    @property
    def path(self) -> Path:
        """The pipeline's file."""
        return self.folder / "pipeline.toml"

    def read(self) -> Read:
        """The pipeline."""
        return read_pipeline(self.path)

    def day(self, number: int, part: int = 0, columns: dict[str, Any] | pa.Table | None = None, ready: bool = True) -> Path:
        """Let a file of a day be there; the same number and part have the same samples."""
        found = columns_of(ROWS, seed=100 * number + part) if columns is None else columns
        path = write(self.folder / "days" / f"date={self.slot(number)}" / f"part-{part}.parquet", found)
        if ready:
            (path.parent / "_SUCCESS").touch()
        return path

    def bad_day(self, number: int) -> Path:
        """A day whose labels are the other way round."""
        columns = columns_of(ROWS, seed=100 * number)
        return self.day(number, columns={**columns, "label": np.int8(1) - columns["label"]})

    def slot(self, number: int) -> Slot:
        """Of a day."""
        return self.read().pattern.parse(f"2024-09-{number:02d}")

    @property
    def registry(self) -> Registry:
        """Where models go."""
        return Registry(str(self.folder / "registry"))


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(file=io.StringIO(), width=500)


def said(console: Console) -> str:
    """What it was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Killed(BaseException):
    """As a kill: what comes after it is not done."""


def go(days: Days, **wanted: Any) -> list[tuple[str, str, str]]:
    """What came of it: slot, kind and status of each attempt."""
    return [(of.slot, of.kind, of.status) for of in retrain(days.read(), Wanted(**wanted), quiet())]


def ledger_of(days: Days) -> Ledger:
    return Ledger(days.read().state)


def trained_rows(days: Days, name: str) -> int:
    return json.loads((days.folder / "state" / "runs" / name / "summary.json").read_text())["finished"]["examples"]
