"""Where a publish goes: one copy of the message into each queue that it reaches."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

from kombu.transport.virtual import UndeliverableWarning

from relay_adapters.celery.errors import NotFound, no_route
from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.messages import marks
from relay_adapters.celery.messages.envelope import pack
from relay_adapters.celery.messages.protocol import told_of
from relay_adapters.celery.queues import moves
from relay_adapters.celery.queues.declaring import Declaring
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.queues.topology import Table
from relay_adapters.celery.sending.upkeep import end
from relay_adapters.celery.workerstate import is_worker
from relay_core.errors import Unavailable
from relay_core.job import new_id

logger = logging.getLogger("relay.celery")


class Routing(Declaring):
    """The part of a channel that routes what is published."""

    leases: Leases
    priority_order: str
    _used: dict[str, float]
    events: dict[str, set[Callable[..., object]]]
    """As py-amqp's channels have them, of which kombu knows `basic_return`: what it calls with a mandatory message that
    reaches no queue."""

    def basic_publish(self, message: Any, exchange: str, routing_key: str, **options: Any) -> None:
        """Put a message into every queue that it reaches. Raises NotFound when there is no such exchange."""
        self._inplace_augment_message(message, exchange, routing_key)
        reached = self.route(message, exchange or "", routing_key or "", **options)
        if not reached and options.get("mandatory"):
            self._return(message, exchange or "", routing_key or "")

    def _return(self, message: Any, exchange: str, routing_key: str) -> None:
        """Tell who published a mandatory message that no queue takes it."""
        error = no_route(exchange, routing_key)
        if not self.events["basic_return"]:
            raise error
        returned = self.Message({**message, "properties": {**message["properties"], "delivery_tag": None}}, self)
        for told in list(self.events["basic_return"]):
            told(error, exchange, routing_key, returned)

    def route(
        self, message: Any, exchange: str, routing_key: str, *, passed: tuple[str, ...] = (), **options: Any
    ) -> int:
        """Put a message into every queue that it reaches: how many; none when no binding matches, as in AMQP.

        Raises NotFound when there is no such exchange.

        :param passed: the exchanges for which this one is the alternate
        """
        if not exchange:
            return self._to_queue(message, routing_key, **options)
        served: set[str] = set()
        table = self.topology.table(exchange, believe=True)
        while True:
            queues = [queue for queue in table.route(routing_key) if queue not in served]
            boxes = [queue for queue in queues if queue in table.terms and table.terms[queue].mailbox]
            if len(boxes) == len(queues) and self.leases.cut_off:
                self.broker.store.locate([self.topology.places.exchanges])  # tried once: no task is lost here
            if len(boxes) < len(queues) or not queues:
                # no script of the topology's slot will check these: ask for the version first
                checked = self.topology.table(exchange)
                if checked is not table:
                    table = checked
                    continue
            for queue in queues:
                if queue not in boxes and self._to_jobs(message, queue, table, **options):
                    served.add(queue)
            stored = self._to_boxes(message, table, boxes, _again(message))
            if stored is not None:
                served.update(stored)
                break
            table = self.topology.reload(exchange)
        if served:
            return len(served)
        # nobody is bound: the exchange's alternate-exchange, or the option deadletter_queue, takes it
        alternate = (table.properties.get("arguments") or {}).get("alternate-exchange")
        passed = (*passed, exchange)
        if alternate and alternate not in passed:
            return self.route(message, alternate, routing_key, passed=passed, **options)
        queues = self._undeliverable(exchange, routing_key, self.deadletter_queue)
        for queue in queues:
            self._to_queue(message, queue, **options)
        return len(queues)

    def _undeliverable(self, exchange: str, routing_key: str, fallback: Any) -> list[str]:
        """The queue for what reaches no other, if there is one."""
        if not fallback:
            return []
        warnings.warn(
            UndeliverableWarning(f"the message could not be delivered: {exchange!r} has no queue for {routing_key!r}"),
            stacklevel=4,
        )
        if not self._has_queue(fallback):
            self._new_queue(fallback)
        return [fallback]

    def _to_queue(self, message: Any, queue: str, mandatory: bool = False, **options: Any) -> int:
        terms = self.topology.terms(queue)
        if terms is not None and terms.mailbox:
            message[marks.SENT] = True
            stored = self.broker.store.run(
                moves.publish(
                    self.topology.places, "", "", _id(message), pack(message), [_box(queue, terms)], _again(message)
                )
            )  # fmt: skip
            message[marks.STORED] = True
            return sum(stored)
        if terms is None and mandatory:
            return 0
        if terms is None and _is_reply(message):
            logger.debug("queue %r is gone, and with it who waited for a reply, which is dropped", queue)
            return 0
        self._use(queue, terms)
        self._put(queue, message, **options)
        self._bound(queue, terms)
        return 1

    def _to_jobs(self, message: Any, queue: str, table: Table, **options: Any) -> bool:
        """False for a queue whose time is over, and which is gone now."""
        # a limit that was added since the table was read
        terms = self.topology.terms(queue) or table.terms.get(queue)
        if table.type != "fanout":
            self._use(queue, terms)
        elif terms is not None and self._ends(queue, terms):
            return False  # a copy for a consumer that is gone: nobody misses it
        self._put(queue, message, **options)
        self._bound(queue, terms)
        return True

    def _ends(self, queue: str, terms: Terms) -> bool:
        """End a queue whose time is over: whether it was, and is gone."""
        return bool(terms.idle_ms) and self.topology.has_ended(queue) and end(self.topology, queue, terms)

    def _bound(self, queue: str, terms: Terms | None) -> None:
        """After a publish into a queue of jobs."""

    def _use(self, queue: str, terms: Terms | None) -> None:
        """A queue that expires and is published to, or asked for a message, is in use: it lives on for its time."""
        if terms is not None and terms.idle_ms:
            now = time.monotonic()
            if now - self._used.get(queue, -math.inf) > terms.idle_ms / 4000:
                if len(self._used) >= 1000:
                    self._used.clear()
                if self.topology.use(queue, terms):
                    self._used[queue] = now

    def _to_boxes(self, message: Any, table: Table, queues: list[str], again: bool) -> list[str] | None:
        """Those of the mailboxes that are there; None when the exchange's bindings have changed: then nothing was
        stored."""
        if not queues:
            return []
        outage, found = self.topology.outage, list[str]()
        if is_worker():
            outage.check()  # its loop waits for no server that hangs; others may
        boxes = [_box(queue, table.terms[queue]) for queue in queues]
        for at in range(0, len(boxes), 200):
            batch = boxes[at : at + 200]
            message[marks.SENT] = True
            publish = moves.publish(
                self.topology.places, "" if at else table.exchange, table.version,
                _id(message), pack(message), batch, again,
            )  # fmt: skip
            try:
                stored = self.broker.store.run(publish)
            except Unavailable as error:
                outage.begin(error)
                outage.check()
                raise
            if not stored:
                return None
            message[marks.STORED] = True
            for (queue, _keep, _most), there in zip(batch, stored, strict=True):
                if there:
                    found.append(queue)
                else:
                    self.topology.delete_queue(queue, "vanished")
        return found

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        if not exchange:
            return [routing_key or default or self.deadletter_queue or ""]
        try:
            found = self.topology.table(exchange).route(routing_key)
        except NotFound:
            found = []
        return found or self._undeliverable(exchange, routing_key, default or self.deadletter_queue)

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **options: Any) -> None:
        self.route(message, exchange, routing_key, **options)


def _box(queue: str, terms: Terms) -> tuple[str, int, int]:
    return queue, terms.ttl or 0, terms.most


def _id(message: Any) -> str:
    return str(message.get(marks.ID) or new_id())


def _again(message: Any) -> bool:
    """True when an earlier call may have stored it."""
    return bool(message.get(marks.TRIED))


def _is_reply(message: Any) -> bool:
    """True for the answer to a request, as a result of Celery's `rpc://`."""
    properties = message["properties"]
    return bool(properties.get("correlation_id")) and not (properties.get("reply_to") or "task" in told_of(message))
