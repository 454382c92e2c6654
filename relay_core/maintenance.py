"""Bulk work and repair, as flows of bounded batches, so that no call keeps the server from its clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay_core import commands, keys
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import InvalidArgument
from relay_core.job import Record, State
from relay_core.keys import QueueKeys
from relay_core.operations import Flow, Operations, Raw
from relay_core.validation import job_ids, whole

Progress = Callable[[int], None]
"""Called with the number of jobs handled since the last call."""

_SUSPECTS = 50
_SCAN = 1000
_RECORDS = 100


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found.

    :ivar checked: ids looked at
    :ivar findings: id -> what was wrong: no_record, no_state, two_states, wrong_list, no_lease,
        leftover, no_payload
    :ivar repaired: False when it only looked
    """

    queue: str
    checked: int
    findings: Mapping[str, str] = field(default_factory=dict)
    repaired: bool = True

    @property
    def clean(self) -> bool:
        return not self.findings


def configure(ops: Operations, queue: str, changes: Mapping[str, str]) -> Flow[None]:
    yield commands.configure(ops.settings.keys(queue), changes)


def limits(rate: float | None, burst: int | None, max_inflight: int | None) -> dict[str, str]:
    """The settings that `limit` stores, checked; None unsets one."""
    if rate is None and burst is not None:
        raise InvalidArgument(f"burst ({burst!r}) needs a rate")
    if rate is not None and (
        isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0001 <= rate <= 1_000_000
    ):
        raise InvalidArgument(f"rate must be between 0.0001 and 1000000 jobs per second, got {rate!r}")
    if burst is None:
        burst = max(1, round(rate or 0))
    whole("burst", burst, least=1, most=1_000_000)
    if max_inflight is not None:
        whole("max_inflight", max_inflight, least=1, most=1_000_000)
    return {
        "rate": "" if rate is None else repr(float(rate)),
        "burst": "" if rate is None else str(burst),
        "max_inflight": "" if max_inflight is None else str(max_inflight),
    }


def cancel(ops: Operations, queue: str, ids: Sequence[str]) -> Flow[list[State | None]]:
    states: list[State | None] = []
    ids = job_ids(ids)
    for at in range(0, len(ids), MAX_BATCH):
        states += yield commands.cancel(ops.settings.keys(queue), ids[at : at + MAX_BATCH])
    return states


def requeue(
    ops: Operations, queue: str, ids: Sequence[str] | None, limit: int | None, progress: Progress | None
) -> Flow[int]:
    """Requeue these dead jobs, or all that are dead now (at most `limit`), the oldest first."""
    q = ops.settings.keys(queue)
    if limit is not None:
        whole("limit", limit, least=0, most=2**53)
    done = 0
    if ids is not None:
        ids = job_ids(ids)
        for at in range(0, len(ids), MAX_BATCH):
            done += sum((yield commands.requeue(q, ids[at : at + MAX_BATCH])))
        return done
    # what dies while this runs comes after what was dead at its start, and is left for the next time
    left = (yield commands.stats(q)).dead
    left = left if limit is None else min(left, limit)
    while left > 0:
        page = yield Raw(("ZRANGE", q.dead, 0, min(MAX_BATCH, left) - 1))
        if not page:
            break
        moved = sum((yield commands.requeue(q, [commands.id_of(id) for id in page])))
        if not moved:
            break  # only ids without a record are left: the audit's business
        done += moved
        left -= moved
        if progress:
            progress(moved)
    return done


def purge(ops: Operations, queue: str, states: Sequence[State], progress: Progress | None) -> Flow[int]:
    """Drop all jobs that are in these states now; inflight ones cannot be named."""
    if isinstance(states, str):
        raise InvalidArgument(f"states must be a list of states, got {states!r}; write [state] for one")
    for state in states:
        if state not in ("ready", "delayed", "dead"):
            raise InvalidArgument(f"purge takes ready, delayed and dead, got {state!r}; inflight jobs are running")
    q = ops.settings.keys(queue)
    done = 0
    for state in states:
        left = getattr((yield commands.stats(q)), state)
        while left > 0:
            dropped = yield commands.purge(q, state, min(MAX_BATCH, left))
            if not dropped:
                break
            left -= dropped
            done += dropped
            if progress:
                progress(dropped)
    return done


def delete_queue(ops: Operations, queue: str) -> Flow[bool]:
    """Drop an empty queue, then its name. Whoever enqueues meanwhile puts the name back, or it is put back here."""
    q, registry = ops.settings.keys(queue), keys.registry(ops.settings.prefix)
    if not (yield commands.delete_queue(q)):
        return False
    yield Raw(("SREM", registry, keys.encode_queue(queue)))
    if (yield Raw(("EXISTS", q.config))):
        yield Raw(("SADD", registry, keys.encode_queue(queue)))
    return True


def audit(ops: Operations, queue: str, repair: bool, progress: Progress | None) -> Flow[AuditReport]:
    """Read all states without holding the server, then look at what seems wrong under one script each.

    Jobs move while they are read, so what seems wrong mostly is not; the script has the last word.
    """
    q = ops.settings.keys(queue)
    seen: Counter[bytes] = Counter()
    for key in (q.leases, q.dead, q.delayed):
        seen.update((yield from _scan("ZSCAN", key)))
    listed: dict[bytes, int] = {}
    for level, key in enumerate(q.ready):
        start = 0
        while page := (yield Raw(("LRANGE", key, start, start + _SCAN - 1))):
            seen.update(page)
            listed.update(dict.fromkeys(page, level))
            start += _SCAN
    stored, misplaced, apart = yield from _stored(q, listed)
    others = set((yield from _scan("HSCAN", q.owners))) | set((yield from _scan("HSCAN", q.errors)))
    untold = set((yield from _scan("ZSCAN", q.untold)))
    if progress:
        progress(len(stored | seen.keys()))
    suspects = {id for id, times in seen.items() if times > 1} | (seen.keys() ^ stored) | (others - stored) | misplaced
    # an inflight id whose state says that nobody holds it
    states = yield from _scan_pairs(q.owners)
    leased = set((yield from _scan("ZSCAN", q.leases)))
    suspects |= {id for id, state in states if state.endswith(b" h") != (id in leased) and id in stored}
    suspects |= leased - {id for id, _state in states}
    suspects |= untold - set((yield from _scan("ZSCAN", q.dead)))
    suspects |= apart ^ set((yield from _scan("HSCAN", q.payloads, _RECORDS)))
    findings = {}
    ordered = sorted(suspects)
    for at in range(0, len(ordered), _SUSPECTS):
        batch = [commands.id_of(id) for id in ordered[at : at + _SUSPECTS]]
        answers = yield commands.audit(q, batch, repair=repair)
        findings.update({id: finding for id, finding in zip(batch, answers, strict=True) if finding})
    if repair:
        yield from _heal_due(ops, queue, q)
    return AuditReport(queue, len(stored | seen.keys()), findings, repair)


def _heal_due(ops: Operations, queue: str, q: QueueKeys) -> Flow[None]:
    """Promote writes the exact next due time, whatever it was before; ready levels are registered anew."""
    yield from ops.promote(queue)
    levels = []
    for level, key in reversed(list(enumerate(q.ready))):
        if (yield Raw(("EXISTS", key))):
            levels.append(str(level))
    known = ((yield Raw(("HGET", q.config, "levels"))) or b"").decode()
    if set(levels) - set(known):
        merged = "".join(sorted(set(levels) | set(known), reverse=True))
        yield Raw(("HSET", q.config, "levels", merged))


def _stored(q: QueueKeys, listed: Mapping[bytes, int]) -> Flow[tuple[set[bytes], set[bytes], set[bytes]]]:
    """The ids that have a record, those of them that are on the ready list of another level, and those whose payload
    lies apart.

    The records pass by in small pages and are not kept: all payloads of the queue are in them.
    """
    ids: set[bytes] = set()
    misplaced: set[bytes] = set()
    apart: set[bytes] = set()
    cursor: Any = b"0"
    while True:
        cursor, flat = yield Raw(("HSCAN", q.jobs, cursor, "COUNT", _RECORDS))
        for id, record in pairs(flat):
            ids.add(id)
            if id in listed and record[:40].split(b" ")[1:2] != [b"%d" % listed[id]]:
                misplaced.add(id)
            if Record.lies_apart(record):
                apart.add(id)
        if int(cursor) == 0:
            return ids, misplaced, apart


def _scan(command: str, key: bytes, count: int = _SCAN) -> Flow[list[bytes]]:
    """The names alone; what stands beside them may be large, and is let go page by page."""
    return [name for name, _nothing in (yield from _scan_pairs(key, command, count, values=False))]


def _scan_pairs(
    key: bytes, command: str = "HSCAN", count: int = _SCAN, *, values: bool = True
) -> Flow[list[tuple[bytes, bytes]]]:
    cursor: Any = b"0"
    found: list[tuple[bytes, bytes]] = []
    while True:
        cursor, flat = yield Raw((command, key, cursor, "COUNT", count))
        found += pairs(flat) if values else ((name, b"") for name, _value in pairs(flat))
        if int(cursor) == 0:
            return found


def pairs(
    flat: Sequence[bytes] | Mapping[bytes, bytes] | Sequence[tuple[bytes, bytes]],
) -> Iterator[tuple[bytes, bytes]]:
    """HSCAN and ZSCAN pages, in whichever shape the client library gives them."""
    if isinstance(flat, Mapping):
        yield from flat.items()
    elif flat and isinstance(flat[0], tuple):
        yield from flat  # type: ignore[misc]
    else:
        yield from zip(flat[::2], flat[1::2], strict=True)
