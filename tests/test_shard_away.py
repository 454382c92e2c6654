"""One server of a cluster is away: workers go on with the queues of the others, and with its own once it is back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from relay_core import Broker
from relay_core.keys import queue_keys
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines
from tests.servers import Server, eventually
from tests.topologies import Cluster

pytestmark = pytest.mark.slow

MAIL = b"relay:{celery}:x"
"""A key beside those of the workers' mailboxes."""


@pytest.fixture(scope="module")
def clusters() -> Iterator[Cluster]:
    """A cluster that goes on without a server that nobody replaces."""
    options = {"cluster-require-full-coverage": "no", "cluster-replica-no-failover": "yes"}
    with Cluster(options=options) as cluster:
        yield cluster


@pytest.fixture
def parted(clusters: Cluster) -> Cluster:
    clusters.reset()
    return clusters


def server_of(cluster: Cluster, key: bytes) -> Server:
    return cluster.primary_of(cluster.slot_of(key))


def queue_at(cluster: Cluster, server: Server) -> str:
    """A queue that lies there."""
    names = (f"q{n}" for n in range(1000))
    return next(name for name in names if server_of(cluster, queue_keys("relay", name).marker) is server)


def two_without_mail(cluster: Cluster) -> tuple[Server, Server]:
    """Servers that keep no mailboxes of Celery's workers."""
    first, second = (server for server in cluster.nodes[:3] if server is not server_of(cluster, MAIL))
    return first, second


def lose(server: Server, how: str) -> None:
    server.kill() if how == "killed" else server.pause()


def regain(server: Server, how: str) -> None:
    server.start() if how == "killed" else server.resume()


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent"])
def test_a_celery_worker_goes_on_without_a_server(parted: Cluster, tmp_path: Path, pool: str, how: str) -> None:
    server, other = two_without_mail(parted)
    gone, there = queue_at(parted, server), queue_at(parted, other)
    client = client_of(parted.url, tmp_path)

    def run(queue: str, key: str) -> None:
        client.send_task("tests.celery_app.run", (key,), queue=queue)
        eventually(lambda: lines(tmp_path, start=f"{key} "), f"run of {key}")

    with CeleryWorker(parted.url, tmp_path, *POOLS[pool], "-Q", f"{gone},{there}") as worker:
        run(gone, "first")
        run(there, "second")
        lose(server, how)
        try:
            for n in range(30):
                run(there, f"there-{n}")
        finally:
            regain(server, how)
        parted.wait_until_ok()
        run(gone, "again")
        assert not worker.logged("Connection to broker lost"), worker.text
        assert worker.stop() == 0
    client.close()


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("pool", ["prefork", "solo", "gevent"])
def test_a_celery_worker_goes_on_without_its_mailboxes(parted: Cluster, tmp_path: Path, pool: str, how: str) -> None:
    server, there = server_of(parted, MAIL), queue_at(parted, two_without_mail(parted)[0])
    with (
        client_of(parted.url, tmp_path) as client,
        Broker(parted.url) as broker,
        CeleryWorker(parted.url, tmp_path, *POOLS[pool], "-Q", there) as worker,
    ):
        keys = ["first", "second", "third"]
        for key in keys:  # a client has to ask that server, too, so they are written before
            client.send_task("tests.celery_app.run", (key,), queue="written")
        written = broker.claim("written", 3)
        lose(server, how)
        try:
            eventually(lambda: worker.logged("are put off"), "the worker to notice", 60)
            for key, job in zip(keys, written, strict=True):
                broker.enqueue(there, job.payload)
                eventually(lambda key=key: lines(tmp_path, start=f"{key} "), f"run of {key}", 60)
        finally:
            regain(server, how)
        parted.wait_until_ok()
        eventually(lambda: client.control.ping(timeout=5, limit=1), "the worker to answer")
        assert not worker.logged("Connection to broker lost"), worker.text
        assert worker.stop() == 0
