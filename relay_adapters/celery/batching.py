"""`with producer.batch(): …`: what is published there goes to the store in few round trips, when the batch ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.due import wait_of
from relay_core import JobSpec
from relay_core.errors import Unavailable

if TYPE_CHECKING:
    from relay_adapters.celery.publishing import Publishing


@dataclass(slots=True, eq=False)
class _Entry:
    queue: str
    spec: JobSpec
    message: Any
    tried_at: float | None
    """`time.monotonic()` of the first try that may have stored it."""

    def now(self) -> JobSpec:
        """What it waits for is counted from when it is sent."""
        return self.spec if self.spec.delay is None else replace(self.spec, delay=wait_of(self.message) or None)


class Batch:
    """What kombu's `Producer.batch` collects messages in.

    A flush that is cut off keeps what it held: another flush stores what the first one did not, and nothing twice.

    :param channel: gives the channel by which it is stored
    :param max_size: messages after which it is flushed without being asked
    """

    def __init__(self, channel: Callable[[], Publishing], max_size: int) -> None:
        self._channel = channel
        self._max_size = max_size
        self._entries: list[_Entry] = []
        self._taken: list[tuple[str, Any]] = []
        """Messages whose ids were taken, each with its queue: they are stored under others, one by one."""

    @property
    def channel(self) -> Publishing:
        return self._channel()

    def publish(self, message: Any, **options: Any) -> None:
        """Route a message now, and store it with the others. Mailboxes, which are in memory, are written at once."""
        message[BATCH] = self
        self.channel.basic_publish(message, **options)
        if len(self._entries) >= self._max_size:
            self.flush()

    def add(self, queue: str, spec: JobSpec, message: Any) -> None:
        again: float | None = message.get(AGAIN)
        # one whose publish was cut off on its way to several queues may be here already
        if again is None or not any(entry.queue == queue and entry.spec.id == spec.id for entry in self._entries):
            self._entries.append(_Entry(queue, spec, message, again))

    def flush(self) -> None:
        """Store what was collected, confirmed. Raises Unavailable and the like."""
        self._store_taken()
        while self._entries:
            queue, tried = self._entries[0].queue, self._entries[0].tried_at is not None
            alike = [entry for entry in self._entries if entry.queue == queue and (entry.tried_at is not None) == tried]
            self._store(queue, alike)
            stored = set(alike)
            self._entries = [entry for entry in self._entries if entry not in stored]
            self._store_taken()

    def _store(self, queue: str, entries: list[_Entry]) -> None:
        broker, started = self.channel.broker, time.monotonic()
        since = min((entry.tried_at for entry in entries if entry.tried_at is not None), default=None)
        try:
            specs = [entry.now() for entry in entries]
            answers = broker.drive(broker.operations.enqueue_many(queue, specs, since))
        except Unavailable as error:
            for entry in entries if error.maybe_executed else ():
                entry.tried_at = started if entry.tried_at is None else entry.tried_at
            raise
        for entry, answer in zip(entries, answers, strict=True):
            if answer.duplicate and answer.id == entry.spec.id:
                self._taken.append((queue, entry.message))

    def _store_taken(self) -> None:
        while self._taken:
            queue, message = self._taken[0]
            fresh = message.pop(BATCH, None) is not None
            started = time.monotonic()
            try:
                self.channel._put(queue, message, taken=int(fresh))
            except Unavailable as error:
                if error.maybe_executed and message.get(AGAIN) is None:
                    message[AGAIN] = started
                raise
            del self._taken[0]

    def discard(self) -> None:
        """Forget what was not flushed."""
        self._entries, self._taken = [], []

    def close(self) -> None:
        self.discard()


BATCH, AGAIN = "relay_batch", "relay_again"
"""Under these names a message on its way knows its batch, and `time.monotonic()` of its first try where that may have
stored it; neither is ever stored."""
