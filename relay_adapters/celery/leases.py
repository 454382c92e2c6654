"""The leases of a process's Celery messages: kept by a thread, so that no pool and no task can hold them up."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref

from relay_core import Broker, Job, Verdict
from relay_core.errors import RelayError

logger = logging.getLogger("relay.celery")


class Leases:
    """Delivery tag -> job, for all channels over one broker, closed ones included: their tasks may still run."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        """A child of a fork holds nothing: its parent does."""
        self._jobs: dict[str, Job] = {}
        self._lost: set[str] = set()
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    def add(self, tag: str, job: Job) -> None:
        with self._lock:
            if self._pid != os.getpid():
                self._forget()
            self._jobs[tag] = job
            if self._thread is None:
                self._thread = threading.Thread(target=_beat, args=(weakref.ref(self),), daemon=True)
                self._thread.name = "relay-celery-heartbeat"
                self._thread.start()

    def pop(self, tag: str) -> Job | None:
        """The job of a tag, which is no longer extended; None where it ended before."""
        with self._lock:
            return self._jobs.pop(tag, None)

    def extend(self) -> None:
        """Extend all leases. A lease that was lost is not extended again; the ack of its task says so."""
        with self._lock:
            held = [(tag, job) for tag, job in self._jobs.items() if tag not in self._lost]
        if not held:
            return
        for (tag, job), verdict in zip(held, self.broker.extend([job for _tag, job in held]), strict=True):
            if verdict is Verdict.LOST and tag in self._jobs:
                self._lost.add(tag)
                logger.warning("message %s of queue %r: its lease was lost while it was held", job.id, job.queue)


def _beat(leases: weakref.ref[Leases]) -> None:
    me = threading.current_thread()
    while True:
        alive = leases()
        if alive is None or alive._thread is not me:
            return
        pause = alive.broker.settings.lease / 3
        del alive
        time.sleep(pause)
        alive = leases()
        if alive is not None:
            try:
                alive.extend()
            except RelayError as error:
                logger.warning("leases could not be extended, next try in %.1f s: %s", pause, error)
        del alive


_all: dict[int, Leases] = {}
_all_lock = threading.Lock()


def leases_of(broker: Broker) -> Leases:
    """The leases over a broker, which lives as long as its process."""
    with _all_lock:
        return _all.setdefault(id(broker), Leases(broker))
