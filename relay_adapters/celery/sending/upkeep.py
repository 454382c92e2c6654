"""What has to be done from time to time for the declared queues, by whoever consumes: a thread of `Attendance`.

Queues whose time is over end, and expired messages leave queues that nobody consumes, as a delay by x-message-ttl and
x-dead-letter-exchange needs.
"""

from __future__ import annotations

import time
from typing import Any

from relay_adapters.celery.queues.attendance import Attendance
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.queues.topology import Topology
from relay_core import Broker
from relay_core.connection import forks

PAGE = 50
"""Queues whose time is over that one turn ends."""

LONGEST = 0.5
"""Seconds after which a turn leaves the rest for the next one: the thread has to say that its process lives."""

AGAIN = 0.05
"""Seconds until the next turn where this one left something."""

REREAD = 5.0
"""Seconds after which the queues to be looked after are read again: as many of them may be others."""


class Upkeep:
    """The chores over one topology."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._looks: dict[str, tuple[float, Terms]] = {}
        self._read_at = 0.0
        self._channel: Any = None

    def turn(self, ended: int, limited: int) -> float:
        """Do what is due, or some of it: seconds until the next time.

        :param ended: how many queues' time is over
        :param limited: how many queues have messages with a time limit
        """
        now = time.monotonic()
        more = bool(ended) and self._end_some(now + LONGEST)
        if limited != len(self._looks) or (limited and now - self._read_at >= REREAD):
            self._read(now)
        # who waits the longest comes first, and one comes in any case
        due = sorted((at, queue) for queue, (at, _terms) in self._looks.items() if at <= now)
        for n, (_at, queue) in enumerate(due):
            if n and time.monotonic() >= now + LONGEST:
                more = True
                break
            terms = self._looks[queue][1]
            self._looks[queue] = (now + REREAD, terms)  # where this one fails, the others have their turn
            self._looks[queue] = (now + self._sweeper().sweep(queue, terms), terms)
        if more:
            return AGAIN
        reread = [self._read_at + REREAD] if self._looks else []
        return max(AGAIN, min([at for at, _terms in self._looks.values()] + reread, default=now + 60.0) - now)

    def _end_some(self, until: float) -> bool:
        """End queues whose time is over. True when there may be more."""
        page = self.topology.stored.ended(PAGE)
        for n, queue in enumerate(page):
            if n and time.monotonic() >= until:
                return True
            end(self.topology, queue, self.topology.terms(queue, fresh=True))
        return len(page) == PAGE

    def _read(self, now: float) -> None:
        """See which queues have to be looked after; one that is new or has other terms, at once."""
        known, self._read_at = self._looks, now
        self._looks = {
            name: known[name] if name in known and known[name][1] == terms else (now, terms)
            for name, terms in self.topology.stored.limited().items()
        }

    def _sweeper(self) -> Any:
        if self._channel is None:
            from relay_adapters.celery.sending.sweeper import Sweeper

            self._channel = Sweeper(self.topology)
        return self._channel


def end(topology: Topology, queue: str, terms: Terms | None) -> bool:
    """End a queue whose time is over: whether it is gone. One that is only auto_delete is kept while it holds what
    nobody else has, unless that was meant for its consumer alone."""
    broker = topology.broker
    if terms is None:
        topology.stored.raw("ZREM", topology.places.ends, queue)
        return True
    if terms.mailbox:
        return topology.delete_queue(queue, "ended")
    if terms.expires is None and not _its_own(topology, queue, terms) and broker.stats(queue).pending:
        topology.use(queue, terms)
        return False
    if not topology.delete_queue(queue, "ended"):
        return False
    broker.purge(queue)
    broker.delete_queue(queue)
    return True


def _its_own(topology: Topology, queue: str, terms: Terms) -> bool:
    """True for an exclusive queue, and one that only fanout exchanges fill: what it holds was meant for its consumer
    alone."""
    if terms.exclusive:
        return True
    exchanges = {exchange for exchange, _binding in topology.stored.bound(queue)}
    return bool(exchanges) and all((topology.exchange(name) or {}).get("type") == "fanout" for name in exchanges)


_all: dict[int, Attendance] = {}
_all_lock = forks.Lock()


def attendance_of(broker: Broker) -> Attendance:
    """The attendance and topology of a broker, which live as long as its process."""
    with _all_lock:
        if id(broker) not in _all:
            topology = Topology(broker)
            # a signal's handler may have been faster
            _all.setdefault(id(broker), Attendance(topology, Upkeep(topology).turn))
        return _all[id(broker)]
