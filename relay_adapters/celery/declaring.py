"""What a channel declares: exchanges, bindings and queues, which lie in the store."""

from __future__ import annotations

from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import virtual

from relay_adapters.celery.topology import Binding, Topology
from relay_core import Broker


class Declaring(virtual.Channel):
    """The part of a channel that declares, binds and deletes, and looks up which queues a publish reaches."""

    broker: Broker
    topology: Topology

    def exchange_declare(
        self, exchange: str | None = None, type: str = "direct", durable: bool = False, auto_delete: bool = False,
        arguments: Any = None, nowait: bool = False, passive: bool = False,
    ) -> None:  # fmt: skip
        type = type or "direct"
        exchange = exchange or f"amq.{type}"
        if passive:
            if self.topology.exchange(exchange) is None:
                raise _not_found("exchange", exchange)
            return
        if type not in self.exchange_types:
            known = ", ".join(sorted(self.exchange_types))
            raise ChannelError(f"exchange {exchange!r}: type {type!r} is not supported, these are: {known}")
        properties = {"type": type, "durable": durable, "auto_delete": auto_delete, "arguments": arguments or {}}
        held = self.topology.declare_exchange(exchange, properties)
        if held["type"] != type:
            raise ChannelError(f"exchange {exchange!r} is declared as {held['type']}, not as {type}")

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        if if_unused and self.topology.table(exchange, fresh=True):
            raise ChannelError(f"exchange {exchange!r} is in use: it has bindings")
        self.topology.delete_exchange(exchange)

    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        exchange = exchange or "amq.direct"
        if self.topology.exchange_type(exchange) is None:
            raise _not_found("exchange", exchange)
        meta = self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments)
        self.topology.bind(exchange, Binding(*meta))

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        exchange = exchange or "amq.direct"
        meta = self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments)
        self.topology.unbind(exchange, Binding(*meta))

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any) -> None:
        if if_empty and self._size(queue):
            return
        self._purge(queue)
        self.topology.delete_queue(queue)

    def list_bindings(self) -> Any:
        for exchange in self.topology.exchanges():
            for binding in self.topology.table(exchange, fresh=True):
                yield binding.queue, exchange, binding.routing_key

    def get_exchanges(self) -> list[str]:
        return self.topology.exchanges()

    def get_table(self, exchange: str) -> list[Binding]:
        return self.topology.table(exchange)

    def typeof(self, exchange: str, default: str = "direct") -> Any:
        return self.exchange_types[self.topology.exchange_type(exchange) or default]

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        if not exchange:
            return list(super()._lookup(exchange, routing_key, default))
        found = self.typeof(exchange).lookup(self.get_table(exchange), exchange, routing_key, None)
        if not found:
            # bound a moment ago by another process, perhaps, as reply queues are
            table = self.topology.table(exchange, fresh=True)
            found = self.typeof(exchange).lookup(table, exchange, routing_key, None)
        return list(found) or list(super()._lookup(exchange, routing_key, default))

    def _new_queue(self, queue: str, auto_delete: bool = False, arguments: Any = None, **_: Any) -> None:
        self.broker.settings.keys(queue)
        self.topology.declare_queue(queue, {**(arguments or {}), "auto_delete": auto_delete})

    def _has_queue(self, queue: str, **_: Any) -> bool:
        return self.topology.has_queue(queue)

    def _size(self, queue: str) -> int:
        stats = self.broker.stats(queue)
        return stats.ready + stats.delayed

    def _purge(self, queue: str) -> int:
        return self.broker.purge(queue)


def _not_found(what: str, name: str) -> ChannelError:
    return ChannelError(f"NOT_FOUND - no {what} {name!r}", (50, 10), "Channel.declare", "404")
