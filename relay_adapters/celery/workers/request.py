"""The request of a task in a worker, with what Celery knows of it and does not tell its transport."""

from __future__ import annotations

import logging
import os
import sys
import time
from functools import partial
from typing import Any

from celery.app.task import Task
from celery.exceptions import TimeLimitExceeded
from celery.worker.request import Request as Stock
from celery.worker.state import task_ready

from relay_adapters.celery.holding.forgotten import Forgotten
from relay_adapters.celery.holding.inhand import LEASE, lease_of, lent
from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.outcomes.announcing import dispatcher
from relay_adapters.celery.workers.revoking import Revoker, is_revoked
from relay_core import Job

logger = logging.getLogger("relay.celery")


class Request(Stock):
    """Tells the leases when a task starts and why it failed; takes the lease of a late-acked task with it.

    Of messages of other transports it is Celery's own.
    """

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self._leases: Leases | None = getattr(message.channel, "leases", None)
        self._job: Job | None = None
        if self._leases is None:
            return
        # Celery has its loop do this in its next turn, for which a task that runs in the loop's own thread lets it wait
        self._on_ack = partial(_ack, message)
        if (held := self._leases.get(message.delivery_tag)) is not None:
            self._job, held.task, self._leases.tasks = held.job, True, True
            held.untold = self.task.Strategy != Task.Strategy
            self._leases.untold |= held.untold
            if self._leases.broker.plugins.wants("relay_run_ended"):
                # Celery derives a class from this one, and overrides the method there
                self.__dict__["on_success"] = self._succeeded
        if held is not None and self.task.acks_late:
            lease = lease_of(held.job, self.request_dict)
            self.request_dict["properties"] = {**(self.request_dict.get("properties") or {}), LEASE: lease}

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        if self._leases is not None:
            greenlet: Any = sys.modules.get("greenlet")
            green = greenlet is not None and pid == id(greenlet.getcurrent())
            here = green or pid == os.getpid()
            # a child of a pool has its own look, see `children`
            if not self._leases.start(self.message.delivery_tag, here) and here:
                self._not_started()
                raise greenlet.GreenletExit if green else Forgotten(self.id)
        super().on_accepted(pid, time_accepted)

    def _not_started(self) -> None:
        """Let go of what is not to run: its message, if that is still held here, and the credit for it."""
        logger.info("task %s[%s] is not started: its message was handed back, or its lease is over", self.name, self.id)
        task_ready(self)
        if self._leases is not None:
            self._leases.hand_back([self.message.delivery_tag], started=True, wait=False)
        self.reject(requeue=True)

    def _succeeded(self, failed__retval__runtime: Any, **options: Any) -> Any:
        failed, _result, seconds = failed__retval__runtime
        if not failed:
            self._ran(seconds, None)
        derived: Any = type(self)
        return derived.on_success(self, failed__retval__runtime, **options)

    def _ran(self, seconds: float, error: BaseException | None) -> None:
        if self._leases is not None and self._job is not None:
            plugins = self._leases.broker.plugins
            plugins.notify("relay_run_ended", job=self._job, seconds=max(0.0, seconds), error=error)

    def cancel(self, pool: Any, signal: Any = None, **options: Any) -> None:
        """Celery ends a running task without an answer, as `worker_cancel_long_running_tasks_on_connection_loss` asks:
        another worker may have it now."""
        super().cancel(pool, signal=signal, **options)
        if self._leases is not None:
            self._leases.hand_back([self.message.delivery_tag], started=True, wait=False)

    def on_retry(self, exc_info: Any) -> None:
        self._blame(None)
        super().on_retry(exc_info)
        if self._leases is not None and self._job is not None and is_revoked(self):
            # the connection may be another one by now, and have no such channel: then there is the task's own queue
            queues = dict.fromkeys([self._job.queue, *self.message.channel.consumed])
            Revoker(self.app, self._leases.broker, [*queues], dispatcher(), self.hostname).next_try(self)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        error = exc_info.exception
        error = getattr(error, "exc", error) if type(error).__name__ == "ExceptionWithTraceback" else error
        if isinstance(error, Forgotten):
            return self._not_started()
        self._blame(error)
        if self.time_start is not None:
            self._ran(time.time() - self.time_start, error)
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _retry_worker_lost(self, *args: Any) -> Any:
        """Celery 5.7 sends the next try of a task whose process died from here (`retry_on_worker_lost`)."""
        with lent((self.request_dict.get("properties") or {}).get(LEASE)):
            return super()._retry_worker_lost(*args)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if not soft:
            self._blame(TimeLimitExceeded(timeout))
        super().on_timeout(soft, timeout)

    def _blame(self, cause: BaseException | None) -> None:
        held = self._leases.get(self.message.delivery_tag) if self._leases is not None else None
        if held is None:
            return
        held.cause = cause
        # a retry may have moved the very job: then its ack finds nothing, and that is right
        held.expected = held.expected or cause is None


def _ack(message: Any, log: logging.Logger, errors: Any) -> None:
    try:
        message.ack_log_error(log, errors)
    except Exception:
        logger.exception("message %s could not be acked", message.delivery_tag)
