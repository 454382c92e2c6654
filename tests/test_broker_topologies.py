"""Jobs go through every kind of store, and no acknowledged one is lost when its primary goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker
from relay_core.keys import queue_keys
from tests.servers import AclServer, Flavour, Server, TlsServer
from tests.topologies import Cluster, SentinelTrio

JOBS = 20


class _Blocking:
    """An AsyncBroker on an event loop of its own, called as a Broker is."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._broker = AsyncBroker(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Awaitable[Any]] = getattr(self._broker, name)

        async def call(*args: Any, **options: Any) -> Any:
            return await method(*args, **options)

        return lambda *args, **options: self._loop.run_until_complete(call(*args, **options))

    def close(self) -> None:
        self._loop.run_until_complete(self._broker.close())
        self._loop.close()


@pytest.fixture(params=[Broker, _Blocking], ids=["sync", "async"])
def broker_at(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """`broker_at(url)` opens a broker, blocking or asyncio, and closes it after the test."""
    opened: list[Any] = []

    def open_at(url: str, **options: Any) -> Any:
        opened.append(request.param(url, retry_for=30.0, **options))
        return opened[-1]

    yield open_at
    for broker in opened:
        broker.close()


def serve(broker: Any, queue: str, count: int = JOBS) -> None:
    """Enqueue jobs, claim and ack them all, and find the queue empty."""
    ids = {broker.enqueue(queue, b"payload %d" % i).id for i in range(count)}
    done: set[str] = set()
    while jobs := broker.claim(queue, count=7):
        broker.ack_many(jobs)
        done |= {job.id for job in jobs}
    assert done == ids
    assert not broker.claim(queue, wait=0.02)


@pytest.mark.parametrize("fixture", ["unix_server", "tcp_server", "tls_server", "mutual_tls_server", "acl_server"])
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_jobs_go_through_every_way_to_one_server(
    fixture: str, flavour: Flavour, request: pytest.FixtureRequest, broker_at: Callable[..., Any]
) -> None:
    server: Server | TlsServer | AclServer = request.getfixturevalue(fixture)
    serve(broker_at(server.url), "work")


@pytest.mark.slow
def test_jobs_go_through_a_primary_that_sentinels_name_and_through_its_failover(
    sentinel_trio: SentinelTrio, broker_at: Callable[..., Any]
) -> None:
    broker = broker_at(sentinel_trio.url, durability="replica:1", durability_timeout=10.0)
    serve(broker, "before")
    before = {broker.enqueue("work", b"before").id for _ in range(JOBS)}
    old = sentinel_trio.kill_primary()
    with ThreadPoolExecutor(1) as other:
        promoted = other.submit(sentinel_trio.wait_for_primary, old)
        # With its only replica promoted there is nobody left to confirm.
        plain = broker_at(sentinel_trio.url)
        meanwhile = {plain.enqueue("work", b"meanwhile").id for _ in range(JOBS)}
        assert promoted.result() is not old
    done: set[str] = set()
    while jobs := plain.claim("work", count=7):
        plain.ack_many(jobs)
        done |= {job.id for job in jobs}
    assert done == before | meanwhile


@pytest.mark.slow
def test_jobs_go_through_a_cluster_that_loses_a_primary(cluster: Cluster, broker_at: Callable[..., Any]) -> None:
    broker = broker_at(cluster.url, durability="replica:1", durability_timeout=10.0)
    queues = [f"work{i}" for i in range(12)]
    for queue in queues:
        serve(broker, queue, 3)
    before = {broker.enqueue(queue, b"before").id for queue in queues}
    dead = cluster.kill_primary_of(cluster.slot_of(queue_keys("relay", "work0").jobs))
    with ThreadPoolExecutor(1) as other:
        replaced = other.submit(cluster.wait_until_replaced, dead)
        plain = broker_at(cluster.url)
        meanwhile = {plain.enqueue(queue, b"meanwhile").id for queue in queues}
        replaced.result()
    done: set[str] = set()
    while jobs := plain.claim(queues, count=7):
        plain.ack_many(jobs)
        done |= {job.id for job in jobs}
    assert done == before | meanwhile
