"""The blocking Broker, and relay's own Worker over it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from relay_core import Broker, Job, RetryPolicy
from relay_core.broker_base import BrokerBase
from relay_core.errors import LeaseLost
from relay_core.worker import Reject, Worker
from tests.faces.face import QUEUE, Face, Handler, Rejected, Run, Taker, Terms

GARBAGE = b"a record of no known form"


def policy(terms: Terms) -> RetryPolicy:
    return RetryPolicy(base=terms.backoff, jitter=False, max_retries=terms.retries)


def run_of(job: Job) -> Run:
    return Run(job.payload.decode(), job.id, job.retries)


def spoil(broker: BrokerBase, id: str) -> tuple[object, ...]:
    """The command that makes a stored job's record undecodable; any bytes are a good payload."""
    return ("HSET", broker.settings.keys(QUEUE).jobs, id, GARBAGE)


class SyncFace(Face):
    name = "sync"
    failed = "max_retries"
    rejected = "rejected"
    tells_lost = "LeaseLost"

    def __init__(self, url: str, terms: Terms) -> None:
        super().__init__(url, terms)
        self.broker = Broker(url, lease=terms.lease, max_deliveries=terms.max_deliveries, retry=policy(terms))

    def send(self, body: str, *, delay: float | None = None, priority: int = 0) -> None:
        self.broker.enqueue(QUEUE, body.encode(), delay=delay, priority=priority)

    def send_once(self, body: str, key: str) -> str:
        return self.broker.enqueue(QUEUE, body.encode(), dedup_key=key).id

    def send_garbage(self) -> None:
        self.broker.store.raw(*spoil(self.broker, self.broker.enqueue(QUEUE, b"").id))

    @contextmanager
    def working(self, handler: Handler, concurrency: int = 1) -> Iterator[None]:
        def handle(job: Job) -> None:
            try:
                handler(run_of(job))
            except Rejected as error:
                raise Reject(str(error)) from error

        worker = Worker(self.broker, handle, [QUEUE], concurrency=concurrency)
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            yield
        finally:
            worker.stop()
            thread.join(30)
            assert not thread.is_alive()

    def taker(self) -> Taker:
        return SyncTaker(self.broker)

    def waiting(self) -> int:
        stats = self.broker.stats(QUEUE)
        return stats.ready + stats.delayed

    def purge(self) -> None:
        self.broker.purge(QUEUE)

    def pause(self) -> None:
        self.broker.pause(QUEUE)

    def resume(self) -> None:
        self.broker.resume(QUEUE)

    def close(self) -> None:
        self.broker.close()


class SyncTaker(Taker):
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._job: Job

    def take(self, seconds: float) -> str | None:
        for job in self._broker.claim(QUEUE, wait=seconds):
            self._job = job
            return job.payload.decode()
        return None

    def ack(self) -> str:
        try:
            self._broker.ack(self._job)
        except LeaseLost as error:
            return type(error).__name__
        return ""

    def hand_back(self) -> None:
        self._broker.release(self._job)

    def close(self) -> None:
        """The connections are the face's."""
