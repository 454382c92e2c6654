"""A Celery app on `relay://`, its worker on a thread, and kombu for the consumer driven by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.exceptions import Reject
from celery.worker import state
from kombu import pools

from relay_core import Broker
from tests.faces.face import QUEUE, Face, Failed, Handler, Rejected, Run, Taker, Terms


class CeleryFace(Face):
    name = "celery"
    lacks: ClassVar[Mapping[str, str]] = {
        "dedup answer": "`apply_async` answers with the id that Celery made, whether the task was stored or not"
    }
    # Celery's own retries end in a failure that is not acked, and of relay's, which come then, there are none
    failed = "max_retries"
    rejected = "rejected"

    def __init__(self, url: str, terms: Terms) -> None:
        super().__init__(url, terms)
        self.app = Celery("faces", broker=url, set_as_current=False)
        self.app.conf.update(
            broker_transport_options={
                "lease": terms.lease,
                "max_deliveries": terms.max_deliveries,
                "retry": {"base": terms.backoff, "max_retries": 0},
            },
            task_default_queue=QUEUE,
            task_acks_late=True,
            task_acks_on_failure_or_timeout=False,
            task_ignore_result=True,
            worker_prefetch_multiplier=1,
            worker_hijack_root_logger=False,
            worker_enable_remote_control=False,
        )
        self.handler: Handler

        @self.app.task(
            bind=True, name="run", max_retries=terms.retries, default_retry_delay=terms.backoff, shared=False
        )
        def run(task: Any, body: str) -> None:
            try:
                self.handler(Run(body, task.request.id, task.request.retries))
            except Failed as error:
                raise task.retry(exc=error) from error
            except Rejected as error:
                raise Reject(error, requeue=False) from error

        self.run = run

    def send(self, body: str, *, delay: float | None = None, priority: int = 0) -> None:
        self.run.apply_async((body,), countdown=delay, priority=priority)

    def send_once(self, body: str, key: str) -> str:
        self.run.apply_async((body,), relay_dedup_key=key)
        return ""

    def send_garbage(self) -> None:
        with Broker(self.url) as broker:
            broker.enqueue(QUEUE, b"\xff no message")

    @contextmanager
    def working(self, handler: Handler, concurrency: int = 1) -> Iterator[None]:
        self.handler = handler
        pool = "solo" if concurrency == 1 else "threads"
        with start_worker(
            self.app,
            pool=pool,
            concurrency=concurrency,
            perform_ping_check=False,
            shutdown_timeout=30,
            loglevel="ERROR",
        ):
            yield
            self._end_the_sleep_of_the_loop()

    def _end_the_sleep_of_the_loop(self) -> None:
        """What a signal does to a worker process: its loop sees at once that it has to stop."""
        state.should_terminate = 0
        with Broker(self.url) as broker:
            broker.store.raw("ZADD", broker.settings.keys(QUEUE).marker, 0, "w")

    def taker(self) -> Taker:
        return CeleryTaker(self.app)

    def waiting(self) -> int:
        with self.app.connection_for_read() as connection, Broker(self.url) as broker:
            declared = connection.default_channel.queue_declare(QUEUE, passive=True)
            return int(declared.message_count) + broker.stats(QUEUE).delayed

    def purge(self) -> None:
        self.app.control.purge()

    def close(self) -> None:
        self.app.close()
        # kombu's pools are the process's, and remember for a store that is emptied now which queues it has
        pools.reset()


class CeleryTaker(Taker):
    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection = app.connection_for_read()
        self._channel = self._connection.channel()
        self._message: Any = None

    def take(self, seconds: float) -> str | None:
        queue = self._app.amqp.queues[QUEUE].bind(self._channel)
        deadline = time.monotonic() + seconds
        while (message := queue.get()) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)  # AMQP's get does not wait
        self._message = message
        args, _kwargs, _embedded = message.payload
        return str(args[0])

    def ack(self) -> str:
        self._message.ack()
        return ""

    def hand_back(self) -> None:
        """A channel that closes gives back what is not acked."""
        self._channel.close()
        self._channel = self._connection.channel()

    def close(self) -> None:
        self._connection.close()
