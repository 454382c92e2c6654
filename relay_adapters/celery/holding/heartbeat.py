"""The thread that keeps the leases of a process's Celery messages, so that no pool and no task can hold it up.

It also tells the server what it is owed, see `owed.py`, where no claim takes that along, and hands back what was not
started when the worker stops.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

from relay_adapters.celery.holding import children, greenbeat
from relay_adapters.celery.holding.owed import LINGER
from relay_adapters.celery.workerstate import is_worker, running_tags, shutting_down
from relay_core import Broker, Verdict
from relay_core.errors import RelayError
from relay_core.keeping import Keeper

if TYPE_CHECKING:
    from relay_adapters.celery.holding.held import Held
    from relay_adapters.celery.holding.leases import Leases

logger = logging.getLogger("relay.celery")

_AGAIN = 0.25
"""Seconds until what an unreachable server left undone is tried again."""

_NOTICE, _SELDOM = 1.0, 3600.0
"""Seconds between looks at whether the worker was told to stop, while it holds messages, and while it holds none."""

_SETTLES = 0.5
"""Seconds after that was noticed until what was not started is handed back: what a pool's child has just started is
known by then."""


class Heartbeat:
    """Extends the leases of one table of them, a third of a lease after the last time."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._lease = leases.broker.settings.lease
        self._keeper = Keeper(leases.broker)
        self._event = threading.Event()
        self._watching = False
        """True while the thread is about to look at pending acks."""
        self.thread: threading.Thread | None = None
        self._next = 0.0
        self._failing = False
        self._leave_at = 0.0

    def start(self) -> None:
        """With the table's lock held, before it first has something to keep. Repeating it is harmless.

        Raises RuntimeError where this process may have no more threads just now.
        """
        if self.thread is not None:
            return
        self.were_extended()
        self.thread = threading.Thread(target=_beat, args=(weakref.ref(self._leases),), daemon=True)
        self.thread.name = "relay-celery-heartbeat"
        try:
            self.thread.start()
        except BaseException:
            self.thread = None  # what comes next asks for it again
            raise
        greenbeat.start(self._leases)

    def wake(self) -> None:
        """There is something to do."""
        self._event.set()

    def ack_pending(self) -> None:
        """An ack waits to be sent."""
        watching, self._watching = self._watching, True
        if not watching:
            self.wake()

    @property
    def broker(self) -> Broker | Keeper:
        """By what this thread tells the server. The heartbeat's own is not held up by one server of several."""
        return self._keeper if threading.current_thread() is self.thread else self._leases.broker

    def late(self) -> float:
        """Seconds by which the leases should have been extended before; 0 while nothing is held."""
        return max(0.0, time.monotonic() - self._next) if self._leases.holding else 0.0

    def were_extended(self) -> None:
        """By another thread just now: this one's turn is later."""
        self._next = time.monotonic() + self._lease / 3

    def extend(self) -> RelayError | None:
        """Extend all leases. A lease that was lost is not extended again; the ack of its task says so.

        The first error, where some could not be extended. Raises it where none could, unless all were set aside before.
        """
        leases = self._leases
        leases.settle_claims()
        failed: RelayError | None = None
        if leases.owed.acks and time.monotonic() > leases.rows[False].until:
            # a child may wait for word of a task that was acked as it was accepted. Of acks alone: a full server does
            # not take all else, and is to extend the leases all the same
            try:
                leases.owed.pay(self._keeper, leases.sent)
            except RelayError as error:
                failed = error
        with leases.lock:
            batch = [held for held in leases.held.values() if not (held.lost or leases.moved(held))]
        until = time.monotonic() + self._lease
        verdicts = self._keeper.extend([held.job for held in batch])
        errors = [verdict for verdict in verdicts if isinstance(verdict, RelayError)]
        if errors and len(errors) == len(batch) and not all(held.aside for held in batch):
            raise errors[0]
        for held, verdict in zip(batch, verdicts, strict=True):
            if isinstance(verdict, RelayError):
                self._set_aside(held)
            elif verdict is Verdict.LOST:
                leases.lose(held)
            else:
                held.until = until
        with leases.lock:
            known = [self._are_sure(aside, until) for aside in (False, True)]
        if not all(known):
            self._next = time.monotonic() + LINGER
        return failed or next(iter(errors), None)

    def _are_sure(self, aside: bool, until: float) -> bool:
        """Say until when the leases of a row last, with the lock held. False: what became of acks in it is not known
        yet."""
        leases, row = self._leases, self._leases.rows[aside]
        mine = [held for held in leases.held.values() if held.aside is aside]
        if time.monotonic() > row.until and any(held.acked and not held.refused for held in mine):
            return False
        sure = (held.until for held in mine if not (held.lost or held.acked or leases.moved(held)))
        row.sure(min(sure, default=until))
        return True

    def _set_aside(self, held: Held) -> None:
        """Its lease could not be extended, as others were: from now on it has no part in what is said of these."""
        leases = self._leases
        row = leases.rows[True]
        with leases.lock:
            if held.aside or leases.held.get(held.tag) is not held:
                return
            first = not any(other.aside for other in leases.held.values())
            row.sure(held.until if first else min(row.until, held.until))
            held.aside = True
            row.kept(held.tag)

    def _give_up(self) -> None:
        """The server is not there and leases are over: what a child has not started for that reason, it shall not."""
        leases = self._leases
        with leases.lock:
            now = time.monotonic()
            for held in list(leases.held.values()):
                row = leases.rows[held.aside]
                if row.does(held.tag) != children.WAITS or now <= row.until:
                    continue
                if held.acked and not leases.owed.withdraw(held):
                    continue  # what becomes of that ack is not known
                leases.let_go(held)

    def _leave(self, now: float) -> float:
        """Hand back what was not started when the worker stops: its channels close only when the last task has ended,
        which may take hours. Seconds until this thread should look again."""
        leases = self._leases
        if not leases.holding or not is_worker():
            return _SELDOM
        if not shutting_down():
            return _NOTICE
        if not self._leave_at:
            self._leave_at = now + _SETTLES
        if now < self._leave_at:
            return self._leave_at - now
        leases.settle_claims()
        leases.hand_back(set(leases.held) - running_tags())
        return _NOTICE

    def work(self) -> float:
        """What the thread has to do now: seconds until it has to look again."""
        leases, now = self._leases, time.monotonic()
        abandoned = leases.abandoned and leases.settle_claims()
        if now >= self._next:
            self._extend_again(now)
        stopping = self._leave(now)
        if leases.owed.due(now):
            try:
                leases.flush()
            except RelayError as error:
                logger.debug("the server could not be told of all that is owed: %s", error)
                return _AGAIN
        if leases.owed.acks or abandoned:
            return LINGER
        self._watching = False
        # an ack may have become pending between these lines, unseen by the thread that left it
        return LINGER if leases.owed.acks else max(0.0, min(self._next - time.monotonic(), stopping))

    def _extend_again(self, now: float) -> None:
        late = now - self._next
        if self._leases.holding and late > self._lease / 2:
            logger.warning("leases are kept %.1f s late: this process was stopped for a while", late)
        self._next = now + self._lease / 3
        try:
            failed = self.extend()
        except RelayError as error:
            failed = error
        if failed is not None:
            self._next = time.monotonic() + min(self._lease / 3, 1.0)
            level = logging.DEBUG if self._failing else logging.WARNING
            logger.log(level, "leases could not be extended, tried again every second: %s", failed)
            self._give_up()
        self._failing = failed is not None  # a task may run for hours beside a server of a list that is away


def _beat(reference: weakref.ref[Leases]) -> None:
    me = threading.current_thread()
    while True:
        leases = reference()
        if leases is None or leases.heartbeat.thread is not me:
            return
        heartbeat = leases.heartbeat
        event = heartbeat._event
        try:
            pause = heartbeat.work()
        except BaseException:  # whatever it was, SystemExit of a hook too: the leases must be kept
            logger.exception("the leases of Celery messages: next try in 1 s")
            pause = 1.0
        del leases, heartbeat
        event.wait(pause)
        event.clear()
