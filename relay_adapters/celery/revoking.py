"""Revokes of tasks that wait in the store: there they are taken out, where Celery marks them in workers' memories."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from relay_adapters.celery.envelope import head_of
from relay_adapters.celery.ids import ids_of
from relay_core import Broker
from relay_core.errors import RelayError
from relay_core.job import State

logger = logging.getLogger("relay.celery")

_PAGE = 200
"""Waiting tasks that are read at a time, in the search for stamps."""

_WAITING: tuple[State, ...] = ("delayed", "ready")
"""In this order, so that a task that becomes due meanwhile is seen."""

Stamps = Mapping[str, Collection[Any]]
"""Stamped header -> the values that are revoked."""


def by_ids(app: Any, broker: Broker, queues: Iterable[str], task_ids: Iterable[str]) -> None:
    """Take these tasks out of these queues."""
    try:
        for task_id in task_ids:
            for queue in queues:
                _take_out(app, broker, queue, dict.fromkeys(ids_of(task_id), task_id))
    except RelayError as error:
        logger.warning("tasks that wait in the store could not be revoked there: %s", error)


def by_stamps(app: Any, broker: Broker, queues: Iterable[str], stamps: Stamps) -> None:
    """Take out of these queues what bears one of these stamps, in a thread of its own: all that waits is read."""

    def search() -> None:
        try:
            for queue in queues:
                for state in _WAITING:
                    _search(app, broker, queue, state, stamps)
        except RelayError as error:
            logger.warning("tasks that wait in the store could not all be revoked there by their stamps: %s", error)

    threading.Thread(target=search, name="relay-celery-revoke", daemon=True).start()


def stamps_of(headers: Mapping[str, Any] | Iterable[str]) -> Stamps:
    """What `revoke_by_stamped_headers` was given: a mapping to a value or several, or texts like `name=value`."""
    if not isinstance(headers, Mapping):
        headers = {name: value for name, _, value in (text.partition("=") for text in headers)}
    return {name: _several(value) for name, value in headers.items()}


def _several(value: Any) -> Collection[Any]:
    return value if isinstance(value, (list, tuple, set, frozenset)) else (value,)


def _search(app: Any, broker: Broker, queue: str, state: State, stamps: Stamps) -> None:
    skip = 0
    while page := broker.jobs(queue, state, limit=_PAGE, skip=skip):
        bear = {job.id: task_id for job in page if (task_id := _bearer(job.payload, stamps)) is not None}
        gone = _take_out(app, broker, queue, bear) if bear else 0
        if len(page) < _PAGE:
            return
        skip += len(page) - gone


def _bearer(payload: bytes, stamps: Stamps) -> str | None:
    """The id of the task, where it bears one of the stamps."""
    try:
        headers = head_of(payload).get("headers") or {}
    except (ValueError, KeyError, TypeError):
        return None
    borne = headers.get("stamps") or {}
    for name in headers.get("stamped_headers") or ():
        if name in stamps and any(value in stamps[name] for value in _several(borne.get(name)) if value is not None):
            return str(headers.get("id"))
    return None


def _take_out(app: Any, broker: Broker, queue: str, jobs: Mapping[str, str]) -> int:
    """Cancel these jobs (id -> id of its task) where they wait, and say so in their results: how many that were."""
    ids = list(jobs)
    out = [id for id, state in zip(ids, broker.cancel_many(queue, ids), strict=True) if state in _WAITING]
    for task_id in {jobs[id]: None for id in out}:
        logger.info("task %s was revoked while it waited in queue %r", task_id, queue)
        if app.backend.get_state(task_id) not in ("SUCCESS", "FAILURE", "REVOKED"):
            app.backend.mark_as_revoked(task_id, reason="revoked", store_result=True)
    return len(out)
