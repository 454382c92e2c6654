"""What the store knows of a job's past and present, and what it does not keep."""

from __future__ import annotations

from typing import Any

from relay_core.cli.output import age, moment
from relay_core.job import StoredJob

NOT_KEPT = "the store keeps counts and the last failure; times and errors of earlier deliveries are not kept"


def document(job: StoredJob) -> list[dict[str, Any]]:
    """The events for `--json`, in their order. What is not kept is null."""
    events: list[dict[str, Any]] = [{"event": "enqueued", "at": job.created_at}]
    if job.deliveries:
        events.append({"event": "claimed", "times": job.deliveries, "at": None})
    if job.retries:
        events.append({"event": "retried", "times": job.retries, "at": None})
    if job.failed_at is not None:
        name = "died" if job.state == "dead" else "failed"
        events.append({"event": name, "at": job.failed_at, "reason": job.reason, "error": job.error})
    if job.held:
        events.append({"event": "held", "token": job.token, "fence": fence(job), "lease_ends_at": job.due_at})
    elif job.state == "delayed":
        events.append({"event": "due", "at": job.due_at})
    return events


def fence(job: StoredJob) -> int | None:
    """The fence of the last claim, None when the job was never claimed."""
    return None if job.token is None else int(job.token.split(":", 2)[1])


def lines(job: StoredJob, now: float) -> list[str]:
    """The same for people.

    :param now: unix seconds by the server's clock
    """
    told = [f"enqueued   {_at(job.created_at, now)}"]
    if job.deliveries:
        retried = f", {job.retries} ended in a retry" if job.retries else ""
        told.append(f"delivered  {_times(job.deliveries)}{retried}")
    else:
        told.append("delivered  never")
    if job.failed_at is not None:
        name = "died" if job.state == "dead" else "failed"
        why, *traceback = ": ".join(part for part in (job.reason, job.error) if part).splitlines() or ["-"]
        told.append(f"{name:<11}{_at(job.failed_at, now)}: {why}")
        told += [f"{'':<11}{line}" for line in traceback]
    if job.held:
        left = (
            "-" if job.due_at is None else _left(job.due_at - now, "the lease ends in {}", "the lease is over for {}")
        )
        told.append(f"held       by the claim with fence {fence(job)}, {left}")
    elif job.state == "delayed" and job.due_at is not None:
        told.append(f"due        {moment(job.due_at)}, {_left(job.due_at - now, 'in {}', 'for {}')}")
    elif job.state == "ready":
        told.append("ready      waits for a worker")
    return told


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _left(seconds: float, ahead: str, past: str) -> str:
    return ahead.format(age(seconds)) if seconds > 0 else past.format(age(-seconds))


def _at(at: float | None, now: float) -> str:
    return "-" if at is None else f"{moment(at)}, {age(now - at)} ago"
