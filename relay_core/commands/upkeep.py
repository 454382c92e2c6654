"""Commands off the hot path: what people and tools read and repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from relay_core import scripts
from relay_core.commands.command import Command, id_of
from relay_core.errors import InvalidRecord
from relay_core.job import NO_OPTIONS, Record, State, StoredJob
from relay_core.keys import LAYOUT, LEVELS, QueueKeys

PAGE_BYTES = 4 * 2**20
"""Bytes of records after which a page of `scan` ends."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """One queue at one instant. Times are unix seconds of the server.

    :ivar ready: jobs per priority level, level 0 first
    :ivar oldest_at: since when the oldest job at the head of a ready list has been ready: its creation, or due time
    :ivar patient_at: the same of the job that has waited longer than 99 in 100 of its ready list; of several lists, the
        earliest
    :ivar settings: rate, burst, max_inflight as stored; absent when not set
    :ivar counters: lifetime counts of enqueued, claimed, processed, retried, dead, reaped, promoted, ...
    """

    queue: str
    now: float
    ready_by_level: tuple[int, ...]
    delayed: int
    inflight: int
    dead: int
    oldest_at: float | None
    patient_at: float | None
    next_due_at: float | None
    paused: bool
    settings: Mapping[str, float]
    counters: Mapping[str, int]

    @property
    def ready(self) -> int:
        return sum(self.ready_by_level)

    @property
    def pending(self) -> int:
        """Jobs that are not over: ready, delayed and inflight."""
        return self.ready + self.delayed + self.inflight


def _seconds(ms: float) -> float | None:
    return None if ms < 0 else ms / 1000


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [item.decode() for item in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def stats(q: QueueKeys) -> Command[QueueStats]:
    """Depths, settings and counters at one instant."""

    def parse(reply: Sequence[Any], _resent: bool) -> QueueStats:
        now, delayed, inflight, dead, oldest, patient, next_due, config, counters, *ready = reply
        settings = _pairs(config)
        return QueueStats(
            queue=q.queue,
            now=now / 1000,
            ready_by_level=tuple(ready),
            delayed=delayed,
            inflight=inflight,
            dead=dead,
            oldest_at=_seconds(oldest),
            patient_at=_seconds(patient),
            next_due_at=_seconds(next_due),
            paused="paused" in settings,
            settings={k: float(settings[k]) for k in ("rate", "burst", "max_inflight") if k in settings},
            counters={name: int(value) for name, value in _pairs(counters).items()},
        )

    keys = (q.config, q.counters, q.delayed, q.leases, q.dead, q.jobs, q.finished, *q.ready)
    return Command(scripts.load("stats"), keys, (LAYOUT,), parse)


def _stored_jobs(q: QueueKeys, flat: Sequence[Any]) -> list[StoredJob]:
    return [_stored_job(q, *flat[i : i + 6]) for i in range(0, len(flat), 6)]


def _stored_job(
    q: QueueKeys, id: bytes, state: bytes, score: int | bytes, raw: bytes, owner: bytes, failure: bytes
) -> StoredJob:
    try:
        record = Record.unpack(raw)
        created, priority, payload = record.created_ms / 1000, record.priority, record.payload
        options = record.options
    except InvalidRecord:
        # a record that does not decode is shown as it is: its bytes are what somebody wants to see
        created, priority, payload, options = None, None, raw, NO_OPTIONS
    token, _, rest = owner.decode(errors="replace").partition(" ")
    head, _, error = failure.decode(errors="replace").partition("\n")
    failed_at, _, reason = head.partition(" ")
    name = cast("State | None", state.decode() or None)
    return StoredJob(
        id=id_of(id),
        queue=q.queue,
        state=name,
        payload=payload,
        created_at=created,
        priority=priority,
        deliveries=_number(token.partition(":")[0]),
        retries=_number(rest.partition(" ")[0]),
        due_at=int(score) / 1000 if name in ("delayed", "inflight") else None,
        reason=reason or None,
        error=error or None,
        failed_at=_number(failed_at) / 1000 if failed_at else None,
        options=options,
        token=token or None,
        held=rest.endswith(" h"),
    )


def _number(text: str) -> int:
    """Of what the scripts keep; 0 for what somebody else wrote there, as they read it themselves."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 17 else 0


def _state_keys(q: QueueKeys) -> tuple[bytes, ...]:
    return (q.config, q.jobs, q.delayed, q.leases, q.dead, q.owners, q.errors, *q.ready, q.payloads)


def list_jobs(q: QueueKeys, state: State, skip: int, limit: int) -> Command[list[StoredJob]]:
    """A page of at most 200 jobs: ready in the order of claims, delayed by due time, dead by age, oldest first."""
    return Command(
        scripts.load("list"),
        _state_keys(q),
        (LAYOUT, state, skip, limit),
        lambda reply, _resent: _stored_jobs(q, reply),
    )


def show(q: QueueKeys, ids: Sequence[str]) -> Command[list[StoredJob | None]]:
    """The jobs of these ids, None for one that is not in the store."""

    def parse(reply: Sequence[Any], _resent: bool) -> list[StoredJob | None]:
        found = _stored_jobs(q, reply)
        return [job if job.state or job.payload else None for job in found]

    return Command(scripts.load("show"), _state_keys(q), (LAYOUT, *ids), parse)


def requeue(q: QueueKeys, ids: Sequence[str]) -> Command[list[bool]]:
    """Dead jobs become ready again: True per id that was dead."""
    keys = (
        q.config, q.dead, q.jobs, q.owners, q.errors, q.counters, q.marker, q.dedup, q.dedup_expiry, q.untold, *q.ready,
    )  # fmt: skip
    return Command(scripts.load("requeue"), keys, (LAYOUT, *ids), lambda reply, _resent: [bool(one) for one in reply])


class Adopted(NamedTuple):
    """A job of another system to take in.

    `at_ms`: unix milliseconds at which a delayed one is due or a dead one died. `created_ms`: unix milliseconds as
    text, or "" for now. `record`: Record.pack.
    """

    id: str
    state: str
    at_ms: int
    created_ms: str
    reason: str
    error: str
    record: bytes


def adopt(q: QueueKeys, jobs: Sequence[Adopted]) -> Command[list[bool]]:
    """Take in up to 200 jobs, each in its state: True per job, False for one that is here or was done lately."""
    keys = (q.config, q.jobs, q.counters, q.marker, q.delayed, q.dead, q.errors, q.finished, *q.ready)
    args = tuple(arg for job in jobs for arg in job)
    return Command(
        scripts.load("adopt"),
        keys,
        (LAYOUT, *args),
        lambda reply, _resent: [bool(one) for one in reply],
        durable=True,
    )


def scan(
    q: QueueKeys, point: tuple[int, str], until_ms: int, limit: int, *, records: bool, most_bytes: int = PAGE_BYTES
) -> Command[tuple[int, list[tuple[StoredJob, int]]]]:
    """Dead jobs after a point, each with its time of death in ms, and how many there are from there on.

    At most `limit` (1..200), and no more than `most_bytes` of records or one job; an empty page is the end.

    :param point: unix ms and id, which need not be there: the page begins after it
    :param until_ms: unix ms of the last death to return
    :param records: with the records; without, the jobs have neither payload nor options
    """

    def parse(reply: Sequence[Any], _resent: bool) -> tuple[int, list[tuple[StoredJob, int]]]:
        rows = [reply[i : i + 6] for i in range(1, len(reply), 6)]
        return reply[0], [(_stored_job(q, *row), int(row[2])) for row in rows]

    keys = (q.config, q.jobs, q.dead, q.owners, q.errors, q.payloads)
    args = (LAYOUT, point[0], point[1], until_ms, limit, most_bytes, int(records))
    return Command(scripts.load("scan"), keys, args, parse)


def bookmark(q: QueueKeys, run: str, place: str) -> Command[int]:
    """Keep how far a bulk run came."""
    return Command(scripts.load("bookmark"), (q.bulk,), (run, place), lambda reply, _resent: int(reply))


def drop(q: QueueKeys, ids: Sequence[str]) -> Command[list[bool]]:
    """Dead jobs leave the store: True per id that was dead."""
    keys = (q.config, q.dead, q.jobs, q.owners, q.errors, q.counters, q.untold, q.payloads)
    return Command(scripts.load("drop"), keys, (LAYOUT, *ids), lambda reply, _resent: [bool(one) for one in reply])


def cancel(q: QueueKeys, ids: Sequence[str]) -> Command[list[State | None]]:
    """Take jobs out: the state each was in (inflight: left alone), None for one that is not there."""
    keys = (
        q.config, q.jobs, q.delayed, q.leases, q.dead, q.owners, q.errors, q.dedup, q.counters, q.untold, *q.ready,
        q.payloads,
    )  # fmt: skip
    return Command(
        scripts.load("cancel"),
        keys,
        (LAYOUT, *ids),
        lambda reply, _resent: [cast("State | None", one.decode() or None) for one in reply],
    )


def purge(q: QueueKeys, state: State, limit: int, *, keep: int = 0) -> Command[int]:
    """Drop at most `limit` jobs of a state that is not inflight: how many.

    :param keep: ready jobs to leave, however many there are
    """
    keys = (
        q.config, q.jobs, q.delayed, q.dead, q.owners, q.errors, q.dedup, q.counters, q.untold, *q.ready, q.payloads,
        q.leases,
    )  # fmt: skip
    return Command(scripts.load("purge"), keys, (LAYOUT, state, limit, keep), lambda reply, _resent: int(reply))


def delete_queue(q: QueueKeys) -> Command[bool]:
    """Drop all keys of a queue that holds no job: False when it holds one."""
    keys = (
        q.config, q.jobs, q.delayed, q.leases, q.dead, q.owners, q.errors, q.dedup, q.dedup_expiry, q.marker,
        q.counters, q.finished, q.bulk, q.ticks, q.untold, *q.ready, q.payloads,
    )  # fmt: skip
    return Command(scripts.load("delete_queue"), keys, (LAYOUT,), lambda reply, _resent: bool(reply))


def configure(q: QueueKeys, changes: Mapping[str, str]) -> Command[None]:
    """Store settings: paused, rate, burst, max_inflight; an empty value unsets one."""
    args = tuple(arg for pair in changes.items() for arg in pair)
    return Command(scripts.load("configure"), (q.config, q.marker), (LAYOUT, *args), lambda _reply, _resent: None)


def shift(q: QueueKeys, ms: int, *, leases: bool) -> Command[int]:
    """Let time pass at once, for relay_core.testing: how many delayed jobs there are.

    :param leases: leases, dead jobs, their burials and timed dedup keys get older too
    """
    keys = (q.config, q.delayed, q.leases, q.dead, q.dedup_expiry, q.marker, q.untold)
    return Command(scripts.load("shift"), keys, (LAYOUT, ms, int(leases)), lambda reply, _resent: int(reply))


def audit(q: QueueKeys, ids: Sequence[str], *, repair: bool) -> Command[list[str]]:
    """Look closely at up to 50 ids: a finding per id, empty when it is sound."""
    keys = (
        q.config, q.jobs, q.counters, q.marker, q.delayed, q.leases, q.dead, q.owners, q.errors, q.untold,
        *q.ready, q.payloads,
    )  # fmt: skip
    assert len(q.ready) == LEVELS
    return Command(
        scripts.load("audit"),
        keys,
        (LAYOUT, int(repair), *ids),
        lambda reply, _resent: [one.decode() for one in reply],
    )
