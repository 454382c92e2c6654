"""What has to be done from time to time for the declared queues, by whoever consumes: a thread of `Attendance`.

Queues whose time is over end, and expired messages leave queues that nobody consumes, as a delay by x-message-ttl and
x-dead-letter-exchange needs.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from relay_adapters.celery.attendance import Attendance
from relay_adapters.celery.terms import Terms
from relay_adapters.celery.topology import Topology
from relay_core import Broker


class Upkeep:
    """The chores over one topology."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._looks: dict[str, tuple[float, Terms]] = {}
        self._channel: Any = None

    def turn(self, ended: int, limited: int) -> float:
        """Do what is due: seconds until the next time.

        :param ended: how many queues' time is over
        :param limited: how many queues have messages with a time limit
        """
        now = time.monotonic()
        if ended:
            for queue in self.topology.ended():
                end(self.topology, queue, self.topology.terms(queue, fresh=True))
        if limited != len(self._looks):
            known = self._looks
            self._looks = {
                name: (known[name][0] if name in known else now, terms)
                for name, terms in self.topology.limited().items()
            }
        for queue, (at, terms) in list(self._looks.items()):
            if now >= at:
                self._looks[queue] = (now + self._sweeper().sweep(queue, terms), terms)
        return max(0.05, min([at for at, _terms in self._looks.values()], default=now + 60.0) - now)

    def _sweeper(self) -> Any:
        if self._channel is None:
            from relay_adapters.celery.sweeper import Sweeper

            self._channel = Sweeper(self.topology)
        return self._channel


def end(topology: Topology, queue: str, terms: Terms | None) -> None:
    """End a queue whose time is over. One that is only auto_delete is kept while it holds what nobody else has."""
    broker = topology.broker
    if terms is None:
        topology.raw("ZREM", topology.places.ends, queue)
    elif terms.mailbox:
        topology.delete_queue(queue, "ended")
    elif terms.expires is not None or _copies_only(topology, queue) or not broker.stats(queue).pending:
        if topology.delete_queue(queue, "ended"):
            broker.purge(queue)
            broker.delete_queue(queue)
    else:
        topology.use(queue, terms)


def _copies_only(topology: Topology, queue: str) -> bool:
    """True for a queue that only fanout exchanges fill: what it holds was meant for its consumer alone."""
    exchanges = {exchange for exchange, _binding in topology.bound(queue)}
    return bool(exchanges) and all((topology.exchange(name) or {}).get("type") == "fanout" for name in exchanges)


_all: dict[int, Attendance] = {}
_all_lock = threading.Lock()


def attendance_of(broker: Broker) -> Attendance:
    """The attendance and topology of a broker, which live as long as its process."""
    with _all_lock:
        if id(broker) not in _all:
            topology = Topology(broker)
            _all[id(broker)] = Attendance(topology, Upkeep(topology).turn)
        return _all[id(broker)]
