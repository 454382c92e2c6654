"""How a message ends: acked, refused, or handed back when its channel closes."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

from relay_adapters.celery.holding.held import Held
from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.receiving import failing
from relay_adapters.celery.sending.deadletters import DeadLetters
from relay_adapters.celery.workerstate import running_tags
from relay_core import Broker, Verdict
from relay_core.errors import LeaseLost, Unavailable

logger = logging.getLogger("relay.celery")


class Settling(DeadLetters):
    """The part of a channel that ends messages. From any thread, and after it was closed: leases outlive channels."""

    broker: Broker
    leases: Leases
    _unacked: set[str]

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Ack; with `multiple`, as over AMQP, all that the channel was given until then."""
        for tag in self.qos.given_until(delivery_tag) if multiple else (delivery_tag,):
            self.qos.ack(tag)

    def settle(self, tag: str) -> None:
        """Ack. Under an event loop it is pending until the loop's next claim, or for 10 ms; of a channel that was
        closed, until the thread that keeps the leases reaches the server."""
        self._unacked.discard(tag)
        if self.connection is None or self.connection.looping:
            self.leases.ack_later(tag)
            return
        held = self.leases.pop(tag)
        if held is None or self.leases.moved(held):
            return
        try:
            verdicts = self.broker.ack_many([held.job])
        except Unavailable:
            # the thread that keeps the leases sends it when the server is there again; until then nobody else gets it
            self.leases.add(tag, held.job)
            self.leases.ack_later(tag)
            raise
        self.leases.sent([held], verdicts)

    def refuse(self, tag: str, requeue: bool) -> None:
        """Reject: what becomes of the message depends on why, see `failing`. Where the server is not there, the thread
        that keeps the leases does it later."""
        self._unacked.discard(tag)
        held = self.leases.pop(tag)
        if held is None or held.expected or held.lost or self.leases.moved(held):
            return
        # an event loop waits for no server that is away or full: the thread does it later
        looping = self.connection is not None and self.connection.looping
        try:
            with self.broker.store.hurried(0.0 if looping else math.inf):
                wait = self._refuse(held, requeue)
        except Unavailable as error:
            logger.warning("message %s is rejected when the server is there again: %s", held.job.id, error)
            self.leases.refuse_later(held, partial(self._refuse, held, requeue))
        else:
            if wait is not None and self.connection is not None:
                self.connection.look_within(self, wait)

    def _refuse(self, held: Held, requeue: bool) -> float | None:
        """Seconds until the message may come again, or None. Raises Unavailable."""
        try:
            # a failed task, too: who names an exchange for dead letters wants it there, as over AMQP, and not retried
            if not requeue and self._has_dead_letters(held.job.queue):
                if Verdict.LOST in self.broker.extend(held.job):  # whoever has it now decides
                    raise LeaseLost(held.job.queue, held.job.id, "dead letter")
                if self.dead_letter(held.job, "rejected"):
                    return None
            return failing.refuse(self.broker, held, requeue)
        except LeaseLost as error:
            logger.warning("%s", error)
            return None

    def _has_dead_letters(self, queue: str) -> bool:
        terms = self.topology.terms(queue)
        return terms is not None and terms.dead_exchange is not None

    def credit_freed(self) -> None:
        if self.connection is not None:
            self.connection.credit_freed(self)

    def close(self) -> None:
        """Hand back what Celery has not started. What runs keeps its lease, and its ack will be taken."""
        if not self.closed:
            tags = self._unacked - running_tags()
            self._unacked = self._unacked - tags
            if self.connection is not None:
                self.connection.forget(self, tags)
            else:
                self.leases.hand_back(tags)
        super().close()

    def _restore(self, message: Any) -> None:
        """Redeliver: `basic_recover`."""
        self._unacked.discard(message.delivery_tag)
        self.leases.hand_back([message.delivery_tag])
