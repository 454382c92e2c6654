"""Depths of queues, read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from relay_core.broker import Broker
from relay_core.commands import QueueStats
from relay_core.metrics.reading import Reader


def depth_family() -> GaugeMetricFamily:
    return GaugeMetricFamily("relay_queue_depth", "Jobs in a queue by state", labels=["queue", "state"])


def add_depths(family: GaugeMetricFamily, stats: QueueStats) -> None:
    """The four states of one queue, dead ones by the name of their queue, `dlq`."""
    for state, depth in (
        ("ready", stats.ready),
        ("inflight", stats.inflight),
        ("delayed", stats.delayed),
        ("dlq", stats.dead),
    ):
        family.add_metric([stats.queue, state], depth)


class DepthCollector(Collector):
    """`relay_queue_depth{queue,state}`, read from the store at each scrape; register it where you like.

    A queue that cannot be read is left out of that scrape: never a stale value, never a false zero.

    :param queues: their names, or a function that tells them at each scrape
    """

    def __init__(self, broker: Broker, queues: Sequence[str] | Callable[[], Sequence[str]]) -> None:
        self._reader = Reader(broker)
        self._queues: Callable[[], Sequence[str]]
        if callable(queues):
            self._queues = queues
        else:
            names = tuple(queues)
            self._queues = lambda: names

    def describe(self) -> list[Metric]:
        """Without samples, so that registering needs no server."""
        return [depth_family()]

    def collect(self) -> Iterator[Metric]:
        family = depth_family()
        for stats in self._reader.stats(self._queues()):
            add_depths(family, stats)
        yield family

    def close(self) -> None:
        """Give back the connections."""
        self._reader.close()
