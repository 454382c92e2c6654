"""Of a task with a strategy of its own, as celery-batches', nobody tells when it starts: it is not handed back."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from celery.utils.nodenames import gethostname

from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_core import Broker
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines
from tests.servers import Server, eventually
from tests.test_celery_bad_messages import LENIENT, NO_MESSAGE, NO_TASK

FLAGS = ("--include", "tests.celery_batches_app,tests.celery_hold_close", "--prefetch-multiplier", "3")


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize("kind", ["prefork", "threads"])
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
        (tmp_path / "see-to-it").touch()
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


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_what_a_pool_has_not_begun_when_the_connection_is_lost_runs_once(
    server: Server, broker: Broker, tmp_path: Path
) -> None:
    """Two batches that lie in the pipes of frozen children, and one that waits for a child."""
    client = client_of(server.url, tmp_path)
    with CeleryWorker(server.url, tmp_path, *POOLS["prefork"], *FLAGS) as worker:
        pool = worker.children(client)
        for child in pool:
            os.kill(child, signal.SIGSTOP)
        for key in "abcdef":
            client.send_task("tests.celery_batches_app.batch", [key])
        eventually(lambda: broker.stats("celery").inflight == 6, "the messages to be fetched")
        # each answer is a turn of its loop: in the third one after the tasks came it has written to its children
        for _ in range(3):
            assert client.control.ping([f"w@{gethostname()}"], timeout=20, limit=1)
        server.cli("CLIENT", "KILL", "TYPE", "normal")
        eventually(lambda: lines(tmp_path, "connection"), "the loss to be noticed")
        (tmp_path / "see-to-it").touch()
        (tmp_path / "go").touch()
        assert client.control.ping([f"w@{gethostname()}"], timeout=20, limit=1), "it is back"
        for child in pool:
            os.kill(child, signal.SIGCONT)
        eventually(lambda: broker.stats("celery").pending == 0, "all to be done")
        assert worker.stop() == 0
    assert (sorted(lines(tmp_path)), sorted(lines(tmp_path, "started"))) == (list("abcdef"), list("abcdef"))
    assert broker.stats("celery").counters["processed"] == 6
    client.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize("kind", POOLS)
def test_messages_that_no_client_has_written_keep_nothing_from_its_batch(
    server: Server, broker: Broker, tmp_path: Path, kind: str
) -> None:
    client, good = client_of(server.url, tmp_path), []
    bad, names = {**NO_MESSAGE, **NO_TASK}, {}
    task = b"tests.celery_batches_app.batch"
    for name, raw in {**bad, **LENIENT}.items():
        good.append(f"good-{len(good)}")
        client.send_task(task.decode(), [good[-1]])
        names[broker.enqueue("celery", raw.replace(b"tests.celery_app.run", task), headers={HEADER: ADAPTER}).id] = name
    if (len(good) + len(LENIENT)) % 2:
        good.append("last")  # they run by twos
        client.send_task(task.decode(), [good[-1]])
    (tmp_path / "go").touch()
    with CeleryWorker(server.url, tmp_path, *POOLS[kind], "--include", "tests.celery_batches_app") as worker:
        eventually(
            lambda: worker.process.poll() is not None or not broker.stats("celery").pending, "the end of all of them"
        )
        assert worker.process.poll() is None, worker.text[-3000:]
        assert worker.stop() == 0
    assert Counter(lines(tmp_path)) == Counter([*good, *["odd"] * len(LENIENT)])
    dead = broker.dead("celery", limit=1000)
    assert {names[job.id] for job in dead} == set(bad)
    assert {job.reason for job in dead} <= {"undecodable", "rejected"}
    client.close()
