"""Revokes of tasks that wait in the store: there they are taken out, where Celery marks them in workers' memories."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from relay_adapters.celery.messages.envelope import head_of, unpack
from relay_adapters.celery.messages.ids import ids_of
from relay_adapters.celery.messages.protocol import told_of
from relay_adapters.celery.outcomes.announcing import announce
from relay_adapters.celery.outcomes.telling import teller
from relay_adapters.celery.outcomes.unstarted import context_of, stores_errors
from relay_adapters.telling import BUGS, PATIENCE, Tell
from relay_core import Broker
from relay_core.errors import RelayError
from relay_core.job import Record, State
from relay_core.operations.grants import fetch

logger = logging.getLogger("relay.celery")

_PAGE = 200
"""Waiting tasks that are read at a time, in the search for stamps."""

_WAITING: tuple[State, ...] = ("delayed", "ready")
"""In this order, so that a task that becomes due meanwhile is seen."""

Stamps = Mapping[str, Collection[Any]]
"""Stamped header -> the values that are revoked."""


class Revoker:
    """For a worker: takes tasks out of queues, and tells of each as Celery does of one that it drops.

    :param events: the worker's event dispatcher, or None
    :param hostname: the worker's name, which goes into extended results
    """

    def __init__(self, app: Any, broker: Broker, queues: Sequence[str], events: Any, hostname: str) -> None:
        self._app, self._broker, self._queues = app, broker, queues
        self._events, self._hostname = events, hostname
        # of many that are revoked at once, a result backend that is not there holds up the first
        self._told_by = time.monotonic() + PATIENCE

    def by_ids(self, task_ids: Iterable[str]) -> int:
        """Take these tasks out: how many waited."""
        out = 0
        try:
            for task_id in task_ids:
                for queue in self._queues:
                    out += self._take_out(queue, payloads(self._broker, queue, ids_of(task_id)))
        except RelayError as error:
            logger.warning("tasks that wait in the store could not be revoked there: %s", error)
        return out

    def next_try(self, request: Any) -> None:
        """A task that is revoked has sent its next try, which may wait for hours. Where that was taken out already, its
        result said so until Celery stored RETRY.

        :param request: a worker's
        """
        if not self.by_ids([request.id]) and request.store_errors:
            self._tell_backend(request.id, partial(_say_revoked, request))

    def by_stamps(self, stamps: Stamps) -> None:
        """Take out what bears one of these stamps, in a thread of its own: all that waits is read."""

        def search() -> None:
            try:
                for queue in self._queues:
                    for state in _WAITING:
                        self._search(queue, state, stamps)
            except RelayError as error:
                logger.warning("tasks that wait in the store could not all be revoked there by their stamps: %s", error)

        threading.Thread(target=search, name="relay-celery-revoke", daemon=True).start()

    def _search(self, queue: str, state: State, stamps: Stamps) -> None:
        skip = 0
        while page := self._broker.jobs(queue, state, limit=_PAGE, skip=skip):
            bearing = {job.id: job.payload for job in page if _bears(_headers_of(job.payload), stamps)}
            gone = self._take_out(queue, bearing)
            if len(page) < _PAGE:
                return
            skip += len(page) - gone

    def _take_out(self, queue: str, payloads: Mapping[str, bytes]) -> int:
        """Cancel these jobs (id -> payload) where they wait: how many did."""
        if not payloads:
            return 0
        ids = list(payloads)
        out = [id for id, state in zip(ids, self._broker.cancel_many(queue, ids), strict=True) if state in _WAITING]
        for id in out:
            try:
                self._tell(queue, unpack(payloads[id]))
            except Exception:  # a message may be no task, and the others are to be revoked all the same
                logger.exception("job %s of queue %r was revoked, and not all were told", id, queue)
        return len(out)

    def _tell(self, queue: str, message: MutableMapping[str, Any]) -> None:
        """Its event, its result with its chord, and the signal."""
        from celery import signals

        told = told_of(message)
        logger.info("task %s was revoked while it waited in queue %r", told["id"], queue)
        task = self._app.tasks.get(told["task"])
        context = context_of(self._app, message)
        context.hostname = self._hostname
        how = {"terminated": False, "signum": None, "expired": False}
        announce(self._events, "task-revoked", task, told, **how)
        self._tell_backend(told["id"], partial(_mark_as_revoked, self._app, told, context))
        if task is not None:
            signals.task_revoked.send(sender=task, request=context, **how)

    def _tell_backend(self, task_id: str, tell: Tell) -> None:
        teller.tell(f"task {task_id} was revoked", tell, max(0.0, self._told_by - time.monotonic()))


def _mark_as_revoked(app: Any, told: Mapping[str, Any], context: Any, _is_ours: Callable[[], bool]) -> None:
    """:param told: what the task's message says of it"""
    task = app.tasks.get(told["task"])
    backend = app.backend if task is None else task.backend  # of this thread: not all are for several
    backend.mark_as_revoked(told["id"], "revoked", request=context, store_result=stores_errors(task, told))


def _say_revoked(request: Any, _is_ours: Callable[[], bool]) -> None:
    """Its result alone: its chord has been told, and would count it twice."""
    from celery.app.task import Context
    from celery.exceptions import TaskRevokedError

    backend = request.task.backend
    if _has_gone_on(backend, request.id):
        return
    context = Context(request.request_dict)
    backend.store_result(request.id, TaskRevokedError("revoked"), "REVOKED", request=context)


def _has_gone_on(backend: Any, task_id: str) -> bool:
    """Whether the next try was not taken out, but runs or ran in a worker that was not told of the revoke yet: what it
    tells is not to be written over, where the backend does not see to that itself."""
    from celery.backends.base import Backend

    if type(backend).get_task_meta is not Backend.get_task_meta:
        return False  # as of rpc://, where to ask is to take what is meant for the client
    try:
        return backend.get_task_meta(task_id, cache=False)["status"] not in ("RETRY", "PENDING")
    except BUGS:
        return False  # as of where there is none, and of those that are only told


def is_revoked(request: Any) -> bool:
    """Whether this worker has been told so, by id or by stamp."""
    from celery.worker import state

    return request.id in state.revoked or _bears(request.request_dict, stamps_of(dict(state.revoked_stamps)))


def payloads(broker: Broker, queue: str, ids: Sequence[str]) -> dict[str, bytes]:
    """Of the jobs of these ids that are there. Most are not, so that no list of a queue is searched for them."""
    q = broker.settings.keys(queue)
    records = zip(ids, broker.store.raw("HMGET", q.jobs, *ids), strict=True)
    found = broker.drive(fetch(q, {id: record for id, record in records if record is not None}))
    for id, record in found.items():
        with suppress(Exception):  # of one that cannot be read, it is only known that it is there
            found[id] = broker.plugins.decode(Record.unpack(record).payload, queue)
    return found


def stamps_of(headers: Mapping[str, Any] | Iterable[str]) -> Stamps:
    """What `revoke_by_stamped_headers` was given: a mapping to a value or several, or texts like `name=value`."""
    if not isinstance(headers, Mapping):
        headers = {name: value for name, _, value in (text.partition("=") for text in headers)}
    return {name: _several(value) for name, value in headers.items()}


def _headers_of(payload: bytes) -> Mapping[str, Any]:
    """Empty of what is no message."""
    try:
        return head_of(payload).get("headers") or {}
    except (ValueError, TypeError, AttributeError):
        return {}


def _several(value: Any) -> Collection[Any]:
    return value if isinstance(value, (list, tuple, set, frozenset)) else (value,)


def _bears(headers: Mapping[str, Any], stamps: Stamps) -> bool:
    """Whether the task of these headers bears one of the stamps."""
    try:
        borne = headers.get("stamps") or {}
        return any(
            value in stamps[name]
            for name in headers.get("stamped_headers") or ()
            if name in stamps
            for value in _several(borne.get(name))
            if value is not None
        )
    except (ValueError, TypeError, AttributeError):
        return False  # of other types than Celery stamps with
