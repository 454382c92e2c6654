"""The consumer that a Dramatiq worker reads one queue through."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.worker import ConsumerThread

from relay_adapters.dramatiq.line import Line
from relay_adapters.dramatiq.message import Holding, Lease, RelayMessage, delivered
from relay_core import Broker, Verdict
from relay_core.commands import Nack
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import Unavailable

logger = logging.getLogger("relay.dramatiq")

MAX_RETRIES = 2**31
"""Dramatiq counts retries in the message and decides when they are used up; the store must not."""


@contextmanager
def dramatiq_errors() -> Iterator[None]:
    """What Dramatiq's threads handle by trying again."""
    try:
        yield
    except Unavailable as error:
        raise ConnectionClosed(error) from error


class RelayConsumer(Consumer):
    """Keeps at most `prefetch` messages unsettled, buffered ones included.

    Messages may be acked and nacked from any thread, through any consumer of the queue, open or closed.
    """

    def __init__(self, line: Line, prefetch: int, timeout: int) -> None:
        self.queue_name = line.queue
        self.prefetch = prefetch
        self.timeout = timeout
        self._line = line
        self._core: Broker = line.core
        self._holding: Holding = {}
        self._buffer: deque[Lease] = deque()
        # Dramatiq's own consumer threads come back for more or close; whoever else iterates may do neither.
        self._steady = isinstance(threading.current_thread(), ConsumerThread)
        self._attending = False
        self._closed = False
        line.join(self._holding)

    # claiming

    def __next__(self) -> RelayMessage | None:
        deadline = time.monotonic() + self.timeout / 1000
        with dramatiq_errors():
            while True:
                while self._buffer:
                    message = self._open(self._buffer.popleft())
                    if message is not None:
                        return message
                if self._closed or not self._fill(deadline):
                    return None

    def _open(self, lease: Lease) -> RelayMessage | None:
        """The message, or None when it does not decode (it goes to dead) or its lease has ended meanwhile."""
        if not lease.holds():
            self._holding.pop(lease.job.id, None)
            return None
        try:
            return RelayMessage(delivered(lease.job), lease, self._holding)
        except Exception as error:  # an encoder may fail in any way, and only this message is spoiled
            cause = error.error if isinstance(error, DecodeError) else error
            logger.error("job %s of queue %r does not decode, and goes to dead: %r", lease.job.id, self.queue_name, cause)
            self._bury(lease, f"message does not decode: {cause!r}")
            return None

    def _bury(self, lease: Lease, error: str) -> None:
        item = self._core.operations.nack_of(lease.job, error, dead=True, reason="undecodable")
        try:
            self._core.finish(self.queue_name, (), [(lease.job, item)])
        finally:
            # if the store is away, the lease ends and the message is looked at once more
            self._holding.pop(lease.job.id, None)

    def _free(self) -> int:
        """Slots; what consumers that closed have left running on this queue takes some."""
        left = sum(len(holding) for holding in self._line.holdings if holding is not self._holding and holding.closed)
        return min(self.prefetch - len(self._holding) - left, MAX_BATCH)
