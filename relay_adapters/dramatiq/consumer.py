"""The consumer that a Dramatiq worker reads one queue through."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dramatiq import worker as dramatiq_worker
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.middleware import SkipMessage

from relay_adapters.dramatiq.errors import WorkerErrors
from relay_adapters.dramatiq.line import Line
from relay_adapters.dramatiq.message import Holding, Lease, RelayMessage, delivered, encoded
from relay_core import Broker, Job
from relay_core.commands import Nack
from relay_core.commands.moves import MAX_BATCH
from relay_core.operations import Flow, Wait, Waited
from relay_core.operations.ending import safe_repr

logger = logging.getLogger("relay.dramatiq")

_ConsumerThread: Any = getattr(dramatiq_worker, "ConsumerThread", None) or dramatiq_worker._ConsumerThread
"""Public since Dramatiq 2.0."""

MAX_RETRIES = 2**31
"""Dramatiq counts retries in the message and decides when they are used up; the store must not."""


def _wait(marker: bytes, timeout: float) -> Flow[bool]:
    waited: Waited = yield Wait((marker,), timeout)
    return waited.rung


class RelayConsumer(Consumer):
    """Keeps at most `prefetch` messages unsettled, buffered ones included.

    Messages may be acked and nacked from any thread, through any consumer of the queue, open or closed.
    """

    def __init__(self, line: Line, errors: WorkerErrors, prefetch: int, timeout: int) -> None:
        self.queue_name = line.queue
        self.prefetch = prefetch
        self.timeout = timeout
        self._line = line
        self._errors = errors
        self._core: Broker = line.core
        self._holding: Holding = Holding()
        self._buffer: deque[Lease] = deque()
        # Dramatiq's own consumer threads come back for more or close; whoever else iterates may do neither.
        self._thread = threading.current_thread()
        self._steady = isinstance(self._thread, _ConsumerThread)
        self._attending = False
        self._closed = False
        # Until then only a wake-up can bring work: an idle worker listens, and asks nothing.
        self._quiet_until = 0.0
        self._woken = False
        # claimed, and not given out before this process holds nothing else: it may kill what is beside it
        self._suspect: Lease | None = None
        line.join(self._holding)

    # claiming

    def __next__(self) -> RelayMessage | None:
        deadline = time.monotonic() + self.timeout / 1000
        with self._errors:
            while True:
                if self._ends() and (self._buffer or self._suspect is not None):
                    self._give_up()
                elif self._suspect is not None and self._line.gate.is_clear():
                    self._buffer.append(self._suspect)
                    self._suspect = None
                elif self._buffer and self._line.gate.is_shut:
                    self._hand_back()
                while self._buffer:
                    message = self._open(self._buffer.popleft())
                    if message is not None:
                        return message
                if self._closed or not self._fill(deadline):
                    return None

    def _open(self, lease: Lease) -> RelayMessage | None:
        """The message, or None when it does not decode (it goes to dead) or its lease has ended meanwhile."""
        if not lease.holds():
            self._holding.pop(lease.job.token, None)
            return None
        try:
            return RelayMessage(delivered(lease.job), lease, self._holding)
        except Exception as error:  # an encoder may fail in any way, and only this message is spoiled
            cause = safe_repr(error.error if isinstance(error, DecodeError) else error)
            logger.error(
                "job %s of queue %r does not decode, and goes to dead: %s", lease.job.id, self.queue_name, cause
            )
            self._bury(lease, f"message does not decode: {cause}")
            return None

    def _bury(self, lease: Lease, error: str) -> None:
        item = self._core.operations.nack_of(lease.job, error, dead=True, reason="undecodable")
        try:
            self._core.finish(self.queue_name, (), [(lease.job, item)])
        finally:
            # if the store is away, the lease ends and the message is looked at once more
            self._holding.pop(lease.job.token, None)
            self._line.gate.changed()

    def _fill(self, deadline: float) -> bool:
        """Claim into the buffer; False when there was nothing until the deadline."""
        while True:
            self._attend(self._steady)
            acks = self._line.gather(self._full, deadline - time.monotonic(), max(1, self.prefetch // 2))
            if not acks:
                if self._full():
                    self._pass_on()
                    return False
                if self._due():
                    return True
                self._attend(False)
                acks = self._line.take()
            if acks or self._woken or time.monotonic() >= self._quiet_until:
                self._take_in(acks)
                if self._buffer:
                    self._attend(self._steady)
                    return True
            else:
                self._woken = self._listen(min(deadline, self._quiet_until) - time.monotonic())
            if time.monotonic() >= deadline and not self._woken:
                return False

    def _take_in(self, acks: Sequence[Job]) -> None:
        """Send the acks, and claim what there is room for."""
        gate = self._line.gate
        open_ = gate.enter()
        try:
            free = max(0, self._free()) if open_ else 0
            if not acks and not free:
                return  # the gate was shut a moment ago
            claimed = self._line.claim(acks, free, self._woken)
            for job in claimed:
                lease = Lease(job)
                self._holding[job.token] = lease
                self._buffer.append(lease)
            if (suspect := gate.first_suspect(claimed)) is not None:
                self._set_apart(self._holding[suspect.token])
        finally:
            gate.leave()
        if free:
            self._woken = False
            hint = self._core.settings.max_block if claimed.retry_after is None else claimed.retry_after
            # not even full: whatever was ready is here, unless a suspect made it go back
            everything = len(claimed) < free and not gate.is_shut
            rest = min(hint, self._core.settings.max_block) if everything else 0.0
            self._quiet_until = time.monotonic() + rest

    def _set_apart(self, suspect: Lease) -> None:
        """Shut the gate for it. What was claimed with it is handed back, and so it is where another one was first."""
        if self._line.gate.shut(suspect, self._holding):
            self._suspect = suspect
            self._buffer.remove(suspect)
            self._hand_back()

    def _hand_back(self) -> None:
        """Release what is buffered, uncounted: it waits until the suspect that this process holds is settled."""
        leases = list(self._buffer)
        self._buffer.clear()
        for lease in leases:
            self._holding.pop(lease.job.token, None)
        self._quiet_until = 0.0
        self._release(leases)

    def _give_up(self) -> None:
        """Hand back all that was not given out."""
        if self._suspect is not None:
            self._buffer.append(self._suspect)
            self._suspect = None
        self._hand_back()

    def _ends(self) -> bool:
        """Whether its worker does: that one starts nothing any more, though it may run for long."""
        return self._errors.ends(self._thread)

    def _due(self) -> bool:
        return self._suspect is not None and self._line.gate.is_clear()

    def _pass_on(self) -> None:
        """A wake-up that this consumer does not follow, for a shut gate or its worker's end, is for another process."""
        if self._woken and (self._line.gate.is_shut or self._ends()):
            self._core.finish(self.queue_name, (), (), 0, woken=True)
            self._woken = False

    def _listen(self, timeout: float) -> bool:
        """Wait for a wake-up: whoever takes one has to claim, and to pass it on while work remains."""
        marker = self._core.settings.keys(self.queue_name).marker
        return self._core.drive(_wait(marker, max(0.001, timeout)))

    def _attend(self, attend: bool) -> None:
        if attend != self._attending:
            self._attending = attend
            if attend:
                self._line.attend()
            else:
                self._line.leave()

    def _free(self) -> int:
        if self._line.gate.is_shut or self._ends():
            return 0
        return min(self.prefetch - len(self._holding) - self._line.left_running(), MAX_BATCH)

    def _full(self) -> bool:
        return self._free() <= 0 and not self._due()

    # how a message ends

    def ack(self, message: MessageProxy) -> None:
        self._settle(message, self._ack)

    def nack(self, message: MessageProxy) -> None:
        self._settle(message, self._nack)

    def _settle(self, message: MessageProxy, end: Callable[[RelayMessage], None]) -> None:
        if not isinstance(message, RelayMessage):
            logger.warning("message %r did not come from a relay consumer, and is left alone", message)
            return
        try:
            with self._errors:
                end(message)
        except ConnectionClosed:
            raise  # Dramatiq tries again
        except BaseException:
            # Dramatiq does not, but may refer to the message for long: let its lease end, so that it comes again
            message.settle()
            self._line.freed()
            raise
        finally:
            self._line.gate.changed()

    def _ack(self, message: RelayMessage) -> None:
        if message.pending is not None:
            self._end(message, message.pending)
        elif message.settle() and not message.lease.lost:
            self._line.ack(message.lease.job)
        else:
            self._line.flush()  # this may be the second try of an ack that could not be sent

    def _nack(self, message: RelayMessage) -> None:
        if not message.settled:
            self._end(message, message.pending or self._dead(message))

    def _end(self, message: RelayMessage, item: Nack) -> None:
        if not message.lease.lost:
            self._line.nack(message.lease.job, item)
        message.pending = None
        message.settle()
        self._line.freed()

    def _dead(self, message: RelayMessage) -> Nack:
        """The dead letter: the message as it is now, with its retries and traceback, and what it failed of."""
        trace = message.options.get("traceback")
        # before 2.0 Dramatiq rejects the message of an unknown actor while it handles that error, and does not tell it
        cause = sys.exc_info()[1] if message.exception is None else message.exception
        error = "" if cause is None else safe_repr(cause)
        if isinstance(trace, str):
            error = f"{error}\n{trace[-3000:]}"
        ran = message.exception is not None and not isinstance(message.exception, SkipMessage)
        job, reason, nack_of = message.lease.job, "failed" if ran else "rejected", self._core.operations.nack_of
        try:
            return nack_of(job, error, dead=True, reason=reason, payload=encoded(message))
        except Exception as refused:
            # options that the encoder cannot take, a traceback that makes it too large, a plugin that fails
            logger.warning(
                "job %s of queue %r goes to dead with the body it came with: %s", job.id, job.queue, safe_repr(refused)
            )
            return nack_of(job, error, dead=True, reason=reason)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Hand back what was not started; the delivery does not count."""
        mine = [message for message in messages if isinstance(message, RelayMessage) and message.settle()]
        self._release([message.lease for message in mine])

    def close(self) -> None:
        """Send the acks that wait, and hand back what is buffered. What runs keeps its lease.

        Raises nothing but ConnectionClosed, the one error at which Dramatiq's consumer thread does not die here.
        """
        if self._closed:
            return
        self._closed = self._holding.closed = True
        self._attend(False)
        try:
            try:
                self._give_up()
            finally:
                if not self._errors.in_vain:
                    with self._errors:
                        self._line.flush()
        except ConnectionClosed:
            raise
        except Exception as error:
            logger.exception("closing a consumer of queue %r failed; its messages come back later", self.queue_name)
            raise ConnectionClosed(error) from error  # type: ignore[no-untyped-call]

    def _release(self, leases: Iterable[Lease]) -> None:
        jobs = [lease.job for lease in leases if not lease.lost]
        try:
            if jobs and not self._errors.in_vain:
                with self._errors:
                    self._core.release(jobs)
        finally:
            self._line.freed()
            self._line.gate.changed()
