"""What the consumers of one queue share in one process: acks on their way to the store, and who holds what."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from relay_adapters.dramatiq.gate import Gate
from relay_adapters.dramatiq.message import Holding, Lease
from relay_core import Broker, Claimed, Job, Verdict
from relay_core.commands import Nack
from relay_core.commands.moves import MAX_BATCH
from relay_core.keeping import Keeper

logger = logging.getLogger("relay.dramatiq")

GATHER = 0.001
"""Seconds for which a consumer without a free slot waits for more acks to send together with its next claim."""


class Line:
    """Acks come from worker threads, and are sent by whoever is at hand.

    While a consumer attends (it is between two claims, and sure to come back or to close), it sends them with
    its next claim, in one round trip. Else the thread that acks sends them, together with those of the threads
    that come while it does so. An ack that cannot be sent stays here, and is sent first thing next time.
    """

    def __init__(self, core: Broker, queue: str, gate: Gate) -> None:
        self.core = core
        self.queue = queue
        self.gate = gate
        self.holdings: list[Holding] = []
        self._acks: deque[Job] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._attending = 0
        self._waiting = 0
        self._enough = 1
        self._flushing = False
        self._on_their_way = 0
        gate.stand_by(queue, self)

    @property
    def unsent(self) -> bool:
        """Whether the store does not know yet of some messages that are done."""
        return bool(self._acks) or self._on_their_way > 0

    def leases(self) -> list[Lease]:
        """All unsettled leases of the queue in this process."""
        return [lease for holding in self.holdings for lease in holding.copy().values()]

    def left_running(self) -> int:
        """How many messages of closed consumers are unsettled."""
        return sum(len(holding) for holding in self.holdings if holding.closed)

    def join(self, holding: Holding) -> None:
        """A consumer opens. Those that closed and hold nothing are forgotten."""
        with self._lock:
            self.holdings = [*(kept for kept in self.holdings if kept or not kept.closed), holding]

    def ack(self, job: Job) -> None:
        """The job is done. Raises Unavailable when it was for this thread to send it and that failed."""
        with self._lock:
            self._acks.append(job)
            if self._waiting and (not self._attending or len(self._acks) in (1, self._enough)):
                self._changed.notify_all()
            if self._attending:
                return
        self.flush()

    def nack(self, job: Job, item: Nack) -> Verdict:
        """The job failed. Raises Unavailable."""
        _acked, (verdict,), _claimed = self.core.finish(self.queue, (), ((job, item),))
        self._report((job,), (verdict,))
        return verdict

    def freed(self) -> None:
        """A slot came free in another way than by an ack."""
        with self._lock:
            self._changed.notify_all()

    def flush(self, keeper: Keeper | None = None) -> None:
        """Send the acks that wait, unless another thread is doing it.

        :param keeper: what sends them, for the thread that has other leases to keep
        """
        while True:
            acks: list[Job] = []
            mine = False
            # all of it: wherever Dramatiq interrupts this thread, neither the flag nor the acks may be left behind
            try:
                with self._lock:
                    if self._flushing:
                        return
                    acks = self._take()
                    mine = self._flushing = bool(acks)
                if not acks:
                    return
                self._report(acks, (keeper or self.core).ack_many(acks))
            except BaseException:
                self._put_back(acks)
                raise
            else:
                self._sent(acks)
            finally:
                if mine:
                    self._flushing = False

    def attend(self) -> None:
        """From now on acks are left to the caller, until it leaves."""
        with self._lock:
            self._attending += 1

    def leave(self) -> None:
        """From now on acks are no longer left to the caller, who has to look once more for those that were."""
        with self._lock:
            self._attending -= 1

    def take(self) -> list[Job]:
        """The acks that wait; the caller sends them."""
        with self._lock:
            return self._take()

    def gather(self, full: Callable[[], bool], timeout: float, enough: int) -> list[Job]:
        """Wait until there are acks or a free slot; where there was none, a moment more for up to `enough` acks."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._enough = enough
            self._waiting += 1
            try:
                while full() and not self._acks:
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        break
                    if 0 < len(self._acks) < enough:
                        self._changed.wait(GATHER)
            finally:
                self._waiting -= 1
            return self._take()

    def claim(self, acks: Sequence[Job], count: int, woken: bool) -> Claimed:
        """Send the acks and claim up to `count` jobs, in one round trip.

        :param woken: the caller took the wake-up, and passes it on while work remains
        """
        if not acks and count:
            return self.core.drive(self.core.operations.claim((self.queue,), count, woken=woken))
        try:
            verdicts, _nacked, claimed = self.core.finish(self.queue, acks, (), count, woken and count > 0)
        except BaseException:
            self._put_back(acks)
            raise
        self._report(acks, verdicts)
        self._sent(acks)
        return claimed

    def _take(self) -> list[Job]:
        taken = [self._acks.popleft() for _ in range(min(len(self._acks), MAX_BATCH))]
        self._on_their_way += len(taken)
        return taken

    def _sent(self, acks: Sequence[Job]) -> None:
        with self._lock:
            self._on_their_way -= len(acks)
        self.gate.changed()

    def _put_back(self, acks: Sequence[Job]) -> None:
        with self._lock:
            self._on_their_way -= len(acks)
            self._acks.extendleft(reversed(acks))

    @staticmethod
    def _report(jobs: Sequence[Job], verdicts: Sequence[Verdict]) -> None:
        for job, verdict in zip(jobs, verdicts, strict=True):
            if verdict is Verdict.LOST:
                logger.warning(
                    "job %s of queue %r ended after its lease was lost: it runs again, or did so elsewhere",
                    job.id,
                    job.queue,
                )
