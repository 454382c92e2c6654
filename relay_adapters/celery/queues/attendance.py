"""Which queues this process consumes from: told to the store by a thread, so that no pool and no task can hold it up.

A queue that expires lives for as long as somebody attends to it; a mailbox learns what was received and drops it; and
a queue that was deleted under its consumers is declared and bound again.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TypeVar

from relay_adapters.celery.queues import moves
from relay_adapters.celery.queues.declarations import process_name
from relay_adapters.celery.queues.moves import Touched
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.queues.topology import AS_BEFORE, GRACE_MS, Topology
from relay_core.commands import Command
from relay_core.connection import forks
from relay_core.errors import RelayError

T = TypeVar("T")

logger = logging.getLogger("relay.celery")

LONGEST = 20.0
"""Seconds between two touches where no queue expires sooner."""

MANY = 500
"""Messages received from mailboxes after which they are acknowledged without waiting for the next touch."""


REMEMBERED = 100
"""Queues that were left of which is known what was received from them, should this process come back."""


_numbers = count()


@dataclass
class _Attended:
    terms: Terms
    channels: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Left:
    terms: Terms
    until: float
    """Monotonic time from which the store knows by itself that this process is gone."""


class Attendance:
    """The queues that the channels over one topology consume from. Safe for threads and after a fork.

    :param chores: run by the thread after each touch, with the number of queues whose time is over and of those that
        have to be looked after. Answers the seconds until it wants to run again.
    """

    def __init__(self, topology: Topology, chores: Callable[[int, int], float] | None = None) -> None:
        self.topology = topology
        self._chores = chores
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """A child of a fork consumes nothing: its parent does."""
        self._lock = threading.RLock()
        self._attended: dict[str, _Attended] = {}
        self._left: dict[str, _Left] = {}
        self._parting = threading.Lock()
        self._last: dict[str, dict[int, str]] = {}
        """Queue -> seat -> the message of it that was received last, '' none. See `sit`."""
        self._seats: dict[tuple[str, int], int] = {}
        """(queue, seat) -> channel"""
        self._received = 0
        self._pause = 0.0
        self._failures = 0
        self._away = False
        """Whether the store could not be told something since it was touched last."""
        self._ended = self._limited = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        # of its own: another app of this process may attend to the same queue, through a broker with other options
        self.consumer = f"{process_name()}:{next(_numbers)}"

    def join(self, channel: int, queue: str, terms: Terms) -> None:
        """A channel begins to consume from a queue."""
        with self._lock:
            attended = self._attended.setdefault(queue, _Attended(terms))
            attended.terms = terms
            attended.channels.add(channel)
            self._left.pop(queue, None)
            self._remember(queue)
            self.topology.own.consume(queue)
            if self.period < self._pause:
                self._wake.set()  # the thread sleeps for longer than this queue may wait
            if self._thread is None:
                self._thread = threading.Thread(target=_attend, args=(weakref.ref(self),), daemon=True)
                self._thread.name = "relay-celery-attendance"
                self._thread.start()
        known = queue in self.topology.own.queues
        # where the server is away, the thread tells it later
        self.topology.outage.ask(lambda: self.touch([queue]), AS_BEFORE if known else None)

    def part(self, channel: int, queue: str) -> None:
        """A channel consumes no more. The thread tells the store, so that a lost connection holds nobody up."""
        with self._lock:
            attended = self._attended.get(queue)
            if attended is None:
                return
            attended.channels.discard(channel)
            for taken in [key for key, owner in self._seats.items() if key[0] == queue and owner == channel]:
                del self._seats[taken]
            if not attended.channels:
                del self._attended[queue]
                until = time.monotonic() + max(self._alive_ms, attended.terms.idle_ms) / 1000
                self._left[queue] = _Left(attended.terms, until)
                self.topology.own.leave(queue)
                self._wake.set()

    def _remember(self, queue: str) -> None:
        """What it receives, with the lock held. A process that lives for long may consume from one queue after the
        other: of those that it has left, the first are forgotten."""
        self._last.setdefault(queue, {0: ""})
        for old in [old for old in list(self._last) if old not in self._attended][:-REMEMBERED]:
            del self._last[old]

    def sit(self, channel: int, queues: Collection[str]) -> int:
        """A channel begins to read mailboxes: by which name. The same one for all, its own or else the first that no
        other channel has for any of them: what is left unread is told again to the next of that name, and to nobody
        else."""
        with self._lock:
            held = [seat for (_queue, seat), owner in self._seats.items() if owner == channel]
            free = (n for n in chain(held, count()) if all(self._seats.get((q, n), channel) == channel for q in queues))
            seat = next(free)
            for queue in queues:
                self._seats[queue, seat] = channel
            return seat

    def reader(self, seat: int) -> str:
        """The name by which mailboxes are read."""
        return f"{self.consumer}#{seat}" if seat else self.consumer

    def received(self, queue: str, seat: int, id: str) -> None:
        """A message of a mailbox was handed over."""
        with self._lock:
            self._last.setdefault(queue, {})[seat] = id
        self._received += 1
        if self._received >= MANY:
            self._received = 0
            self._wake.set()

    def last(self, queue: str, seat: int) -> str:
        """The message of a mailbox that this process received last by that name; "" for none."""
        return self._last.get(queue, {}).get(seat, "")

    def forget(self, queue: str) -> None:
        """The queue was deleted by this process."""
        with self._lock:
            self._last.pop(queue, None)
            self._left.pop(queue, None)

    @property
    def period(self) -> float:
        """Seconds between two touches: less than half of the shortest time after which one of the queues ends."""
        with self._lock:
            idle = [attended.terms.idle_ms for attended in self._attended.values()]
        return min([LONGEST, *(ms * 0.00045 for ms in idle if ms)])

    @property
    def _alive_ms(self) -> int:
        """For how long the store takes this process for alive after a touch."""
        return max(1000, round(self.period * 3000))

    def touch(self, queues: list[str] | None = None) -> None:
        """Tell the store of these queues, or of all; declare anew what is not there."""
        with self._lock:
            told = [
                Touched(queue, terms.idle_ms, (terms.ttl or 0) if terms.mailbox else -1, self.reader(seat), last)
                for queue in queues or list(self._attended)
                if queue in self._attended and (terms := self._attended[queue].terms)
                for seat, last in self._last.get(queue, {0: ""}).items()
            ]
        alive_ms = self._alive_ms
        for at in range(0, len(told), 100):
            batch = told[at : at + 100]
            ended, limited, *answers = self._run(
                moves.touch(self.topology.places, self.consumer, alive_ms, batch, away=self._away)
            )
            self._away = False
            if limited > self._limited:
                self._wake.set()
            self._ended, self._limited = ended, limited
            found = dict(zip((row.queue for row in batch), answers, strict=True))
            gone = [queue for queue, there in found.items() if not there and queue in self.topology.own.queues]
            for queue in gone:
                logger.info("queue %r is gone from the store and is declared again", queue)
            if gone or self.topology.own.owing:
                self.topology.own.revive(gone)

    def say_goodbye(self) -> None:
        """Tell the store at once of the queues that were left; where the thread is about to, wait for it.

        Raises RelayError; what could not be told is told the next time.
        """
        with self._parting:
            with self._lock:
                left, self._left = self._left, {}
            try:
                for queue, gone in list(left.items()):
                    terms = gone.terms
                    # a queue of jobs that names its own time has it: its consumers may be restarting
                    soon = terms.auto_delete and (terms.mailbox or terms.expires is None)
                    grace = min(GRACE_MS, terms.idle_ms) if soon else 0
                    self._run(moves.leave(self.topology.places, queue, self.consumer, grace))
                    del left[queue]
            finally:
                now = time.monotonic()
                with self._lock:
                    untold = {q: gone for q, gone in left.items() if q not in self._attended and now < gone.until}
                    self._left = {**untold, **self._left}

    def _run(self, command: Command[T]) -> T:
        try:
            return self.topology.broker.store.run(command)
        except RelayError:
            self._away = True
            raise

    def turn(self) -> float:
        """What the thread does each time: seconds until the next time."""
        self._wake.clear()
        self._received = 0
        self.say_goodbye()
        self.touch()
        pause = self.period
        if self._chores is not None:
            pause = min(pause, self._chores(self._ended, self._limited))
        self._failures = 0
        return pause

    def failed(self, error: RelayError) -> float:
        """The store could not be told: seconds until the next try. A server that is away for long is asked ever less
        often, and the log says so once."""
        pause = min(self.period, 2.0**self._failures)
        level = logging.DEBUG if self._failures else logging.WARNING
        self._failures = min(self._failures + 1, 10)
        logger.log(level, "the store could not be told which queues are consumed, next try in %.1f s: %s", pause, error)
        return pause


def _attend(reference: weakref.ref[Attendance]) -> None:
    me, pause = threading.current_thread(), None
    while True:
        attendance = reference()
        if attendance is None or attendance._thread is not me:
            return
        wake = attendance._wake
        pause = attendance._pause = attendance.period if pause is None else pause
        del attendance
        wake.wait(pause)
        attendance = reference()
        if attendance is None or attendance._thread is not me:
            return
        with attendance._lock:
            if not attendance._attended and not attendance._left:
                attendance._thread = None
                return
        pause = attendance.period
        try:
            pause = attendance.turn()
        except RelayError as error:
            pause = attendance.failed(error)
        except BaseException:  # whatever it was, SystemExit of a hook too: the queues must be kept
            logger.exception("attending to queues failed, next try in %.1f s", pause)
        del attendance
