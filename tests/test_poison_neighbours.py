"""A job that kills its worker must not take the jobs that were fetched with it to dead, in any face of relay."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from relay_core import Broker, JobSpec
from tests.celery_workers import POOLS, CeleryWorker, client_of
from tests.dramatiq_workers import Workers, lines
from tests.servers import Server, eventually

ROOT = Path(__file__).parent.parent


def test_a_poison_job_goes_to_dead_alone(server: Server) -> None:
    with Broker(server.url, lease=0.5) as broker:
        # in front, and fetched together with the poison each time it comes back
        broker.enqueue_many("q", [JobSpec(b"poison", max_deliveries=5)] + [JobSpec(b"innocent")] * 60)
        command = [sys.executable, "-m", "tests.poison_handlers", server.url]
        workers = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            eventually(lambda: broker.stats("q").pending == 0, "the queue to be empty", 120)
            assert workers.poll() is None
        finally:
            os.killpg(workers.pid, signal.SIGKILL)
            workers.wait()
        assert [job.payload for job in broker.dead("q")] == [b"poison"]
        assert broker.dead("q")[0].deliveries == 5
        assert broker.stats("q").counters["processed"] == 60
        assert broker.audit("q").clean


def is_dead_alone(broker: Broker, queue: str, deliveries: int, innocents: dict[str, int]) -> None:
    """The poison is dead, by its deliveries, and nothing else is; every queue holds to its promises."""
    [dead] = broker.dead(queue)
    assert (dead.reason, dead.deliveries) == ("max_deliveries", deliveries)
    for name, processed in innocents.items():
        stats = broker.stats(name)
        assert (stats.pending, stats.dead) == (0, int(name == queue))
        assert stats.counters["processed"] == processed
        assert broker.audit(name).clean


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_dramatiq_message_that_kills_its_process_goes_to_dead_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APP_URL", server.url)
    monkeypatch.setenv("APP_FOLDER", str(tmp_path))
    sys.modules.pop("tests.poison_dramatiq_app", None)
    app = importlib.import_module("tests.poison_dramatiq_app")
    core: Broker = app.broker.core
    for queue in ("here", "there"):
        core.pause(queue)
    app.poison.send()
    for n in range(20):
        app.innocent.send(f"here-{n}")
        app.far_innocent.send(f"there-{n}")
    workers: Workers | None = None

    def all_over() -> bool:
        nonlocal workers
        if workers is None or workers.process.poll() is not None:
            workers = Workers(
                server, tmp_path, threads=1, app="tests.poison_dramatiq_app", dramatiq_queue_prefetch="30"
            )
        return core.stats("here").pending == core.stats("there").pending == 0

    try:
        for queue in ("there", "here"):
            core.resume(queue)
        eventually(all_over, "both queues to be empty", 120)
    finally:
        if workers is not None:
            workers.kill()
        app.broker.close()
    ran = Counter(lines(tmp_path))
    assert ran.pop("poison") == 3
    assert ran.keys() == {f"{queue}-{n}" for queue in ("here", "there") for n in range(20)}
    is_dead_alone(core, "here", 3, {"here": 20, "there": 20})


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_a_celery_task_that_kills_its_worker_goes_to_dead_alone(server: Server, tmp_path: Path) -> None:
    """One worker per pool that has no children to die in its place. No result backend: nobody can be told."""
    pools = ("solo", "threads", "gevent")
    app = client_of(server.url, tmp_path)
    broker = Broker(server.url, lease=1.0)
    for pool in pools:
        app.signature("tests.celery_app.kill_child", args=(f"poison-{pool}",), queue=pool).apply_async()
        for n in range(30):
            app.signature("tests.celery_app.late", args=(f"{pool}-{n}",), queue=pool).apply_async()
    workers: dict[str, CeleryWorker] = {}

    def all_over() -> bool:
        for pool in pools:
            if pool not in workers or workers[pool].process.poll() is not None:
                workers[pool] = CeleryWorker(
                    server.url, tmp_path, *POOLS[pool], "-Q", pool, "--prefetch-multiplier", "31", name=pool,
                    options={"lease": 1.0, "max_deliveries": 3}, ready=False,
                )  # fmt: skip
        return all(broker.stats(pool).pending == 0 for pool in pools)

    try:
        eventually(all_over, "all queues to be empty", 150)
        eventually(lambda: all(workers[pool].logged("went to dead") for pool in pools), "word of the dead tasks")
    finally:
        for worker in workers.values():
            worker.kill()
    ran = Counter(line.split()[0] for line in lines(tmp_path))
    for pool in pools:
        assert ran.pop(f"poison-{pool}") == 3
        is_dead_alone(broker, pool, 3, {pool: 30})
        assert "Traceback" not in workers[pool].text
        assert "cannot be read" not in workers[pool].text
    assert ran.keys() == {f"{pool}-{n}" for pool in pools for n in range(30)}
    app.close()
    broker.close()
