"""What monitors are told of a task that ends without being run, in the name of this process's worker."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

logger = logging.getLogger("relay.celery")

_consumers: dict[tuple[int, int], Any] = {}
"""Those of the workers of this process, usually one, by its id and their own: a child of the pool inherits those of its
parent."""


def begin(consumer: Any) -> None:
    """Its worker runs in this process."""
    _consumers[os.getpid(), id(consumer)] = consumer


def end(consumer: Any) -> None:
    """Its worker has ended."""
    _consumers.pop((os.getpid(), id(consumer)), None)


def _here() -> list[Any]:
    return [consumer for (pid, _), consumer in list(_consumers.items()) if pid == os.getpid()]


def dispatcher() -> Any:
    """The event dispatcher of this process's worker, or None. It has another one after a reconnect."""
    found = (getattr(consumer, "event_dispatcher", None) for consumer in _here())
    return next(filter(None, found), None)


def announce(events: Any, type: str, task: Any, told: Mapping[str, Any], **how: Any) -> None:
    """Send an event of a task, where its worker sends any; from any thread. It says what `task-received` says: perhaps
    no worker has said so of this one, and monitors would list it nameless.

    :param events: an event dispatcher, or None
    :param task: None where this process does not know it
    :param told: what its message says of it
    """
    if events is None or not events.enabled or not getattr(task, "send_events", True):
        return
    received = {name: told.get(name) for name in ("root_id", "parent_id", "eta", "expires")}
    send = partial(
        events.send, type, uuid=told["id"], name=told["task"], args=told.get("argsrepr", ""),
        kwargs=told.get("kwargsrepr", ""), retries=told.get("retries") or 0, **received, **how,
    )  # fmt: skip
    hub = next((one.hub for one in _here() if getattr(one, "event_dispatcher", None) is events), None)
    if hub is None:
        _try(send)
    else:
        # where there is a loop, the dispatcher has a buffer that is not for two threads: Celery before 5.7 drops from
        # it what one adds while the other sends, and asks the loop for a turn without the lock of that
        hub.call_soon(_try, send)


def _try(send: Callable[[], object]) -> None:
    """Monitors are told of what is done: who did it is not to do it again, and no loop to end, where that fails."""
    try:
        send()
    except Exception as error:  # Celery before 5.7 frees its lock as the connection ends, whoever has it
        logger.warning("monitors are not told of a task: %r", error)
