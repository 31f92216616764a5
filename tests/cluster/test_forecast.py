"""By which load the slots are placed: that of an earlier run, or of the first partition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from flowps.cluster.forecast import Forecast
from flowps.cluster.plan import Plan
from flowps.cluster.shard_report import PlacementReport
from flowps.errors import ConfigError
from flowps.ps.load import SlotLoad
from tests.cluster.conftest import USERS

TWO = ("ps.num_shards", 2)
MEASURED = SlotLoad(signs=2.5, distinct=1.5, rows=77)


def leave(folder: Path, loads: dict[str, SlotLoad]) -> Path:
    """What a run that measured these loads leaves of its placement."""
    folder.mkdir()
    (folder / "placement.json").write_bytes(msgspec.json.encode(PlacementReport("something", [], loads)))
    return folder


def test_one_shard_needs_none(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    assert make_plan().forecast is None
    assert make_plan(("ps.load_from", tmp_path / "none")).forecast is None


def test_the_first_partition_is_measured(make_plan: Callable[..., Plan]) -> None:
    found = make_plan(TWO).forecast
    assert found is not None
    assert found.source == "measured on the first 100 examples"
    (load,) = found.loads
    assert load.signs == 1.0
    assert load.rows == USERS
    assert USERS / 100 < load.distinct < 1  # batches of 32, each with users that come twice


def test_measuring_takes_a_few_batches_and_says_how_many_examples(make_plan: Callable[..., Plan]) -> None:
    found = make_plan(TWO, ("data.batch_size", 2)).forecast
    assert found is not None
    assert found.source == "measured on the first 32 examples"


def test_what_a_named_run_has_measured_comes_first(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    named = leave(tmp_path / "named", {"other": SlotLoad(1, 1, 1), "user": MEASURED})
    leave(tmp_path / "run", {"user": SlotLoad(9, 9, 9)})
    found = make_plan(TWO, ("ps.load_from", named), ("run_dir", tmp_path / "run")).forecast
    assert found == Forecast((MEASURED,), f"measured by the run in {named}")


def test_an_earlier_run_in_the_run_directory_comes_next(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    earlier = leave(tmp_path / "run", {"user": MEASURED})
    found = make_plan(TWO, ("run_dir", earlier)).forecast
    assert found == Forecast((MEASURED,), f"measured by the run in {earlier}")


def spoil_nothing(folder: Path) -> None:
    """No run has been there."""


def spoil_slots(folder: Path) -> None:
    leave(folder, {"somebody": MEASURED})


def spoil_end(folder: Path) -> None:
    """A run has not ended: it has measured nothing."""
    leave(folder, {})


def spoil_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "placement.json").write_text("{")


SPOILT: dict[Callable[[Path], None], str] = {
    spoil_nothing: "No such file or directory",
    spoil_slots: "it has no slot 'user'",
    spoil_end: "it has no slot 'user'",
    spoil_file: "placement.json",
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_named_run_without_these_loads_is_refused(
    make_plan: Callable[..., Plan], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path / "run")
    with pytest.raises(ConfigError) as refusal:
        make_plan(TWO, ("ps.load_from", tmp_path / "run"))
    said = str(refusal.value)
    assert said.startswith(f"ps.load_from: {tmp_path}/run has no measured load of these slots (")
    assert SPOILT[spoil] in said
    assert said.endswith(
        "name the directory of a finished run on the same columns, or leave it out to measure the first partition"
    )  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_run_directory_without_them_is_no_error(
    make_plan: Callable[..., Plan], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path / "run")
    found = make_plan(TWO, ("run_dir", tmp_path / "run")).forecast
    assert found is not None
    assert found.source == "measured on the first 100 examples"
