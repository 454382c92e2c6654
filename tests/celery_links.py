"""Connections of kombu's to relay, as if of processes apart: each with caches, leases and sockets of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import kombu
from kombu.asynchronous import Hub

import relay_adapters.celery  # noqa: F401 - a bare kombu.Connection does not load kombu's plugins
from relay_core import Broker
from tests.servers import eventually

BOX = {"durable": False, "auto_delete": True, "expires": 10, "message_ttl": 10}
"""How Celery declares the queues of control commands, replies and events."""

_names = count()


@contextmanager
def link(url: str, **options: Any) -> Iterator[kombu.Connection]:
    """A connection that shares nothing with the others in this process: another client name, another broker."""
    options = {"client_name": f"link-{next(_names)}", "retry_for": 10.0, **options}
    with kombu.Connection(url, transport_options=options) as connection:
        yield connection


def fresh(name: str) -> str:
    """A name that no other test uses."""
    return f"{name}-{next(_names)}"


def send(connection: kombu.Connection, body: Any, exchange: str = "", key: str = "", **options: Any) -> None:
    kombu.Producer(connection.default_channel).publish(body, exchange=exchange, routing_key=key, **options)


def got(connection: kombu.Connection, queue: str) -> list[Any]:
    """The bodies of all that waits in a queue, taken out of it."""
    found = []
    while (message := connection.default_channel.basic_get(queue, no_ack=True)) is not None:
        found.append(message.payload)
    return found


class Inbox:
    """A consumer on a channel of its own that keeps what it is given."""

    def __init__(self, connection: kombu.Connection, *queues: Any, prefetch: int | None = None, **options: Any) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.bodies: list[Any] = []
        self.messages: list[Any] = []
        self.consumer = kombu.Consumer(
            self.channel, list(queues), callbacks=[self._take], prefetch_count=prefetch, **options
        )
        self.consumer.consume()

    def _take(self, body: Any, message: Any) -> None:
        self.bodies.append(body)
        self.messages.append(message)

    def wait(self, number: int, seconds: float = 20.0) -> list[Any]:
        """Drain events until so many bodies have come."""
        self.drain(lambda: len(self.bodies) >= number, seconds)
        return self.bodies

    def drain(self, until: Callable[[], bool], seconds: float) -> None:
        while not until():
            self.connection.drain_events(timeout=seconds)

    def quiet(self, seconds: float = 0.3) -> list[Any]:
        """What has come when nothing more comes for so long."""
        try:
            while True:
                self.connection.drain_events(timeout=seconds)
        except TimeoutError:
            return self.bodies


class Loop:
    """A channel under an event loop of kombu's, with a pool that always has tasks waiting."""

    def __init__(self, connection: kombu.Connection, prefetch: int) -> None:
        self.hub: Any = Hub()
        self.prefetch = prefetch
        self.channel: Any = connection.channel()
        self.queue, self.got = fresh("loop"), list[Any]()
        kombu.Queue(self.queue)(self.channel).declare()
        self.channel.basic_qos(0, prefetch, False)
        self.received: Callable[[Any], object] = lambda message: None
        """Called with each message as it is delivered, before it is among those that were got."""
        self.channel.basic_consume(self.queue, False, self._receive, fresh("tag"))
        connection.transport.register_with_event_loop(connection.connection, self.hub)
        self.watch: Any = connection.transport._watches[self.channel, "jobs"]
        self.turns = self.hub.create_loop()

    def _receive(self, message: Any) -> None:
        self.received(message)
        self.got.append(message)

    def all_done(self, engine: Broker) -> list[int]:
        """Ack what comes until the queue is empty: the bodies, in turn."""
        done: list[int] = []

        def empty() -> bool:
            while self.got:
                message = self.got.pop(0)
                done.append(message.payload)
                if not message.acknowledged:
                    message.ack()
            stats = engine.stats(self.queue)
            assert stats.inflight <= self.prefetch
            return not stats.ready + stats.inflight

        self.until(empty, "all to be done")
        return done

    def until(self, condition: Callable[[], object], what: str) -> None:
        def turned() -> object:
            self.hub.call_later(0.01, lambda: None)
            next(self.turns)
            return condition()

        eventually(turned, what)
