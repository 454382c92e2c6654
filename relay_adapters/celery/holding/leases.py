"""What a process holds of Celery messages, by their delivery tags: until each is acked, refused or handed back, and its
lease, which `heartbeat.py` keeps, ends."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from relay_adapters.celery.holding import children, greenbeat
from relay_adapters.celery.holding.apart import Apart
from relay_adapters.celery.holding.heartbeat import Heartbeat
from relay_adapters.celery.holding.held import Held
from relay_adapters.celery.holding.owed import Owed
from relay_adapters.celery.messages.tags import number_of
from relay_adapters.celery.workerstate import running_tags
from relay_core import Broker, Job, Verdict
from relay_core.connection import forks
from relay_core.errors import RelayError

if TYPE_CHECKING:
    from relay_adapters.celery.receiving.ahead import Ahead

logger = logging.getLogger("relay.celery")

_DECISION = 0.05
"""Seconds that a child may take to decide whether it starts a task. It takes less, unless it is frozen just then."""

_UNDER_WAY = 1.0
"""Seconds that a process which ends waits for acks that are on their way. A server that is there takes less."""


class Leases:
    """Delivery tag -> what is held, for all channels over one broker, closed ones included: their tasks may run."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """A child of a fork holds nothing: its parent does."""
        self.lock = threading.RLock()  # a signal's handler may connect: Celery sends worker_shutting_down in one
        self.held: dict[str, Held] = {}
        self.owed = Owed(self.broker.url.several)
        self._ahead: list[Ahead] = []
        self.cut_off = False
        """True from when an event loop loses its connection until it has another: it is about to say farewell to a
        server that is most likely away, and has better things to do than to wait for it."""
        self.tasks = False
        """True once a Celery worker made a task of one."""
        self.untold = False
        """True once a task came of which nobody tells when it starts: that the pool has some waiting may be wrong."""
        self.rows = children.Row(), children.Row()
        """What a pool's children are told of those whose leases could be extended last; and of those set aside."""
        self.heartbeat = Heartbeat(self)
        self.apart = Apart(self)

    # what is held

    def add(self, tag: str, job: Job) -> None:
        with self.lock:
            self._begin()
            row = self.rows[False]
            if not self.held or job.expires_at < row.until:
                row.sure(job.expires_at)
            self.held[tag] = Held(tag, job, job.expires_at)
            row.held(tag)

    def _begin(self) -> None:
        """With the lock held, when this process first has something to keep."""
        if self.heartbeat.thread is None:
            self.heartbeat.start()
            self.rows = children.row(), children.row()  # once: there are not many

    def get(self, tag: str) -> Held | None:
        return self.held.get(tag)

    def pop(self, tag: str) -> Held | None:
        """What is held by a tag, which is no longer extended; None where it ended before."""
        with self.lock:
            held = self.held.pop(tag, None)
        self.apart.changed()
        return held

    def moving(self, job: Job, begun: bool) -> None:
        """A task is about to end its delivery by itself, or could not. Said before it does: a heartbeat that crosses
        its move finds no lease any more, and that is no loss."""
        with self.lock:
            for held in list(self.held.values()):  # a signal's handler that connects may add to it
                if held.job.id == job.id and held.job.token == job.token:
                    held.moved = begun

    def moved(self, held: Held) -> bool:
        """Whether the task that ran ended the delivery by itself, here or in a pool's child."""
        return held.moved or self._row_of(held).does(held.tag) == children.MOVED

    def start(self, tag: str, here: bool = True) -> bool:
        """A task is about to run. False: it was handed back, or its lease is over, and it must not.

        :param here: in this process; a child looks at its lease itself, and waits where that may be over
        """
        with self.lock:
            held = self.held.get(tag)
            if held is None or held.lost or (here and not held.started and time.monotonic() > held.until):
                return False
            held.started = True
            return True

    @property
    def holding(self) -> int:
        return len(self.held)

    def snapshot(self) -> list[Held]:
        """What is held just now, without the lock, which gevent's threads cannot share with others."""
        return [held for held in list(self.held.values()) if not held.lost]

    # acks

    def ack_later(self, tag: str) -> bool:
        """Leave an ack pending, for the next claim or the heartbeat. False: it ended before."""
        with self.lock:
            held = self.held.get(tag)
            if held is None or held.acked:
                return False
            over = self.moved(held)
            if over:
                del self.held[tag]
                self._row_of(held).done(tag)
            else:
                held.acked = True
                self.owed.ack(held)
        if over:
            self.apart.changed()
        else:
            self.heartbeat.ack_pending()
        return not over

    def unsent(self, taken: Sequence[Held]) -> None:
        """Acks that were taken from what is owed could not be sent. The heartbeat may have seen none meanwhile, and
        sleep until its next beat."""
        self.owed.unsent(taken)
        self.heartbeat.wake()

    def sent(self, taken: Sequence[Held], verdicts: Iterable[Verdict]) -> None:
        """What became of acks that were taken from what is owed."""
        with self.lock:
            for held, verdict in zip(taken, verdicts, strict=True):
                self.held.pop(held.tag, None)
                if verdict is not Verdict.LOST:
                    self._row_of(held).done(held.tag)
                elif not (held.expected or self.moved(held)):
                    self._row_of(held).lost(held.tag)
                    _warn_lost(held, "its ack came too late, and it may run again")
        self.apart.changed()

    def refuse_later(self, held: Held, refuse: Callable[[], object]) -> None:
        """The server is not there: refuse a message once it is. Its lease is kept until then.

        :param refuse: raises RelayError where that did not work either
        """
        with self.lock:
            held.acked = held.refused = True  # whatever becomes of it, its delivery is over
            self.held[held.tag] = held
            self.owed.refuse(held, refuse)
        self.heartbeat.wake()

    def flush(self) -> None:
        """Send what is pending: acks, and releases and refusals that could not be sent before. Raises Unavailable and
        the like."""
        self.owed.pay(self.heartbeat.broker, self.sent, self.pop)

    def hand_back(self, tags: Iterable[str], *, started: bool = False, wait: bool = True) -> None:
        """Release what was not started; what runs keeps its lease, also where only a pool's child knows that it does.
        An unreachable server is tried again later.

        :param started: also what was started, and is being ended without an answer; but not what a pool's child has
            run to its end, though this process has not heard of it yet: its ack comes
        :param wait: until the server has been told, unless it was away just now. False: the heartbeat tells it, for one
            that is away would hold up an event loop that has others to turn to
        """
        with self.lock:
            found = [held for tag in tags if (held := self.held.get(tag)) is not None]
            found.sort(key=lambda held: number_of(held.tag))  # they come back in the order in which they came
            stays = self._ended if started else self._may_run
            gone = [held for held in found if not (held.acked or stays(held))]
            for held in gone:
                self.let_go(held)
        self.apart.changed()
        if not gone:
            return  # a server that is away is not waited for on account of what it was owed before
        if self.owed.away or not wait:
            self.heartbeat.wake()
            return
        try:
            self.flush()
        except RelayError as error:
            logger.warning("messages that were not started are handed back when the server is there again: %s", error)
            self.heartbeat.wake()

    def end(self) -> None:
        """Before the process ends: hand back what was claimed and not started, and flush. Raises as that does."""
        for ahead in list(self._ahead):
            ahead.hand_back()
        with self.lock:
            for held in list(self.held.values()):
                held.untold = False  # its pool has ended
        self.hand_back(set(self.held) - running_tags())
        self.flush()
        # the thread that keeps the leases dies with the process, also where it is just sending acks
        self.owed.wait_for_others(_UNDER_WAY)
        self.flush()

    def _ended(self, held: Held) -> bool:
        return self._row_of(held).does(held.tag) in (children.ENDED, children.MOVED)

    def _may_run(self, held: Held) -> bool:
        return held.started or held.untold or self._runs(held)

    def _runs(self, held: Held) -> bool:
        """With the lock held: whether a pool's child has started what is to be handed back. If not, it will not."""
        row = self._row_of(held)
        row.lost(held.tag)
        patience = time.monotonic() + _DECISION
        while (does := row.does(held.tag)) == children.DECIDES and time.monotonic() < patience:
            time.sleep(_DECISION / 100)
        if does not in (children.RUNS, children.ENDED, children.MOVED):
            return False
        row.kept(held.tag)
        held.started = True
        return True

    def let_go(self, held: Held) -> None:
        """With the lock held: nobody starts it here any more."""
        del self.held[held.tag]
        self._row_of(held).lost(held.tag)
        self.owed.release(held.job)

    def lose(self, held: Held) -> None:
        """A heartbeat finds its lease gone."""
        if self.held.get(held.tag) is held and not (held.acked or held.expected or self.moved(held)):
            held.lost = True
            self.broker.operations.tell_lost(held.job, "extend")
            self._row_of(held).lost(held.tag)
            _warn_lost(held, "its lease was lost while it was held")

    def _row_of(self, held: Held) -> children.Row:
        return self.rows[held.aside]

    # claims that are under way

    def set_out(self, ahead: Ahead) -> None:
        """A claim was sent, and its reply will be taken later."""
        with self.lock:
            self._begin()
            self._ahead.append(ahead)

    def come_home(self, ahead: Ahead) -> None:
        """Its reply was taken."""
        with suppress(ValueError):
            self._ahead.remove(ahead)

    def abandon(self, ahead: Ahead) -> None:
        """Its channel is gone, and its reply may take a while: the heartbeat hands back what comes of it."""
        ahead.abandoned = True
        self.heartbeat.wake()

    def settle_claims(self) -> bool:
        """Hold what was claimed and not taken, for a task may keep the loop from it for hours. True while there are
        abandoned ones left: the heartbeat has leases to keep, and waits for no reply."""
        for ahead in list(self._ahead):
            if ahead.abandoned:
                ahead.hand_back(wait=False)
            else:
                ahead.settle(wait=False)
        return self.abandoned

    @property
    def abandoned(self) -> bool:
        """Whether replies are under way that their channels will not take any more."""
        return any(ahead.abandoned for ahead in self._ahead)


def _warn_lost(held: Held, what: str) -> None:
    logger.warning("message %s of queue %r: %s", held.job.id, held.job.queue, what)


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
