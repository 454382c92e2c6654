"""Messages that are collected, and go to the store in few round trips: in a batch of the user's (`with
producer.batch(): …`), which stores them as it ends, or in a group, see groups.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.messages import marks
from relay_adapters.celery.messages.due import wait_of
from relay_adapters.celery.turning import client_of, of_the_broker
from relay_core import Broker
from relay_core.clock import sent_now
from relay_core.errors import InvalidArgument, StoreError, Unavailable
from relay_core.operations.enqueueing import Placed

if TYPE_CHECKING:
    from relay_adapters.celery.sending.publishing import Publishing


@dataclass(slots=True, eq=False)
class _Entry:
    queue: str
    placed: Placed
    message: Any
    tried_at: float | None
    """`sent_now()` of the first try that may have stored it."""

    def now(self) -> Placed:
        """What it waits for is counted from when it is sent."""
        return self.placed if self.placed.spec.delay is None else self.placed.delayed(wait_of(self.message) or None)


class Batch:
    """What kombu's `Producer.batch` collects messages in.

    A flush that fails keeps what it did not store, and another one stores that, and nothing twice.

    :param channel: gives the channel by which it is stored
    :param max_size: most messages that are collected
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
        """Route a message now, and store it with the others. Mailboxes, which are in memory, are written at once.

        What cannot be stored is refused now. Raises what a flush does where it was time for one; then the message was
        not taken.
        """
        self.make_room()
        message[marks.BATCH] = self
        self.channel.basic_publish(message, **options)

    def make_room(self) -> None:
        """Store what there is, where there is enough. Raises as `flush` does."""
        if len(self._entries) >= self._max_size:
            self.flush()

    def add(self, queue: str, placed: Placed, message: Any) -> None:
        again: float | None = message.get(marks.TRIED)
        # one whose publish was cut off on its way to several queues may be here already
        if again is None or not any(
            entry.queue == queue and entry.placed.job.id == placed.job.id for entry in self._entries
        ):
            self._entries.append(_Entry(queue, placed, message, again))

    def flush(self) -> None:
        """Store what was collected, confirmed. Raises Unavailable and the like: then another flush may go on."""
        if self._entries or self._taken:
            channel = self.channel
            try:
                self._store_all(channel)
            except StoreError as error:
                raise of_the_broker(client_of(channel), error) from error

    def _store_all(self, channel: Publishing) -> None:
        self._store_taken(channel)
        while self._entries:
            self._store_first(channel.broker)
            self._store_taken(channel)

    def _store_first(self, broker: Broker) -> None:
        """Store the first entry, and those that can go with it."""
        queue, tried = self._entries[0].queue, self._entries[0].tried_at is not None
        alike = [entry for entry in self._entries if entry.queue == queue and (entry.tried_at is not None) == tried]
        since = min((entry.tried_at for entry in alike if entry.tried_at is not None), default=None)
        if not tried:  # before it is, for an interrupt may come at any time
            _tried(alike, sent_now())
        try:
            answers = broker.drive(broker.operations.enqueue_placed([entry.now() for entry in alike], since))
        except (Unavailable, StoreError, InvalidArgument) as error:
            if not (tried or _may_have_stored(error)):
                _tried(alike, None)
            if isinstance(error, StoreError):
                error.maybe_executed |= tried
            raise
        ids = [entry.placed.job.id for entry in alike]
        taken = [
            (queue, entry.message)
            for entry, id, answer in zip(alike, ids, answers, strict=True)
            if answer.duplicate and answer.id == id
        ]
        done = set(alike)
        left = [entry for entry in self._entries if entry not in done]
        self._taken, self._entries = [*self._taken, *taken], left

    def _store_taken(self, channel: Publishing) -> None:
        while self._taken:
            queue, message = self._taken[0]
            fresh = message.pop(marks.BATCH, None) is not None
            sent_at = sent_now()
            try:
                channel._put(queue, message, taken=int(fresh))
            except Unavailable as error:
                if error.maybe_executed and message.get(marks.TRIED) is None:
                    message[marks.TRIED] = sent_at
                raise
            del self._taken[0]

    def discard(self) -> None:
        """Forget what was not flushed."""
        self._entries, self._taken = [], []

    def close(self) -> None:
        self.discard()


def _tried(entries: Iterable[_Entry], at: float | None) -> None:
    for entry in entries:
        entry.tried_at = at


def _may_have_stored(error: Unavailable | StoreError | InvalidArgument) -> bool:
    return not isinstance(error, InvalidArgument) and error.maybe_executed
