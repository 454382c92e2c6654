"""When schedules tick: cron expressions through changes of the clock, intervals, and what was missed."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from relay_core.errors import InvalidArgument, InvalidRecord
from relay_core.schedule import Schedule
from relay_core.schedule import cron as cron_module
from relay_core.schedule.cron import Cron
from relay_core.schedule.plan import Plan

BERLIN, SAO_PAULO, APIA, LORD_HOWE = "Europe/Berlin", "America/Sao_Paulo", "Pacific/Apia", "Australia/Lord_Howe"


def ms(text: str, tz: str = "UTC") -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(tz)).timestamp() * 1000)


def ticks(expression: str, tz: str, start: str, count: int) -> list[str]:
    cron, at, found = Cron(expression, tz), ms(start, tz), []
    for _ in range(count):
        at = cron.after(at)
        found.append(datetime.fromtimestamp(at / 1000, ZoneInfo(tz)).strftime("%m-%dT%H:%M%z"))
    return found


@pytest.mark.parametrize(
    ("expression", "tz", "start", "expected"),
    [
        ("0 3 * * *", "UTC", "2026-01-31T03:00", ["02-01T03:00+0000", "02-02T03:00+0000"]),
        ("@daily", "UTC", "2026-01-31T03:00", ["02-01T00:00+0000"]),
        ("*/20 8-9 * * mon-fri", BERLIN, "2026-07-31T09:30", ["07-31T09:40+0200", "08-03T08:00+0200"]),
        # the clock is put forward from 02:00 to 03:00
        ("30 2 * * *", BERLIN, "2026-03-28T12:00", ["03-29T03:30+0200", "03-30T02:30+0200"]),
        ("0 3 * * *", BERLIN, "2026-03-28T12:00", ["03-29T03:00+0200", "03-30T03:00+0200"]),
        ("0 * * * *", BERLIN, "2026-03-29T00:30", ["03-29T01:00+0100", "03-29T03:00+0200", "03-29T04:00+0200"]),
        ("*/30 * * * *", BERLIN, "2026-03-29T01:15", ["03-29T01:30+0100", "03-29T03:00+0200", "03-29T03:30+0200"]),
        ("0 0 * * *", SAO_PAULO, "2018-11-03T12:00", ["11-04T01:00-0200", "11-05T00:00-0200"]),
        ("0,30 2 * * *", BERLIN, "2026-03-28T12:00", ["03-29T03:00+0200", "03-29T03:30+0200", "03-30T02:00+0200"]),
        ("30 2,3 * * *", BERLIN, "2026-03-28T12:00", ["03-29T03:30+0200", "03-30T02:30+0200"]),
        ("5 2,3 * * *", BERLIN, "2026-03-29T03:10", ["03-30T02:05+0200"]),
        # the clock is put back from 03:00 to 02:00
        ("30 2 * * *", BERLIN, "2026-10-24T12:00", ["10-25T02:30+0200", "10-26T02:30+0100"]),
        ("0 * * * *", BERLIN, "2026-10-25T01:30", ["10-25T02:00+0200", "10-25T02:00+0100", "10-25T03:00+0100"]),
        ("0 2-4 * * *", BERLIN, "2026-10-25T01:30", ["10-25T02:00+0200", "10-25T02:00+0100", "10-25T03:00+0100"]),
        ("45 1 * * *", LORD_HOWE, "2026-04-04T12:00", ["04-05T01:45+1100", "04-06T01:45+1030"]),
        # a day that was left out
        ("0 9 * * *", APIA, "2011-12-28T12:00", ["12-29T09:00-1000", "12-31T09:00+1400"]),
        # the other half of the year
        ("0 12 1 7 *", BERLIN, "2026-01-28T12:00", ["07-01T12:00+0200", "07-01T12:00+0200"]),
    ],
)
def test_cron_ticks_by_the_clock_on_the_wall(expression: str, tz: str, start: str, expected: list[str]) -> None:
    assert ticks(expression, tz, start, len(expected)) == expected


def test_a_tick_that_is_asked_for_within_the_hour_that_comes_twice_is_not_repeated() -> None:
    second = ms("2026-10-25T01:10")  # 02:10 for the second time in Berlin
    assert Cron("30 2 * * *", BERLIN).after(second) == ms("2026-10-26T01:30")
    assert Cron("*/15 * * * *", BERLIN).after(second) == ms("2026-10-25T01:15")


def test_seconds_may_stand_at_the_end() -> None:
    cron = Cron("* * * * * */20")
    assert [cron.after(ms("2026-01-01T00:00:19")), cron.after(ms("2026-01-01T00:00:20"))] == [
        ms("2026-01-01T00:00:20"),
        ms("2026-01-01T00:00:40"),
    ]


def test_the_time_zone_of_the_machine_does_not_matter() -> None:
    code = "from relay_core.schedule.cron import Cron; print(Cron('30 2 * * *', 'Europe/Berlin').after(1792922400000))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TZ": tz}, capture_output=True, text=True, check=True
        ).stdout
        for tz in ("America/Los_Angeles", "Asia/Kolkata")
    }
    assert len(told) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cron": "61 * * * *"}, "'61 * * * *'"),
        ({"cron": "* * *"}, "3 fields"),
        ({"cron": "0 0 30 2 *"}, "'0 0 30 2 *'"),
        ({"cron": "R * * * *"}, "random"),
        ({"cron": "H(0-5) * * * *"}, "random"),
        ({"cron": ""}, "0 fields"),
        ({"cron": 5}, "got 5"),
        ({"cron": "* * * * *", "tz": "Mars/Olympus"}, "Mars/Olympus"),
        ({"cron": "* * * * *", "tz": "../etc/passwd"}, "IANA"),
        ({"cron": "* * * * *", "tz": None}, "None"),
        ({"cron": "* * * * *", "every": 1}, "either"),
        ({}, "either"),
        ({"every": 0.01}, "every"),
        ({"every": float("nan")}, "every"),
        ({"every": 1, "missed": "never"}, "missed"),
        ({"every": 1, "catch_up": 0}, "catch_up"),
        ({"every": 1, "overlap": 1}, "overlap"),
        ({"every": 1, "priority": 10}, "priority"),
        ({"every": 1, "headers": {"a": 1}}, "headers"),
        ({"every": 1, "payload": "text"}, "payload"),
        ({"every": 1, "payload": b"x" * 65_537}, "65537"),
        ({"every": 1, "name": "with space"}, "name"),
        ({"every": 1, "name": ""}, "name"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said.replace("*", r"\*")):
        Schedule(**({"name": "n", "queue": "q"} | options))  # type: ignore[arg-type]


def test_without_croniter_cron_says_what_to_install_and_intervals_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "croniter", None)
    cron_module._croniter.cache_clear()
    with pytest.raises(InvalidArgument, match=r"relay-queue\[schedule\]"):
        Schedule("n", "q", cron="* * * * *")
    assert Schedule("n", "q", every=1).after(0, 0) == 1000
    cron_module._croniter.cache_clear()


def test_intervals_are_counted_from_when_they_were_stored() -> None:
    one = Schedule("n", "q", every=2.5)
    assert [one.after(at, 1000) for at in (1000, 3499, 3500, 5999)] == [3500, 3500, 6000, 6000]


@pytest.mark.parametrize("cron", [None, "* * * * * *"])
def test_missed_ticks_are_enqueued_by_the_policy(cron: str | None) -> None:
    def picked(first: int, now: int, **options: object) -> list[int]:
        one = Schedule("n", "q", cron=cron, every=None if cron else 1, **options)  # type: ignore[arg-type]
        return [tick // 1000 for tick in one.to_enqueue(first * 1000, now * 1000, 0)]

    assert picked(100, 100) == [100]
    assert picked(100, 107) == [107]
    assert picked(100, 107, missed="skip") == [107]
    assert picked(100, 107, missed="all") == list(range(100, 108))
    assert picked(100, 107, missed="all", catch_up=3) == [105, 106, 107]
    assert picked(100, 100_000, missed="all") == list(range(99_901, 100_001))
    assert picked(100, 3_000_000) == [3_000_000]


def test_a_tick_over_a_minute_late_is_skipped_where_the_policy_says_so() -> None:
    daily = Schedule("n", "q", cron="0 3 * * *", missed="skip")
    tick = ms("2026-01-01T03:00")
    assert daily.to_enqueue(tick, tick + 60_000, 0) == [tick]
    assert daily.to_enqueue(tick, tick + 60_001, 0) == []
    assert daily.to_enqueue(tick, ms("2026-03-01T03:00:05"), 0) == [ms("2026-03-01T03:00")]


def test_a_plan_is_read_as_it_was_written_and_one_of_a_newer_release_is_not() -> None:
    one = Schedule("n", "q", b"\xff\x00", cron="0 3 * * *", tz=BERLIN, missed="all", overlap=False, headers={"a": "b"})
    packed = Plan(one, 17).pack()
    assert Plan.unpack(packed) == Plan(one, 17)
    for raw in (packed.replace(b'"v":1', b'"v":2'), b"{}", b"[1]", b"\xff", packed.replace(b'"cron"', b'"moon"')):
        with pytest.raises((InvalidRecord, InvalidArgument)):
            Plan.unpack(raw)
