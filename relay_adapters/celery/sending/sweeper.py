"""Dead-lettering without a connection of kombu's, for the thread that looks after queues nobody consumes."""

from __future__ import annotations

from relay_adapters.celery.holding.leases import leases_of
from relay_adapters.celery.queues.topology import Topology
from relay_adapters.celery.sending.deadletters import DeadLetters
from relay_adapters.celery.sending.publishing import Publishing


class Sweeper(Publishing, DeadLetters):
    """The publishing half of a channel, over a topology alone."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.broker = topology, topology.broker
        self.leases = leases_of(self.broker)
        self._used = {}
