"""One node of a cluster is away: what runs of queues on the others keeps its lease, and starts nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import dramatiq
import pytest
from dramatiq.errors import ConnectionClosed

from relay_adapters.dramatiq import RelayBroker
from relay_core import Broker, Job
from relay_core.keys import queue_keys
from relay_core.worker import Worker
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines
from tests.dramatiq_workers import running
from tests.servers import eventually
from tests.topologies import Cluster

LEASE = 3.0
"""Less than for what a command is repeated, so that a heartbeat that waits for one node comes too late for others."""


@pytest.fixture
def parted() -> Iterator[Cluster]:
    """A cluster that goes on without a node that nobody replaces."""
    options = {"cluster-require-full-coverage": "no", "cluster-replica-no-failover": "yes"}
    with Cluster(options=options) as cluster:
        yield cluster


@pytest.fixture
def queues(parted: Cluster) -> tuple[str, str]:
    """Two of different nodes."""
    first = "q0"
    node = parted.primary_of(parted.slot_of(queue_keys("relay", first).marker))
    others = (f"q{n}" for n in range(1, 100))
    keys = {queue: queue_keys("relay", queue).marker for queue in others}
    return first, next(queue for queue, key in keys.items() if parted.primary_of(parted.slot_of(key)) is not node)


def lose_node_of(cluster: Cluster, gone: str, alive: str) -> None:
    """Kill it, and see for some leases that nobody else is given what runs of the other queue."""
    cluster.kill_primary_of(cluster.slot_of(queue_keys("relay", gone).marker))
    with Broker(cluster.url, lease=LEASE) as rival:
        assert not rival.claim(alive, wait=2.5 * LEASE)
        assert rival.stats(alive).inflight == 1


def test_a_workers_leases_outlive_another_node(parted: Cluster, queues: tuple[str, str]) -> None:
    started, go = threading.Semaphore(0), threading.Event()

    def hold(job: Job) -> None:
        started.release()
        go.wait(60)

    with Broker(parted.url, lease=LEASE) as broker:
        for queue in queues:
            broker.enqueue(queue, b"1")
        worker = Worker(broker, hold, queues, concurrency=2)
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        try:
            assert all(started.acquire(timeout=30) for _ in queues)
            lose_node_of(parted, *queues)
            go.set()
            eventually(lambda: broker.stats(queues[1]).inflight == 0, "the ack")
        finally:
            go.set()
            worker.stop()
            thread.join(60)


def test_dramatiqs_leases_outlive_another_node(parted: Cluster, queues: tuple[str, str]) -> None:
    started, go = threading.Semaphore(0), threading.Event()
    broker = RelayBroker(url=parted.url, lease=LEASE, middleware=[])

    def hold() -> None:
        started.release()
        go.wait(60)

    actors = [dramatiq.actor(hold, broker=broker, actor_name=queue, queue_name=queue) for queue in queues]
    with running(broker):
        try:
            for actor in actors:
                actor.send()
            assert all(started.acquire(timeout=30) for _ in queues)
            lose_node_of(parted, *queues)
        finally:
            go.set()
    with suppress(ConnectionClosed):  # of the ack that the lost node is owed, unless a thread is just at it
        broker.close()


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_celerys_leases_outlive_another_node(
    parted: Cluster, queues: tuple[str, str], tmp_path: Path, pool: str
) -> None:
    with ExitStack() as stack:
        client = client_of(parted.url, tmp_path)
        stack.callback(client.close)
        flags = (*POOLS[pool], "-Q", ",".join(queues))
        stack.enter_context(CeleryWorker(parted.url, tmp_path, *flags, options={"lease": LEASE, "retry_for": 10.0}))
        # under gevent it is kept from its heartbeat, and a thread beside it steps in
        for queue, task in zip(queues, ("hold", "hold" if pool == "prefork" else "spin"), strict=True):
            client.send_task(f"tests.celery_app.{task}", (queue, "go"), queue=queue)
            eventually(lambda queue=queue: lines(tmp_path, "started", queue), f"{task} runs")
        lose_node_of(parted, *queues)
        (tmp_path / "go").touch()
