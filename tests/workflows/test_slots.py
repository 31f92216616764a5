"""Slots: names of folders as times, which are ready, and clocks that are put forward and back."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from flowps.errors import ConfigError, DataError
from workflows.slots import Pattern, find

HOURS, DAYS = Pattern("date=%Y-%m-%d/hour=%H"), Pattern("date=%Y-%m-%d")
BERLIN = ZoneInfo("Europe/Berlin")


def at(*of: int) -> float:
    return datetime(*of, tzinfo=UTC).timestamp()  # type: ignore[arg-type, misc]


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
        os.utime(path, (at(2024, 1, 1), at(2024, 1, 1)))
    return folder


def names(root: Path, pattern: Pattern, marker: str = "_SUCCESS", age: float = 0, now: float = at(2030, 1, 1)) -> dict[str, bool]:
    return {of.slot.name: of.is_ready for of in find(str(root), pattern, ZoneInfo("UTC"), marker, age, now)}


@pytest.mark.parametrize(
    ("text", "folder", "name"),
    [
        ("date=%Y-%m-%d/hour=%H", "date=2024-09-21/hour=14", "2024-09-21T14"),
        ("%Y/%m/%d", "2024/09/21", "2024-09-21"),
        ("y=%Y/m=%m", "y=2024/m=09", "2024-09"),
        ("d%d.%m.%Y/t%H%M", "d21.09.2024/t1405", "2024-09-21T14:05"),
        ("dt=%Y%m%d%H", "dt=2024092114", "2024-09-21T14"),
        ("%Y", "2024", "2024"),
    ],
)
def test_folders_are_slots(tmp_path: Path, text: str, folder: str, name: str) -> None:
    put(
        tmp_path, f"{folder}/part.parquet", f"{folder}/_SUCCESS", "other/part.parquet", f"x{folder}/part.parquet", f"{folder}x/a.pq"
    )
    assert names(tmp_path, Pattern(text)) == {name: True}


@pytest.mark.parametrize("text", ["", "date=%Y-%d", "hour=%H", "%Y-%m-%d-%d", "%Y-%m-%d %S", "%Y%m%d%M"])
def test_a_pattern_that_names_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^partitions\.slots: .* expected each of %Y %m %d %H %M once, without a gap"):
        Pattern(text)


def test_what_is_no_day_is_no_slot(tmp_path: Path) -> None:
    put(tmp_path, "date=2024-02-30/a.parquet", "date=2024-02-29/a.parquet", "date=2024-2-1/a.parquet")
    (tmp_path / "date=2024-03-01").write_text("a file")
    assert names(tmp_path, DAYS) == {"2024-02-29": False}


def test_slots_are_in_order_of_time_and_have_the_files_that_spark_reads(tmp_path: Path) -> None:
    put(tmp_path, "date=2024-09-21/hour=02/b.parquet", "date=2024-09-21/hour=02/a.pq", "date=2024-09-21/hour=02/_tmp/c.parquet",
        "date=2024-09-21/hour=02/.d.parquet", "date=2024-09-21/hour=02/e.csv", "date=2024-09-20/hour=23/a.parquet",
        "date=2024-09-21/hour=02/deep/f.parquet")  # fmt: skip
    found = find(str(tmp_path), HOURS, ZoneInfo("UTC"), "_SUCCESS", 0, at(2030, 1, 1))
    assert [of.slot.name for of in found] == ["2024-09-20T23", "2024-09-21T02"]
    assert [file.url.removeprefix(found[1].url) for file in found[1].files] == ["/a.pq", "/b.parquet", "/deep/f.parquet"]
    assert [file.size for file in found[1].files] == [28, 33, 38]
    assert {file.modified for file in found[1].files} == {at(2024, 1, 1)}


def test_a_marker_makes_a_slot_ready_and_its_name_may_be_another(tmp_path: Path) -> None:
    put(tmp_path, "date=2024-09-20/a.parquet", "date=2024-09-21/a.parquet", "date=2024-09-21/_SUCCESS", "date=2024-09-22/DONE")
    assert names(tmp_path, DAYS) == {"2024-09-20": False, "2024-09-21": True, "2024-09-22": False}
    assert names(tmp_path, DAYS, marker="DONE")["2024-09-22"], "a slot without files is one too"
    (waits, *_) = find(str(tmp_path), DAYS, ZoneInfo("UTC"), "_SUCCESS", 0, at(2030, 1, 1))
    assert waits.waits_for == "for _SUCCESS"


def test_without_a_marker_age_does(tmp_path: Path) -> None:
    """The slot is over, and nothing was written for so long."""
    put(tmp_path, "date=2024-09-21/hour=14/a.parquet")
    over = at(2024, 9, 21, 15)
    assert names(tmp_path, HOURS, "", 60, over + 59) == {"2024-09-21T14": False}
    assert names(tmp_path, HOURS, "", 60, over + 60) == {"2024-09-21T14": True}
    os.utime(tmp_path / "date=2024-09-21/hour=14/a.parquet", (over + 500, over + 500))
    assert names(tmp_path, HOURS, "", 60, over + 559) == {"2024-09-21T14": False}
    assert names(tmp_path, HOURS, "", 60, over + 560) == {"2024-09-21T14": True}
    (tmp_path / "date=2024-09-22" / "hour=00").mkdir(parents=True)
    assert names(tmp_path, HOURS, "", 60)["2024-09-22T00"] is False, "an empty folder may be one that is being written"


class TestClocks:
    def test_an_hour_that_comes_twice_ends_when_the_second_one_ends(self) -> None:
        """Berlin, 27 October 2024: at 03:00 summer time it is 02:00 again."""
        assert HOURS.ends(HOURS.parse("2024-10-27T01"), BERLIN) == at(2024, 10, 27, 1), "02:00, shown twice: the later"
        assert HOURS.ends(HOURS.parse("2024-10-27T02"), BERLIN) == at(2024, 10, 27, 2)
        assert HOURS.ends(HOURS.parse("2024-10-26T23"), BERLIN) == at(2024, 10, 26, 22)
        assert DAYS.ends(DAYS.parse("2024-10-27"), BERLIN) - DAYS.ends(DAYS.parse("2024-10-26"), BERLIN) == 25 * 3600

    def test_an_hour_that_is_left_out_is_missing_and_not_waited_for(self, tmp_path: Path) -> None:
        """31 March 2024: at 02:00 it is 03:00."""
        put(tmp_path, *(f"date=2024-03-31/hour={hour:02d}/_SUCCESS" for hour in (0, 1, 3, 4)))
        found = find(str(tmp_path), HOURS, BERLIN, "_SUCCESS", 0, at(2030, 1, 1))
        assert [of.slot.name[-2:] for of in found] == ["00", "01", "03", "04"]
        ends = [HOURS.ends(of.slot, BERLIN) for of in found]
        assert ends == [at(2024, 3, 31, 0), at(2024, 3, 31, 1), at(2024, 3, 31, 2), at(2024, 3, 31, 3)]
        assert DAYS.ends(DAYS.parse("2024-03-31"), BERLIN) - DAYS.ends(DAYS.parse("2024-03-30"), BERLIN) == 23 * 3600

    def test_months_and_years_end_where_the_next_begin(self) -> None:
        zone = ZoneInfo("UTC")
        assert Pattern("%Y-%m").ends(Pattern("%Y-%m").parse("2024-12"), zone) == at(2025, 1, 1)
        assert Pattern("%Y").ends(Pattern("%Y").parse("2024"), zone) == at(2025, 1, 1)
        assert Pattern("%Y%m%d%H%M").ends(Pattern("%Y%m%d%H%M").parse("2024-02-28T23:59"), zone) == at(2024, 2, 29)


def test_names_may_be_coarser_than_slots() -> None:
    assert HOURS.parse("2024-09-21").name == "2024-09-21T00"
    assert HOURS.last("2024-09-21").name == "2024-09-21T23"
    assert HOURS.last("2024-02").name == "2024-02-29T23"
    assert HOURS.parse("2024-09-21T14") == HOURS.last("2024-09-21T14")
    assert DAYS.parse("2024-09-21T14").name == "2024-09-21"
    assert DAYS.last("2024").name == "2024-12-31"
    for wrong in ("yesterday", "2024-13", "2024-09-21 14", ""):
        with pytest.raises(ConfigError, match="is no slot; expected one as in 2024-09-21T14"):
            HOURS.parse(wrong)


def test_old_folders_are_not_even_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"date=2024-09-{day:02d}/hour={hour:02d}/_SUCCESS" for day in (1, 20, 21) for hour in (0, 13, 23)))
    listed: list[str] = []
    ls = LocalFileSystem.ls
    monkeypatch.setattr(LocalFileSystem, "ls", lambda self, path, **more: (listed.append(str(path)), ls(self, path, **more))[1])
    found = find(str(tmp_path), HOURS, ZoneInfo("UTC"), "_SUCCESS", 0, at(2030, 1, 1), datetime(2024, 9, 20, 13))
    assert [of.slot.name for of in found] == ["2024-09-20T13", "2024-09-20T23", "2024-09-21T00", "2024-09-21T13", "2024-09-21T23"]
    assert not any("2024-09-01" in path or "2024-09-20/hour=00" in path for path in listed)


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^partitions\.root: .*/none: no such folder"):
        names(tmp_path / "none", DAYS)


def test_an_object_store() -> None:
    """Whose folders are made of names alone."""
    memory = fsspec.filesystem("memory")
    try:
        for name in ("date=2024-09-21/a.parquet", "date=2024-09-21/_SUCCESS", "date=2024-09-22/a.parquet"):
            memory.pipe(f"/slots-bucket/{name}", b"xx")
        found = find("memory://slots-bucket", DAYS, ZoneInfo("UTC"), "_SUCCESS", 0, at(2030, 1, 1))
        assert [(of.slot.name, of.is_ready) for of in found] == [("2024-09-21", True), ("2024-09-22", False)]
        assert [file.url for file in found[0].files] == ["memory:///slots-bucket/date=2024-09-21/a.parquet"]
        assert found[0].files[0].modified > 0
    finally:
        memory.rm("/slots-bucket", recursive=True)
