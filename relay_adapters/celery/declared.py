"""Spares publishers the copies that kombu makes of a queue only to find that it was declared before.

`kombu.common.maybe_declare` binds a copy of the queue and one of its exchange to the channel, and then looks whether
this connection has declared it. Here it looks first. The answer is the same: False, nothing to do.
"""

from __future__ import annotations

from typing import Any

from kombu.messaging import Producer


def install(channels: type) -> None:
    """For the producers of these channels, and of no other transport's. Repeating it is harmless."""
    producer: Any = Producer
    stock = producer.maybe_declare
    if hasattr(stock, "relay_stock"):
        return

    def maybe_declare(self: Producer, entity: Any, retry: bool = False, **retry_policy: Any) -> Any:
        channel = self.channel
        if isinstance(channel, channels) and entity and _is_declared(channel, entity):
            return False
        return stock(self, entity, retry, **retry_policy)

    maybe_declare.relay_stock = stock  # type: ignore[attr-defined]
    producer.maybe_declare = maybe_declare


def _is_declared(channel: Any, entity: Any) -> bool:
    connection = channel.connection
    return bool(
        connection is not None and entity.can_cache_declaration and hash(entity) in connection.client.declared_entities
    )
