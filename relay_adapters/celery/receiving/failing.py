"""What becomes of a message that was not acked: why decides, as far as Celery says why."""

from __future__ import annotations

from relay_adapters.celery.holding.held import Held
from relay_adapters.celery.holding.inhand import nack_uncounted
from relay_adapters.celery.outcomes import burial
from relay_core import Broker, Verdict
from relay_core.errors import LeaseLost

_SOONEST = 0.1


def is_rejected(held: Held, requeue: bool) -> bool:
    """True for a message that is refused for good: not one whose task failed and is retried by relay's policy."""
    return not requeue and (held.cause is None or type(held.cause).__name__ == "Reject")


def is_returned(held: Held, requeue: bool) -> bool:
    """True for a message that is no task and that its consumer puts back: as often as it likes, as over any other
    transport, unless its queue has a limit."""
    return requeue and held.cause is None and not held.task and held.job.options.max_deliveries is None


def refuse(broker: Broker, held: Held, requeue: bool) -> float | None:
    """Move a refused message: seconds until it may run again, or None. Raises LeaseLost, Unavailable.

    A `Reject(requeue=True)` and a failure that is not acked wait for a retry by relay's policy, and go to dead when
    that says so. A task whose process died, or that a stopping worker gives back, was delivered without an answer: it
    comes back after a pause, until its deliveries are used up. All else goes to dead.
    """
    job, cause = held.job, held.cause
    if held.spoiled is not None:
        broker.nack(job, f"message is no task: {held.spoiled}", dead=True, reason="undecodable")
        return None
    if is_returned(held, requeue):
        item = broker.operations.nack_of(job, "requeued by its consumer", 0.0, reason="requeued")
        if nack_uncounted(broker, job, item) is Verdict.LOST:
            raise LeaseLost(job.queue, job.id, "nack")
        return 0.0
    kind = "" if cause is None else type(cause).__name__
    if is_rejected(held, requeue):
        why = getattr(cause, "reason", None)
        broker.nack(job, "rejected by the worker" if why is None else str(why), dead=True, reason="rejected")
        return None
    if requeue and kind not in ("Reject", "TimeLimitExceeded") and held.task:
        policy = broker.settings.policy(job)
        pause = max(_SOONEST, policy.delay(max(0, job.deliveries - job.retries - 1)))
        broker.extend(job, min(pause, 86_400.0))
        return pause
    error = "requeued by the worker" if cause is None or kind == "Reject" else cause
    # the first time at once, as by other transports
    item = broker.operations.nack_of(job, error, 0.0 if requeue and job.retries == 0 else None)
    if broker.nack(job, error, item.delay_ms / 1000, reason="requeued" if requeue else None) is Verdict.DEAD:
        if kind == "Reject":
            burial.failed(job, f"requeued {job.retries} times")
        return None
    return item.delay_ms / 1000
