"""Of a task with a strategy of its own, as celery-batches', nobody tells when it starts: it is not handed back."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from relay_core import Broker
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines
from tests.servers import Server, eventually

FLAGS = ("--include", "tests.celery_batches_app", "--prefetch-multiplier", "3")


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize(
    "kind",
    # before, Celery's prefork pool forgets such a run when its connection is lost, and waits for it as it stops
    [pytest.param("prefork", marks=pytest.mark.since("celery", "5.6")), "threads"],
)
def test_a_batch_that_runs_as_its_worker_stops_or_loses_its_connection_runs_once(
    server: Server, broker: Broker, tmp_path: Path, kind: str
) -> None:
    client = client_of(server.url, tmp_path)
    with CeleryWorker(server.url, tmp_path, *POOLS[kind], *FLAGS) as first:
        for key in ("a", "b", "c"):
            client.send_task("tests.celery_batches_app.batch", [key])
        eventually(lambda: len(lines(tmp_path, "started")) == 2, "a batch of two to start")
        eventually(lambda: broker.stats("celery").inflight == 3, "the third one to be fetched")
        server.cli("CLIENT", "KILL", "TYPE", "normal")
        eventually(lambda: first.logged("Connection to broker lost"), "the loss to be noticed")
        with CeleryWorker(server.url, tmp_path, *POOLS[kind], *FLAGS, name="second"):
            first.send(signal.SIGTERM)
            eventually(lambda: first.logged("Warm shutdown"), "the worker to be told")
            client.send_task("tests.celery_batches_app.batch", ["d"])
            (tmp_path / "go").touch()
            assert first.process.wait(30) == 0
            eventually(lambda: len(lines(tmp_path)) == 4, "the others to run elsewhere")
            eventually(lambda: broker.stats("celery").pending == 0, "all to be done")
        assert sorted(lines(tmp_path, "started")) == ["a", "b", "c", "d"]
        assert broker.stats("celery").counters["released"] == 1
    client.close()
