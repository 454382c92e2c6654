"""What a job spec becomes, by itself: without a server."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest

from relay_core import JobSpec
from relay_core.errors import InvalidArgument
from relay_core.job import Record, new_id

PLAIN: list[dict[str, Any]] = [
    {},
    {"priority": 9},
    {"headers": {"a": "b\u00e9"}},
    {"priority": 3, "headers": {"a": ""}},
]
OTHERS: list[dict[str, Any]] = [
    {"headers": {}},
    {"headers": {"a": "b", "c": "d"}},
    {"headers": UserDict({"a": "b"})},
    {"headers": {"a": "b"}, "max_retries": 0},
    {"delay": 1.5},
    {"dedup_key": "k", "dedup_for": 2.0},
]


@pytest.mark.parametrize("asked", PLAIN + OTHERS, ids=str)
def test_what_is_stored_reads_as_it_was_asked_for(asked: dict[str, Any]) -> None:
    spec = JobSpec(b"body\n", id="i", **asked)
    for _ in range(2):  # of most jobs some is remembered
        job = spec.stored(b"body\n")
        assert job.record == Record.pack(spec.priority, spec.options(), b"body\n")
        read = Record.unpack(b"1 " + job.record)
        assert (read.priority, read.payload, read.options) == (spec.priority, b"body\n", spec.options())
        assert (job.id, job.due) == ("i", spec.due())


@pytest.mark.parametrize(
    "asked",
    [
        {"priority": True}, {"priority": 10}, {"priority": -1}, {"priority": 1.0}, {"priority": []},
        {"headers": {"a": 1}}, {"headers": {1: "a"}}, {"headers": {True: "a"}}, {"headers": {"a": []}},
        {"headers": "a"}, {"headers": 1}, {"headers": [("a", "b")]},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_each_time(asked: dict[str, Any]) -> None:
    JobSpec(b"", priority=1, headers={"a": "b"}).stored(b"")  # what equals one that is remembered is none of it
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=next(iter(asked))):
            JobSpec(b"", **asked).stored(b"")


def test_fresh_ids_are_ordered_by_their_millisecond_and_else_random(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = "0123456789abcdefghjkmnpqrstvwxyz"
    first, last = 1_700_000_000_000, 1_700_000_000_000 + 40 * 365 * 86_400_000
    made = []
    for ms in (first, first + 1, last):
        monkeypatch.setattr("time.time_ns", lambda now=ms: now * 1_000_000 + 999_999)
        ids = {new_id() for _ in range(100)}
        assert len(ids) == 100
        for id in ids:
            assert len(id) == 22
            assert sum(digits.index(digit) << 5 * place for place, digit in enumerate(reversed(id[:10]))) == ms
        assert {digit for id in ids for digit in id[10:]} == set(digits)
        made.append(ids)
    assert max(made[0]) < min(made[1])
    assert max(made[1]) < min(made[2])
