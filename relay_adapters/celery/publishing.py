"""Publishing: a message becomes one job per queue that it reaches."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from kombu.utils.json import dumps
from kombu.utils.uuid import uuid

from relay_adapters.celery.declaring import Declaring
from relay_adapters.celery.plugin import ADAPTER, HEADER


class Publishing(Declaring):
    """The part of a channel that stores messages."""

    priority_order = "amqp"

    def _put(self, queue: str, message: Any, **_: Any) -> None:
        priority = self._get_message_priority(message, reverse=self.priority_order == "redis")
        due = _due(message)
        self.broker.enqueue(
            queue, dumps(message).encode(), priority=priority, headers={HEADER: ADAPTER}, **({"at": due} if due else {})
        )

    def _next_delivery_tag(self) -> str:
        return str(uuid())


def _due(message: Any) -> float | None:
    """When a task is due, from protocol 2's `eta`: unix seconds. A naive time means the worker's zone: its business."""
    eta = (message.get("headers") or {}).get("eta")
    if not isinstance(eta, str):
        return None
    try:
        when = datetime.fromisoformat(eta.replace("Z", "+00:00"))
    except ValueError:
        return None
    return when.timestamp() if when.tzinfo is not None else None
