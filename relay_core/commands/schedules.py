"""Commands of recurring jobs: the plans are in a slot of their own, the job of each tick goes to its queue's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relay_core import scripts
from relay_core.commands.command import Command
from relay_core.commands.enqueues import NewJob
from relay_core.job import Enqueued
from relay_core.keys import LAYOUT, QueueKeys, ScheduleKeys

MAX_DUE = 20
"""Most plans in one reply."""


@dataclass(frozen=True, slots=True)
class Due:
    """Schedules whose tick has come. Times are unix ms of the server.

    :ivar wait_ms: until the next tick of another schedule; 0 when more are due, None when there is none
    :ivar ticks: name, its tick, its plan as it is stored
    """

    now_ms: int
    wait_ms: int | None
    ticks: Sequence[tuple[str, int, bytes]]


def due(s: ScheduleKeys, limit: int = MAX_DUE, skip: int = 0) -> Command[Due]:
    """At most `limit` schedules whose tick has come, those after the first `skip`; with 0 it only tells the time."""

    def parse(reply: Sequence[Any], _resent: bool) -> Due:
        now, wait, *flat = reply
        ticks = [(flat[i].decode(), flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
        return Due(now, None if wait < 0 else wait, ticks)

    return Command(scripts.load("due"), (s.plans, s.next_ticks), (skip, limit), parse)


def schedule(s: ScheduleKeys, name: str, seen: bytes, plan: bytes, tick_ms: int) -> Command[tuple[int, bool]]:
    """Store a plan in place of the one that was seen (b"": none): the server's now in ms, and whether it was so."""

    def parse(reply: Sequence[int], _resent: bool) -> tuple[int, bool]:
        return reply[0], bool(reply[1])

    keys = (s.plans, s.next_ticks, s.alarm)
    return Command(scripts.load("schedule"), keys, (name, seen, plan, tick_ms), parse, durable=True)


def unschedule(s: ScheduleKeys, name: str) -> Command[tuple[int, bytes]]:
    """Remove a schedule: the server's now in ms, and the plan that it had, b"" for none."""

    def parse(reply: Sequence[Any], _resent: bool) -> tuple[int, bytes]:
        return reply[0], reply[1]

    return Command(scripts.load("unschedule"), (s.plans, s.next_ticks), (name,), parse)


def retire(q: QueueKeys, name: str, until_ms: int) -> Command[int]:
    """The queue takes no tick of a schedule up to this moment any more."""
    return Command(scripts.load("retire"), (q.ticks,), (name, until_ms), lambda reply, _resent: int(reply))


def advance(s: ScheduleKeys, name: str, plan: bytes, done_ms: int, tick_ms: int) -> Command[bool]:
    """A schedule waits for its next tick: False when its plan or tick is not what was seen."""
    args = (name, plan, done_ms, tick_ms)
    return Command(scripts.load("advance"), (s.plans, s.next_ticks), args, lambda reply, _resent: bool(reply))


def tick(q: QueueKeys, name: str, tick_ms: int, job: NewJob, dedup_key: str = "") -> Command[Enqueued | None]:
    """Store the job of a tick. None: the tick was here before; a duplicate: the job named by it is not over.

    :param dedup_key: held by the job until it is done
    """

    def parse(reply: int | bytes, _resent: bool) -> Enqueued | None:
        if isinstance(reply, bytes):
            return Enqueued(reply.decode(), duplicate=True)
        return Enqueued(job.id) if reply else None

    keys = (q.config, q.jobs, q.counters, q.marker, q.dedup, q.ticks, *q.ready)
    args = (LAYOUT, name, tick_ms, job.id, dedup_key, job.record)
    return Command(scripts.load("tick"), keys, args, parse, durable=True)
