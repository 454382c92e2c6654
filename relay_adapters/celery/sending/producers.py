"""Spares publishers the copies that kombu's producers make anew for each message.

`kombu.common.maybe_declare` binds a copy of the queue and one of its exchange to the channel, and then looks whether
this connection has declared it: here it looks first, and the answer is the same, nothing to do. A producer that comes
out of its pool makes a copy of its exchange for the connection that it gets: here it keeps the copy that it has.

Nor does it turn to another broker of a list to declare something: kombu would have it publish by its channel of the one
before. It repeats all of a publish, which begins with what it declares.
"""

from __future__ import annotations

from typing import Any

from kombu.connection import Connection
from kombu.messaging import Producer
from kombu.utils.functional import ChannelPromise

from relay_adapters.celery.turning import client_of, has_others


def install(channels: type, transports: type) -> None:
    """For the producers of these channels and transports, and of no others. Repeating it is harmless."""
    producer: Any = Producer
    if not hasattr(producer.maybe_declare, "relay_stock"):
        producer.maybe_declare = _looking_first(producer.maybe_declare, channels)
        producer.revive = _keeping_its_exchange(producer.revive, transports)


def _looking_first(stock: Any, channels: type) -> Any:
    def maybe_declare(self: Producer, entity: Any, retry: bool = False, **retry_policy: Any) -> Any:
        channel = self.channel
        if isinstance(channel, channels) and entity and _is_declared(channel, entity):
            return False
        if isinstance(channel, channels) and (client := client_of(channel)) is not None and has_others(client):
            retry = False
        return stock(self, entity, retry, **retry_policy)

    maybe_declare.relay_stock = stock  # type: ignore[attr-defined]
    return maybe_declare


def _is_declared(channel: Any, entity: Any) -> bool:
    connection = channel.connection
    return bool(
        connection is not None and entity.can_cache_declaration and hash(entity) in connection.client.declared_entities
    )


def _keeping_its_exchange(stock: Any, transports: type) -> Any:
    def revive(self: Any, channel: Any) -> None:
        own = vars(self).get("relay_exchange")
        connects = isinstance(channel, Connection)
        if connects and own is not None and own is self.exchange:
            self.__connection__ = channel
            self._channel = own._channel = ChannelPromise(lambda: channel.default_channel)
            return
        stock(self, channel)
        if connects and issubclass(channel.get_transport_cls(), transports):
            self.relay_exchange = self.exchange  # the copy that was just made

    return revive
