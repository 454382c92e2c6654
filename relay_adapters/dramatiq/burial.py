"""What happens to a message that killed its workers until its deliveries were used up."""

from __future__ import annotations

import logging

from dramatiq.broker import Broker
from dramatiq.errors import DramatiqError
from dramatiq.middleware import Callbacks
from dramatiq.results import Results

from relay_adapters.dramatiq.message import Holding, Lease, RelayMessage, delivered
from relay_adapters.dramatiq.plugin import ADAPTER, HEADER
from relay_core import Job, NotYet, hookimpl

logger = logging.getLogger("relay.dramatiq")


class WorkerLost(DramatiqError):
    """Each worker that ran the message died without an answer, so it went to dead. Its result is this error."""


class Burial:
    """Plugin of a RelayBroker's own core broker: tells the middleware of messages that it finds buried.

    Runs `before_nack` and `after_nack` with the exception, so that Results stores it and nobody waits for ever,
    and the `on_failure` callback. The retries are not asked: the message had its deliveries. A result backend that is
    away is told later, and all others with it.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None, again: bool) -> None:
        if reason != "max_deliveries" or job.headers.get(HEADER) != ADAPTER:
            return
        message = RelayMessage(delivered(job), Lease(job), Holding())
        exception = WorkerLost(f"message {message.message_id} ({message.actor_name}): {error}")  # type: ignore[no-untyped-call]
        message.fail()
        message.stuff_exception(exception)
        self._store(message)
        logger.error("%s; it went to dead", exception)
        self._broker.emit_before("nack", message)
        self._broker.emit_after("nack", message)
        for middleware in self._broker.middleware:
            if isinstance(middleware, Callbacks):
                middleware.after_process_message(self._broker, message, exception=exception)  # type: ignore[no-untyped-call]

    def _store(self, message: RelayMessage) -> None:
        """First of all, for `emit_after` passes over what a backend raises. That it then is stored once more is
        nothing to whoever waits for it."""
        for middleware in self._broker.middleware:
            if isinstance(middleware, Results):
                try:
                    middleware.after_nack(self._broker, message)  # type: ignore[no-untyped-call]
                except Exception as error:  # whatever its backend raises
                    logger.warning("message %s went to dead; its result is stored later: %r", message.message_id, error)
                    raise NotYet(f"its result backend: {error!r}") from error
