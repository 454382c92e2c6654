"""What a handler may say of its job beside returning (ack) or raising any error (retry by the policy)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from relay_core.commands import Nack
from relay_core.job import Job
from relay_core.operations import Operations

logger = logging.getLogger("relay.worker")


class Retry(Exception):
    """Raise it to have the job run again, after `delay` seconds or by the policy. It counts as a retry."""

    def __init__(self, message: str = "", delay: float | None = None) -> None:
        self.delay = delay
        super().__init__(message)


class Reject(Exception):
    """Raise it to send the job to dead at once, with `reason`, a single word."""

    def __init__(self, message: str = "", reason: str = "rejected") -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. `error` None: it is done."""

    job: Job
    error: BaseException | None
    seconds: float


def nack_of(operations: Operations, job: Job, error: BaseException) -> Nack:
    """What a handler's error does to its job."""
    build = operations.nack_of
    try:
        if isinstance(error, Reject):
            return build(job, error, dead=True, reason=error.reason)
        return build(job, error, error.delay if isinstance(error, Retry) else None)
    except Exception as problem:  # such as a delay of -1: this job's trouble, not the worker's
        logger.error("job %s of queue %r failed, and how cannot be told: %r", job.id, job.queue, problem)
        return build(
            job, f"{type(error).__name__}, of which cannot be told: {problem!r}", dead=isinstance(error, Reject)
        )
