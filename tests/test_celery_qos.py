"""How much a Celery worker fetches, and what it consumes from, also when that changes while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.utils.nodenames import gethostname

from relay_core import Broker
from tests.celery_workers import CeleryWorker, client_of, lines, results_of
from tests.servers import Server, eventually

ONE = ("-P", "prefork", "-c", "1")
WORKERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "one": ((*ONE, "--prefetch-multiplier", "1"), {}),
    "all": (ONE, {"worker_prefetch_multiplier": 0}),  # the flag takes 0 for not given
    "none": ((*ONE, "--prefetch-multiplier", "1"), {"worker_disable_prefetch": True}),
    "scaled": (("-P", "prefork", "--autoscale", "3,1", "--prefetch-multiplier", "1"), {}),
}


class Site:
    """A server, and a worker per setting, each with a queue of its name."""

    def __init__(self, server: Server, folder: Path, stack: ExitStack) -> None:
        self.folder, self.broker = folder, Broker(server.url)
        self.app: Celery = client_of(server.url, folder, results_of(server))
        for name, (flags, conf) in WORKERS.items():
            worker = CeleryWorker(server.url, folder, *flags, "-Q", name, name=name, conf=conf, ready=False)
            stack.enter_context(worker)
            setattr(self, name, worker)
        for name in WORKERS:
            getattr(self, name).ready()

    def send(self, queue: str, name: str, *args: Any) -> str:
        return str(self.app.send_task(f"tests.celery_app.{name}", args, queue=queue).id)

    def held(self, queue: str, count: int) -> None:
        eventually(lambda: self.broker.stats(queue).inflight == count, f"{count} messages of {queue} to be held")

    def finish(self, queue: str) -> None:
        (self.folder / f"go-{queue}").touch()

        def empty() -> bool:
            stats = self.broker.stats(queue)
            return stats.ready + stats.inflight == 0

        eventually(empty, f"{queue} to be empty")

    def tell(self, worker: str, command: str, **arguments: Any) -> None:
        to = [f"{worker}@{gethostname()}"]
        said = self.app.control.broadcast(command, arguments=arguments, destination=to, reply=True, timeout=10, limit=1)
        assert "ok" in said[0][to[0]], said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Server("valkey") as server, ExitStack() as stack:
        site = Site(server, tmp_path_factory.mktemp("qos"), stack)
        yield site
        site.app.close()
        site.broker.close()


def test_a_multiplier_of_one_holds_as_many_as_run_and_grows_with_the_pool(site: Site) -> None:
    for n in range(5):
        site.send("one", "hold", f"one-{n}", "go-one")
    site.held("one", 1)
    assert site.broker.stats("one").ready == 4
    site.tell("one", "pool_grow", n=1)
    site.held("one", 2)
    site.finish("one")
    assert len(lines(site.folder, "started", "one-")) == 5


def test_a_multiplier_of_zero_fetches_all_there_is(site: Site) -> None:
    for n in range(120):
        site.send("all", "hold", f"all-{n}", "go-all")
    site.held("all", 120)
    site.finish("all")
    assert len(lines(site.folder, start="all-")) == 120


def test_a_worker_without_prefetch_fetches_only_what_it_can_start(site: Site) -> None:
    for n in range(4):
        site.send("none", "hold", f"none-{n}", "go-none")
    site.held("none", 1)
    eventually(lambda: lines(site.folder, "started", "none-"), "a task to start")
    assert site.broker.stats("none").ready == 3
    site.finish("none")


def test_an_autoscaled_worker_fetches_more_as_it_grows(site: Site) -> None:
    for n in range(6):
        site.send("scaled", "hold", f"scaled-{n}", "go-scaled")
    eventually(lambda: len(lines(site.folder, "started", "scaled-")) == 3, "three tasks to run")
    site.finish("scaled")


def test_queues_are_added_and_cancelled_while_a_worker_runs(site: Site) -> None:
    site.tell("one", "add_consumer", queue="extra")
    site.send("extra", "run", "extra-1")
    eventually(lambda: lines(site.folder, start="extra-1"), "a task of the new queue to run")
    site.tell("one", "cancel_consumer", queue="extra")
    site.send("extra", "run", "extra-2")
    site.send("one", "run", "still-there")
    eventually(lambda: lines(site.folder, start="still-there"), "a task of the old queue to run")
    assert site.broker.stats("extra").ready == 1
    assert lines(site.folder, start="extra-2") == []
    site.tell("one", "add_consumer", queue="extra")
    eventually(lambda: lines(site.folder, start="extra-2"), "what waited meanwhile to run")
