"""One queue of several cannot be told, as its server is away alone, hangs, or takes nothing of it: what is held of the
others is kept."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from relay_adapters.celery.holding import children, greenbeat
from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.messages.tags import new_tag
from relay_adapters.dramatiq import heartbeat as dramatiq_heartbeat
from relay_adapters.dramatiq.gate import Gate
from relay_adapters.dramatiq.line import Line
from relay_adapters.dramatiq.message import Holding, Lease
from relay_core import Broker, Job, hookimpl
from relay_core.connection import Bell
from relay_core.errors import StoreError, Unavailable
from relay_core.worker import Worker
from relay_core.worker.held import Heartbeat, Held
from tests.servers import Server, eventually
from tests.topologies import Cluster


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: what differs between servers is tested below."""
    return str(request.param)


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry_for=2.0) as broker:
        yield broker


def spoil(broker: Broker, queue: str) -> None:
    """From now on the server takes nothing of this queue."""
    owners = broker.settings.keys(queue).owners
    broker.store.raw("DEL", owners)
    broker.store.raw("SET", owners, "no hash")


def one_of_each(broker: Broker, *queues: str) -> list[Job]:
    """A claimed job of each queue."""
    for queue in queues:
        broker.enqueue(queue, b"")
    return [broker.claim(queue)[0] for queue in queues]


def a_worker(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> tuple[children.Board, Leases, list[str]]:
    """What a Celery worker holds, a job of `bad` and one of `good`, by these tags; and how its children know of it."""
    board = children.Board(os.getpid())
    monkeypatch.setattr(children, "_board", board)
    leases, tags = Leases(broker), list[str]()
    for job in one_of_each(broker, "bad", "good"):
        tags.append(new_tag(job))
        leases.add(tags[-1], job)
    return board, leases, tags


def test_what_was_done_of_the_other_queues_is_told_before_the_error(server: Server) -> None:
    told: list[str] = []

    class Note:
        @hookimpl
        def relay_job_acked(self, job: Job) -> None:
            told.append(job.queue)

        @hookimpl
        def relay_lease_lost(self, queue: str, move: str) -> None:
            told.append(f"{queue} {move}")

    with Broker(server.url, plugins=[Note()]) as broker:
        jobs = one_of_each(broker, "bad", "good")
        (lost,) = one_of_each(broker, "lost")
        broker.release(lost)
        spoil(broker, "bad")
        for move in (broker.extend, broker.release):
            with pytest.raises(StoreError):
                move([jobs[0], lost])
        with pytest.raises(StoreError):
            broker.ack_many(jobs)
    assert told == ["lost extend", "good"], "its release was done before"


def test_a_worker_knows_of_the_leases_that_were_extended(broker: Broker) -> None:
    held, jobs = Held(), one_of_each(broker, "bad", "good")
    for job in jobs:
        held.add(job)
    before = {job.id: hold.expires_at for job, hold in zip(jobs, held._holds.values(), strict=True)}
    spoil(broker, "bad")
    assert isinstance(Heartbeat(broker, held).beat(), StoreError)
    moved = [hold.expires_at > before[hold.job.id] for hold in held._holds.values()]
    assert moved == [False, True]


def test_a_claim_of_several_queues_asks_one_that_failed_after_the_others(broker: Broker) -> None:
    for queue in ("bad", "good", "good"):
        broker.enqueue(queue, b"")
    ready = broker.settings.keys("bad").ready[0]
    kept = broker.store.raw("DUMP", ready)
    broker.store.raw("SET", ready, "no list")
    with pytest.raises(StoreError):
        broker.claim(["bad", "good"])
    assert [job.queue for job in broker.claim(["bad", "good"], 9)] == ["good", "good"]
    with pytest.raises(StoreError):
        broker.claim(["bad", "good"])
    broker.store.raw("RESTORE", ready, 0, kept, "REPLACE")
    broker.enqueue("good", b"")
    assert [job.queue for job in broker.claim(["bad", "good"])] == ["good"]
    assert [job.queue for job in broker.claim(["bad", "good"])] == ["bad"]
    broker.enqueue("good", b"")
    broker.enqueue("bad", b"")
    assert [job.queue for job in broker.claim(["bad", "good"], 9)] == ["bad", "good"], "in their order again"


def test_after_an_outage_the_queues_of_one_server_are_asked_in_their_order() -> None:
    with Server("valkey") as own, Broker(own.url, retry_for=0.0) as broker:
        assert broker.claim(["first", "second"]) == []
        own.kill()
        with pytest.raises(Unavailable):
            broker.claim(["first", "second"])
        own.start()
        for queue in ("second", "first"):
            broker.enqueue(queue, b"")
        assert [job.queue for job in broker.claim(["first", "second"])] == ["first"]


@pytest.mark.usefixtures("by_hand")
def test_children_of_a_celery_worker_start_what_was_extended(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    board, leases, tags = a_worker(broker, monkeypatch)
    bad, good = tags
    spoil(broker, "bad")
    assert isinstance(leases.heartbeat.extend(), StoreError)
    for tag in tags:
        held = leases.get(tag)
        assert held is not None
        assert (held.until > held.job.expires_at) is (tag == good)
    held = leases.get(bad)
    assert held is not None
    held.until = 0.0  # it is over, as far as this process knows
    assert isinstance(leases.heartbeat.extend(), StoreError)
    assert board.may_start(good)
    assert not board.may_start(bad), "its lease may be over, and it may run elsewhere"
    broker.store.raw("DEL", broker.settings.keys("bad").owners)
    assert leases.heartbeat.extend() is None, "the server says of the other one that it is lost"
    assert held.lost
    for tag in tags:
        leases.pop(tag)


@pytest.mark.usefixtures("by_hand")
def test_a_lease_that_is_extended_again_is_sure_again(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    board, leases, tags = a_worker(broker, monkeypatch)
    owners = broker.settings.keys("bad").owners
    kept = broker.store.raw("DUMP", owners)
    spoil(broker, "bad")
    held = leases.get(tags[0])
    assert held is not None
    held.until = 0.0
    assert isinstance(leases.heartbeat.extend(), StoreError)
    assert not board.may_start(tags[0])
    broker.store.raw("RESTORE", owners, 0, kept, "REPLACE")
    assert leases.heartbeat.extend() is None
    assert all(map(board.may_start, tags))
    for tag in tags:
        leases.pop(tag)


@pytest.mark.usefixtures("by_hand")
def test_of_what_could_not_be_extended_together_each_is_sure_as_soon_as_it_was(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was away is back, and takes nothing of one queue: what is held of the others is no part of that."""
    board, leases, tags = a_worker(broker, monkeypatch)
    bad, good = tags
    owners = broker.settings.keys("good").owners
    kept = broker.store.raw("DUMP", owners)
    for queue in ("bad", "good"):
        spoil(broker, queue)
    with pytest.raises(StoreError):
        leases.heartbeat.extend()
    broker.store.raw("RESTORE", owners, 0, kept, "REPLACE")
    held = leases.get(bad)
    assert held is not None
    held.until = 0.0
    assert isinstance(leases.heartbeat.extend(), StoreError)
    assert board.may_start(good)
    assert not board.may_start(bad)
    for tag in tags:
        leases.pop(tag)


@pytest.mark.usefixtures("by_hand")
def test_a_child_that_looked_before_a_lease_was_set_aside_looks_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, leases, tags = a_worker(broker, monkeypatch)
    spoil(broker, "bad")
    held, found = leases.get(tags[0]), list[object]()
    assert held is not None
    held.until = 0.0
    leases.rows[False].sure(0.0)

    def now() -> float:
        """What the child calls between its look at the message and that at its row."""
        if not found:
            found.append(None)
            found.append(leases.heartbeat.extend())
        return time.monotonic()

    monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    assert not board.may_start(tags[0]), "its lease may be over, and it may run elsewhere"
    assert isinstance(found[1], StoreError)
    assert board.may_start(tags[1])
    for tag in tags:
        leases.pop(tag)


@pytest.mark.usefixtures("by_hand")
def test_what_comes_while_only_leases_that_are_aside_are_held_is_sure(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, leases, tags = a_worker(broker, monkeypatch)
    bad, good = tags
    spoil(broker, "bad")
    assert isinstance(leases.heartbeat.extend(), StoreError)
    leases.pop(good)
    leases.rows[False].sure(0.0)  # as a lease later
    assert isinstance(leases.heartbeat.extend(), StoreError)
    (job,) = one_of_each(broker, "good")
    leases.add(later := new_tag(job), job)
    assert board.may_start(later), "it need not wait for a heartbeat"
    for tag in (bad, later):
        leases.pop(tag)


@pytest.mark.usefixtures("by_hand")
def test_what_was_handed_back_is_not_handed_back_again_with_what_could_not_be(server: Server) -> None:
    lost: list[str] = []

    class Note:
        @hookimpl
        def relay_lease_lost(self, queue: str) -> None:
            lost.append(queue)

    with Broker(server.url, plugins=[Note()]) as broker:
        leases, jobs = Leases(broker), one_of_each(broker, "bad", "good")
        tags = [new_tag(job) for job in jobs]
        for tag, job in zip(tags, jobs, strict=True):
            leases.add(tag, job)
        owners = broker.settings.keys("bad").owners
        kept = broker.store.raw("DUMP", owners)
        spoil(broker, "bad")
        leases.hand_back(tags)
        assert len(broker.claim("good")) == 1, "which is another worker's now"
        with pytest.raises(StoreError):
            leases.flush()
        broker.store.raw("RESTORE", owners, 0, kept, "REPLACE")
        leases.flush()
        assert len(broker.claim("bad")) == 1
    assert lost == []


@pytest.mark.usefixtures("by_hand")
def test_the_thread_beside_gevents_extends_what_it_can(broker: Broker) -> None:
    leases, jobs = Leases(broker), one_of_each(broker, "bad", "good")
    tags = [new_tag(job) for job in jobs]
    for tag, job in zip(tags, jobs, strict=True):
        leases.add(tag, job)
    spoil(broker, "bad")
    assert not greenbeat._extend(leases, broker.store)
    extended = [held.until > held.job.expires_at for held in leases.snapshot()]
    assert extended == [False, True]
    for tag in tags:
        leases.pop(tag)


# one server of a cluster hangs


@pytest.fixture(scope="module")
def slow_to_judge() -> Iterator[Cluster]:
    """A cluster that takes no server for dead within these tests."""
    with Cluster("valkey", options={"cluster-node-timeout": "300000"}) as cluster:
        yield cluster


def apart(cluster: Cluster, broker: Broker) -> tuple[str, str, Server]:
    """Two queues on two servers, and the server of the first."""
    servers = {f"q{n}": cluster.primary_of(cluster.slot_of(broker.settings.keys(f"q{n}").jobs)) for n in range(20)}
    first, server = next(iter(servers.items()))
    return first, next(queue for queue, other in servers.items() if other is not server), server


Keep = Callable[[Broker, list[Job]], Any]


@contextmanager
def by_worker(broker: Broker, jobs: list[Job]) -> Iterator[None]:
    held = Held()
    for job in jobs:
        held.add(job)
    heartbeat = Heartbeat(broker, held)
    heartbeat.start()
    yield
    heartbeat.stop()


@contextmanager
def by_dramatiq(broker: Broker, jobs: list[Job]) -> Iterator[None]:
    lines, gate = [], Gate(broker.settings)
    for job in jobs:
        lines.append(Line(broker, job.queue, gate))
        lines[-1].join(Holding({job.token: Lease(job)}))
    lines[0]._acks.append(jobs[0])
    heartbeat = dramatiq_heartbeat.Heartbeat(broker, lambda: lines)
    heartbeat.start()
    yield
    heartbeat.stop()


@contextmanager
def by_celery(broker: Broker, jobs: list[Job]) -> Iterator[None]:
    leases = Leases(broker)
    for job in jobs:
        leases.add(tag := new_tag(job), job)
        if job is jobs[0]:
            leases.ack_later(tag)
    yield
    leases.after_fork()  # it holds nothing any more, which ends its thread


@pytest.mark.slow
@pytest.mark.parametrize("keep", [by_worker, by_dramatiq, by_celery])
def test_a_server_that_hangs_holds_up_no_heartbeat_of_the_others(slow_to_judge: Cluster, keep: Keep) -> None:
    cluster = slow_to_judge
    cluster.reset()
    with Broker(cluster.url, lease=4.0) as broker, Broker(cluster.url) as other:
        hangs, there, server = apart(cluster, broker)
        assert other.claim(there) == []
        jobs = one_of_each(broker, hangs, there)
        leases, extended = broker.settings.keys(there).leases, set[float]()

        def kept() -> bool:
            assert other.claim(there) == [], "another worker has got it"
            extended.add(float(other.store.raw("ZSCORE", leases, jobs[1].id)))
            return len(extended) > 8

        server.pause()
        try:
            with keep(broker, jobs):
                eventually(kept, "its lease to be extended again and again", 60)
        finally:
            server.resume()


@pytest.mark.slow
def test_a_server_that_hangs_leaves_a_worker_to_the_queues_of_the_others(
    slow_to_judge: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = slow_to_judge
    cluster.reset()
    done: list[bytes] = []
    with Broker(cluster.url) as broker, Broker(cluster.url) as other:
        hangs, there, server = apart(cluster, broker)
        worker = Worker(broker, lambda job: done.append(job.payload), [hangs, there], concurrency=1, prefetch=0)
        working = threading.Thread(target=worker.run)
        working.start()
        try:
            other.enqueue(there, b"")
            eventually(lambda: done, "the worker to be at work")
            server.pause()
            # one at a time, and it turns to the other queue before each
            other.enqueue_many(there, [b""] * 99)
            eventually(lambda: len(done) == 100, "one job after the other", 60)
            tries = [record for record in caplog.records if "cannot be reached" in record.getMessage()]
            assert 0 < len(tries) < 50, "it was tried less often than others got a job done"
        finally:
            server.resume()
            worker.stop()
            working.join(60)
    assert not working.is_alive()


def test_a_queue_that_was_put_off_is_asked_as_if_this_worker_had_taken_its_marker(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it may have, over a connection that was lost: then it is this worker that has to wake others again. A worker
    that has other queues to look after looks for it in between."""
    worker, asked = Worker(broker, lambda job: None, ["back", "other"]), list[tuple[str, bool]]()
    away = [{broker.settings.keys("back").marker}] * 3

    def exchange(queue: str, _room: int, woken: bool) -> Any:
        asked.append((queue, woken))
        if len(asked) == 4:
            worker.stop()
        return [], None

    def rung(_bell: object) -> bool:
        away.pop()
        return not away

    monkeypatch.setattr(Bell, "away", property(lambda _bell: away[0] if away else frozenset()))
    monkeypatch.setattr(Bell, "rung", rung)
    monkeypatch.setattr(worker, "_exchange", exchange)
    monkeypatch.setattr(worker, "_rest", lambda _wait: False)
    worker.run()
    assert asked[:4] == [("other", False), ("other", False), ("back", True), ("other", True)]
