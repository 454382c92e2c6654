"""When a message may run: its `eta`, which the store waits for, so that no worker has to."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from datetime import datetime, timedelta, timezone
from typing import Any

from relay_adapters.celery.messages.protocol import change_protocol_1, protocol_1, told_of
from relay_core.errors import InvalidArgument
from relay_core.retry import MAX_DELAY

_YEAR = 365 * 86_400
_AFTER = 0.05
"""Seconds after its end at which an expired task is handed out, so that any worker's clock agrees that it has."""


def wait_of(message: MutableMapping[str, Any]) -> float:
    """Seconds that a task must wait, by this process's clock: a producer with a wrong clock wrote its eta by it too.

    A task that expires before it is due is handed out when it expires, so that its worker can revoke it.
    """
    told = told_of(message)
    eta, expires = told.get("eta"), told.get("expires")
    due = timestamp(eta)
    if due is None:
        return 0.0
    ends = timestamp(expires)
    if ends is not None and ends < due:
        due = ends + _AFTER
    wait = max(0.0, due - time.time())
    if wait > MAX_DELAY:
        raise InvalidArgument(
            f"the eta of task {told.get('task')!r} ({eta}) is {wait / _YEAR:.1f} years away; a message waits for "
            f"{MAX_DELAY / _YEAR:.0f} years at most"
        )
    return wait


def run_now(message: MutableMapping[str, Any]) -> None:
    """The store says that a task is due. A worker whose clock is late must not hold it back by the eta."""
    headers = message.get("headers") or {}
    if "eta" in headers:
        if _is_ahead(headers["eta"]):
            headers["eta"] = _now()
    elif (task := protocol_1(message)) is not None and _is_ahead(task.get("eta")):
        change_protocol_1(message, task, eta=_now())


def _is_ahead(eta: Any) -> bool:
    due = timestamp(eta)
    return due is not None and due > time.time()


def _now() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat()


def timestamp(when: Any) -> float | None:
    """Unix seconds of an ISO text or datetime; else None. One without a time zone is UTC, as to Celery's workers."""
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when.replace("Z", "+00:00"))
        except ValueError:
            return None
    if not isinstance(when, datetime):
        return None
    aware: datetime = when if when.utcoffset() is not None else when.replace(tzinfo=timezone.utc)
    return (aware - datetime(1970, 1, 1, tzinfo=timezone.utc)) / timedelta(seconds=1)
