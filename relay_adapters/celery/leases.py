"""The leases of a process's Celery messages: kept by a thread, so that no pool and no task can hold them up.

What is owed to the server, see `owed.py`, is told it by that thread where no claim takes it along.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from relay_adapters.celery import children, greenbeat
from relay_adapters.celery.apart import Apart
from relay_adapters.celery.held import Held
from relay_adapters.celery.owed import LINGER, Owed
from relay_adapters.celery.tags import number_of
from relay_adapters.celery.workerstate import is_worker, running_tags, shutting_down
from relay_core import Broker, Job, Verdict
from relay_core.connection import forks
from relay_core.errors import RelayError
from relay_core.keeping import Keeper

if TYPE_CHECKING:
    from relay_adapters.celery.ahead import Ahead

logger = logging.getLogger("relay.celery")

_AGAIN = 0.25
"""Seconds until what an unreachable server left undone is tried again."""

_DECISION = 0.05
"""Seconds that a child may take to decide whether it starts a task. It takes less, unless it is frozen just then."""

_UNDER_WAY = 1.0
"""Seconds that a process which ends waits for acks that are on their way. A server that is there takes less."""

_NOTICE, _SELDOM = 1.0, 3600.0
"""Seconds between looks at whether the worker was told to stop, while it holds messages, and while it holds none."""


class Leases:
    """Delivery tag -> what is held, for all channels over one broker, closed ones included: their tasks may run."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """A child of a fork holds nothing: its parent does."""
        self._lock = threading.RLock()  # a signal's handler may connect: Celery sends worker_shutting_down in one
        self._held: dict[str, Held] = {}
        self.owed = Owed()
        self._ahead: list[Ahead] = []
        self._leave_at = 0.0
        self._event = threading.Event()
        self._watching = False
        self._thread: threading.Thread | None = None
        self.cut_off = False
        """True from when an event loop loses its connection until it has another: it is about to say farewell to a
        server that is most likely away, and has better things to do than to wait for it."""
        self.tasks = False
        """True once a Celery worker made a task of one."""
        self.untold = False
        """True once a task came of which nobody tells when it starts: that the pool has some waiting may be wrong."""
        self._next_beat = 0.0
        self._failing = False
        self._sure = self._sure_aside = 0.0
        self._row = children.Row()
        self._row_aside: children.Row | None = None
        self._keeper = Keeper(self.broker)
        self.apart = Apart(self)

    # what is held

    def add(self, tag: str, job: Job) -> None:
        with self._lock:
            self._begin()
            if not self._held or job.expires_at < self._sure:
                self._be_sure(job.expires_at)
            self._held[tag] = Held(tag, job, job.expires_at)
            self._row.held(tag)

    def _begin(self) -> None:
        """Start the thread, with the lock held, when this process first has something to keep."""
        if self._thread is not None:
            return
        self._row = children.row()
        self._next_beat = time.monotonic() + self.broker.settings.lease / 3
        self._thread = threading.Thread(target=_beat, args=(weakref.ref(self),), daemon=True)
        self._thread.name = "relay-celery-heartbeat"
        self._thread.start()
        greenbeat.start(self)

    def get(self, tag: str) -> Held | None:
        return self._held.get(tag)

    def pop(self, tag: str) -> Held | None:
        """What is held by a tag, which is no longer extended; None where it ended before."""
        with self._lock:
            held = self._held.pop(tag, None)
        self.apart.changed()
        return held

    def moving(self, job: Job, begun: bool) -> None:
        """A task is about to end its delivery by itself, or could not. Said before it does: a heartbeat that crosses
        its move finds no lease any more, and that is no loss."""
        with self._lock:
            for held in list(self._held.values()):  # a signal's handler that connects may add to it
                if held.job.id == job.id and held.job.token == job.token:
                    held.moved = begun

    def moved(self, held: Held) -> bool:
        """Whether the task that ran ended the delivery by itself, here or in a pool's child."""
        return held.moved or self._row.does(held.tag) == children.MOVED

    def start(self, tag: str, here: bool = True) -> bool:
        """A task is about to run. False: it was handed back, or its lease is over, and it must not.

        :param here: in this process; a child looks at its lease itself, and waits where that may be over
        """
        with self._lock:
            held = self._held.get(tag)
            if held is None or held.lost or (here and not held.started and time.monotonic() > held.until):
                return False
            held.started = True
            return True

    @property
    def holding(self) -> int:
        return len(self._held)

    @property
    def thread(self) -> threading.Thread | None:
        """What keeps them."""
        return self._thread

    def late(self) -> float:
        """Seconds by which they should have been extended before; 0 while nothing is held."""
        return max(0.0, time.monotonic() - self._next_beat) if self._held else 0.0

    def snapshot(self) -> list[Held]:
        """What is held just now, without the lock, which gevent's threads cannot share with others."""
        return [held for held in list(self._held.values()) if not held.lost]

    def were_extended(self) -> None:
        """By another thread just now: this one's turn is later."""
        self._next_beat = time.monotonic() + self.broker.settings.lease / 3

    # acks

    def ack_later(self, tag: str) -> bool:
        """Leave an ack pending, for the next claim or this thread. False: it ended before."""
        with self._lock:
            held = self._held.get(tag)
            if held is None or held.acked:
                return False
            over = self.moved(held)
            if over:
                del self._held[tag]
                self._row.done(tag)
            else:
                held.acked = True
                self.owed.ack(held)
                watching, self._watching = self._watching, True
        if over:
            self.apart.changed()
        elif not watching:
            self._event.set()
        return not over

    def unsent(self, taken: Sequence[Held]) -> None:
        """Acks that were taken from what is owed could not be sent. This thread may have seen none meanwhile, and sleep
        until the next beat."""
        self.owed.unsent(taken)
        self._event.set()

    def sent(self, taken: Sequence[Held], verdicts: Iterable[Verdict]) -> None:
        """What became of acks that were taken from what is owed."""
        with self._lock:
            for held, verdict in zip(taken, verdicts, strict=True):
                self._held.pop(held.tag, None)
                if verdict is not Verdict.LOST:
                    self._row.done(held.tag)
                elif not (held.expected or self.moved(held)):
                    self._row.lost(held.tag)
                    _warn_lost(held, "its ack came too late, and it may run again")
        self.apart.changed()

    def refuse_later(self, held: Held, refuse: Callable[[], object]) -> None:
        """The server is not there: refuse a message once it is. Its lease is kept until then.

        :param refuse: raises RelayError where that did not work either
        """
        with self._lock:
            held.acked = held.refused = True  # whatever becomes of it, its delivery is over
            self._held[held.tag] = held
            self.owed.refuse(held, refuse)
        self._event.set()

    def flush(self) -> None:
        """Send what is pending: acks, and releases and refusals that could not be sent before. Raises Unavailable and
        the like."""
        keeps = threading.current_thread() is self._thread  # and must not be held up by one server of several
        self.owed.pay(self._keeper if keeps else self.broker, self.sent, self.pop)

    def hand_back(self, tags: Iterable[str], *, started: bool = False, wait: bool = True) -> None:
        """Release what was not started; what runs keeps its lease, also where only a pool's child knows that it does.
        An unreachable server is tried again later.

        :param started: also what was started, and is being ended without an answer; but not what a pool's child has
            run to its end, though this process has not heard of it yet: its ack comes
        :param wait: until the server has been told, unless it was away just now. False: the thread tells it, for one
            that is away would hold up an event loop that has others to turn to
        """
        with self._lock:
            found = [held for tag in tags if (held := self._held.get(tag)) is not None]
            found.sort(key=lambda held: number_of(held.tag))  # they come back in the order in which they came
            stays = self._ended if started else self._may_run
            gone = [held for held in found if not (held.acked or stays(held))]
            for held in gone:
                self._let_go(held)
        self.apart.changed()
        if not gone:
            return  # a server that is away is not waited for on account of what it was owed before
        if self.owed.away or not wait:
            self._event.set()
            return
        try:
            self.flush()
        except RelayError as error:
            logger.warning("messages that were not started are handed back when the server is there again: %s", error)
            self._event.set()

    def end(self) -> None:
        """Before the process ends: hand back what was claimed and not started, and flush. Raises as that does."""
        for ahead in list(self._ahead):
            ahead.hand_back()
        with self._lock:
            for held in list(self._held.values()):
                held.untold = False  # its pool has ended
        self.hand_back(set(self._held) - running_tags())
        self.flush()
        # the thread that keeps the leases dies with the process, also where it is just sending acks
        self.owed.wait_for_others(_UNDER_WAY)
        self.flush()

    def _ended(self, held: Held) -> bool:
        return self._row.does(held.tag) in (children.ENDED, children.MOVED)

    def _may_run(self, held: Held) -> bool:
        return held.started or held.untold or self._runs(held)

    def _runs(self, held: Held) -> bool:
        """With the lock held: whether a pool's child has started what is to be handed back. If not, it will not."""
        self._row.lost(held.tag)
        patience = time.monotonic() + _DECISION
        while (does := self._row.does(held.tag)) == children.DECIDES and time.monotonic() < patience:
            time.sleep(_DECISION / 100)
        if does not in (children.RUNS, children.ENDED, children.MOVED):
            return False
        self._row_of(held).kept(held.tag)
        held.started = True
        return True

    def _let_go(self, held: Held) -> None:
        del self._held[held.tag]
        self._row.lost(held.tag)
        self.owed.release(held.job)

    def leave(self, now: float) -> float:
        """Hand back what was not started when the worker stops: its channels close only when the last task has ended,
        which may take hours. Seconds until this thread should look again.

        Half a second after it is noticed, for what a pool's child has just started is known by then.
        """
        if not self._held or not is_worker():
            return _SELDOM
        if not shutting_down():
            return _NOTICE
        if not self._leave_at:
            self._leave_at = now + 0.5
        if now < self._leave_at:
            return self._leave_at - now
        self._settle_claims()
        self.hand_back(set(self._held) - running_tags())
        return _NOTICE

    # claims that are under way

    def set_out(self, ahead: Ahead) -> None:
        """A claim was sent, and its reply will be taken later."""
        with self._lock:
            self._begin()
            self._ahead.append(ahead)

    def come_home(self, ahead: Ahead) -> None:
        """Its reply was taken."""
        with suppress(ValueError):
            self._ahead.remove(ahead)

    def abandon(self, ahead: Ahead) -> None:
        """Its channel is gone, and its reply may take a while: this thread hands back what comes of it."""
        ahead.abandoned = True
        self._event.set()

    def _settle_claims(self) -> bool:
        """Hold what was claimed and not taken, for a task may keep the loop from it for hours. True while there are
        abandoned ones left: this thread has leases to keep, and waits for no reply."""
        for ahead in list(self._ahead):
            if ahead.abandoned:
                ahead.hand_back(wait=False)
            else:
                ahead.settle(wait=False)
        return any(ahead.abandoned for ahead in self._ahead)

    # the heartbeat

    def extend(self) -> RelayError | None:
        """Extend all leases. A lease that was lost is not extended again; the ack of its task says so.

        The first error, where some could not be extended. Raises it where none could, unless all were set aside before.
        """
        self._settle_claims()
        failed: RelayError | None = None
        if self.owed.acks and time.monotonic() > self._sure:
            # a child may wait for word of a task that was acked as it was accepted. Of acks alone: a full server does
            # not take all else, and is to extend the leases all the same
            try:
                self.owed.pay(self._keeper, self.sent)
            except RelayError as error:
                failed = error
        with self._lock:
            batch = [held for held in self._held.values() if not (held.lost or self.moved(held))]
        until = time.monotonic() + self.broker.settings.lease
        verdicts = self._keeper.extend([held.job for held in batch])
        errors = [verdict for verdict in verdicts if isinstance(verdict, RelayError)]
        if errors and len(errors) == len(batch) and not all(held.aside for held in batch):
            raise errors[0]
        for held, verdict in zip(batch, verdicts, strict=True):
            if isinstance(verdict, RelayError):
                self._set_aside(held)
            elif verdict is not Verdict.LOST:
                held.until = until
            elif self._held.get(held.tag) is held and not (held.acked or held.expected or self.moved(held)):
                held.lost = True
                self.broker.operations.tell_lost(held.job, "extend")
                self._row.lost(held.tag)
                _warn_lost(held, "its lease was lost while it was held")
        with self._lock:
            known = [self._are_sure(aside, until) for aside in (False, True)]
        if not all(known):
            self._next_beat = time.monotonic() + LINGER
        return failed or next(iter(errors), None)

    def _are_sure(self, aside: bool, until: float) -> bool:
        """Say until when the leases of a row last, with the lock held. False: what became of acks in it is not known
        yet."""
        mine = [held for held in self._held.values() if held.aside is aside]
        if time.monotonic() > (self._sure_aside if aside else self._sure) and any(
            held.acked and not held.refused for held in mine
        ):
            return False
        sure = (held.until for held in mine if not (held.lost or held.acked or self.moved(held)))
        if not aside:
            self._be_sure(min(sure, default=until))
        elif self._row_aside is not None:
            self._sure_aside = min(sure, default=until)
            self._row_aside.sure(self._sure_aside)
        return True

    def _be_sure(self, until: float) -> None:
        self._sure = until
        self._row.sure(until)

    def _set_aside(self, held: Held) -> None:
        """Its lease could not be extended, as others were: from now on it has no part in what is said of these."""
        with self._lock:
            if held.aside or self._held.get(held.tag) is not held:
                return
            if not any(other.aside for other in self._held.values()):
                self._sure_aside = held.until
            self._sure_aside = min(self._sure_aside, held.until)
            if self._row_aside is None:
                self._row_aside = children.row()
            self._row_aside.sure(self._sure_aside)
            held.aside = True
            self._row_of(held).kept(held.tag)

    def _row_of(self, held: Held) -> children.Row:
        return self._row_aside if held.aside and self._row_aside is not None else self._row

    def give_up(self) -> None:
        """The server is not there and leases are over: what a child has not started for that reason, it shall not."""
        with self._lock:
            now = time.monotonic()
            for held in [held for held in self._held.values() if self._row.does(held.tag) == children.WAITS]:
                if now <= (self._sure_aside if held.aside else self._sure):
                    continue
                if held.acked and not self.owed.withdraw(held):
                    continue  # what becomes of that ack is not known
                self._let_go(held)

    def work(self) -> float:
        """What the thread has to do now: seconds until it has to look again."""
        now = time.monotonic()
        abandoned = any(ahead.abandoned for ahead in self._ahead) and self._settle_claims()
        if now >= self._next_beat:
            if self._held and now - self._next_beat > self.broker.settings.lease / 2:
                logger.warning(
                    "leases are kept %.1f s late: this process was stopped for a while", now - self._next_beat
                )
            self._next_beat = now + self.broker.settings.lease / 3
            try:
                failed = self.extend()
            except RelayError as error:
                failed = error
            if failed is not None:
                self._next_beat = time.monotonic() + min(self.broker.settings.lease / 3, 1.0)
                level = logging.DEBUG if self._failing else logging.WARNING
                logger.log(level, "leases could not be extended, tried again every second: %s", failed)
                self.give_up()
            self._failing = failed is not None  # a task may run for hours beside a server of a list that is away
        stopping = self.leave(now)
        if self.owed.due(now):
            try:
                self.flush()
            except RelayError as error:
                logger.debug("the server could not be told of all that is owed: %s", error)
                return _AGAIN
        if self.owed.acks or abandoned:
            return LINGER
        self._watching = False
        # an ack may have become pending between these lines, unseen by the thread that left it
        return LINGER if self.owed.acks else max(0.0, min(self._next_beat - time.monotonic(), stopping))


def _warn_lost(held: Held, what: str) -> None:
    logger.warning("message %s of queue %r: %s", held.job.id, held.job.queue, what)


def _beat(reference: weakref.ref[Leases]) -> None:
    me = threading.current_thread()
    while True:
        leases = reference()
        if leases is None or leases._thread is not me:
            return
        event = leases._event
        try:
            pause = leases.work()
        except BaseException:  # whatever it was, SystemExit of a hook too: the leases must be kept
            logger.exception("the leases of Celery messages: next try in 1 s")
            pause = 1.0
        del leases
        event.wait(pause)
        event.clear()


_all: dict[int, Leases] = {}
_all_lock = forks.Lock()
_registered_in = 0
"""The process whose end is awaited: a child of a fork has its own."""


def leases_of(broker: Broker) -> Leases:
    """The leases over a broker, which lives as long as its process."""
    global _registered_in
    with _all_lock:
        if _registered_in != os.getpid():
            _registered_in = os.getpid()
            atexit.register(_at_exit, os.getpid())
        if id(broker) not in _all:
            _all.setdefault(id(broker), Leases(broker))  # a signal's handler may have been faster
        return _all[id(broker)]


def any_untold() -> bool:
    """True once this process took tasks over relay of which nobody tells when they start."""
    return any(leases.untold for leases in list(_all.values()))


def _at_exit(pid: int) -> None:
    """The acks of the last milliseconds, and what was claimed in them."""
    for leases in list(_all.values()) if pid == os.getpid() else ():
        with suppress(RelayError):
            leases.end()
    greenbeat.end()
