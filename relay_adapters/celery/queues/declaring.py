"""What a channel declares: exchanges, bindings and queues, which lie in the store."""

from __future__ import annotations

from typing import Any

from amqp.protocol import queue_declare_ok_t
from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.uuid import uuid

from relay_adapters.celery.errors import not_found, reserved
from relay_adapters.celery.queues import exchanges, lengths, terms
from relay_adapters.celery.queues.attendance import Attendance
from relay_adapters.celery.queues.exchanges import PREDECLARED, Binding
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.queues.topology import Topology
from relay_adapters.celery.turning import for_publishers
from relay_core import Broker
from relay_core.errors import Unavailable

_COUNTED_WITHIN = 0.1
"""Seconds for which a server of a cluster is asked again for what waits in a queue that is declared: it may have cut an
idle connection."""

_INSTEAD = {"x-delayed-message": "; delay by countdown or eta, or by a queue with x-message-ttl"}


class Declaring(virtual.Channel):
    """The part of a channel that declares, binds and deletes, and looks up which queues a publish reaches."""

    exchange_types = exchanges.TYPES

    broker: Broker
    topology: Topology
    attendance: Attendance

    # exchanges

    @for_publishers
    def exchange_declare(
        self, exchange: str | None = None, type: str = "direct", durable: bool = False, auto_delete: bool = False,
        arguments: Any = None, nowait: bool = False, passive: bool = False,
    ) -> None:  # fmt: skip
        type = type or "direct"
        exchange = exchange or f"amq.{type}"
        if passive:
            if self.topology.exchange(exchange) is None:
                raise not_found("exchange", exchange, "Exchange.declare")
            return
        if type not in exchanges.TYPES:
            known, instead = ", ".join(sorted(exchanges.TYPES)), _INSTEAD.get(type, "")
            raise ChannelError(f"exchange {exchange!r}: type {type!r} is not supported, these are: {known}{instead}")
        if exchange.startswith("amq.") and exchange not in PREDECLARED:
            raise reserved(f"exchange name {exchange!r} begins with 'amq.', which is reserved", "Exchange.declare")
        properties = {
            "type": type, "durable": bool(durable), "auto_delete": bool(auto_delete),
            "arguments": dict(arguments or {}),
        }  # fmt: skip
        self.topology.declare_exchange(exchange, properties)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Forget an exchange and its bindings; its queues stay. Raises PreconditionFailed, and AccessRefused for those
        that are always there."""
        if not exchange or exchange.startswith("amq."):
            which = repr(exchange) if exchange else "the default exchange"
            raise reserved(f"{which} is always there, and is not deleted", "Exchange.delete")
        self.topology.delete_exchange(exchange, if_unused)

    def exchange_bind(self, destination: str, source: str = "", *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            f"relay binds no exchange to another: bind the queues of {destination!r} to {source!r}, too"
        )

    def get_exchanges(self) -> list[str]:
        return self.topology.stored.exchanges()

    def typeof(self, exchange: str, default: str = "direct") -> Any:
        found = self.topology.exchange(exchange)
        return self.exchange_types[found["type"] if found else default]

    # bindings

    @for_publishers
    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        self.topology.bind(exchange or "amq.direct", self._binding(queue, exchange, routing_key, arguments))

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        self.topology.unbind(exchange or "amq.direct", self._binding(queue, exchange, routing_key, arguments))

    def _binding(self, queue: str, exchange: str | None, routing_key: str, arguments: Any) -> Binding:
        exchange = exchange or "amq.direct"
        return Binding(*self.typeof(exchange).prepare_bind(queue, exchange, routing_key or "", arguments))

    def list_bindings(self) -> Any:
        for exchange, binding in self.topology.stored.bindings():
            yield binding.queue, exchange, binding.routing_key

    def get_table(self, exchange: str) -> list[Binding]:
        return self.topology.table(exchange).rows

    # queues

    def prepare_queue_arguments(self, arguments: Any, **options: Any) -> Any:
        return to_rabbitmq_queue_arguments(arguments, **options)

    @for_publishers
    def queue_declare(self, queue: str | None = None, passive: bool = False, **options: Any) -> Any:
        """(queue, waiting messages, consumers in other processes). Raises NotFound, PreconditionFailed."""
        queue = queue or f"amq.gen-{uuid()}"
        if passive:
            if not self._has_queue(queue):
                raise not_found("queue", queue, "Queue.declare")
            return queue_declare_ok_t(queue, self._length(queue), self.topology.stored.consumers(queue))
        consumers = self._new_queue(queue, **options)
        return queue_declare_ok_t(queue, self._length_if_there(queue), consumers)

    def _length_if_there(self, queue: str) -> int:
        """Of a queue that was just declared. It may lie on a server of a cluster that is away alone, which keeps no
        worker from its other queues."""
        if not self.broker.url.several:
            return self._length(queue)
        try:
            with self.broker.store.hurried(_COUNTED_WITHIN):
                return self._length(queue)
        except Unavailable:
            return 0

    def _length(self, queue: str) -> int:
        """What a declaration tells of a queue."""
        return self._size(queue) if self._mailbox(queue) is not None else lengths.waiting(self.broker, queue)

    def _new_queue(
        self, queue: str, auto_delete: bool = False, arguments: Any = None, durable: bool = True,
        exclusive: bool = False, **_: Any,
    ) -> int:  # fmt: skip
        self.broker.settings.keys(queue)
        found = terms.parse(queue, arguments, auto_delete=auto_delete, durable=durable, exclusive=exclusive)
        return self.topology.declare_queue(queue, found, later=found.mailbox and self._declares_later)

    @property
    def _declares_later(self) -> bool:
        """Whether a mailbox whose server is away alone may be declared when that is back."""
        return False

    def _has_queue(self, queue: str, **_: Any) -> bool:
        return self.topology.terms(queue, fresh=True) is not None

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any) -> int | None:
        """Delete a queue with its messages and bindings: how many messages; None when it stays.

        With `if_empty` a message that arrives in this very moment is kept in the store, for who declares it again.
        """
        held = self._size(queue)
        if (if_empty and held) or not (held or self._has_queue(queue)):
            return None
        if if_unused:
            self.attendance.say_goodbye()
        if not self.topology.delete_queue(queue, "unused" if if_unused else ""):
            return None
        self.attendance.forget(queue)
        if not if_empty:
            self.broker.purge(queue)
        self.broker.delete_queue(queue)
        return held

    def _size(self, queue: str) -> int:
        """What a queue has, with what waits for its time."""
        if self._mailbox(queue) is not None:
            return self.topology.waiting(queue)
        stats = self.broker.stats(queue)
        return stats.ready + stats.delayed

    def _purge(self, queue: str) -> int:
        if self._mailbox(queue) is not None:
            waiting = self.topology.stored.waiting(queue)  # not those that a consumer has, of which XTRIM tells, too
            self.topology.stored.raw("XTRIM", self.topology.places.box(queue), "MAXLEN", 0)
            return waiting
        return self.broker.purge(queue)

    def _mailbox(self, queue: str) -> Terms | None:
        """The terms of a queue that is a mailbox; None for a queue of jobs."""
        found = self.topology.terms(queue)
        return found if found is not None and found.mailbox else None
