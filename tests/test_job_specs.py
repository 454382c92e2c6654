"""What a job spec becomes, by itself: without a server."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest

from relay_core import JobSpec
from relay_core.errors import InvalidArgument
from relay_core.job import Record

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
