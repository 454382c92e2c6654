"""What a handler may say of its job beside returning (ack) or raising any error (retry by the policy)."""

from __future__ import annotations

from dataclasses import dataclass

from relay_core.job import Job


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
