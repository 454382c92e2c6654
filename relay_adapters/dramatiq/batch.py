"""`with broker.batch():` what is sent meanwhile goes to the store in few round trips. A group that runs is one."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import dramatiq
from dramatiq.message import Message

from relay_adapters.dramatiq.errors import DramatiqErrors
from relay_core import JobSpec
from relay_core.clock import sent_now
from relay_core.connection import forks
from relay_core.errors import RelayError, Unavailable
from relay_core.operations.enqueueing import Placed

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
    placed: Placed
    at: float
    """`time.monotonic()`."""

    def now(self) -> Placed:
        """What it waits for is counted from when it was sent."""
        delay = self.placed.spec.delay
        return self.placed if delay is None else self.placed.delayed(max(0.0, delay - time.monotonic() + self.at))


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
        """`sent_now()` of the first try that may have stored some of it."""
        forks.watch(self)

    def after_fork(self) -> None:
        """What was gathered is the parent's to store."""
        self._lock = threading.RLock()
        self._sent, self.closed = [], True

    def add(self, message: Message[Any], delay: int | None, spec: JobSpec) -> bool:
        """Take a message. False where the block has ended.

        Raises InvalidArgument, and what a flush raises when it was time for one; then the message was not taken.
        """
        with self._lock:
            if self.closed:
                return False
            placed, now = self.broker.core.operations.prepare(message.queue_name, spec), time.monotonic()
            if self._sent and (
                len(self._sent) >= MESSAGES or self._bytes >= BYTES or now - self._sent[0].at >= SECONDS
            ):
                self.flush()
            self._sent.append(_Sent(message, delay, placed, now))
            self._bytes += len(placed.job.record)
            return True

    def flush(self) -> None:
        """Store what there is, and tell Dramatiq's middleware of it. Raises Unavailable and the like: another flush
        may go on then, and stores nothing twice."""
        with self._lock:
            self._failed = False
            try:
                self._store_all()
            except RelayError:
                self._failed = True
                raise

    def _store_all(self) -> None:
        refused: RelayError | None = None
        for queue in dict.fromkeys(sent.message.queue_name for sent in self._sent):
            try:
                self._store([sent for sent in self._sent if sent.message.queue_name == queue])
            except Unavailable:
                raise
            except RelayError as error:  # of this queue
                refused = refused or error
        if refused:
            raise refused

    def _store(self, alike: list[_Sent]) -> None:
        core, since = self.broker.core, self._tried_at
        if since is None:  # before it is, for an interrupt may come at any time
            self._tried_at = sent_now()
        try:
            core.drive(core.operations.enqueue_placed([sent.now() for sent in alike], since))
        except Unavailable as error:
            if not error.maybe_executed:
                self._tried_at = since
            raise
        stored = {sent.placed.job.id for sent in alike}
        self._sent = [sent for sent in self._sent if sent.placed.job.id not in stored]
        self._bytes = sum(len(sent.placed.job.record) for sent in self._sent)
        if since is None or not self._sent:
            self._tried_at = None
        for sent in alike:
            self.broker.emit_after("enqueue", sent.message, sent.delay)

    def close(self) -> None:
        """Raises ConnectionClosed, and StoreError where the server refuses."""
        with self._lock, DramatiqErrors():
            try:
                while self._sent:  # middleware that hears of them may send others
                    self.flush()
            except RelayError as error:
                self.broker.not_stored(error)
                raise
            self.closed = True

    def abort(self) -> None:
        """Where the block did not end by what `close` raises, store what was sent before."""
        try:
            if not self._failed:
                self.close()
        except Exception as error:
            logger.error("what was sent before an error cannot be stored: %s", error)


def batch_of(broker: RelayBroker) -> Batch | None:
    """What is gathered of this broker's messages here, if anything is."""
    return next((batch for batch in _open.get() if batch.broker is broker and not batch.closed), None)


@contextmanager
def gathering(broker: RelayBroker) -> Iterator[None]:
    """See RelayBroker.batch. What is sent in a block of a block is the outer one's."""
    batch = Batch(broker)
    before = _open.get()
    _open.set((*before, batch))
    try:
        yield
        batch.close()
    except BaseException:
        batch.abort()
        raise
    finally:
        batch.closed = True
        _open.set(before)


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
