"""What happens to a task that went to dead without an answer: its result becomes FAILURE, so nobody waits for ever."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from typing import Any

from relay_adapters.celery.envelope import unpack
from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_adapters.celery.protocol import told_of
from relay_adapters.celery.unstarted import context_of, stores_errors
from relay_core import Job, hookimpl
from relay_core.connection import forks

logger = logging.getLogger("relay.celery")

OWN_THREADS = "relay-celery-"
"""What the names of relay's threads in a worker begin with."""


class Burial:
    """Plugin of the transport's brokers: any consumer that buries a task tells its result backend."""

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None) -> None:
        if reason != "max_deliveries" or job.headers.get(HEADER) != ADAPTER:
            return
        if threading.current_thread().name.startswith(OWN_THREADS):
            _teller.tell(job, error or reason)
        else:
            fail(job, error or reason)


class _Teller:
    """A thread that tells result backends, for one may be slow, and relay's other threads have leases to keep."""

    def __init__(self) -> None:
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, str]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def tell(self, job: Job, why: str) -> None:
        self._jobs.put((job, why))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="celery-burials", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            job, why = self._jobs.get()
            try:
                fail(job, why)
            except Exception:
                logger.exception("job %s went to dead, and not all were told", job.id)


_teller = _Teller()


def fail(job: Job, why: str) -> None:
    """Mark the task as failed as if its worker process had died: result, chord, `link_error`, signal and event."""
    if "celery" not in sys.modules:
        return
    from billiard.exceptions import WorkerLostError
    from celery import current_app
    from celery.backends.base import DisabledBackend

    message = unpack(job.payload)
    told = told_of(message)
    if "task" not in told:
        return
    app = current_app._get_current_object()
    error = WorkerLostError(f"Task {told['task']}[{told['id']}] went to dead: {why}")
    logger.error("%s", error)
    context = context_of(app, message)
    task = app.tasks.get(told["task"])
    backend = app.backend if task is None else task.backend
    # an app without results cannot be asked for one
    if not isinstance(backend, DisabledBackend) and backend.get_state(told["id"]) == "SUCCESS":
        return  # it was done, and only the answer was lost
    backend.mark_as_failure(told["id"], error, request=context, store_result=stores_errors(task, told))
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
