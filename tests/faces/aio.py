"""The AsyncBroker, driven on an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, TypeVar

from relay_core import AsyncBroker, Job
from relay_core.errors import LeaseLost, Unavailable
from tests.faces.direct import policy, run_of, spoil
from tests.faces.face import QUEUE, Face, Failed, Handler, Rejected, Taker, Terms

T = TypeVar("T")


class Loop:
    """An event loop on a thread, for callers that block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


class AsyncFace(Face):
    name = "async"
    lacks: ClassVar[Mapping[str, str]] = {
        "heartbeat": "an AsyncBroker is a client without a worker: who runs long jobs on it calls `extend`"
    }
    failed = "max_retries"
    rejected = "rejected"
    tells_lost = "LeaseLost"

    def __init__(self, url: str, terms: Terms) -> None:
        super().__init__(url, terms)
        self.loop = Loop()
        self.broker = AsyncBroker(url, lease=terms.lease, max_deliveries=terms.max_deliveries, retry=policy(terms))

    def send(self, body: str, *, delay: float | None = None, priority: int = 0) -> None:
        self.loop.run(self.broker.enqueue(QUEUE, body.encode(), delay=delay, priority=priority))

    def send_once(self, body: str, key: str) -> str:
        return self.loop.run(self.broker.enqueue(QUEUE, body.encode(), dedup_key=key)).id

    def send_garbage(self) -> None:
        async def send() -> None:
            stored = await self.broker.enqueue(QUEUE, b"")
            await self.broker.store.raw(*spoil(self.broker, stored.id))

        self.loop.run(send())

    @contextmanager
    def working(self, handler: Handler, concurrency: int = 1) -> Iterator[None]:
        stopping = threading.Event()

        async def work() -> None:
            while not stopping.is_set():
                with suppress(Unavailable, LeaseLost):
                    for job in await self.broker.claim(QUEUE, wait=0.2):
                        await self._handle(handler, job)

        async def all_work() -> None:
            await asyncio.gather(*(work() for _ in range(concurrency)))

        thread = threading.Thread(target=self.loop.run, args=(all_work(),))
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(30)
            assert not thread.is_alive()

    async def _handle(self, handler: Handler, job: Job) -> None:
        try:
            await asyncio.to_thread(handler, run_of(job))
        except Rejected as error:
            await self.broker.nack(job, error, dead=True, reason="rejected")
        except Failed as error:
            await self.broker.nack(job, error)
        else:
            await self.broker.ack(job)

    def taker(self) -> Taker:
        return AsyncTaker(self)

    def waiting(self) -> int:
        stats = self.loop.run(self.broker.stats(QUEUE))
        return stats.ready + stats.delayed

    def purge(self) -> None:
        self.loop.run(self.broker.purge(QUEUE))

    def pause(self) -> None:
        self.loop.run(self.broker.pause(QUEUE))

    def resume(self) -> None:
        self.loop.run(self.broker.resume(QUEUE))

    def close(self) -> None:
        self.loop.run(self.broker.close())
        self.loop.close()


class AsyncTaker(Taker):
    def __init__(self, face: AsyncFace) -> None:
        self._run = face.loop.run
        self._broker = face.broker
        self._job: Job

    def take(self, seconds: float) -> str | None:
        for job in self._run(self._broker.claim(QUEUE, wait=seconds)):
            self._job = job
            return job.payload.decode()
        return None

    def ack(self) -> str:
        try:
            self._run(self._broker.ack(self._job))
        except LeaseLost as error:
            return type(error).__name__
        return ""

    def hand_back(self) -> None:
        self._run(self._broker.release(self._job))

    def close(self) -> None:
        """The connections are the face's."""
