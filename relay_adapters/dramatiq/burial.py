"""What happens to a message that killed its workers until its deliveries were used up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from dramatiq.errors import DramatiqError
from dramatiq.middleware import Callbacks
from dramatiq.results import Results

from relay_adapters.dramatiq.message import Holding, Lease, RelayMessage, delivered
from relay_adapters.dramatiq.plugin import ADAPTER, HEADER
from relay_adapters.telling import BUGS, Teller
from relay_core import Job, NotYet, hookimpl

if TYPE_CHECKING:
    from relay_adapters.dramatiq.broker import RelayBroker

logger = logging.getLogger("relay.dramatiq")


class WorkerLost(DramatiqError):
    """Each worker that ran the message died without an answer, so it went to dead. Its result is this error."""


teller = Teller("dramatiq", "message")
"""The one of this process."""


class Burial:
    """Plugin of a RelayBroker's own core broker: tells the middleware of messages that it finds buried.

    Runs `before_nack` and `after_nack` with the exception, so that Results stores it and nobody waits for ever,
    and the `on_failure` callback. The retries are not asked: the message had its deliveries. A thread does so, for the
    one that claims has a queue to attend to. A result backend that is away is told later, and all others with it.
    """

    def __init__(self, broker: RelayBroker) -> None:
        self._broker = broker

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None, again: bool) -> None:
        if reason != "max_deliveries" or job.headers.get(HEADER) != ADAPTER:
            return
        message = RelayMessage(delivered(job), Lease(job), Holding())
        exception = WorkerLost(f"message {message.message_id} ({message.actor_name}): {error}")  # type: ignore[no-untyped-call]
        message.fail()
        message.stuff_exception(exception)
        teller.take(self._broker.core, job, partial(self._tell, message, exception))

    def _tell(self, message: RelayMessage, exception: WorkerLost, is_ours: Callable[[], bool]) -> None:
        self._store(message)
        if not is_ours():
            raise NotYet("its result backend was waited for too long")
        logger.error("%s; it went to dead", exception)
        try:
            self._broker.emit_before("nack", message)
            self._broker.emit_after("nack", message)
            for middleware in self._broker.middleware:
                if isinstance(middleware, Callbacks):
                    middleware.after_process_message(self._broker, message, exception=exception)  # type: ignore[no-untyped-call]
        except (Exception, SystemExit):  # the rest is done, and is not to be done twice for that
            logger.exception("message %s went to dead, and its middleware raised", message.message_id)

    def _store(self, message: RelayMessage) -> None:
        """First of all, for `emit_after` passes over what a backend raises. That it then is stored once more is
        nothing to whoever waits for it."""
        for middleware in self._broker.middleware:
            if isinstance(middleware, Results):
                with suppress(*BUGS):  # it is there, and `emit_after` logs it
                    middleware.after_nack(self._broker, message)  # type: ignore[no-untyped-call]
