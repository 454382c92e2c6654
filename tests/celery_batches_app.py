"""For a worker's `--include`: a task with a strategy of its own, which runs messages by twos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Task
from celery.utils.imports import symbol_by_name
from celery.worker.request import create_request_cls
from celery.worker.strategy import hybrid_to_proto2, proto1_to_proto2

from tests.celery_app import app, note, wait_for


class Batches(Task):  # type: ignore[misc]
    """Celery hears of its runs neither that they start nor that they end."""

    abstract = True

    def Strategy(self, task: Any, app: Any, consumer: Any) -> Callable[..., None]:
        make = create_request_cls(
            symbol_by_name(self.Request), task, consumer.pool, consumer.hostname, consumer.event_dispatcher, app=app
        )
        waiting: list[Any] = []

        def handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
            if "args" in message.payload:
                body, headers, decoded, utc = hybrid_to_proto2(message, message.payload)
            elif body is None:
                body, headers, decoded, utc = message.body, message.headers, False, True
            else:
                body, headers, decoded, utc = proto1_to_proto2(message, body)
            waiting.append(
                make(message, on_ack=ack, on_reject=reject, body=body, headers=headers, decoded=decoded,
                     utc=utc, app=app, hostname=consumer.hostname, eventer=consumer.event_dispatcher, task=task,
                     connection_errors=consumer.connection_errors)
            )  # fmt: skip
            if len(waiting) == 2:
                requests = [waiting.pop(), waiting.pop()]
                keys = [request.args[0] for request in requests]
                consumer.pool.apply_async(run, (keys,), callback=lambda _: [one.acknowledge() for one in requests])

        return handle


def run(keys: list[str]) -> None:
    """Runs until the test makes a file."""
    for key in keys:
        note(key, "started")
    wait_for("go")
    for key in keys:
        note(key)


@app.task(base=Batches, acks_late=True)
def batch(key: str) -> None:
    """One of the messages."""
