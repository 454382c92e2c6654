"""What happens to a task that went to dead without an answer: its result becomes FAILURE, so nobody waits for ever."""

from __future__ import annotations

import logging
import sys
from typing import Any

from relay_adapters.celery.envelope import unpack
from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_adapters.celery.unstarted import context_of, stores_errors
from relay_core import Job, hookimpl

logger = logging.getLogger("relay.celery")


class Burial:
    """Plugin of the transport's brokers: any consumer that buries a task tells its result backend."""

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None) -> None:
        if reason == "max_deliveries" and job.headers.get(HEADER) == ADAPTER:
            fail(job, error or reason)


def fail(job: Job, why: str) -> None:
    """Mark the task as failed as if its worker process had died: result, chord, `link_error`, signal and event."""
    if "celery" not in sys.modules:
        return
    from billiard.exceptions import WorkerLostError
    from celery import current_app
    from celery.backends.base import DisabledBackend

    message = unpack(job.payload)
    headers = message["headers"]
    if "task" not in headers:
        return
    app = current_app._get_current_object()
    error = WorkerLostError(f"Task {headers['task']}[{headers['id']}] went to dead: {why}")
    logger.error("%s", error)
    context = context_of(app, message)
    task = app.tasks.get(headers["task"])
    backend = app.backend if task is None else task.backend
    # an app without results cannot be asked for one
    if not isinstance(backend, DisabledBackend) and backend.get_state(headers["id"]) == "SUCCESS":
        return  # it was done, and only the answer was lost
    backend.mark_as_failure(headers["id"], error, request=context, store_result=stores_errors(task, headers))
    if task is not None:
        _tell(task, context, error)


def _tell(task: Any, context: Any, error: Exception) -> None:
    from billiard.einfo import ExceptionInfo
    from celery import signals

    try:
        raise error
    except type(error):
        info = ExceptionInfo()
    task.request_stack.push(context)
    try:
        task.on_failure(error, context.id, context.args, context.kwargs, info)
        signals.task_failure.send(
            sender=task, task_id=context.id, exception=error, args=context.args, kwargs=context.kwargs,
            traceback=info.traceback, einfo=info,
        )  # fmt: skip
    finally:
        task.request_stack.pop()
