"""The lease of a late-acked task, known to the process that runs it: a property of its request.

So the process that runs a task, a pool's child too, can end its delivery in the same move that decides what becomes
of it, where the worker's main process would need a second one.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.holding import children
from relay_core import Broker, Job, Verdict
from relay_core.commands import Nack
from relay_core.job import Options

if TYPE_CHECKING:
    from relay_adapters.celery.holding.leases import Leases

logger = logging.getLogger("relay.celery")

LEASE = "relay_lease"
"""The property, of the request only. A header would go along with whatever a task sends on with its own headers."""

_NO_LIMIT = 10**6
"""Of retries that are not relay's to count: Celery counts those of its tasks itself."""

_moved: deque[str] = deque(maxlen=1000)
"""Tokens of the deliveries that this process has ended by a retry. Who retries twice in a run sends two tasks."""


def lease_of(job: Job, headers: Mapping[str, Any]) -> list[Any]:
    """What goes with the task, as JSON can hold it."""
    retries = headers.get("retries") or 0
    return [job.queue, job.id, job.token, job.priority, job.retries, job.options.to_json(), headers.get("id"), retries]


def job_of(lease: Any) -> Job:
    """The job, good for a nack or ack. Raises ValueError or TypeError for what is no lease."""
    queue, id, token, priority, retries, options, _task, _retries = lease
    now = time.monotonic()
    return Job(
        id, queue, b"", 0.0, 0.0, priority, int(token.partition(":")[0]), retries, token, now, now,
        Options.from_json(options),
    )  # fmt: skip


_lent: ContextVar[Any] = ContextVar("relay_lent_lease", default=None)


@contextmanager
def lent(lease: Any) -> Iterator[None]:
    """For a worker that sends the next try of a task whose process died: the lease is the task's."""
    token = _lent.set(lease)
    try:
        yield
    finally:
        _lent.reset(token)


def lease_here(told: Mapping[str, Any]) -> Any:
    """The lease of the task that runs here, where a message that tells this may be its next try; else None."""
    if not told.get("retries") or (state := sys.modules.get("celery._state")) is None:
        return None
    if (lease := _lent.get()) is not None:
        return lease
    task = state.get_current_task()
    return None if task is None else (task.request.properties or {}).get(LEASE)


def runs_here(message: Mapping[str, Any]) -> bool:
    """Whether a message that is no task of protocol 2 is about the task that runs here: its next try by protocol 1."""
    if "task" in message["headers"] or (state := sys.modules.get("celery._state")) is None:
        return False
    task = state.get_current_task()
    return task is not None and task.request.id == message["properties"].get("correlation_id")


def retried(lease: Any, queues: Sequence[str], told: Mapping[str, Any]) -> Job | None:
    """The job in hand, where a message that tells this is its next try on the same queue; else None."""
    try:
        job = job_of(lease)
    except (ValueError, TypeError):
        return None
    next_try = told.get("id") == lease[6] and told.get("retries") == lease[7] + 1 and job.token not in _moved
    return job if next_try and list(queues) == [job.queue] else None


def nack_uncounted(broker: Broker, job: Job, item: Nack) -> Verdict:
    """Nack a job whose retries are not relay's to count, so that it never goes to dead for them."""
    _acked, (verdict,), _claimed = broker.finish(job.queue, (), [(job, item._replace(max_retries=_NO_LIMIT))])
    return verdict


def put_back(broker: Broker, leases: Leases, job: Job, payload: bytes, delay: float) -> bool:
    """Give the job its new payload and let it wait, in one move that ends its delivery. False: there is no such job.

    Where the lease was lost, the job is another worker's, or waits for one: that delivery decides, and this retry is
    dropped. To store it would make two of one task.
    """
    item = broker.operations.nack_of(job, "retried by the task", delay, payload=payload, reason="retry")
    done = False
    leases.moving(job, True)
    children.moving(True)
    try:
        done = nack_uncounted(broker, job, item) in (Verdict.DONE, Verdict.ALREADY)
    finally:
        if not done:
            leases.moving(job, False)
            children.moving(False)
    if done:
        _moved.append(job.token)
        children.moved()
        return True
    stored = broker.show(job.queue, job.id)
    if stored is None or stored.state not in ("ready", "delayed", "inflight"):
        return False
    logger.warning("task %s: its lease was lost, so that its retry is left to the worker that has it now", job.id)
    return True
