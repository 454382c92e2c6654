"""`with producer.batch(): …`: what is published there goes to the store in few round trips, when the batch ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relay_core import JobSpec
from relay_core.errors import Unavailable

if TYPE_CHECKING:
    from relay_adapters.celery.publishing import Publishing


class Batch:
    """What kombu's `Producer.batch` collects messages in.

    A flush that is cut off keeps what it held: another flush stores what the first one did not, and nothing twice.

    :param channel: gives the channel by which it is stored
    :param max_size: messages after which it is flushed without being asked
    """

    def __init__(self, channel: Callable[[], Publishing], max_size: int) -> None:
        self._channel = channel
        self._max_size = max_size
        self._jobs: list[tuple[str, JobSpec, Any]] = []
        self._tried_at: float | None = None
        """When the first try was sent of what may have been stored by one."""
        self._taken: list[tuple[str, Any]] = []
        """Messages whose ids were taken, each with its queue: they are stored under others, one by one."""

    @property
    def channel(self) -> Publishing:
        return self._channel()

    def publish(self, message: Any, **options: Any) -> None:
        """Route a message now, and store it with the others. Mailboxes, which are in memory, are written at once."""
        message[BATCH] = self
        self.channel.basic_publish(message, **options)
        if len(self._jobs) >= self._max_size:
            self.flush()

    def add(self, queue: str, spec: JobSpec, message: Any) -> None:
        # one whose publish was cut off on its way to several queues may be here already, or stored
        self._first_try(message.get(AGAIN))
        self._jobs.append((queue, spec, message))

    def flush(self) -> None:
        """Store what was collected, confirmed. Raises Unavailable and the like."""
        self._store_taken()
        jobs = self._jobs
        for queue in dict.fromkeys(queue for queue, _spec, _message in jobs):
            broker = self.channel.broker
            started, mine = time.monotonic(), [(spec, message) for to, spec, message in jobs if to == queue]
            try:
                specs = [spec for spec, _message in mine]
                answers = broker.drive(broker.operations.enqueue_many(queue, specs, self._tried_at))
            except Unavailable:
                self._first_try(started)
                raise
            self._jobs = [job for job in self._jobs if job[0] != queue]
            for (spec, message), answer in zip(mine, answers, strict=True):
                if answer.duplicate and answer.id == spec.id:
                    self._taken.append((queue, message))
            self._store_taken()
        self._tried_at = None

    def _first_try(self, when: float | None) -> None:
        if when is not None and (self._tried_at is None or when < self._tried_at):
            self._tried_at = when

    def _store_taken(self) -> None:
        while self._taken:
            queue, message = self._taken[0]
            fresh = message.pop(BATCH, None) is not None
            started = time.monotonic()
            try:
                self.channel._put(queue, message, taken=int(fresh))
            except Unavailable:
                if message.get(AGAIN) is None:
                    message[AGAIN] = started
                raise
            del self._taken[0]

    def discard(self) -> None:
        """Forget what was not flushed."""
        self._jobs, self._taken = [], []

    def close(self) -> None:
        self.discard()


BATCH, AGAIN = "relay_batch", "relay_again"
"""Under these names a message on its way knows its batch, and `time.monotonic()` of its first try where that may have
stored it; neither is ever stored."""
