"""Consuming: jobs are claimed while there is credit, and become messages."""

from __future__ import annotations

import logging
import time
from itertools import count
from queue import Empty
from typing import Any

from kombu.utils.json import loads

from relay_adapters.celery.declaring import Declaring
from relay_adapters.celery.settling import Settling
from relay_core import Job

logger = logging.getLogger("relay.celery")

_tags = count(1)


class Consuming(Settling, Declaring):
    """The part of a channel that claims."""

    _no_ack: set[str]
    _touched: float

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
