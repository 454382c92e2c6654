"""A prefork worker that was frozen for longer than its leases: its children start nothing whose lease was lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.utils.nodenames import gethostname

from relay_adapters.celery.holding.forgotten import Forgotten
from relay_adapters.celery.workers.request import Request
from relay_core import Broker
from tests.celery_workers import STARTS, CeleryWorker, client_of, lines
from tests.servers import Server, eventually

LEASE = 1.0
TASKS = ("late", "run")
"""One that is acked when it ends, and one that is acked as it starts."""


class Site:
    """A worker of two children, and a broker that plays another worker."""

    def __init__(self, server: Server, folder: Path, conf: Mapping[str, Any]) -> None:
        self.server, self.folder = server, folder
        self.app: Celery = client_of(server.url, folder)
        self.broker = Broker(server.url, lease=30.0)
        flags = ("-P", "prefork", "-c", "2", "--prefetch-multiplier", "1")
        options = {"lease": LEASE, "retry_for": 0.5}
        self.worker = CeleryWorker(server.url, folder, *flags, options=options, conf=conf)
        self.children = self.worker.children(self.app)

    def send(self, key: str) -> None:
        for name in TASKS:
            self.app.send_task(f"tests.celery_app.{name}", [f"{key}-{name}"])

    def into_the_pipes(self, key: str) -> None:
        """One message to each child, none of which has read it, and the main process frozen too."""
        # a child that is stopped before it says that it starts nothing would keep the credit for one of the messages
        eventually(lambda: not (self.asked("active") or self.asked("reserved")), "the worker to be done")
        self.signal(signal.SIGSTOP, self.children)
        self.send(key)
        eventually(lambda: self.broker.stats("celery").inflight == len(TASKS), "the messages to be fetched")
        # each answer is a turn of its loop: in the third one after the tasks came it has written to its children
        for _ in range(3):
            assert self.app.control.ping([f"w@{gethostname()}"], timeout=20, limit=1)
        self.signal(signal.SIGSTOP, [self.worker.process.pid])

    def asked(self, what: str) -> list[Any]:
        """What the worker says that it has: `active` or `reserved` tasks."""
        name = f"w@{gethostname()}"
        return list(getattr(self.app.control.inspect([name], timeout=20, limit=1), what)()[name])

    def resume_children(self) -> None:
        """Until they have read their messages, and wait for word or, if they should not, have run them."""
        before = [_switches(child) for child in self.children]
        self.signal(signal.SIGCONT, self.children)
        for child, count in zip(self.children, before, strict=True):
            eventually(lambda child=child, count=count: _switches(child) > count + 5 or self.ran(), "a child to look")

    def resume_main(self) -> None:
        self.signal(signal.SIGCONT, [self.worker.process.pid])

    def signal(self, how: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, how)

    def ran(self, key: str = "") -> list[str]:
        return sorted(line.split()[0] for line in lines(self.folder, start=key))

    def empty(self) -> None:
        eventually(lambda: self.broker.stats("celery").pending == 0, "the queue to be empty")

    def close(self) -> None:
        self.worker.kill()
        self.app.close()
        self.broker.close()


def _switches(pid: int) -> int:
    """How often a process has gone to sleep by itself."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))


@pytest.fixture(scope="module", params=STARTS)
def site(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Site]:
    with Server("valkey", tcp=True, options={"appendonly": "yes", "appendfsync": "no"}) as server:
        site = Site(server, tmp_path_factory.mktemp("frozen"), request.param)
        yield site
        site.close()


def test_a_child_does_not_start_what_another_worker_has_meanwhile(site: Site) -> None:
    site.into_the_pipes("lost")
    taken = []
    eventually(lambda: taken.extend(site.broker.claim("celery", 2)) or len(taken) == 2, "the leases to end")
    site.resume_children()
    assert site.ran() == []
    site.resume_main()
    eventually(lambda: site.worker.text.count("is not started") == 2, "the children to be told")
    assert site.ran() == []
    site.broker.ack_many(taken)
    site.empty()
    site.send("next")
    site.empty()
    assert site.ran() == ["next-late", "next-run"]


def test_a_child_waits_for_word_of_a_lease_that_is_over_and_then_starts(site: Site) -> None:
    site.into_the_pipes("kept")
    time.sleep(LEASE * 1.2)
    site.resume_children()
    assert site.ran("kept") == []
    site.resume_main()
    site.empty()
    eventually(lambda: len(site.ran("kept")) == 2, "both tasks to run")
    assert site.ran("kept") == ["kept-late", "kept-run"]


def test_a_child_does_not_wait_for_a_server_that_is_away_and_its_tasks_run_when_that_is_back(site: Site) -> None:
    site.into_the_pipes("away")
    time.sleep(LEASE * 1.2)
    site.resume_children()
    site.server.kill()
    site.resume_main()
    eventually(lambda: site.worker.logged("leases could not be extended"), "the heartbeat to fail")
    for child in site.children:
        eventually(lambda child=child: _rests(child), "a child to wait no more")
    assert site.ran("away") == []
    site.server.start()
    eventually(lambda: len(site.ran("away")) == 2, "both tasks to run", 60)
    site.empty()
    assert site.ran("away") == ["away-late", "away-run"]


def _rests(pid: int) -> bool:
    """True when a process has slept for as long as this looks, without waking."""
    before = _switches(pid)
    time.sleep(0.05)
    return _switches(pid) == before


def test_a_task_that_is_not_started_in_its_own_process_is_handed_back_and_frees_its_credit(site: Site) -> None:
    app = client_of(site.server.url, site.folder, broker_transport_options={"client_name": "here"})

    @app.task(name="here", shared=False)
    def task() -> None:
        raise AssertionError("it was started")

    with app.connection_for_read() as connection, connection.channel() as channel:
        task.apply_async(queue="here")
        message = channel.basic_get("here")
        request = Request(message, on_reject=message.reject_log_error, app=app, task=task)
        channel.leases.get(message.delivery_tag).until = 0.0  # as after a sleep, before the next heartbeat
        with pytest.raises(Forgotten):
            request.on_accepted(os.getpid(), time.monotonic())
        eventually(lambda: site.broker.stats("here").ready == 1, "it to be handed back")
        assert (channel.leases.holding, message.acknowledged) == (0, True)
        assert site.broker.claim("here")[0].deliveries == 1, "it did not count as a delivery"
    app.close()
