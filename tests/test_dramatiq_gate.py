"""A suspect under RelayConsumer, by hand: what it waits for, for how long, and who waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest

import relay_core
from relay_adapters.dramatiq import RelayBroker
from tests.servers import Flavour, Server, eventually

QUEUES = ("here", "there")


@pytest.fixture
def flavour() -> Flavour:
    """One server is enough: what is tested is on this side of it."""
    return "valkey"


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = RelayBroker(url=server.url, lease=1.0, max_deliveries=2)
    dramatiq.set_broker(broker)
    for queue in QUEUES:
        broker.declare_queue(queue)
    yield broker
    broker.close()


def send(broker: RelayBroker, queue: str, *keys: str) -> None:
    for key in keys:
        broker.enqueue(dramatiq.Message(queue, "any", (key,), {}, {}))


def left_by_a_dead_worker(broker: RelayBroker, server: Server, queue: str, *keys: str) -> None:
    """Messages at the head of the queue that a process took and never answered."""
    send(broker, queue, *keys)
    with relay_core.Broker(server.url, lease=0.1) as other:
        assert len(other.claim(queue, count=len(keys))) == len(keys)
        eventually(lambda: other.reap(queue) or other.stats(queue).ready == len(keys), "the leases to end")


def key_of(message: Any) -> Any:
    return message.args[0]


def test_a_suspect_waits_for_what_is_held_and_is_given_out_alone(broker: RelayBroker, server: Server) -> None:
    send(broker, "there", "t0", "t1", "t2")
    there = broker.consume("there", prefetch=3, timeout=50)
    running = next(there)
    left_by_a_dead_worker(broker, server, "here", "s0", "s1")
    send(broker, "here", "h0")
    here = broker.consume("here", prefetch=3, timeout=50)
    assert next(here) is None, "something else is held"
    stats = broker.core.stats("here")
    assert (stats.inflight, stats.ready) == (1, 2), "what was claimed beside it went back"
    assert next(there) is None, "a buffer was given out beside it"
    assert broker.core.stats("there").ready == 2
    there.ack(running)
    suspect = next(here)
    assert key_of(suspect) in ("s0", "s1")
    assert next(there) is None
    assert next(here) is None
    here.ack(suspect)
    second = next(here)
    assert {key_of(suspect), key_of(second)} == {"s0", "s1"}, "the other suspect has its turn"
    here.ack(second)
    assert key_of(next(here)) == "h0"
    assert key_of(next(there)) == "t1"
    for consumer in (here, there):
        consumer.close()


def test_a_suspect_waits_for_a_lease_at_most(broker: RelayBroker, server: Server) -> None:
    send(broker, "there", "long")
    there = broker.consume("there", timeout=50)
    running = next(there)
    left_by_a_dead_worker(broker, server, "here", "s0")
    here = broker.consume("here", timeout=50)
    started = time.monotonic()
    while (suspect := next(here)) is None:
        pass
    assert time.monotonic() - started >= broker.core.settings.lease - 0.1
    assert suspect.lease.holds(), "heartbeats keep it meanwhile"
    send(broker, "there", "next")
    there.ack(running)
    assert next(there) is None, "nothing more is claimed beside it"
    here.ack(suspect)
    assert key_of(next(there)) == "next"
    for consumer in (here, there):
        consumer.close()


def test_a_suspect_that_waits_goes_back_uncounted_when_its_consumer_closes(broker: RelayBroker, server: Server) -> None:
    send(broker, "there", "t0", "t1")
    there = broker.consume("there", prefetch=1, timeout=50)
    running = next(there)
    left_by_a_dead_worker(broker, server, "here", "s0")
    here = broker.consume("here", timeout=50)
    assert next(here) is None
    assert broker.core.stats("here").inflight == 1
    here.close()
    [job] = broker.core.jobs("here", "ready")
    assert job.deliveries == 1
    there.ack(running)
    assert key_of(next(there)) == "t1", "the gate is open"
    there.close()


def test_a_suspect_that_waits_goes_back_uncounted_when_its_worker_ends(broker: RelayBroker, server: Server) -> None:
    started, let_go = threading.Event(), threading.Event()

    @dramatiq.actor(actor_name="any", broker=broker, queue_name="there")
    def long(key: str) -> None:
        started.set()
        let_go.wait(60)

    left_by_a_dead_worker(broker, server, "here", "s0")
    broker.core.pause("here")
    send(broker, "there", "t0")
    worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
    worker.start()
    assert started.wait(30)
    broker.core.resume("here")
    eventually(lambda: broker.core.stats("here").inflight == 1, "the suspect to be claimed")
    stop = threading.Thread(target=worker.stop)
    stop.start()
    try:
        eventually(lambda: broker.core.stats("here").ready == 1, "the suspect to be handed back")
        assert stop.is_alive()
        [job] = broker.core.jobs("here", "ready")
        assert job.deliveries == 1
    finally:
        let_go.set()
        stop.join(30)
