"""Celery workers that are killed or stopped, and brokers that go away: nothing is lost, and nothing starts twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery
from celery._state import _task_stack
from celery.utils.nodenames import gethostname

from relay_adapters.celery.holding import inhand
from relay_adapters.celery.messages.envelope import head_of
from relay_core import Broker, Job, Verdict
from relay_core.testing.times import advance
from tests.aging import age_by
from tests.celery_workers import POOLS, STARTS, CeleryWorker, client_of, lines
from tests.servers import Server, eventually
from tests.topologies import SentinelTrio

SLOTS = {"prefork": 2, "solo": 1, "threads": 2, "gevent": 4}


@pytest.fixture(scope="module")
def kept() -> Iterator[Server]:
    """A server on a port, whose data outlive it."""
    with Server("valkey", tcp=True, options={"appendonly": "yes", "appendfsync": "no"}) as server:
        yield server


@pytest.fixture
def broker(kept: Server) -> Iterator[Broker]:
    kept.reset()
    with Broker(kept.url, lease=1.5) as broker:
        yield broker


@pytest.fixture
def client(kept: Server, broker: Broker, tmp_path: Path) -> Iterator[Celery]:
    app = client_of(kept.url, tmp_path)
    yield app
    app.close()


@pytest.fixture
def running() -> Iterator[ExitStack]:
    """Workers that are entered here are killed at the end."""
    with ExitStack() as stack:
        yield stack


def send(client: Celery, queue: str, name: str, *args: Any) -> str:
    return str(client.send_task(f"tests.celery_app.{name}", args, queue=queue).id)


def started(folder: Path, key: str, times: int = 1) -> None:
    eventually(lambda: len(lines(folder, "started", key)) >= times, f"{key} to start {times} times")


def empty(broker: Broker, *queues: str) -> None:
    def nothing() -> bool:
        found = [broker.stats(queue) for queue in queues]
        return not sum(stats.ready + stats.delayed + stats.inflight for stats in found)

    eventually(nothing, f"{queues} to be empty", 60)


def test_every_pool_goes_on_after_its_broker_was_away_and_starts_nothing_twice(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path, running: ExitStack
) -> None:
    workers = [
        running.enter_context(
            CeleryWorker(kept.url, tmp_path, *flags, "-Q", pool, name=pool, options={"lease": 1.5}, ready=False)
        )
        for pool, flags in POOLS.items()
    ]
    for worker in workers:
        worker.ready()
    for pool, slots in SLOTS.items():
        for n in range(slots):
            send(client, pool, "hold", f"long-{pool}-{n}", "go")
        for n in range(3):  # fetched, and not started when the connection is lost
            send(client, pool, "late", f"short-{pool}-{n}")
    for pool, slots in SLOTS.items():
        started(tmp_path, f"long-{pool}-", slots)
    kept.kill()
    time.sleep(3)  # longer than a block, and than a lease
    kept.start()
    if not kept.cli("PING"):
        pytest.fail("the server did not come back")
    for pool in POOLS:
        send(client, pool, "run", f"after-{pool}")
    (tmp_path / "go").touch()
    empty(broker, *POOLS)
    for worker in workers:  # at the start only: no task runs in that second
        assert worker.text.count("mingle: searching") == 1
    for pool, slots in SLOTS.items():
        for n in range(slots):
            assert len(lines(tmp_path, "started", f"long-{pool}-{n} ")) == 1
            assert len(lines(tmp_path, start=f"long-{pool}-{n} ")) == 1
        for n in range(3):
            assert len(lines(tmp_path, start=f"short-{pool}-{n} ")) == 1
        assert len(lines(tmp_path, start=f"after-{pool} ")) == 1
        assert broker.stats(pool).dead == 0


def test_the_tasks_of_a_killed_worker_run_elsewhere(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path, running: ExitStack
) -> None:
    options = {"lease": 1.5}
    first = running.enter_context(
        CeleryWorker(kept.url, tmp_path, "-P", "prefork", "-c", "1", name="first", options=options)
    )
    ids = [send(client, "celery", "hold", f"key-{n}", "go") for n in range(4)]
    started(tmp_path, "key-")
    first.kill()
    (tmp_path / "go").touch()
    running.enter_context(CeleryWorker(kept.url, tmp_path, "-P", "solo", name="second", options=options))
    empty(broker, "celery")
    runs = lines(tmp_path, start="key-")
    assert sorted(line.split()[0] for line in runs) == [f"key-{n}" for n in range(4)]
    assert {line.split()[2] for line in runs} == {"second"}
    again = [line for line in lines(tmp_path, "started", "key-0") if line.split()[2] == "second"]
    assert [line.split()[4] for line in again] == ["True"]
    assert len(ids) == 4


def test_a_solo_worker_keeps_the_leases_of_a_task_that_is_longer_than_them(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path, running: ExitStack
) -> None:
    for name in ("one", "two"):
        running.enter_context(
            CeleryWorker(kept.url, tmp_path, "-P", "solo", name=name, options={"lease": 2.0}, ready=False)
        )
    send(client, "celery", "hold", "long", "go")
    started(tmp_path, "long")
    time.sleep(5)
    (tmp_path / "go").touch()
    empty(broker, "celery")
    assert len(lines(tmp_path, "started", "long")) == 1


def test_an_early_ack_does_not_wait_for_the_end_of_a_solo_task(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path, running: ExitStack
) -> None:
    running.enter_context(CeleryWorker(kept.url, tmp_path, "-P", "solo", "--prefetch-multiplier", "4"))
    broker.pause("celery")  # so that all three are fetched at once, and run within one turn of the loop
    for n in range(2):
        send(client, "celery", "run", f"quick-{n}")
    send(client, "celery", "hold", "long", "go")
    broker.resume("celery")
    started(tmp_path, "long")
    eventually(lambda: broker.stats("celery").counters.get("processed") == 2, "the acks to arrive")
    (tmp_path / "go").touch()
    empty(broker, "celery")


def test_a_warm_shutdown_finishes_what_runs_and_hands_back_the_rest_uncounted(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path, running: ExitStack
) -> None:
    workers = [
        running.enter_context(CeleryWorker(kept.url, tmp_path, *flags, "-Q", pool, name=pool, ready=False))
        for pool, flags in POOLS.items()
        if pool in ("prefork", "threads")  # solo hears of it when its task has ended, gevent blocks when it is full
    ]
    for worker in workers:
        worker.ready()
    rest: dict[str, list[str]] = {}
    for worker in workers:
        slots = SLOTS[worker.name]
        for n in range(slots):
            send(client, worker.name, "hold", f"long-{worker.name}-{n}", "go")
        started(tmp_path, f"long-{worker.name}-", slots)
        rest[worker.name] = [send(client, worker.name, "late", f"rest-{worker.name}-{n}") for n in range(2)]

        def fetched(pool: str = worker.name, most: int = slots) -> bool:
            return broker.stats(pool).inflight > most

        eventually(fetched, "more to be fetched")
        worker.send(signal.SIGTERM)
    for worker in workers:
        eventually(lambda worker=worker: worker.logged("Warm shutdown"), "the shutdown to begin")
        for id in rest[worker.name]:
            eventually(lambda q=worker.name, id=id: broker.show(q, id).state == "ready", "a message handed back")
    (tmp_path / "go").touch()
    for worker in workers:
        assert worker.process.wait(30) == 0
        assert len(lines(tmp_path, start=f"long-{worker.name}-")) == SLOTS[worker.name]
        assert not lines(tmp_path, start=f"rest-{worker.name}-")
        stats = broker.stats(worker.name)
        assert (stats.ready, stats.inflight) == (2, 0)
        for id in rest[worker.name]:
            job = broker.show(worker.name, id)
            assert job is not None
            assert job.deliveries == 0


@pytest.mark.since("celery", "5.5")
@pytest.mark.parametrize("conf", STARTS)
def test_a_task_that_ends_within_a_soft_shutdown_does_not_run_again(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path, conf: Mapping[str, Any]
) -> None:
    conf = {**conf, "worker_soft_shutdown_timeout": 5.0}
    with CeleryWorker(kept.url, tmp_path, "-P", "prefork", "-c", "2", conf=conf) as worker:
        send(client, "celery", "hold", "ends", "go")
        send(client, "celery", "hold", "stays", "never")
        name = f"w@{gethostname()}"
        # Celery's own cold shutdown waits for the end of a task whose start the main process has not heard of
        eventually(lambda: len(client.control.inspect([name], timeout=20, limit=1).active()[name]) == 2, "both to run")
        worker.send(signal.SIGQUIT)
        eventually(lambda: worker.logged("Initiating Soft Shutdown"), "the soft shutdown to begin")
        (tmp_path / "go").touch()
        assert worker.process.wait(60) is not None
    stats = broker.stats("celery")
    assert (stats.ready, stats.inflight) == (1, 0), "the other one runs elsewhere"
    assert [line.split()[0] for line in lines(tmp_path)] == ["ends"]


def test_tasks_that_are_cancelled_with_the_connection_run_again(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path, running: ExitStack
) -> None:
    worker = running.enter_context(
        CeleryWorker(
            kept.url, tmp_path, "-P", "prefork", "-c", "1",
            conf={"worker_cancel_long_running_tasks_on_connection_loss": True},
        )
    )  # fmt: skip
    send(client, "celery", "hold", "long", "go")
    started(tmp_path, "long")
    kept.kill()
    kept.start()
    started(tmp_path, "long", 2)
    (tmp_path / "go").touch()
    empty(broker, "celery")
    assert len(lines(tmp_path, start="long")) == 1
    assert not worker.logged("TimeoutError"), "the first run was ended, and has not waited in vain"


def test_a_worker_moves_on_to_the_next_broker_of_its_list_and_publishers_do(
    kept: Server, broker: Broker, tmp_path: Path, running: ExitStack
) -> None:
    with Server("redis") as spare:
        urls = f"{kept.url};{spare.url}"
        worker = running.enter_context(CeleryWorker(urls, tmp_path, "-P", "solo", conf={"task_acks_late": True}))
        # kombu shares the pools of apps whose connections differ in nothing but the rest of their lists
        client = client_of(urls, tmp_path, broker_transport_options={"client_name": "failover"})
        send(client, "celery", "run", "before")
        empty(broker, "celery")
        kept.kill()
        send(client, "celery", "run", "after")
        eventually(lambda: lines(tmp_path, start="after"), "the task on the spare broker to run")
        client.close()
        assert worker.stop() == 0
    kept.start()


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_a_worker_waits_for_nothing_of_the_broker_that_it_leaves(
    kept: Server, client: Celery, tmp_path: Path, running: ExitStack, pool: str
) -> None:
    patient = {"retry_for": 120.0}
    with Server("redis") as spare:
        urls = f"{kept.url};{spare.url}"
        running.enter_context(CeleryWorker(urls, tmp_path, "-P", pool, "-c", "1", options=patient))
        for n in range(4):
            send(client, "celery", "hold", f"before{n}", "go")
        started(tmp_path, "before")
        next_client = client_of(spare.url, tmp_path, broker_transport_options={"client_name": "spare"})
        send(next_client, "celery", "run", "after")
        kept.kill()
        try:
            (tmp_path / "go").touch()
            eventually(lambda: lines(tmp_path, start="after"), "the task on the spare broker to run")
        finally:
            kept.start()
        next_client.close()


def test_a_worker_that_may_not_retry_its_connection_ends(
    kept: Server, broker: Broker, tmp_path: Path, running: ExitStack
) -> None:
    conf: dict[str, dict[str, Any]] = {
        "never": {"broker_connection_retry": False},
        "once": {"broker_connection_max_retries": 1},
    }
    workers = [
        running.enter_context(CeleryWorker(kept.url, tmp_path, "-P", "solo", name=name, conf=more, ready=False))
        for name, more in conf.items()
    ]
    for worker in workers:
        worker.ready()
    kept.kill()
    for worker in workers:
        assert worker.process.wait(30) != 0
    kept.start()


def test_workers_go_on_after_a_failover_of_sentinel(
    sentinel_trio: SentinelTrio, tmp_path: Path, running: ExitStack
) -> None:
    worker = running.enter_context(CeleryWorker(sentinel_trio.url, tmp_path, "-P", "solo", options={"lease": 3}))
    client = client_of(sentinel_trio.url, tmp_path)
    send(client, "celery", "run", "before")
    eventually(lambda: lines(tmp_path, start="before"), "the first task to run")
    sentinel_trio.failover()
    send(client, "celery", "run", "after")
    eventually(lambda: lines(tmp_path, start="after"), "a task to run on the new primary", 60)
    client.close()
    assert worker.stop() == 0


@pytest.mark.parametrize("taken", [False, True], ids=["held", "lost"])
def test_a_late_acked_retry_is_one_move_and_the_delivery_that_holds_the_task_decides(
    kept: Server, broker: Broker, tmp_path: Path, taken: bool
) -> None:
    client = client_of(kept.url, tmp_path, broker_transport_options={"client_name": f"retry-{taken}"})
    client.send_task("pay", [1], task_id="t")
    (first,) = broker.claim("celery")
    if taken:  # the lease ended, and another worker has the task
        broker.extend(first, 0.1)
        (second,) = eventually_claimed(broker)
    with runs(client, first):
        client.send_task("pay", [1], task_id="t", retries=1, countdown=60)
    stats = broker.stats("celery")
    # whether or not the worker dies now, before it acks: there is one task, and not two or none
    assert stats.ready + stats.delayed + stats.inflight == 1
    assert broker.ack_many([first]) == [Verdict.LOST]
    job = broker.show("celery", "t")
    assert job is not None
    if taken:
        assert job.state == "inflight"
        broker.ack(second)
    else:
        assert (job.state, job.retries) == ("delayed", 1)
        head = head_of(job.payload)
        assert head["headers"]["retries"] == 1
    client.close()


def test_who_retries_twice_in_one_run_sends_two_tasks(kept: Server, broker: Broker, tmp_path: Path) -> None:
    client = client_of(kept.url, tmp_path, broker_transport_options={"client_name": "twice"})
    client.send_task("pay", [1], task_id="t")
    (first,) = broker.claim("celery")
    with runs(client, first):
        for n in range(3):
            client.send_task("pay", [n], task_id="t", retries=1, countdown=60)
    waiting = [broker.plugins.describe(job) for job in broker.jobs("celery", "delayed")]
    assert sorted(one.args for one in waiting if one is not None and one.args) == ["[0]", "[1]", "[2]"]
    client.close()


@contextmanager
def runs(client: Celery, job: Job) -> Iterator[None]:
    """As if the late-acked task `t` ran here, of a message that was claimed."""

    @client.task(name="runs", shared=False)
    def task() -> None: ...

    _task_stack.push(task)
    task.push_request(id="t", properties={inhand.LEASE: inhand.lease_of(job, {"id": "t"})})
    try:
        yield
    finally:
        task.pop_request()
        _task_stack.pop()


@pytest.mark.since("celery", "5.7")
def test_the_next_try_that_a_worker_sends_for_a_lost_child_is_the_one_that_the_child_has_sent(
    kept: Server, broker: Broker, client: Celery, tmp_path: Path
) -> None:
    with CeleryWorker(kept.url, tmp_path, "-P", "prefork", "-c", "1"):
        send(client, "celery", "retry_lost", "t")
        eventually(lambda: broker.stats("celery").counters.get("processed"), "the next try to be done")
        eventually(lambda: broker.stats("celery").pending == 0, "nothing to be left")
    assert lines(tmp_path, start="t") == ["t 0", "t 1"]
    counters = broker.stats("celery").counters
    assert (counters["enqueued"], counters["retried"], counters["processed"]) == (1, 1, 1)


def test_a_retry_of_another_priority_has_it(kept: Server, broker: Broker, tmp_path: Path) -> None:
    client = client_of(kept.url, tmp_path, broker_transport_options={"client_name": "other-priority"})
    client.send_task("pay", [1], task_id="t", priority=9)
    (first,) = broker.claim("celery")
    with runs(client, first):
        client.send_task("pay", [1], task_id="t", retries=1, priority=2, countdown=60)
    (waits,) = broker.jobs("celery", "delayed")
    assert waits.priority == 2
    broker.ack(first)
    client.close()


@pytest.mark.parametrize("limit", ["expires", "message_ttl"])
def test_the_time_limit_of_a_retry_counts_from_the_retry(
    kept: Server, broker: Broker, tmp_path: Path, limit: str
) -> None:
    """A task that works for long and then retries at once is a new message to other transports."""
    client = client_of(kept.url, tmp_path, broker_transport_options={"client_name": f"limit-{limit}"})
    with client.connection_for_write() as connection:
        channel = connection.default_channel
        kombu.Queue("limited", message_ttl=60 if limit == "message_ttl" else None)(channel).declare()
        more: dict[str, Any] = {"expires": 60} if limit == "expires" else {}
        client.send_task("pay", [1], task_id="t", queue="limited", **more)
        (first,) = broker.claim("limited")
        age_by(broker, "limited", 100)
        with runs(client, first):
            client.send_task("pay", [1], task_id="t", queue="limited", retries=1, **more)
        assert [job.id for job in broker.jobs("limited", "ready")] == ["t"]
        message = channel.basic_get("limited")
        assert message.headers["retries"] == 1
        assert not str(message.headers.get("expires")).startswith("1970")
        message.ack()
    client.close()


def retry_in_an_hour(client: Celery, job: Job, late: timedelta) -> None:
    """As the worker that runs the job asks for it, whose clock is late."""
    right = time.time
    with pytest.MonkeyPatch.context() as patched, runs(client, job):
        patched.setattr(time, "time", lambda: right() - late.total_seconds())
        eta = datetime.fromtimestamp(time.time() + 3600, timezone.utc)
        client.send_task("pay", [1], task_id="t", queue=job.queue, retries=1, eta=eta)


def test_the_time_limit_of_a_retry_counts_from_when_it_is_due_whatever_its_worker_s_clock_says(
    kept: Server, broker: Broker, tmp_path: Path
) -> None:
    client = client_of(kept.url, tmp_path, broker_transport_options={"client_name": "limit-late"})
    with client.connection_for_write() as connection:
        channel = connection.default_channel
        kombu.Queue("late", message_ttl=60)(channel).declare()
        client.send_task("pay", [1], task_id="t", queue="late")
        (first,) = broker.claim("late")
        retry_in_an_hour(client, first, late=timedelta(seconds=86_400))
        assert [job.id for job in broker.jobs("late", "delayed")] == ["t"]
        age_by(broker, "late", 3600)
        advance(broker, 3600, "late")
        message = channel.basic_get("late")
        assert not str(message.headers.get("expires")).startswith("1970")
        message.ack()
    client.close()


def test_a_limit_that_a_queue_is_given_while_a_retry_waits_counts_from_when_that_is_due(
    kept: Server, broker: Broker, tmp_path: Path
) -> None:
    client = client_of(kept.url, tmp_path, broker_transport_options={"client_name": "limit-after"})
    with client.connection_for_write() as connection:
        channel = connection.default_channel
        client.send_task("pay", [1], task_id="t", queue="after")
        (first,) = broker.claim("after")
        retry_in_an_hour(client, first, late=timedelta(seconds=3600))
        kombu.Queue("after", message_ttl=60)(channel).declare()
        age_by(broker, "after", 3600)
        advance(broker, 3600, "after")
        message = channel.basic_get("after")
        assert not str(message.headers.get("expires")).startswith("1970")
        message.ack()
    client.close()


def eventually_claimed(broker: Broker) -> list[Any]:
    found: list[Any] = []
    eventually(lambda: found.extend(broker.claim("celery")) or found, "the job to be claimed")
    return found
