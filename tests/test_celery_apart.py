"""A suspect under kombu's consumers, by hand: what it waits for, for how long, and who waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kombu import Connection, Consumer, Queue

from relay_core import Broker
from tests.celery_workers import CeleryWorker, client_of, lines
from tests.servers import Server, eventually

LEASE = 1.0


@pytest.fixture
def server() -> Iterator[Server]:
    """One of its own, since the adapter's connection stays open for as long as this process lives."""
    with Server("redis") as server:
        yield server


class Site:
    """A connection, and a broker that looks at the store."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.broker = Broker(server.url)
        options = {"lease": LEASE, "max_deliveries": 2, "prefix": "relay"}
        self.connection = Connection(server.url.replace("redis", "relay", 1), transport_options=options)
        self.got: list[tuple[str, object]] = []

    def send(self, queue: str, *keys: str) -> None:
        with self.connection.Producer() as producer:
            for key in keys:
                producer.publish(key, routing_key=queue, declare=[Queue(queue, routing_key=queue)])

    def left_by_a_dead_worker(self, queue: str, *keys: str) -> None:
        """Messages at the head of the queue that a process took and never answered."""
        self.send(queue, *keys)
        with Broker(self.server.url, lease=0.1) as other:
            assert len(other.claim(queue, count=len(keys))) == len(keys)
            eventually(lambda: not other.reap(queue) and other.stats(queue).inflight == 0, "the leases to end")

    def consume(self, queue: str, prefetch: int) -> Consumer:
        consumer = Consumer(
            self.connection.channel(),
            [Queue(queue, routing_key=queue)],
            callbacks=[lambda body, message: self.got.append((body, message))],
            prefetch_count=prefetch,
        )
        consumer.consume()
        return consumer

    def drained(self, seconds: float = 0.3) -> list[str]:
        """What arrives within that time."""
        before, ends = len(self.got), time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            with suppress(TimeoutError):
                self.connection.drain_events(timeout=left)
        return [body for body, _message in self.got[before:]]

    def ack(self, key: str) -> None:
        dict(self.got)[key].ack()  # type: ignore[attr-defined]


@pytest.fixture
def site(server: Server) -> Iterator[Site]:
    site = Site(server)
    yield site
    site.connection.close()
    site.broker.close()


def test_a_suspect_is_delivered_alone_and_the_others_come_after_it(site: Site) -> None:
    site.left_by_a_dead_worker("q", "s0", "s1")
    site.send("q", "h0", "h1")
    site.consume("q", prefetch=10)
    [first] = site.drained()
    assert first in ("s0", "s1")
    assert (site.broker.stats("q").ready, site.broker.stats("q").inflight) == (3, 1)
    site.ack(first)
    [second] = site.drained()
    assert {first, second} == {"s0", "s1"}
    site.ack(second)
    assert site.drained() == ["h0", "h1"]


def test_a_suspect_waits_for_what_was_delivered_before_it(site: Site) -> None:
    site.send("there", "t0")
    site.consume("there", prefetch=1)
    assert site.drained() == ["t0"]
    site.left_by_a_dead_worker("q", "s0")
    site.consume("q", prefetch=1)
    assert site.drained() == []
    assert site.broker.stats("q").inflight == 1
    site.send("there", "t1")
    site.ack("t0")
    assert site.drained() == ["s0"], "nothing else is held now"
    site.ack("s0")
    assert site.drained() == ["t1"]


def test_a_suspect_waits_for_a_lease_at_most(site: Site) -> None:
    site.send("there", "long")
    site.consume("there", prefetch=1)
    assert site.drained() == ["long"]
    site.left_by_a_dead_worker("q", "s0")
    site.consume("q", prefetch=1)
    eventually(lambda: site.drained(), "the suspect")
    assert site.got[-1][0] == "s0"
    site.send("there", "next")
    site.ack("long")
    assert site.drained() == [], "something is claimed beside it"
    site.ack("s0")
    assert site.drained() == ["next"]
    assert (site.broker.stats("q").pending, site.broker.stats("q").dead) == (0, 0)


def test_a_gevent_worker_runs_a_suspect_alone(server: Server, tmp_path: Path) -> None:
    app = client_of(server.url, tmp_path)

    def send(queue: str, name: str, *args: str) -> None:
        app.send_task(f"tests.celery_app.{name}", args, queue=queue)

    def started() -> list[str]:
        return [line.split()[0] for line in lines(tmp_path, "started")]

    with Broker(server.url) as broker:
        send("risky", "hold", "suspect", "end-suspect")
        with Broker(server.url, lease=0.1) as dying:
            assert dying.claim("risky")
            eventually(lambda: dying.reap("risky"), "the lease to end")
        broker.pause("risky")
        flags = ("-P", "gevent", "-c", "4", "-Q", "safe,risky")
        with CeleryWorker(server.url, tmp_path, *flags, options={"lease": 30.0, "max_deliveries": 2}) as worker:
            send("safe", "hold", "busy", "end-busy")
            eventually(lambda: started() == ["busy"], "a task to run")
            broker.resume("risky")
            eventually(lambda: broker.stats("risky").inflight, "the suspect to be fetched")
            for n in range(3):
                send("safe", "late", f"other-{n}")
            assert app.control.ping(timeout=20, limit=1), "its answer is another turn of the worker"
            assert started() == ["busy"]
            (tmp_path / "end-busy").touch()
            eventually(lambda: started() == ["busy", "suspect"], "the suspect to run")
            assert app.control.ping(timeout=20, limit=1)
            assert (broker.stats("safe").ready, broker.stats("safe").inflight) == (3, 0)
            (tmp_path / "end-suspect").touch()
            eventually(lambda: not broker.stats("safe").pending + broker.stats("risky").pending, "all to be done")
            assert worker.process.poll() is None
        assert sorted(line.split()[0] for line in lines(tmp_path)) == [
            "busy",
            "other-0",
            "other-1",
            "other-2",
            "suspect",
        ]
    app.close()
