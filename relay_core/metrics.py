"""Prometheus metrics: a recorder that is a plugin, a collector of depths, and a server for both.

Importing this module needs `prometheus-client`: `pip install 'relay-queue[metrics]'`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from relay_core.broker import Broker
from relay_core.errors import InvalidArgument, RelayError
from relay_core.hooks import hookimpl
from relay_core.job import Job

logger = logging.getLogger("relay.metrics")

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Seconds."""

_COUNTERS = {
    "enqueued": "Jobs stored",
    "deduplicated": "Enqueues that stored nothing because the id or dedup key was taken",
    "claimed": "Jobs leased",
    "processed": "Jobs acked",
    "retried": "Failed jobs that will run again",
    "dead": "Jobs that went to dead",
    "reaped": "Expired leases ended",
    "promoted": "Delayed jobs made ready",
}


class Recorder:
    """A plugin that counts this process's moves: `Broker(url, plugins=[recorder])`.

    Every count is of a move that the store confirmed. Each recorder has a registry of its own.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"relay_jobs_{name}", text, ["queue"], registry=self.registry)
            for name, text in _COUNTERS.items()
        }
        self._latency = Histogram(
            "relay_job_latency_seconds",
            "Time from a job's creation to its ack",
            ["queue"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )

    def _count(self, name: str, queue: str, by: int = 1) -> None:
        self._counters[name].labels(queue).inc(by)

    @hookimpl
    def relay_job_enqueued(self, queue: str) -> None:
        self._count("enqueued", queue)

    @hookimpl
    def relay_job_deduplicated(self, queue: str) -> None:
        self._count("deduplicated", queue)

    @hookimpl
    def relay_job_claimed(self, job: Job) -> None:
        self._count("claimed", job.queue)

    @hookimpl
    def relay_job_acked(self, job: Job, latency: float) -> None:
        self._count("processed", job.queue)
        self._latency.labels(job.queue).observe(latency)

    @hookimpl
    def relay_job_retried(self, job: Job) -> None:
        self._count("retried", job.queue)

    @hookimpl
    def relay_job_dead(self, job: Job) -> None:
        self._count("dead", job.queue)

    @hookimpl
    def relay_jobs_reaped(self, queue: str, count: int) -> None:
        self._count("reaped", queue, count)

    @hookimpl
    def relay_jobs_promoted(self, queue: str, count: int) -> None:
        self._count("promoted", queue, count)


class DepthCollector(Collector):
    """`relay_queue_depth{queue,state}`, read from the store at each scrape; register it where you like.

    A queue that cannot be read is left out of that scrape: never a stale value, never a false zero.
    """

    def __init__(self, broker: Broker, queues: Sequence[str]) -> None:
        self._broker = broker
        self._queues = tuple(queues)

    def describe(self) -> list[Metric]:
        """Without samples, so that registering needs no server."""
        return [self._family()]

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for queue in self._queues:
            try:
                stats = self._broker.stats(queue)
            except RelayError as error:
                logger.warning("depth of queue %r left out of this scrape: %s", queue, error)
                continue
            for state, depth in (
                ("ready", stats.ready),
                ("inflight", stats.inflight),
                ("delayed", stats.delayed),
                ("dlq", stats.dead),
            ):
                family.add_metric([queue, state], depth)
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily("relay_queue_depth", "Jobs in a queue by state", labels=["queue", "state"])


class MetricsServer:
    """Serves `/metrics` of one worker: its recorder's counts and its queues' depths.

    :param address: `host:port`; port 0 picks a free one, see `port` after `start`
    """

    def __init__(self, address: str, broker: Broker, queues: Sequence[str]) -> None:
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise InvalidArgument(f"metrics address must be host:port, got {address!r}")
        self.host = host.strip("[]") or "127.0.0.1"
        self.port = int(port)
        self.recorder = Recorder()
        self.recorder.registry.register(DepthCollector(broker, queues))
        self._broker = broker
        self._server: tuple[WSGIServer, Thread] | None = None

    def start(self) -> None:
        """Begin to record and serve. A port in use is logged, and the worker goes on without metrics."""
        try:
            self._server = start_http_server(self.port, self.host, registry=self.recorder.registry)
        except OSError as error:
            logger.error("no metrics: cannot listen on %s:%d: %s; choose another address", self.host, self.port, error)
            return
        self.port = self._server[0].server_port
        self._broker.plugins.register(self.recorder)

    def stop(self) -> None:
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join(timeout=5.0)
            self._broker.plugins.unregister(self.recorder)
            self._server = None
