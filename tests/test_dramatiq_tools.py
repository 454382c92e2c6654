"""Dramatiq's messages in relay's own tools: the command line's dead letters and cancel, hooks, and delays in bulk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest

from relay_adapters.dramatiq import RelayBroker
from relay_core import Job, hookimpl
from relay_core.validation import JobSpec
from tests.command_line import Cli
from tests.dramatiq_workers import running
from tests.servers import Server, eventually


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = RelayBroker(url=server.url, lease=2.0)
    dramatiq.set_broker(broker)
    yield broker
    broker.close()


@pytest.fixture
def cli(server: Server) -> Cli:
    return Cli(server.url)


def test_dead_letters_are_listed_by_actor_shown_whole_and_requeued_in_bulk(broker: RelayBroker, cli: Cli) -> None:
    well = threading.Event()
    ran: list[int] = []

    def work(x: int) -> None:
        if not well.is_set():
            raise ValueError(f"no {x}")
        ran.append(x)

    mail = dramatiq.actor(work, actor_name="mail", max_retries=1, min_backoff=1, max_backoff=1)
    bill = dramatiq.actor(work, actor_name="bill", max_retries=0)
    for x in range(5):
        mail.send(x)
    for x in range(5, 8):
        bill.send(x)
    with running(broker):
        broker.join("default", timeout=30_000)
        listed = cli.json("dlq", "ls", "-q", "default", "--task", "mail")["jobs"]
        assert {job["task"] for job in listed} == {"mail"}
        assert len(listed) == 5
        shown = cli.json("dlq", "show", listed[0]["id"], "-q", "default")
        assert shown["summary"]["retries"] == 2
        assert shown["summary"]["args"] in ("0", "1", "2", "3", "4")
        assert shown["reason"] == "failed"
        assert "Traceback" in shown["error"]
        assert "ValueError" in shown["error"]
        assert shown["created_at"] <= shown["failed_at"] <= time.time() + 1
        assert shown["headers"] == {"relay_adapter": "dramatiq"}
        well.set()
        assert cli.json("dlq", "requeue", "-q", "default", "--task", "mail")["requeued"] == 5
        broker.join("default", timeout=30_000)
        assert sorted(ran) == [0, 1, 2, 3, 4]
        assert broker.get_queue_message_counts("default") == (0, 0, 3)


def test_cancel_takes_out_a_waiting_and_a_delayed_message_and_says_that_one_runs(broker: RelayBroker, cli: Cli) -> None:
    ran: list[str] = []
    started, let_go = threading.Event(), threading.Event()

    @dramatiq.actor
    def note(name: str) -> None:
        ran.append(name)
        started.set()
        let_go.wait(60)

    first = note.send("first")
    with running(broker, threads=1, queues={"default"}):
        assert started.wait(30)
        eventually(lambda: broker.core.stats("default").inflight == 1, "it runs")
        broker.core.pause("default")
        waiting, delayed = note.send("waiting"), note.send_with_options(args=("delayed",), delay=60_000)
        ids = [message.options["relay_job_id"] for message in (waiting, delayed, first)]
        told = cli.run("job", "cancel", *ids, "-q", "default", "--yes", code=1)
        assert f"job {ids[0]} of queue 'default': cancelled, it was ready" in told.stdout
        assert f"job {ids[1]} of queue 'default': cancelled, it was delayed" in told.stdout
        assert f"job {ids[2]} of queue 'default': is running and was left alone" in told.stderr
        broker.core.resume("default")
        let_go.set()
        broker.join("default", timeout=30_000)
    assert ran == ["first"]


def test_hooks_see_dramatiq_messages_as_any_other_jobs(server: Server) -> None:
    class Watch:
        seen: list[str]

        def __init__(self) -> None:
            self.seen = []

        @hookimpl
        def relay_job_enqueued(self, queue: str, delay: float) -> None:
            self.seen.append(f"enqueued {queue} {round(delay, 1)}")

        @hookimpl
        def relay_job_claimed(self, job: Job) -> None:
            self.seen.append(f"claimed {job.queue}")

        @hookimpl
        def relay_job_retried(self, job: Job, error: str) -> None:
            self.seen.append(f"retried {error.splitlines()[-1]}")

        @hookimpl
        def relay_job_acked(self, job: Job) -> None:
            self.seen.append("acked")

    watch = Watch()
    broker = RelayBroker(url=server.url, plugins=[watch])
    tries: list[int] = []

    @dramatiq.actor(broker=broker, min_backoff=1, max_backoff=1)
    def flaky() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("first")

    flaky.send_with_options(delay=100)
    with running(broker):
        broker.join("default", timeout=30_000)
    broker.close()
    # the thread that retried may be told of it later than others of the next claim, and even of its ack
    watch.seen.remove("retried ValueError: first")
    assert watch.seen == ["enqueued default 0.1", "claimed default", "claimed default", "acked"]


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_100_000_messages_that_are_due_in_a_week_are_no_matter_to_a_worker(broker: RelayBroker) -> None:
    ran: list[int] = []

    @dramatiq.actor
    def note(x: int) -> None:
        ran.append(x)

    payload = note.message(-1).encode()
    week, headers = 7 * 86400.0, {"relay_adapter": "dramatiq"}
    broker.core.enqueue_many("default", [JobSpec(payload, delay=week + x, headers=headers) for x in range(100_000)])
    with running(broker) as worker:
        for x in range(300):
            note.send_with_options(args=(x,), delay=x % 3)
        eventually(lambda: len(ran) == 300, "the others run")
        assert broker.held() == 0
        assert list(worker.consumers) == ["default"]
        assert worker.consumers["default"].delay_queue.qsize() == 0
        assert worker.work_queue.qsize() == 0
    assert sorted(ran) == list(range(300))
    assert broker.get_queue_message_counts("default") == (0, 100_000, 0)


def test_an_idle_worker_asks_nothing_until_there_is_something_to_do(broker: RelayBroker, server: Server) -> None:
    ran = threading.Event()

    @dramatiq.actor
    def note() -> None:
        ran.set()

    def scripts() -> int:
        found: Any = server.info("commandstats").get("cmdstat_evalsha", "calls=0,")
        return int(found.partition("calls=")[2].partition(",")[0])

    note.send()
    with running(broker) as worker:
        assert ran.wait(30)
        eventually(lambda: broker.core.stats("default").inflight == 0, "the ack arrives")
        worker.join()
        began, before = time.monotonic(), scripts()
        time.sleep(1.5)
        asked, passed = scripts() - before, time.monotonic() - began
        # a look each third of a lease (2 s), and the worker's place in the roster; not one per worker_timeout (0.1 s)
        assert asked <= 5 * passed / 1.5, f"{asked} scripts within {passed} s"
        ran.clear()
        note.send()
        assert ran.wait(30)
