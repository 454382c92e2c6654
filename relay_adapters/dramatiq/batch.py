"""`with broker.batch():` what is sent meanwhile goes to the store in few round trips. A group that runs is one."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import dramatiq
from dramatiq.message import Message

from relay_adapters.dramatiq.errors import DramatiqErrors
from relay_core import JobSpec
from relay_core.errors import RelayError, Unavailable

if TYPE_CHECKING:
    from relay_adapters.dramatiq.broker import RelayBroker

logger = logging.getLogger("relay.dramatiq")

MESSAGES, BYTES, SECONDS = 200, 1 << 20, 0.05
"""Most that is gathered before it is stored: a group of many messages starts to run while it is still being sent."""

_open: ContextVar[tuple[Batch, ...]] = ContextVar("relay_batches", default=())
"""The blocks that this thread, or this task of an event loop, is in."""


class _Sent(NamedTuple):
    message: Message[Any]
    delay: int | None
    """Milliseconds, as `enqueue` was given them."""
    spec: JobSpec
    at: float
    """`time.monotonic()`."""

    def now(self) -> JobSpec:
        """What it waits for is counted from when it was sent."""
        delay = self.spec.delay
        return self.spec if delay is None else replace(self.spec, delay=max(0.0, delay - time.monotonic() + self.at))


class Batch:
    """What was sent in one block and is not stored yet. For any thread: a context may be taken over by others.

    :ivar closed: True once the block has ended: what is sent then is stored at once
    """

    def __init__(self, broker: RelayBroker) -> None:
        self.broker = broker
        self.closed = self._failed = False
        self._lock = threading.RLock()
        self._sent: list[_Sent] = []
        self._bytes = 0
        self._tried_at: float | None = None
        """`time.monotonic()` of the first try that may have stored some of it."""

    def add(self, message: Message[Any], delay: int | None, spec: JobSpec) -> bool:
        """Take a message. False where the block has ended.

        Raises InvalidArgument, and what a flush raises when it was time for one; then the message was not taken.
        """
        self.broker.core.operations.check(spec)
        with self._lock:
            if self.closed:
                return False
            now = time.monotonic()
            if self._sent and (
                len(self._sent) >= MESSAGES or self._bytes >= BYTES or now - self._sent[0].at >= SECONDS
            ):
                self.flush()
            self._sent.append(_Sent(message, delay, spec, now))
            self._bytes += len(spec.payload)
            return True

    def flush(self) -> None:
        """Store what there is, and tell Dramatiq's middleware of it. Raises Unavailable and the like: what may be
        stored by another flush is kept."""
        with self._lock:
            self._failed = True
            refused: RelayError | None = None
            for queue in dict.fromkeys(sent.message.queue_name for sent in self._sent):
                try:
                    self._store(queue, [sent for sent in self._sent if sent.message.queue_name == queue])
                except Unavailable:
                    raise
                except RelayError as error:  # of this queue
                    refused = refused or error
            if refused:
                raise refused
            self._failed = False

    def _store(self, queue: str, alike: list[_Sent]) -> None:
        core, started = self.broker.core, time.monotonic()
        try:
            core.drive(core.operations.enqueue_many(queue, [sent.now() for sent in alike], self._tried_at))
        except Unavailable as error:
            if error.maybe_executed and self._tried_at is None:
                self._tried_at = started
            raise
        stored = {sent.spec.id for sent in alike}
        self._sent = [sent for sent in self._sent if sent.spec.id not in stored]
        self._bytes = sum(len(sent.spec.payload) for sent in self._sent)
        for sent in alike:
            self.broker.emit_after("enqueue", sent.message, sent.delay)

    def close(self) -> None:
        """The block ends. Raises ConnectionClosed, and StoreError where the server refuses: what could not be stored is
        forgotten then."""
        with self._lock, DramatiqErrors():
            try:
                while self._sent:  # middleware that hears of them may send others
                    self.flush()
            except RelayError as error:
                self.broker.not_stored(error)
                raise
            finally:
                self.closed = True

    def abort(self) -> None:
        """The block ends by an error. What was sent before it is stored, where that was not the error."""
        with self._lock:
            try:
                if not self._failed:
                    self.close()
            except Exception as error:
                logger.error("what was sent before an error cannot be stored: %s", error)
            finally:
                self.closed = True


def batch_of(broker: RelayBroker) -> Batch | None:
    """What is gathered of this broker's messages here, if anything is."""
    return next((batch for batch in _open.get() if batch.broker is broker and not batch.closed), None)


@contextmanager
def gathering(broker: RelayBroker) -> Iterator[None]:
    """See RelayBroker.batch. What is sent in a block of a block is the outer one's."""
    batch = Batch(broker)
    token = _open.set((*_open.get(), batch))
    try:
        yield
    except BaseException:
        batch.abort()
        raise
    else:
        batch.close()
    finally:
        _open.reset(token)


def install(kind: type[RelayBroker]) -> None:
    """A group that runs on this kind of broker is such a block. Repeating it is harmless."""
    if not hasattr(dramatiq.group.run, "relay_stock"):
        dramatiq.group.run = _together(dramatiq.group.run, kind)  # type: ignore[method-assign]


def _together(stock: Callable[..., Any], kind: type[RelayBroker]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def run(group: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(group.broker, kind):
            return stock(group, *args, **options)
        with group.broker.batch():
            return stock(group, *args, **options)

    run.relay_stock = stock  # type: ignore[attr-defined]
    return run
