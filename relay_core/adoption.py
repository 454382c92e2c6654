"""Taking in jobs of another queue system, as a flow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from relay_core import commands, inspector
from relay_core.commands import Adopted
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import InvalidArgument
from relay_core.job import Arrival, StoredJob
from relay_core.operations import Flow, Operations, error_text
from relay_core.validation import JobSpec


def adopt(ops: Operations, arrivals: Sequence[Arrival]) -> Flow[list[bool]]:
    """Store jobs in their states, with their times: True for each that is new here.

    Plugins route and encode them as any others. All are checked before the first is sent. The order within a queue
    is kept. One whose id belongs to a job with another payload or headers is stored under its `other_id`, if it has
    one.
    """
    fresh = yield from _take_in(ops, arrivals)
    known = [i for i, new in enumerate(fresh) if not new and arrivals[i].other_id]
    others: list[int] = []
    for queue, indices in groupby(sorted(known, key=lambda i: arrivals[i].queue), key=lambda i: arrivals[i].queue):
        mine = list(indices)
        stored = yield from inspector.show(ops, queue, [arrivals[i].id for i in mine])
        # one that was done lately cannot be compared: rather twice than never
        others += [i for i, job in zip(mine, stored, strict=True) if job is None or not _same(job, arrivals[i])]
    if others:
        again = yield from _take_in(ops, [replace(arrivals[i], id=arrivals[i].other_id) for i in sorted(others)])
        for i, new in zip(sorted(others), again, strict=True):
            fresh[i] = new
    return fresh


def _same(job: StoredJob, arrival: Arrival) -> bool:
    return job.payload == arrival.payload and dict(job.options.headers) == dict(arrival.headers)


def _take_in(ops: Operations, arrivals: Sequence[Arrival]) -> Flow[list[bool]]:
    placed = [_place(ops, arrival) for arrival in arrivals]
    fresh = [False] * len(placed)
    order = sorted(range(len(placed)), key=lambda i: placed[i][0])
    for queue, indices in groupby(order, key=lambda i: placed[i][0]):
        mine = list(indices)
        yield from ops.register(queue)
        for at in range(0, len(mine), MAX_BATCH):
            batch = mine[at : at + MAX_BATCH]
            answers = yield commands.adopt(ops.settings.keys(queue), [placed[i][1] for i in batch])
            for i, new in zip(batch, answers, strict=True):
                fresh[i] = new
                if new and arrivals[i].state != "dead":
                    delay = max(0.0, arrivals[i].at - time.time()) if arrivals[i].state == "delayed" else 0.0
                    ops.plugins.notify(
                        "relay_job_enqueued",
                        queue=queue,
                        id=arrivals[i].id,
                        delay=delay,
                        headers=arrivals[i].headers,
                    )
    return fresh


def _place(ops: Operations, arrival: Arrival) -> tuple[str, Adopted]:
    if arrival.state not in ("ready", "delayed", "dead"):
        raise InvalidArgument(f"job {arrival.id}: state must be ready, delayed or dead, got {arrival.state!r}")
    spec = JobSpec(
        arrival.payload, id=arrival.id, at=arrival.at, priority=arrival.priority, headers=arrival.headers or None
    )
    queue, job, _spec = ops.place(arrival.queue, spec)
    created = "" if arrival.created_at is None else str(max(0, round(arrival.created_at * 1000)))
    reason = "_".join(error_text(arrival.reason).split()) or "failed"
    at_ms = int(job.due.lstrip("@") or 0)
    return queue, Adopted(job.id, arrival.state, at_ms, created, reason, error_text(arrival.error), job.record)
