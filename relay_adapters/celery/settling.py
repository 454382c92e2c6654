"""How a message ends: acked, rejected, or handed back when its channel closes."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any

from kombu.transport import virtual

from relay_adapters.celery.leases import Leases
from relay_core import Broker
from relay_core.errors import LeaseLost, RelayError, Unavailable

logger = logging.getLogger("relay.celery")


class Settling(virtual.Channel):
    """The part of a channel that ends messages."""

    broker: Broker
    leases: Leases
    _unacked: set[str]

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


def _running_tags() -> set[str]:
    """Delivery tags of the tasks that this process's Celery worker has started, if it is one."""
    state = sys.modules.get("celery.worker.state")
    return {request.message.delivery_tag for request in list(state.active_requests)} if state else set()
