"""What happens to a task that went to dead without an answer: its result becomes FAILURE, so nobody waits for ever."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from relay_adapters.celery.messages.envelope import unpack
from relay_adapters.celery.messages.protocol import told_of
from relay_adapters.celery.outcomes.announcing import announce, dispatcher
from relay_adapters.celery.outcomes.telling import teller
from relay_adapters.celery.outcomes.unstarted import context_of, stores_errors
from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_adapters.telling import PATIENCE
from relay_core import Broker, Job, NotYet, hookimpl

logger = logging.getLogger("relay.celery")


class Burial:
    """Plugin of the transport's brokers: any consumer that buries a task tells its result backend.

    :ivar broker: the one that it is a plugin of, and hears when that is done
    """

    broker: Broker | None = None

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None, again: bool) -> None:
        if reason != "max_deliveries" or job.headers.get(HEADER) != ADAPTER:
            return
        if self.broker is None:  # it is a plugin of none yet
            return
        teller.take(self.broker, job, partial(fail, job, error or reason))


def failed(job: Job, why: str) -> None:
    """A task went to dead by its holder's own word, of which the store keeps no note."""
    teller.tell(f"task {job.id} went to dead", partial(fail, job, why), PATIENCE)


def fail(job: Job, why: str, is_ours: Callable[[], bool]) -> None:
    """Mark the task as failed as if its worker process had died: result, chord, `link_error`, signal and event.

    :param is_ours: asked when the backend is found to be there: False leaves it to another process

    Raises what the result backend does, and NotYet where it is left to another process.
    """
    if "celery" not in sys.modules:
        return
    from billiard.exceptions import WorkerLostError
    from celery import current_app
    from celery.backends.base import DisabledBackend

    try:
        message = unpack(job.payload)
        told = told_of(message)
        name, id = told["task"], told["id"]
    except (ValueError, KeyError, TypeError):
        return  # no task
    app = current_app._get_current_object()
    error = WorkerLostError(f"Task {name}[{id}] went to dead: {why}")
    task = app.tasks.get(name)
    backend = app.backend if task is None else task.backend
    # an app without results cannot be asked for one
    if not isinstance(backend, DisabledBackend) and backend.get_state(id) == "SUCCESS":
        return  # it was done, and only the answer was lost
    if not is_ours():
        raise NotYet("its result backend was waited for too long")
    context = context_of(app, message, job.deliveries > 1)
    backend.mark_as_failure(id, error, request=context, store_result=stores_errors(task, told))
    logger.error("%s", error)
    announce(dispatcher(), "task-failed", task, told, exception=repr(error), traceback=None)
    if task is not None:
        try:
            _tell(task, context, error)
        except (Exception, SystemExit):  # the task's own; the rest is done, and is not to be done twice for that
            logger.exception("task %s went to dead, and its on_failure raised", id)


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
