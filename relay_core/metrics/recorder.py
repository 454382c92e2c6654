"""The recorder: a plugin that counts the moves of its process, each after the store confirmed it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from relay_core.errors import InvalidArgument
from relay_core.hooks import hookimpl
from relay_core.job import Job
from relay_core.plugins import Plugins
from relay_core.validation import whole

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Seconds."""

MAX_QUEUES = 1000
"""Queues with a label of their own; the moves of more are counted as of `other`."""

OTHER = "other"

_BY_QUEUE = {
    "relay_jobs_enqueued": "Jobs stored",
    "relay_jobs_deduplicated": "Enqueues that stored nothing because the id or dedup key was taken",
    "relay_jobs_reaped": "Expired leases ended",
    "relay_jobs_promoted": "Delayed jobs made ready",
    "relay_leases_lost": "Jobs that were no longer this process's own when it acked, nacked, extended or released them",
}
_BY_TASK = {
    "relay_jobs_claimed": "Jobs leased",
    "relay_jobs_processed": "Jobs acked",
    "relay_jobs_retried": "Failed jobs that will run again",
    "relay_jobs_dead": "Jobs that went to dead",
    "relay_job_runs_failed": "Runs whose handler raised, whatever became of the job",
}
_TIMES = {
    "relay_job_latency_seconds": "Time from a job's creation to its ack",
    "relay_job_wait_seconds": "Time from a job's creation, or from when it was due, to its first claim",
    "relay_job_run_seconds": "Time for which a handler ran",
}


def multiprocess_folder() -> Path | None:
    """Where prometheus-client keeps the values of all processes, if the user asked it to.

    Raises InvalidArgument when there is no such folder, or none that this process may write to: then every count would
    be an error of its own.
    """
    named = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if named is None:
        return None
    if not Path(named).is_dir():
        raise InvalidArgument(f"PROMETHEUS_MULTIPROC_DIR={named!r} is not a folder; make it, empty, before the start")
    try:
        TemporaryFile(dir=named).close()
    except OSError as error:
        raise InvalidArgument(f"PROMETHEUS_MULTIPROC_DIR={named!r} cannot be written to: {error}") from error
    return Path(named)


class _Bounded:
    """The first so many different names, then `other`: labels must not grow without end, nor move between series."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()
        self._lock = Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def label(self, name: str) -> str:
        if name in self._names:
            return name
        with self._lock:
            if len(self._names) >= self._most:
                return OTHER
            self._names.add(name)
            return name


class _Metrics:
    """The metrics of one process."""

    def __init__(self, tasks: int) -> None:
        self.pid = os.getpid()
        self.registry = CollectorRegistry()
        self.queues = _Bounded(MAX_QUEUES)
        self.tasks = _Bounded(tasks)
        labels = ["queue", "task"] if tasks else ["queue"]
        self.counters = {
            **{name: Counter(name, text, ["queue"], registry=self.registry) for name, text in _BY_QUEUE.items()},
            **{name: Counter(name, text, labels, registry=self.registry) for name, text in _BY_TASK.items()},
        }
        self.times = {
            name: Histogram(name, text, labels, buckets=LATENCY_BUCKETS, registry=self.registry)
            for name, text in _TIMES.items()
        }
        self._children: dict[tuple[str, tuple[str, ...]], Any] = {}

    def child(self, name: str, labels: tuple[str, ...]) -> Any:
        """The counter or histogram of these label values, which are bounded. Looking it up anew costs as much again
        as counting."""
        key = name, labels
        found = self._children.get(key)
        if found is None:
            family: Any = self.counters.get(name) or self.times[name]
            found = self._children[key] = family.labels(*labels)
        return found


class Recorder:
    """Counts this process's moves: `Broker(url, plugins=[recorder])`, and serve `recorder.registry`.

    Each recorder has a registry of its own, and a child of a fork another one, where it counts anew. Where
    PROMETHEUS_MULTIPROC_DIR is set, all processes count into that folder, and `exposed()` serves their sum.

    :param tasks: how many names of tasks get a `task` label of their own, the first ones that are met; the others
        are counted as `other`. 0, the default: there is no such label
    :param plugins: whose adapters name tasks and tell internal queues, which are not counted. Default: the
        installed ones
    :ivar shared: whether it counts into the multiprocess folder
    """

    def __init__(self, *, tasks: int = 0, plugins: Plugins | None = None) -> None:
        self._tasks = whole("tasks", tasks, least=0, most=10_000)
        self._plugins = plugins
        self.shared = multiprocess_folder() is not None
        self._made = _Metrics(tasks)

    def _now(self) -> _Metrics:
        # In a child a lock of the parent's metrics may be held for ever, and the parent's counts are not the child's.
        if self._made.pid != os.getpid() and not self.shared:
            self._made = _Metrics(self._tasks)
        return self._made

    @property
    def registry(self) -> CollectorRegistry:
        """What this process counted."""
        return self._now().registry

    def exposed(self, *others: Collector) -> CollectorRegistry:
        """What to serve: the counts of this process, or of all in the multiprocess folder, with `others`."""
        registry = CollectorRegistry()
        if self.shared:
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        else:
            registry.register(_Live(self))
        for other in others:
            registry.register(other)
        return registry

    def _known(self) -> Plugins:
        if self._plugins is None:
            self._plugins = Plugins()
        return self._plugins

    def _labels(self, made: _Metrics, queue: str, job: Job | None = None) -> tuple[str, ...] | None:
        """Label values; None for what is not counted."""
        if queue not in made.queues and self._known().is_internal(queue):
            return None
        name = made.queues.label(queue)
        if job is None or not self._tasks:
            return (name,)
        summary = self._known().describe(job)
        return name, made.tasks.label(summary.name) if summary else OTHER

    def _count(self, name: str, queue: str, by: int = 1) -> None:
        made = self._now()
        if (labels := self._labels(made, queue)) is not None:
            made.child(name, labels).inc(by)

    def _tell(self, job: Job, count: str, by: int = 1, **seconds: float) -> None:
        """Count a move of a job and observe times of it, under one look at its labels."""
        made = self._now()
        if (labels := self._labels(made, job.queue, job)) is not None:
            made.child(count, labels).inc(by)
            for name, value in seconds.items():
                made.child(name, labels).observe(value)

    @hookimpl
    def relay_job_enqueued(self, queue: str) -> None:
        self._count("relay_jobs_enqueued", queue)

    @hookimpl
    def relay_job_deduplicated(self, queue: str) -> None:
        self._count("relay_jobs_deduplicated", queue)

    @hookimpl
    def relay_job_claimed(self, job: Job) -> None:
        if job.deliveries == 1:
            self._tell(job, "relay_jobs_claimed", relay_job_wait_seconds=max(0.0, job.claimed_at - job.ready_at))
        else:
            self._tell(job, "relay_jobs_claimed")

    @hookimpl
    def relay_job_acked(self, job: Job, latency: float) -> None:
        self._tell(job, "relay_jobs_processed", relay_job_latency_seconds=latency)

    @hookimpl
    def relay_job_retried(self, job: Job) -> None:
        self._tell(job, "relay_jobs_retried")

    @hookimpl
    def relay_job_dead(self, job: Job) -> None:
        self._tell(job, "relay_jobs_dead")

    @hookimpl
    def relay_jobs_reaped(self, queue: str, count: int) -> None:
        self._count("relay_jobs_reaped", queue, count)

    @hookimpl
    def relay_jobs_promoted(self, queue: str, count: int) -> None:
        self._count("relay_jobs_promoted", queue, count)

    @hookimpl
    def relay_lease_lost(self, queue: str) -> None:
        self._count("relay_leases_lost", queue)

    @hookimpl
    def relay_run_ended(self, job: Job, seconds: float, error: BaseException | None) -> None:
        # not what the end of a worker raises in its handlers; and a series that begins at 0 has a first increase
        failed = int(isinstance(error, Exception))
        self._tell(job, "relay_job_runs_failed", failed, relay_job_run_seconds=seconds)


class _Live(Collector):
    """Whatever registry the recorder has now."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def describe(self) -> Iterable[Metric]:
        return self._recorder.registry.collect()

    def collect(self) -> Iterable[Metric]:
        return self._recorder.registry.collect()
