"""The jobs that a worker holds leases of, and the thread that keeps them."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from relay_core.broker import Broker
from relay_core.commands import Verdict
from relay_core.errors import RelayError
from relay_core.job import Job
from relay_core.keeping import Keeper

logger = logging.getLogger("relay.worker")


@dataclass(slots=True)
class Hold:
    """A leased job.

    :ivar expires_at: monotonic clock of this process at which the lease ends, unless it is extended again
    """

    job: Job
    expires_at: float
    started: bool = False


class Held:
    """Thread-safe table of leased jobs. A job is started by one thread only, and never after its lease."""

    def __init__(self) -> None:
        self._holds: dict[str, Hold] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, job: Job) -> None:
        with self._lock:
            self._holds[job.token + job.id] = Hold(job, job.expires_at)

    def start(self, job: Job) -> bool:
        """True when the job may be started now; False when its lease is over or it was let go."""
        with self._lock:
            hold = self._holds.get(job.token + job.id)
            if hold is None:
                return False
            if time.monotonic() >= hold.expires_at:
                del self._holds[job.token + job.id]
                return False
            hold.started = True
            return True

    def drop(self, job: Job) -> bool:
        """Forget a job that ended; False when it was let go before."""
        with self._lock:
            return self._holds.pop(job.token + job.id, None) is not None

    def holds(self, job: Job) -> bool:
        return job.token + job.id in self._holds

    def take_all(self, *, started: bool, but: Job | None = None) -> list[Job]:
        """Let go of the jobs that were not started (`started` True: of all), to release them; keep `but`."""
        with self._lock:
            gone = [h.job for h in self._holds.values() if (started or not h.started) and h.job is not but]
            for job in gone:
                del self._holds[job.token + job.id]
            return gone

    def all(self) -> list[Job]:
        with self._lock:
            return [hold.job for hold in self._holds.values()]

    def extended(self, job: Job, expires_at: float) -> None:
        with self._lock:
            if hold := self._holds.get(job.token + job.id):
                hold.expires_at = expires_at


class Heartbeat(threading.Thread):
    """Extends all held leases every third of a lease, prefetched jobs too, whatever the handlers do."""

    def __init__(self, broker: Broker, held: Held) -> None:
        super().__init__(name="relay-heartbeat", daemon=True)
        self._broker = broker
        self._held = held
        self._keeper = Keeper(broker)
        self._stopping = threading.Event()

    def run(self) -> None:
        failed: RelayError | None = None
        while not self._stopping.wait(pause := self._keeper.pause(failed is not None)):
            before, failed = failed, None
            try:
                failed = self.beat()
            except RelayError as error:
                failed = error
            except Exception:  # whatever it was, such as a MemoryError: the leases must be kept
                logger.exception("heartbeat failed, will try again in %.1f s", pause)
            if failed is not None:
                level = logging.DEBUG if before is not None else logging.WARNING
                logger.log(level, "not all leases could be extended, will try again soon: %s", failed)
        self._keeper.close()

    def beat(self) -> RelayError | None:
        """Extend all leases now. A job whose lease was lost is let go: if it runs, its ack will say so.

        The first error where some could not be extended, and None where all were.
        """
        jobs = self._held.all()
        failed: RelayError | None = None
        sent = time.monotonic()
        for job, verdict in zip(jobs, self._keeper.extend(jobs), strict=True):
            if isinstance(verdict, RelayError):
                failed = failed or verdict
            elif verdict is Verdict.LOST:
                if self._held.drop(job):  # else it was acked, nacked or handed back meanwhile
                    self._broker.operations.tell_lost(job, "extend")
                    logger.warning("job %s of queue %r: its lease was lost while it was held here", job.id, job.queue)
            else:
                self._held.extended(job, sent + self._broker.settings.lease)
        return failed

    def stop(self) -> None:
        self._stopping.set()
