"""The broker that is judged, with the few things that the tests ask of the stub broker beside Broker's own."""

from __future__ import annotations

import os
import threading
from typing import Any

from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Middleware

from relay_adapters.dramatiq import RelayBroker

PORT = int(os.environ["JUDGED_PORT"])
REDIS_URL = f"redis://127.0.0.1:{PORT}/0"

OWN = ("relay_job_id", "redis_message_id")
"""Options that a broker adds to what it is given, for itself."""


class Failures(Middleware):
    """Remembers what was dead-lettered, and of what it failed: the stub broker's `fail_fast` and `dead_letters`."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.exceptions: dict[str, list[BaseException]] = {}
        self.lock = threading.Lock()

    def before_nack(self, broker: Any, message: Any) -> None:
        # before, for a join may return as soon as the store knows
        options = {name: value for name, value in message.options.items() if name not in OWN}
        plain = Message(**{**message.asdict(), "args": message.args, "options": options})
        raised = getattr(message, "_exception", None)
        with self.lock:
            self.messages.append(plain)
            if raised is not None:
                self.exceptions.setdefault(message.queue_name, []).append(raised)


class Queue:
    """One of `stub_broker.queues`: what is ready, by hand."""

    def __init__(self, broker: RelayBroker, name: str) -> None:
        self.core, self.name = broker.core, name

    def get(self, timeout: float = 0.0) -> bytes:
        (job,) = self.core.claim(self.name, wait=timeout)
        self.core.ack(job)
        return job.payload

    def put(self, payload: bytes) -> None:
        self.core.enqueue(self.name, payload, headers={"relay_adapter": "dramatiq"})

    def qsize(self) -> int:
        return self.core.stats(self.name).ready


class Queues(set[str]):
    broker: RelayBroker

    def __getitem__(self, name: str) -> Queue:
        return Queue(self.broker, name)


class Extras:
    """Mixed into the broker that is judged."""

    middleware: list[Any]

    @property
    def failures(self) -> Failures:
        found = [one for one in self.middleware if isinstance(one, Failures)]
        if not found:
            found.append(Failures())
            self.middleware.append(found[0])
        return found[0]

    @property
    def dead_letters(self) -> list[Any]:
        return self.failures.messages

    def join(self, queue_name: str, *, fail_fast: bool = True, **options: Any) -> None:
        failures = self.failures
        super().join(queue_name, **options)  # type: ignore[misc]
        with failures.lock:
            raised = failures.exceptions.pop(queue_name, [])
        if fail_fast and raised:
            raise raised[0] from None


class JudgedRelay(Extras, RelayBroker):
    def __init__(self, **options: Any) -> None:
        super().__init__(url=f"relay://127.0.0.1:{PORT}/0", **options)
        self.queues = Queues()
        self.queues.broker = self

    def forget_all(self) -> None:
        self.core.store.raw("FLUSHALL")


class JudgedRedis(Extras, RedisBroker):
    def __init__(self, **options: Any) -> None:
        super().__init__(url=REDIS_URL, **options)

    def forget_all(self) -> None:
        self.client.flushall()


def judged(**options: Any) -> Any:
    return (JudgedRelay if os.environ["JUDGED"] == "relay" else JudgedRedis)(**options)
