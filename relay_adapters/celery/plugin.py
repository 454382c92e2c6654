"""What relay's tools can read of a Celery task: protocol 2's headers, never its pickled or encoded body."""

from __future__ import annotations

import json
from collections.abc import Callable

from relay_core.hooks import hookimpl
from relay_core.job import Job, JobSummary, StoredJob

HEADER, ADAPTER = "relay_adapter", "celery"
"""The header, and its value, of the jobs that this adapter stores."""


@hookimpl
def relay_register_adapter(register: Callable[[str, str], None]) -> None:
    register("celery", "Celery(broker='relay://…'), by relay_adapters.celery")


@hookimpl
def relay_describe_job(job: Job | StoredJob) -> JobSummary | None:
    """Name, arguments as the client wrote them (its safe reprs), retries, eta, and the ids around it."""
    options = job.options
    if options.headers.get(HEADER) != ADAPTER:
        return None
    headers = json.loads(job.payload.partition(b"\n")[0]).get("headers") or {}
    if "task" not in headers:
        return None
    return JobSummary(
        name=headers["task"],
        args=headers.get("argsrepr") or "",
        kwargs=headers.get("kwargsrepr") or "",
        retries=headers.get("retries"),
        eta=headers.get("eta"),
        extra={name: headers[name] for name in ("id", "root_id", "parent_id", "group", "origin") if headers.get(name)},
    )
