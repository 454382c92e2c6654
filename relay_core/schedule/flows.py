"""Recurring jobs as flows: store, remove and list plans, and enqueue what is due.

One job per tick, with any number of processes and whatever happens to them: the job of a tick is stored together with
the tick's time, in its queue's slot, and no tick up to that time is taken there again. The plan moves on afterwards;
a process that dies in between leaves a tick that the next one finds done.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from relay_core import commands, keys
from relay_core.errors import InvalidArgument, InvalidRecord, NotDurable, PluginError, StoreError
from relay_core.keys import ScheduleKeys
from relay_core.maintenance import pairs
from relay_core.operations import Flow, Operations, Raw
from relay_core.schedule.plan import MAX_PAYLOAD, Plan, Schedule, Scheduled
from relay_core.validation import JobSpec, payload_size

logger = logging.getLogger("relay.schedule")

_PAGE = 100
_AGAIN = 1.0
"""Seconds until a refused job is tried again."""

_SELDOM = 600.0
"""Seconds after which it is told again that a plan cannot be read here."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one look at the schedules did.

    :ivar enqueued: (schedule, queue, job id) per job that this look stored
    :ivar passed_over: (schedule, unix ms of the tick) where a job of an earlier tick was not over
    :ivar wait: seconds until the next tick, 0.0 when more are due; None when there is none
    """

    enqueued: list[tuple[str, str, str]]
    passed_over: list[tuple[str, int]]
    wait: float | None


class Unread:
    """The plans that this process cannot read, for want of croniter perhaps, or as a newer release wrote them.

    They are told of in the log, each once in ten minutes. Other processes may well carry them out.
    """

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def tell(self, name: str, error: Exception) -> None:
        now = time.monotonic()
        if now < self._told.get(name, now):
            return
        self._told[name] = now + _SELDOM
        logger.error("schedule %s cannot be run by this process, and is left to others: %s", name, error)


def schedule(ops: Operations, wanted: Schedule) -> Flow[Scheduled]:
    """Store a schedule, in place of the one of this name. One that is stored just so is left alone, with its ticks."""
    s = ScheduleKeys(ops.settings.prefix)
    queue = ops.plugins.route(wanted.queue, wanted.payload, wanted.headers)
    ops.settings.keys(queue)
    payload = ops.plugins.encode(wanted.payload, queue)
    payload_size(payload, MAX_PAYLOAD)
    while True:
        seen: bytes = (yield Raw(("HGET", s.plans, wanted.name))) or b""
        old = _plan(wanted.name, seen) if seen else None
        if seen and old is None:
            raise InvalidArgument(f"schedule {wanted.name!r} is there and cannot be read, see the log; remove it first")
        if old is not None and _same(ops, old.schedule, replace(wanted, queue=queue)):
            score = yield Raw(("ZSCORE", s.next_ticks, wanted.name))
            return Scheduled(replace(wanted, queue=queue), _seconds(score))
        now: int = (yield commands.due(s, 0)).now_ms
        plan = Plan(replace(wanted, queue=queue, payload=payload), now)
        tick = wanted.after(now, now)
        stored_at, stored = yield commands.schedule(s, wanted.name, seen, plan.pack(), tick)
        if stored:
            if old is not None:
                yield from _retire(ops, old, min(stored_at, tick - 1))
            return Scheduled(replace(wanted, queue=queue), tick / 1000)


def _same(ops: Operations, old: Schedule, new: Schedule) -> bool:
    """Whether they differ in nothing; encryption gives other bytes each time, so payloads are compared in the clear."""
    try:
        return replace(old, payload=ops.plugins.decode(old.payload, old.queue)) == new
    except Exception:  # of a plugin: what cannot be read is replaced
        return False


def unschedule(ops: Operations, name: str) -> Flow[bool]:
    """Remove a schedule: whether there was one. No tick of it is enqueued from then on; jobs that are there stay."""
    if not isinstance(name, str):
        raise InvalidArgument(f"a schedule's name is a text, got {name!r}")
    now, raw = yield commands.unschedule(ScheduleKeys(ops.settings.prefix), name)
    plan = _plan(name, raw) if raw else None
    if plan is not None:
        yield from _retire(ops, plan, now)
    return bool(raw)


def _retire(ops: Operations, plan: Plan, until_ms: int) -> Flow[None]:
    """A process that read the plan and was held up cannot store ticks of it any more."""
    q = ops.settings.keys(plan.schedule.queue)
    yield commands.retire(q, plan.schedule.name, until_ms)


def schedules(ops: Operations) -> Flow[list[Scheduled]]:
    """All schedules, by name. A plan that cannot be read here is left out, and logged."""
    s = ScheduleKeys(ops.settings.prefix)
    found: list[Scheduled] = []
    for name, raw in sorted((yield from _stored(s)).items()):
        plan = _plan(name, raw)
        if plan is not None:
            score = yield Raw(("ZSCORE", s.next_ticks, name))
            found.append(Scheduled(_readable(ops, plan.schedule), _seconds(score)))
    return found


def tell_unread(ops: Operations, unread: Unread) -> Flow[None]:
    """Say at once, and not first when they are due, which schedules this process cannot run."""
    for name, raw in sorted((yield from _stored(ScheduleKeys(ops.settings.prefix))).items()):
        _plan(name, raw, unread)


def _stored(s: ScheduleKeys) -> Flow[dict[str, bytes]]:
    raws: dict[str, bytes] = {}
    cursor: Any = b"0"
    while True:
        cursor, page = yield Raw(("HSCAN", s.plans, cursor, "COUNT", _PAGE))
        raws.update((name.decode(), raw) for name, raw in pairs(page))
        if int(cursor) == 0:
            return raws


def _readable(ops: Operations, stored: Schedule) -> Schedule:
    try:
        return replace(stored, payload=ops.plugins.decode(stored.payload, stored.queue))
    except Exception:  # of a plugin: shown as it is stored
        return stored


def _seconds(score: Any) -> float | None:
    return None if score is None else float(score) / 1000


def run_due(ops: Operations, unread: Unread | None = None) -> Flow[Round]:
    """Enqueue the jobs of the ticks that had come when it began. Any number of processes may do so at once.

    A schedule whose job is refused (a queue of a newer layout, a full server) is told in the log and tried again. One
    that cannot be read here is passed over: its tick is not touched, for another process may be able to run it.

    :param unread: what tells of these. Default: each is told of
    """
    s = ScheduleKeys(ops.settings.prefix)
    unread = unread or Unread()
    done = Round([], [], 0.0)
    passed = refused = 0
    found = yield commands.due(s)
    now = found.now_ms  # what comes due meanwhile is for the next look, or this one might never end
    while due := [one for one in found.ticks if one[1] <= now]:
        for name, tick, raw in due:
            plan = _plan(name, raw, unread)
            if plan is None:
                passed += 1
                continue
            try:
                yield from _ticks(ops, plan, tick, now, done)
            except (StoreError, NotDurable) as error:
                logger.error("schedule %s: queue %r refuses its job: %s", name, plan.schedule.queue, error)
                refused += 1
                continue
            except (PluginError, InvalidArgument) as error:
                logger.error("schedule %s: no job is made of its tick, trying again: %s", name, error)
                refused += 1
                continue
            yield commands.advance(s, name, raw, tick, plan.schedule.after(now, plan.anchor_ms))
        found = yield commands.due(s, skip=passed + refused)
    if not found.ticks:
        done = replace(done, wait=None if found.wait_ms is None else found.wait_ms / 1000)
    if refused:
        done = replace(done, wait=_AGAIN if done.wait is None else min(done.wait, _AGAIN))
    return done


def _ticks(
    ops: Operations,
    plan: Plan,
    first_ms: int,
    now_ms: int,
    done: Round,
) -> Flow[None]:
    """One after the other, for a tick that is stored shuts out those before it."""
    one = plan.schedule
    q = ops.settings.keys(one.queue)
    for tick in one.to_enqueue(first_ms, now_ms, plan.anchor_ms):
        yield from _register(ops, one.queue)
        spec = _job(ops, one, tick)
        answer = yield commands.tick(q, one.name, tick, spec.stored(one.payload), one.dedup_key or "")
        if answer is None:
            continue
        if answer.duplicate:
            done.passed_over.append((one.name, tick))
            ops.plugins.notify("relay_job_deduplicated", queue=one.queue, id=answer.id, dedup_key=one.dedup_key)
        else:
            done.enqueued.append((one.name, one.queue, answer.id))
            headers = spec.headers or {}
            ops.plugins.notify("relay_job_enqueued", queue=one.queue, id=answer.id, delay=0.0, headers=headers)


def _job(ops: Operations, one: Schedule, tick: int) -> JobSpec:
    """The job of a tick with what plugins add. Raises PluginError for whatever they raise: the tick is not lost."""
    if not ops.plugins.wants("relay_add_headers"):
        return one.job(tick)
    try:
        return ops.with_headers(one.queue, _readable(ops, one).job(tick))
    except Exception as error:
        raise PluginError(f"a plugin's relay_add_headers raised {error!r}") from error


def _register(ops: Operations, queue: str) -> Flow[None]:
    yield Raw(("SADD", keys.registry(ops.settings.prefix), keys.encode_queue(queue)))


def _plan(name: str, raw: bytes, unread: Unread | None = None) -> Plan | None:
    try:
        return Plan.unpack(raw)
    except (InvalidRecord, InvalidArgument) as error:
        (unread or Unread()).tell(name, error)
        return None
