"""What monitors are told of a task that ends without being run, in the name of this process's worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_consumers: dict[int, Any] = {}
"""By their id, those of the workers that run in this process; usually one."""


def begin(consumer: Any) -> None:
    """Its worker runs, and may be spoken for."""
    _consumers[id(consumer)] = consumer


def end(consumer: Any) -> None:
    _consumers.pop(id(consumer), None)


def dispatcher() -> Any:
    """The event dispatcher of this process's worker, or None. It has another one after a reconnect."""
    found = (getattr(consumer, "event_dispatcher", None) for consumer in list(_consumers.values()))
    return next(filter(None, found), None)


def announce(events: Any, type: str, task: Any, told: Mapping[str, Any], **how: Any) -> None:
    """Send an event of a task, where its worker sends any. It says what `task-received` says: perhaps no worker has
    said so of this one, and monitors would list it nameless.

    :param events: an event dispatcher, or None
    :param task: None where this process does not know it
    :param told: what its message says of it
    """
    if events is None or not events.enabled or not getattr(task, "send_events", True):
        return
    received = {name: told.get(name) for name in ("root_id", "parent_id", "eta", "expires")}
    events.send(
        type, uuid=told["id"], name=told["task"], args=told.get("argsrepr", ""), kwargs=told.get("kwargsrepr", ""),
        retries=told.get("retries") or 0, **received, **how,
    )  # fmt: skip
