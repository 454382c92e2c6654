"""What `channel.client` answers, which is a redis-py client on kombu's Redis transport.

Programs ask it two things: health checks whether the broker is there, dashboards and autoscalers how long a queue is,
often in a `try` that makes a zero of any error. Both go on when the URL has changed. The rest of redis-py would read or
write keys that are not relay's, and is refused.
"""

from __future__ import annotations

from relay_adapters.celery.failover import answers
from relay_adapters.celery.queues import lengths
from relay_core import Broker


class Client:
    """Of one broker. Keeps no connection of its own."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def ping(self) -> bool:
        """Raises Unavailable and the like when the server is not there."""
        return answers(self._broker)

    def llen(self, name: str) -> int:
        """How many messages of a queue wait for a consumer."""
        return lengths.waiting(self._broker, name)

    def __getattr__(self, name: str) -> None:
        raise AttributeError(
            f"channel.client.{name}: relay's queues are no lists of Redis, so only llen and ping are there;"
            " take channel.queue_declare(queue, passive=True), channel.queue_purge(queue) or relay_core.Broker"
        )
