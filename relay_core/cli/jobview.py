"""Jobs as documents and rows, and which of them a filter picks."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from relay_core.broker import Broker
from relay_core.cli.output import plural, shortened
from relay_core.job import JobSummary, State, StoredJob

PAGE = 100
"""Jobs read at a time by a filter."""


def text_of(payload: bytes) -> str | None:
    """The payload as text, or None when it is not UTF-8."""
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None


def document(job: StoredJob, summary: JobSummary | None, *, payload: bool) -> dict[str, Any]:
    """The job for `--json`. Times are unix seconds by the server's clock; absent facts are null.

    :param payload: with the payload itself: `payload` when it is UTF-8, else `payload_base64`
    """
    made: dict[str, Any] = {
        "id": job.id,
        "queue": job.queue,
        "state": job.state,
        "task": summary.name if summary else None,
        "priority": job.priority,
        "created_at": job.created_at,
        "due_at": job.due_at,
        "deliveries": job.deliveries,
        "retries": job.retries,
        "reason": job.reason,
        "error": job.error,
        "failed_at": job.failed_at,
        "dedup_key": job.options.dedup_key,
        "headers": dict(job.options.headers),
        "payload_bytes": len(job.payload),
    }
    if payload:
        text = text_of(job.payload)
        made["payload"] = text
        made["payload_base64"] = base64.b64encode(job.payload).decode() if text is None else None
        made["max_retries"] = job.options.max_retries
        made["max_deliveries"] = job.options.max_deliveries
        made["summary"] = None if summary is None else summary_document(summary)
    return made


def summary_document(summary: JobSummary) -> dict[str, Any]:
    return {
        "name": summary.name,
        "args": summary.args,
        "kwargs": summary.kwargs,
        "retries": summary.retries,
        "eta": summary.eta,
        "extra": {name: value if _plain(value) else repr(value) for name, value in summary.extra.items()},
    }


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (str, int, bool))


def what(job: StoredJob, summary: JobSummary | None, length: int = 48) -> str:
    """A few words on what the job is: the framework's summary, or the beginning of the payload."""
    if summary is not None:
        inside = ", ".join(part for part in (summary.args, summary.kwargs) if part)
        return shortened(f"{summary.name} {inside}".strip(), length)
    text = text_of(job.payload[: 4 * length])
    return plural(len(job.payload), "byte") if text is None else shortened(text, length)


def matches(job: StoredJob, summary: JobSummary | None, task: str | None, error: str | None) -> bool:
    """Whether `--task` is the task's name and `--error` a part of the reason or error, whatever its case."""
    if task is not None and (summary is None or summary.name != task):
        return False
    return error is None or error.lower() in f"{job.reason or ''}\n{job.error or ''}".lower()


def find(
    broker: Broker, queue: str, state: State, *, task: str | None = None, error: str | None = None
) -> Iterator[tuple[StoredJob, JobSummary | None]]:
    """All jobs in a state that a filter picks, read page by page. Do not move them while you read."""
    skip = 0
    while page := broker.jobs(queue, state, limit=PAGE, skip=skip):
        for job in page:
            summary = broker.plugins.describe(job)
            if matches(job, summary, task, error):
                yield job, summary
        if len(page) < PAGE:
            return
        skip += PAGE
