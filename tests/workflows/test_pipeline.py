"""A pipeline's file: what it says, and what is refused before any work begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from flowps.errors import ConfigError
from tests.workflows.pipelines import Days
from workflows.pipeline import read_pipeline


def test_paths_are_beside_the_file_and_the_folders_keys_are_no_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Days(tmp_path, partitions={"slots": "date=%Y-%m-%d/hour=%H"}, publish={"registry": "s3://bucket/models"})
    monkeypatch.chdir("/")
    read = read_pipeline(tmp_path / "pipeline.toml")
    assert read.pipeline.partitions.root == str(tmp_path / "days")
    assert read.pipeline.gate.fixed == (str(tmp_path / "fixed.parquet"),)
    assert (read.state, read.registry) == (tmp_path / "state", "s3://bucket/models")
    assert read.config.data.exclude == ("date", "hour")
    assert read.zone.key == "UTC"


def test_keys_may_be_columns(tmp_path: Path) -> None:
    assert Days(tmp_path, partitions={"keys": True}).read().config.data.exclude == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"config": "none.toml"}, "none.toml: no such file"),
        ({"keep_rus": 3}, "keep_rus: no such knob; did you mean keep_runs?"),
        ({"gate": {"auc_dop": 1.0}}, "gate.auc_dop: no such knob; did you mean gate.auc_drop"),
        ({"gate": {"fixed": []}}, "gate.fixed: expected array of length >= 1, found "),
        ({"gate": {"least_auc": 2.0}}, "gate.least_auc: expected float <= 1"),
        ({"publish": {"keep": 1}}, "publish.keep: expected int >= 2, found 1"),
        ({"publish": {"dtype": "int4"}}, "publish.dtype: expected one of the choices, found 'int4'"),
        ({"partitions": {"slots": "day"}}, "partitions.slots: 'day': expected each of"),
        ({"partitions": {"time_zone": "Nowhere"}}, "'Nowhere': no such time zone"),
        ({"partitions": {"first": "soon"}}, "'soon': is no slot"),
        ({"state": "s3://bucket/state"}, "state: 's3://bucket/state': expected a folder on a local disk"),
        ({"notify": {"webhook": "slack"}}, "notify.webhook: 'slack': expected an http or https URL"),
        ({"notify": {"on": ["lunch"]}}, "notify.on"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name(tmp_path: Path, change: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Days(tmp_path, **change).read()


def test_sections_that_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('config = "run.toml"\nstate = "state"\n')
    with pytest.raises(ConfigError, match=r"the file: object missing required field partitions$"):
        read_pipeline(tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ({"run_dir": "runs/x"}, "run_dir: leave it out; retraining fills it in for every slot"),
        ({"data": {"train": ["x.parquet"]}}, "data.train: leave it out"),
        ({"warm_start": "x"}, "warm_start: leave it out"),
        ({"checkpoint": {"every_s": 0.0}}, "checkpoint.every_s and every_steps are 0: retraining goes on from checkpoints"),
    ],
)
def test_a_run_that_retraining_cannot_fill_in_is_refused(tmp_path: Path, run: dict[str, object], why: str) -> None:
    days = Days(tmp_path)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(run))
    with pytest.raises(ConfigError, match=rf"run\.toml: {why}"):
        days.read()
