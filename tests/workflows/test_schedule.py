"""The scheduler: what cron means, in which time zone. `long_schedule` has it at work."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from flowps.errors import ConfigError
from workflows.pipeline import Schedule
from workflows.schedule import trigger_of

pytestmark = pytest.mark.timeout(60)
BERLIN = ZoneInfo("Europe/Berlin")


def starts(cron: str, begin: datetime, count: int, zone: str = "UTC") -> list[datetime]:
    trigger, found = trigger_of(Schedule(cron=cron, time_zone=zone)), list[datetime]()
    now = begin
    for _ in range(count):
        found.append(trigger.get_next_fire_time(found[-1] if found else None, now))
        now = (found[-1].astimezone(UTC) + timedelta(seconds=1)).astimezone(begin.tzinfo)
    return found


class TestCron:
    @pytest.mark.parametrize(
        ("weekday", "days"),
        [("0", "sun"), ("7", "sun"), ("1", "mon"), ("1-5", "mon tue wed thu fri"), ("0,6", "sun sat"), ("mon-wed", "mon tue wed"),
         ("*/2", "sun tue thu sat"), ("5-7", "sun fri sat"), ("SAT", "sat")],
    )  # fmt: skip
    def test_weekdays_are_those_of_cron(self, weekday: str, days: str) -> None:
        """Not of the library, which counts from Monday."""
        found = starts(f"0 6 * * {weekday}", datetime(2024, 9, 22, tzinfo=ZoneInfo("UTC")), 7)  # a Sunday
        assert {of.strftime("%a").lower() for of in found} == set(days.split())

    @pytest.mark.parametrize(
        "cron", ["", "* * * *", "61 * * * *", "* * * * 8", "* * * * 5-1", "a * * * *", "* * * * 1-x", "0 0 1 * 1", "* * * * */0"]
    )
    def test_what_is_no_cron_is_refused(self, cron: str) -> None:
        with pytest.raises(ConfigError, match=r"^schedule\.cron: .*expected minute hour day month weekday, as in 15 \* \* \* \*"):
            trigger_of(Schedule(cron=cron))

    def test_a_time_zone_that_is_none_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="'Mars/Base': no such time zone; expected a name as in Europe/Berlin or UTC"):
            trigger_of(Schedule(time_zone="Mars/Base"))

    def test_an_hour_that_is_left_out_has_no_start_and_one_that_comes_twice_has_its_own(self) -> None:
        """Berlin: clocks go forward on 31 March 2024 at 02:00, and back on 27 October at 03:00."""
        spring = starts("15 * * * *", datetime(2024, 3, 31, 0, 30, tzinfo=BERLIN), 4, "Europe/Berlin")
        assert [of.strftime("%H:%M%z") for of in spring] == ["01:15+0100", "03:15+0200", "04:15+0200", "05:15+0200"]
        autumn = starts("15 * * * *", datetime(2024, 10, 27, 1, 30, tzinfo=BERLIN), 3, "Europe/Berlin")
        assert [of.strftime("%H:%M%z") for of in autumn] == ["02:15+0200", "02:15+0100", "03:15+0100"]
        daily = starts("30 6 * * *", datetime(2024, 10, 26, tzinfo=BERLIN), 3, "Europe/Berlin")
        assert [of.strftime("%d %H:%M") for of in daily] == ["26 06:30", "27 06:30", "28 06:30"]

    def test_jitter_begins_later(self) -> None:
        knobs = Schedule(cron="0 6 * * *", jitter_s=600)
        base = datetime(2024, 9, 21, tzinfo=ZoneInfo("UTC"))
        late = [(trigger_of(knobs).get_next_fire_time(None, base) - base).total_seconds() - 6 * 3600 for _ in range(30)]
        assert 0 <= min(late) < max(late) <= 600
