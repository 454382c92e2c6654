"""Dead-lettering without a connection of kombu's, for the thread that looks after queues nobody consumes."""

from __future__ import annotations

from relay_adapters.celery.deadletters import DeadLetters
from relay_adapters.celery.leases import leases_of
from relay_adapters.celery.publishing import Publishing
from relay_adapters.celery.topology import Topology


class Sweeper(Publishing, DeadLetters):
    """The publishing half of a channel, over a topology alone."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.broker = topology, topology.broker
        self.leases = leases_of(self.broker)
        self._used = {}
