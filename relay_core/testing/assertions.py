"""What tests say of queues. Each failure lists the jobs that are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relay_core.broker import Broker
from relay_core.job import State, StoredJob

_LISTED = 20


def enqueued(broker: Broker, queue: str) -> list[StoredJob]:
    """The jobs of a queue that are not over: ready ones in the order of claims, then delayed and inflight ones."""
    return [job for state in _OPEN for job in broker.jobs(queue, state, limit=100_000)]


_OPEN: tuple[State, ...] = ("ready", "delayed", "inflight")


def assert_enqueued(
    broker: Broker,
    queue: str,
    payload: bytes | None = None,
    *,
    as_json: Any = None,
    task: str | None = None,
    headers: Mapping[str, str] | None = None,
    delayed: bool | None = None,
    where: Callable[[StoredJob], bool] | None = None,
    count: int | None = None,
) -> list[StoredJob]:
    """Jobs that are as described are in the queue and not over: these, in the order of `enqueued`.

    :param payload: its bytes
    :param as_json: its payload is JSON of this value
    :param task: the task's name, of a job of Celery or Dramatiq
    :param headers: it has these, among others
    :param delayed: True: it waits for its time; False: it does not
    :param where: any other condition
    :param count: exactly so many. Default: at least one
    """
    tests: dict[str, Callable[[StoredJob], bool]] = {}
    if payload is not None:
        tests[f"payload {payload!r}"] = lambda job: job.payload == payload
    if as_json is not None:
        tests[f"payload {as_json!r} as JSON"] = lambda job: _json(job.payload) == as_json
    if task is not None:
        tests[f"task {task!r}"] = lambda job: _task(broker, job) == task
    if headers is not None:
        tests[f"headers {dict(headers)!r}"] = lambda job: dict(headers).items() <= dict(job.options.headers).items()
    if delayed is not None:
        tests["delayed" if delayed else "not delayed"] = lambda job: (job.state == "delayed") is delayed
    if where is not None:
        tests["as `where` wants it"] = where
    return _assert(broker, queue, enqueued(broker, queue), tests, count)


def assert_nothing_enqueued(broker: Broker, queue: str | None = None) -> None:
    """No job of the queue, or of any queue, is ready, delayed or inflight."""
    for name in broker.queues() if queue is None else [queue]:
        found = enqueued(broker, name)
        if found:
            raise AssertionError(f"queue {name!r} is not empty:\n{_listing(broker, found)}")


def assert_dead(
    broker: Broker,
    queue: str,
    payload: bytes | None = None,
    *,
    reason: str | None = None,
    error: str | None = None,
    count: int | None = None,
) -> list[StoredJob]:
    """Dead jobs that are as described are in the queue: these, the longest dead first.

    :param payload: its bytes
    :param reason: why it died: `max_retries`, `max_deliveries`, `rejected`, or what a Reject named
    :param error: a part of what was raised
    :param count: exactly so many. Default: at least one
    """
    tests: dict[str, Callable[[StoredJob], bool]] = {}
    if payload is not None:
        tests[f"payload {payload!r}"] = lambda job: job.payload == payload
    if reason is not None:
        tests[f"reason {reason!r}"] = lambda job: job.reason == reason
    if error is not None:
        tests[f"error {error!r}"] = lambda job: error in (job.error or "")
    return _assert(broker, queue, broker.dead(queue, limit=100_000), tests, count, "dead job")


def _assert(
    broker: Broker,
    queue: str,
    jobs: Sequence[StoredJob],
    tests: Mapping[str, Callable[[StoredJob], bool]],
    count: int | None,
    what: str = "job",
) -> list[StoredJob]:
    found = [job for job in jobs if all(test(job) for test in tests.values())]
    if len(found) == count or (count is None and found):
        return found
    wanted = "at least 1" if count is None else str(count)
    described = f" with {', '.join(tests)}" if tests else ""
    there = f"these are there:\n{_listing(broker, jobs)}" if jobs else "there is none at all"
    raise AssertionError(f"queue {queue!r}: expected {wanted} {what}{described}, found {len(found)}; {there}")


def _json(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except ValueError:
        return None


def _task(broker: Broker, job: StoredJob) -> str | None:
    summary = broker.plugins.describe(job)
    return None if summary is None else summary.name


def _listing(broker: Broker, jobs: Sequence[StoredJob]) -> str:
    lines = []
    for job in jobs[:_LISTED]:
        name = _task(broker, job)
        more = f" {dict(job.options.headers)!r}" if job.options.headers else ""
        why = f" {job.reason}: {job.error}" if job.state == "dead" else ""
        lines.append(f"  {job.id} {job.state} {name + ' ' if name else ''}{job.payload[:80]!r}{more}{why}")
    if len(jobs) > _LISTED:
        lines.append(f"  and {len(jobs) - _LISTED} more")
    return "\n".join(lines)
