"""The channel: kombu's interface on one side, relay's moves on the other."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from datetime import datetime
from itertools import count
from queue import Empty
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.utils.json import dumps, loads
from kombu.utils.uuid import uuid

from relay_adapters.celery.leases import leases_of
from relay_adapters.celery.options import shared_broker
from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_adapters.celery.topology import Binding, Topology
from relay_core import Job
from relay_core.errors import LeaseLost, RelayError, Unavailable

logger = logging.getLogger("relay.celery")

BATCH = 50
"""Most messages claimed at a time where the prefetch count sets no limit."""

_tags = count(1)


class QoS(virtual.QoS):
    """Acks and rejects go to the store at once, from any thread, also after the channel was closed."""

    # what is unacked lies in the store, and a channel that closes hands it back: see Channel.close
    restore_at_shutdown = False

    def ack(self, delivery_tag: str) -> None:
        self.channel.settle(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self.channel.settle(delivery_tag, reject=True, requeue=requeue)
        self._quick_ack(delivery_tag)

    def room(self) -> int:
        """How many messages may be claimed now. Celery replaces `can_consume` at run time: ask, never remember."""
        if not self.can_consume():
            return 0
        if "can_consume" in vars(self):
            return 1
        most = self.can_consume_max_estimate()
        return BATCH if most is None else min(BATCH, most)


class Channel(virtual.Channel):
    """One kombu channel. Its queues are relay queues, its messages jobs, its delivery tags leases."""

    QoS = QoS
    supports_fanout = True
    from_transport_options = (*virtual.Channel.from_transport_options, "priority_order")  # type: ignore[assignment]
    priority_order = "amqp"

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection, **options)
        self.broker = shared_broker(connection.client)
        self.leases = leases_of(self.broker)
        self.topology = Topology(self.broker)
        self._unacked: set[str] = set()
        self._no_ack: set[str] = set()
        self._touched = 0.0

    # topology, kept in the store

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

    # publishing

    def _put(self, queue: str, message: Any, **_: Any) -> None:
        priority = self._get_message_priority(message, reverse=self.priority_order == "redis")
        due = _due(message)
        self.broker.enqueue(
            queue, dumps(message).encode(), priority=priority, headers={HEADER: ADAPTER}, **({"at": due} if due else {})
        )

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **_: Any) -> None:
        """One job per bound queue: nothing is lost between bind and consume. A queue whose owner is gone expires."""
        queues = sorted({binding.queue for binding in self.topology.table(exchange)})
        gone = self.topology.expired(queues)
        for queue in gone:
            self.queue_delete(queue)
        for queue in queues:
            if queue not in gone:
                self._put(queue, message)

    # consuming

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any) -> None:
        if no_ack:
            self._no_ack.add(queue)
        super().basic_consume(queue, no_ack, callback, consumer_tag, **options)
        self.connection.consumers_changed(self)

    def basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        self._no_ack.discard(queue)
        if self.connection is not None:
            self.connection.consumers_changed(self)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The queues that this channel consumes from."""
        return tuple(dict.fromkeys(self._active_queues))

    def claim(self, woken: bool) -> tuple[list[tuple[Any, str]], float | None]:
        """Claim what there is credit for: (raw message, queue) pairs, and seconds until the next look makes sense."""
        queues, room = self.consumed, self.qos.room()
        if not queues or not room:
            return [], None
        # turn about, so that no queue starves the others
        self._active_queues.append(self._active_queues.pop(0))
        jobs = self.broker.drive(self.broker.operations.claim(queues, room, 0.0, woken))
        return [(raw, job.queue) for job in jobs if (raw := self._received(job)) is not None], jobs.retry_after

    def pass_on(self) -> None:
        """A wake-up came that this channel has no credit for: let another worker have it."""
        for queue in self.consumed:
            self.broker.drive(self.broker.operations.finish(queue, (), (), 0, woken=True))

    def keep_alive(self) -> None:
        """Say that the queues that expire are in use, every second at most."""
        if time.monotonic() - self._touched > 1.0:
            self._touched = time.monotonic()
            for queue in self.consumed:
                self.topology.touch(queue)

    def _received(self, job: Job) -> Any:
        """The message of a job, with a delivery tag of this very delivery."""
        try:
            raw = loads(job.payload)
            properties = raw["properties"]
        except (ValueError, KeyError, TypeError) as error:
            logger.error("message %s of queue %r does not decode and goes to dead: %s", job.id, job.queue, error)
            self.broker.nack(job, error, dead=True, reason="undecodable")
            return None
        tag = f"{next(_tags)}.{job.id}"
        properties["delivery_tag"] = tag
        properties.setdefault("delivery_info", {})["redelivered"] = job.deliveries > 1
        if job.queue in self._no_ack:
            self.broker.ack(job)
            return raw
        self._unacked.add(tag)
        self.leases.add(tag, job)
        return raw

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        for job in self.broker.claim(queue):
            if (raw := self._received(job)) is not None:
                return raw
        raise Empty

    def basic_get(self, queue: str, no_ack: bool = False, **options: Any) -> Any:
        message = super().basic_get(queue, no_ack, **options)
        if message is not None and no_ack:
            self.settle(message.delivery_tag)
        return message

    # the end of a message

    def settle(self, tag: str, *, reject: bool = False, requeue: bool = False) -> None:
        """Ack or reject. From any thread, and after the channel was closed: the lease outlives the channel."""
        self._unacked.discard(tag)
        job = self.leases.pop(tag)
        if job is None:
            return
        try:
            if not reject:
                self.broker.ack(job)
            elif requeue:
                self.broker.nack(job, "requeued by the worker", reason="requeued")
            else:
                self.broker.nack(job, "rejected by the worker", dead=True, reason="rejected")
        except LeaseLost as error:
            logger.warning("%s", error)
        except Unavailable:
            # the next heartbeat, or another ack of it, will tell; until then nobody else gets it
            self._unacked.add(tag)
            self.leases.add(tag, job)
            raise
        if self.connection is not None:
            self.connection.credit_freed(self)

    def close(self) -> None:
        """Hand back what Celery has not started. What runs keeps its lease, and its ack will be taken."""
        if not self.closed:
            running = _running_tags()
            jobs = [job for tag in list(self._unacked - running) if (job := self.leases.pop(tag)) is not None]
            self._unacked &= running
            if jobs:
                with suppress(RelayError):  # their leases will run out
                    self.broker.release(jobs)
        super().close()

    def _restore(self, message: Any) -> None:
        self.settle(message.delivery_tag, reject=True, requeue=True)

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


def _running_tags() -> set[str]:
    """Delivery tags of the tasks that this process's Celery worker has started, if it is one."""
    state = sys.modules.get("celery.worker.state")
    return {request.message.delivery_tag for request in list(state.active_requests)} if state else set()


def _not_found(what: str, name: str) -> ChannelError:
    return ChannelError(f"NOT_FOUND - no {what} {name!r}", (50, 10), "Channel.declare", "404")
