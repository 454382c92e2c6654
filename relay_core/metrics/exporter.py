"""What the store itself knows of all queues: `relay exporter`. It sees the moves of every process, whatever it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from relay_core.broker import Broker
from relay_core.commands import QueueStats
from relay_core.metrics.depths import add_depths, depth_family
from relay_core.metrics.reading import Reader, named

LIFETIME = {
    "enqueued": "Jobs stored",
    "deduplicated": "Enqueues that stored nothing because the dedup key was taken",
    "claimed": "Jobs leased",
    "processed": "Jobs acked",
    "retried": "Failed jobs that were to run again",
    "dead": "Jobs that went to dead",
    "reaped": "Expired leases that were ended",
    "promoted": "Delayed jobs that became ready",
    "released": "Jobs handed back unstarted",
    "requeued": "Dead jobs made ready again",
    "cancelled": "Jobs taken out by id",
    "purged": "Jobs dropped by a purge",
    "forgotten": "Dead jobs dropped because they were kept for long enough",
}
"""Counters that the scripts keep per queue, by what they are called there: `relay_queue_<name>_total`."""

MAX_QUEUES = 1000


def _up() -> GaugeMetricFamily:
    return GaugeMetricFamily("relay_store_up", "1 when the store answered this scrape")


def _workers() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        "relay_workers", "Live worker processes that serve a queue, of every face", labels=["queue"]
    )


class StoreCollector(Collector):
    """Lifetime counters, depths, ages, pauses and workers of all queues, read from the store at each scrape.

    Queues in which a framework's processes talk to each other are left out. What cannot be read is left out of that
    scrape, and `relay_store_up` tells.

    :param patterns: shell patterns of the queues to serve. Default: all
    :param max_queues: most queues to serve, in the order of their names; more are left out, with a warning
    """

    def __init__(self, broker: Broker, patterns: Sequence[str] = (), max_queues: int = MAX_QUEUES) -> None:
        self._broker = broker
        self._reader = Reader(broker)
        self._patterns = tuple(patterns)
        self._max_queues = max_queues

    def describe(self) -> list[Metric]:
        """Without samples, so that registering needs no server."""
        return [_up(), *self._of_queues(()), _workers()]

    def _wanted(self, queue: str) -> bool:
        if self._broker.plugins.is_internal(queue):
            return False
        return not self._patterns or any(fnmatchcase(queue, pattern) for pattern in self._patterns)

    def collect(self) -> Iterator[Metric]:
        known = self._reader.queues()
        up = _up()
        up.add_metric([], 0 if known is None else 1)
        yield up
        if known is None:
            return
        workers = self._reader.workers()
        serving = Counter(queue for info in workers or () for queue in info.queues)
        names = sorted({*known, *serving})
        queues = named([name for name in names if self._wanted(name)], self._max_queues)
        yield from self._of_queues(self._reader.stats(queues))
        if workers is not None:
            live = _workers()
            for name in queues:
                live.add_metric([name], serving[name])
            yield live

    @staticmethod
    def _of_queues(found: Sequence[QueueStats]) -> Iterator[Metric]:
        depths = depth_family()
        counters = {
            name: CounterMetricFamily(f"relay_queue_{name}", f"{text}, since the queue began", labels=["queue"])
            for name, text in LIFETIME.items()
        }
        repairs = CounterMetricFamily(
            "relay_audit_repairs", "Jobs that audits found in no state or in two, and mended", labels=["queue"]
        )
        oldest = GaugeMetricFamily(
            "relay_queue_oldest_job_age_seconds",
            "Time since the oldest ready job was created, or was due where it was delayed; 0 when none is ready",
            labels=["queue"],
        )
        paused = GaugeMetricFamily("relay_queue_paused", "1 while claims of the queue are paused", labels=["queue"])
        for stats in found:
            label = [stats.queue]
            add_depths(depths, stats)
            for name, family in counters.items():
                family.add_metric(label, stats.counters.get(name, 0))
            repairs.add_metric(label, stats.counters.get("repaired", 0))
            oldest.add_metric(label, 0 if stats.oldest_at is None else max(0.0, stats.now - stats.oldest_at))
            paused.add_metric(label, int(stats.paused))
        yield from (depths, *counters.values(), repairs, oldest, paused)

    def close(self) -> None:
        """Give back the connections."""
        self._reader.close()
