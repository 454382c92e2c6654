"""A RelayBroker under Dramatiq's own Worker and default middleware."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import dramatiq
from dramatiq.middleware import CurrentMessage

from relay_adapters.dramatiq import RelayBroker
from tests.dramatiq_workers import running
from tests.faces.face import QUEUE, Face, Handler, Rejected, Run, Taker, Terms


class DramatiqFace(Face):
    name = "dramatiq"
    lacks: ClassVar[Mapping[str, str]] = {
        "dedup answer": "as it has no dedup",
        "dedup": "Dramatiq's enqueue has no word for it: every message has an id of its own",
    }
    failed = "failed"
    # `throws` is Dramatiq's word for what is not to be tried again, and fails the message
    rejected = "failed"

    def __init__(self, url: str, terms: Terms) -> None:
        super().__init__(url, terms)
        self.broker = RelayBroker(url=url, lease=terms.lease, max_deliveries=terms.max_deliveries)
        self.broker.add_middleware(CurrentMessage())
        self.handler: Handler
        backoff = int(terms.backoff * 1000)

        def run(body: str) -> None:
            message = CurrentMessage.get_current_message()
            assert message is not None
            self.handler(Run(body, message.message_id, message.options.get("retries", 0)))

        self.run = dramatiq.actor(
            run, broker=self.broker, queue_name=QUEUE, throws=Rejected,
            max_retries=terms.retries, min_backoff=backoff, max_backoff=backoff,
        )  # fmt: skip

    def send(self, body: str, *, delay: float | None = None, priority: int = 0) -> None:
        ms = None if delay is None else int(delay * 1000)
        self.run.send_with_options(args=(body,), delay=ms, broker_priority=priority)

    def send_garbage(self) -> None:
        self.broker.core.enqueue(QUEUE, b"\xff no message")

    @contextmanager
    def working(self, handler: Handler, concurrency: int = 1) -> Iterator[None]:
        self.handler = handler
        with running(self.broker, threads=concurrency):
            yield

    def taker(self) -> Taker:
        return DramatiqTaker(self.broker)

    def waiting(self) -> int:
        ready, delayed, _dead = self.broker.get_queue_message_counts(QUEUE)
        return ready + delayed

    def purge(self) -> None:
        self.broker.flush(QUEUE)

    def close(self) -> None:
        self.broker.close()


class DramatiqTaker(Taker):
    def __init__(self, broker: RelayBroker) -> None:
        self._broker = broker
        self._consumer: Any = None
        self._message: Any = None

    def take(self, seconds: float) -> str | None:
        self._consumer = self._broker.consume(QUEUE, prefetch=1, timeout=int(seconds * 1000))
        self._message = next(self._consumer)
        return None if self._message is None else str(self._message.args[0])

    def ack(self) -> str:
        self._consumer.ack(self._message)
        return ""

    def hand_back(self) -> None:
        self._consumer.requeue([self._message])

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
