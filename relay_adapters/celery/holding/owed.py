"""What this process has still to tell the server of its messages: acks that wait for company, and what it could not
tell while that was away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from relay_adapters.celery.holding.held import Held
from relay_core import Broker, Job, Verdict
from relay_core.errors import RelayError, Unavailable
from relay_core.keeping import Keeper

LINGER = 0.01
"""Seconds for which an ack may be pending, so that many go in one round trip."""

_MOST = 200


class Owed:
    """Acks by queue, releases and refusals. For any thread.

    :param several: whether queues may lie on several servers, of which one may be away alone
    :ivar away: True while the server could not be told of them when that was tried last
    """

    def __init__(self, several: bool = False) -> None:
        self._several = several
        self._lock = threading.RLock()  # a signal's handler may connect, which tells what is owed
        self._changed = threading.Condition(self._lock)
        self._paying = 0
        self.away = False
        self._acks: dict[str, list[Held]] = {}
        self._acks_since = 0.0
        self._releases: list[Job] = []
        self._refusals: list[tuple[Held, Callable[[], object]]] = []

    @property
    def acks(self) -> bool:
        """Whether acks are pending."""
        return bool(self._acks)

    def due(self, now: float) -> bool:
        """Whether it is time to pay."""
        return bool(self._releases or self._refusals or (self._acks and now - self._acks_since >= LINGER))

    def ack(self, held: Held) -> None:
        with self._lock:
            if not self._acks:
                self._acks_since = time.monotonic()
            self._acks.setdefault(held.job.queue, []).append(held)

    def pending(self, queues: Iterable[str]) -> bool:
        """True while acks of one of these queues wait to be sent."""
        acks = self._acks
        return bool(acks) and any(queue in acks for queue in queues)

    def take_acks(self, queue: str, most: int = _MOST) -> list[Held]:
        """Acks to send now, of one queue. Those that could not be sent come back by `unsent`."""
        with self._lock:
            waiting = self._acks.pop(queue, [])  # in one step: a signal's handler may add to them in between
            if left := waiting[most:]:
                self._acks[queue] = [*left, *self._acks.get(queue, ())]
            return waiting[:most]

    def unsent(self, taken: Sequence[Held]) -> None:
        """They could not be sent, and stay pending. Their leases are kept."""
        with self._lock:
            for held in taken:
                self._acks.setdefault(held.job.queue, []).append(held)

    def withdraw(self, held: Held) -> bool:
        """Forget an ack. False where none is pending: it is under way, or there was none."""
        with self._lock:
            acks = self._acks.get(held.job.queue, [])
            if held not in acks:
                return False
            acks.remove(held)
            if not acks:
                del self._acks[held.job.queue]
            return True

    def release(self, job: Job) -> None:
        with self._lock:
            self._releases.append(job)

    def refuse(self, held: Held, refuse: Callable[[], object]) -> None:
        """:param refuse: raises RelayError where that did not work either"""
        with self._lock:
            self._refusals.append((held, refuse))

    def pay(
        self,
        broker: Broker | Keeper,
        acked: Callable[[Sequence[Held], Iterable[Verdict]], None],
        refused: Callable[[str], object] | None = None,
    ) -> None:
        """Tell the server. What cannot be told stays. Raises Unavailable and the like.

        :param acked: called with what became of acks
        :param refused: called with the delivery tag of what was refused. Default: only acks are told
        """
        with self._lock:
            self._paying += 1
        try:
            self._pay(broker, acked, refused)
            self.away = False
        except Unavailable:
            self.away = True
            raise
        finally:
            with self._lock:
                self._paying -= 1
                self._changed.notify_all()

    def wait_for_others(self, seconds: float) -> None:
        """Until no other thread is telling the server of what it has taken, at most for so long."""
        with self._lock:
            self._changed.wait_for(lambda: not self._paying, seconds)

    def _pay(
        self,
        broker: Broker | Keeper,
        acked: Callable[[Sequence[Held], Iterable[Verdict]], None],
        refused: Callable[[str], object] | None,
    ) -> None:
        errors: list[RelayError] = []
        away: Unavailable | None = None
        parts = [partial(self._pay_acks, broker, acked)]
        if refused is not None:
            parts += [partial(self._pay_releases, broker), partial(self._pay_refusals, refused)]
        for part in parts:
            try:
                part()
            except RelayError as error:  # what a server does not take of one queue holds up no other
                errors.append(error)
                away = away or (error if isinstance(error, Unavailable) else None)
            # a refusal waits longer for a server that hangs than leases may wait for this thread
            if away is not None and not (self._several and part is parts[0]):
                break
        if errors:
            raise away or errors[0]

    def _pay_acks(self, broker: Broker | Keeper, acked: Callable[[Sequence[Held], Iterable[Verdict]], None]) -> None:
        while taken := [held for queue in list(self._acks) for held in self.take_acks(queue)]:
            left = taken
            try:
                results = broker.drive(broker.operations.ack_each([held.job for held in taken]))
                left = [held for held, result in zip(taken, results, strict=True) if isinstance(result, RelayError)]
            finally:
                self.unsent(left)
            told = [(held, one) for held, one in zip(taken, results, strict=True) if not isinstance(one, RelayError)]
            acked([held for held, _one in told], [one for _held, one in told])
            _raise_first(results)

    def _pay_releases(self, broker: Broker | Keeper) -> None:
        if not self._releases:
            return
        with self._lock:
            jobs, self._releases = self._releases, []
        left = jobs
        try:
            results = broker.drive(broker.operations.release_each(jobs))
            left = [job for job, result in zip(jobs, results, strict=True) if isinstance(result, RelayError)]
        finally:
            with self._lock:
                self._releases += left  # and not the others: who has them by now would be taken for a loss
        _raise_first(results)

    def _pay_refusals(self, refused: Callable[[str], object]) -> None:
        while True:
            with self._lock:
                if not self._refusals:
                    return
                held, refuse = self._refusals.pop(0)
            try:
                refuse()
            except BaseException as error:
                with self._lock:
                    waits = isinstance(error, Unavailable) and not self._several
                    at = 0 if waits else len(self._refusals)
                    self._refusals.insert(at, (held, refuse))
                raise
            refused(held.tag)


def _raise_first(results: Sequence[Verdict | RelayError]) -> None:
    for result in results:
        if isinstance(result, RelayError):
            raise result
