"""Promises 7 and 8: a delay waits in the store, an idle worker costs almost nothing, and work starts at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest

from relay_core import AsyncBroker
from relay_core.broker import Broker
from relay_core.connection.resting import MOST, RestingBells
from relay_core.job import Claimed
from relay_core.operations import Settings, Wait, Waited
from relay_core.testing import advance
from relay_core.validation import JobSpec
from tests.servers import Server, eventually
from tests.signals import handled_by


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, lease=60.0) as broker:
        yield broker


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No idle claim looks by itself, as it else does every 5 s: whatever it finds it was woken for."""
    monkeypatch.setattr(Settings, "max_block", 3600.0)


needs_waking = pytest.mark.usefixtures("unasked")


class Waiter(threading.Thread):
    """A worker that waits for one job."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(daemon=True)
        self.broker = broker
        self.found: Claimed | None = None
        self.ended, self.busy = time.monotonic(), 0.0
        self.start()

    def run(self) -> None:
        self.found = self.broker.claim("q", wait=3600.0)
        self.ended, self.busy = time.monotonic(), time.thread_time()

    def result(self) -> Claimed:
        self.join(40)
        assert self.found is not None, "still waiting"
        return self.found


def blocked(server: Server, count: int = 1) -> None:
    eventually(lambda: server.info("clients")["blocked_clients"] == str(count), f"{count} blocked workers")


def calls(server: Server, *names: str) -> int:
    """How often clients sent these commands since the last CONFIG RESETSTAT."""
    stats = server.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", "calls=0").partition("calls=")[2].partition(",")[0]) for name in names)


def test_a_delayed_job_waits_in_the_store_and_no_worker_holds_it(broker: Broker) -> None:
    broker.enqueue_many("q", [JobSpec(b"x", delay=3600.0) for _ in range(500)])
    assert broker.claim("q", 200) == []
    broker.enqueue("q", b"now")
    (job,) = broker.claim("q", 200)
    broker.nack(job, "again", delay=3600.0)
    assert broker.claim("q", 200) == []
    stats = broker.stats("q")
    assert (stats.delayed, stats.inflight, stats.ready) == (501, 0, 0)


def test_an_idle_worker_sends_less_than_a_command_a_second(server: Server, broker: Broker) -> None:
    waiter = Waiter(broker)
    blocked(server)
    server.cli("CONFIG", "RESETSTAT")
    began = time.monotonic()
    waiter.join(3.0)
    assert waiter.is_alive()
    assert calls(server, "evalsha", "bzpopmin") <= time.monotonic() - began
    broker.enqueue("q", b"x")
    assert len(waiter.result()) == 1
    assert waiter.busy < 1.0


@needs_waking
def test_a_waiting_worker_starts_new_work_at_once(server: Server, broker: Broker) -> None:
    waiter = Waiter(broker)
    blocked(server)
    broker.enqueue("q", b"x")
    assert len(waiter.result()) == 1


@needs_waking
@pytest.mark.parametrize("known", [None, 3600.0], ids=["first due time", "earlier due time"])
def test_a_waiting_worker_starts_a_delayed_job_when_it_is_due(
    server: Server, broker: Broker, known: float | None
) -> None:
    if known:
        broker.enqueue("q", b"much later", delay=known)
    waiter = Waiter(broker)
    blocked(server)
    sent = time.monotonic()
    broker.enqueue("q", b"x", delay=0.5)
    assert [job.payload for job in waiter.result()] == [b"x"]
    assert waiter.ended - sent >= 0.49


@needs_waking
@pytest.mark.parametrize("how", ["nack", "release", "requeue", "resume", "expiry"])
def test_a_waiting_worker_hears_of_work_that_comes_back(server: Server, broker: Broker, how: str) -> None:
    broker.enqueue("q", b"x")
    with Broker(server.url, lease=0.5) as short:
        (job,) = short.claim("q")
        if how == "requeue":
            short.nack(job, dead=True)
        if how == "resume":
            short.release(job)
            short.pause("q")
        if how in ("nack", "release"):
            short.extend(job, 60.0)
        waiter = Waiter(broker)
        blocked(server)
        if how == "nack":
            short.nack(job, delay=0.0)
        elif how == "release":
            short.release(job)
        elif how == "requeue":
            short.requeue("q")
        elif how == "resume":
            short.resume("q")
        assert len(waiter.result()) == 1


def test_a_retry_that_is_due_before_all_else_wakes_a_worker_which_has_to_look_earlier(broker: Broker) -> None:
    broker.enqueue("q", b"x")
    (job,) = broker.claim("q")
    marker = broker.settings.keys("q").marker
    broker.store.raw("ZPOPMIN", marker)
    broker.nack(job, delay=5.0)
    assert broker.store.raw("ZCARD", marker) == 1


@pytest.mark.parametrize("how", ["ack", "ack of two", "ack after a retry", "nack", "finish", "release", "reap"])
def test_the_end_of_a_job_wakes_a_worker_that_max_inflight_held_back(server: Server, broker: Broker, how: str) -> None:
    broker.limit("q", max_inflight=2)
    broker.enqueue_many("q", [b"x"] * 5)
    if how == "ack after a retry":
        broker.nack(broker.claim("q")[0], delay=0.0)
        broker.ack_many(broker.claim("q", 2))
        broker.ack_many(broker.claim("q", 2))
        broker.enqueue_many("q", [b"x"] * 5)
    jobs = broker.claim("q", 2)
    assert broker.claim("q").limited == "max_inflight"
    server.cli("DEL", broker.settings.keys("q").marker)
    if how == "nack":
        broker.nack(jobs[0], delay=60.0)
    elif how == "finish":
        broker.finish("q", jobs)
    elif how == "release":
        broker.release(jobs[0])
    elif how == "reap":
        broker.extend(jobs[0], 0.1)
        eventually(lambda: broker.reap("q"), "the end of the lease")
    else:
        broker.ack_many(jobs if how == "ack of two" else jobs[:1])
    assert server.cli("EXISTS", broker.settings.keys("q").marker) == 1


@needs_waking
def test_wakes_chain_through_many_workers_without_a_herd(server: Server, broker: Broker) -> None:
    waiters = [Waiter(broker) for _ in range(20)]
    blocked(server, 20)
    server.cli("CONFIG", "RESETSTAT")
    broker.enqueue_many("q", [b"x"] * 5)
    eventually(lambda: sum(waiter.found is not None for waiter in waiters) == 5, "five workers to wake one another")
    # each of five claims, perhaps in two steps; one more may look in vain
    assert calls(server, "evalsha") <= 16
    blocked(server, 15)
    broker.enqueue_many("q", [b"x"] * 15)
    assert all(len(waiter.result()) == 1 for waiter in waiters)
    assert broker.stats("q").ready == 0


def test_a_wake_up_that_a_killed_worker_took_is_made_good(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_core.operations.settings._MAX_BLOCK", 3600.0)
    with Broker(server.url, lease=1.5) as brisk:  # looks by itself every half second
        waiter = Waiter(brisk)
        blocked(server)
        # stored, with the wake-up taken by somebody who never claimed
        take = "return redis.call('RPUSH', KEYS[1], 'it') and redis.call('HSET', KEYS[2], 'it', ARGV[1])"
        q = brisk.settings.keys("q")
        brisk.enqueue("q", b"x", delay=3600.0)  # the queue's level is known, and no one is blocked on the marker
        server.cli("EVAL", take, 2, q.ready[0], q.jobs, b"1 0 0 \nx")
        assert [job.id for job in waiter.result()] == ["it"]


@needs_waking
def test_a_wait_ends_in_time_when_nothing_comes(broker: Broker) -> None:
    began = time.monotonic()
    assert broker.claim("q", wait=0.4) == []
    assert time.monotonic() - began >= 0.39


@needs_waking
def test_a_worker_of_several_queues_wakes_for_each(server: Server, broker: Broker) -> None:
    for queue in ("b", "a"):
        found: list[Claimed] = []
        thread = threading.Thread(
            target=lambda: found.append(broker.claim(["a", "b"], wait=3600.0)),  # noqa: B023
            daemon=True,
        )
        thread.start()
        blocked(server)
        broker.enqueue(queue, b"x")
        thread.join(40)
        assert [job.queue for job in found[0]] == [queue]


def test_a_claim_takes_its_queues_from_whatever_they_come_in_however_often_it_looks(broker: Broker) -> None:
    broker.enqueue("b", b"x", delay=0.2)
    (job,) = broker.claim((name for name in "ab"), wait=30.0)
    assert job.queue == "b"


@pytest.mark.parametrize("queues", [("poisoned", "busy"), ("busy", "poisoned")])
def test_who_waits_for_several_queues_looks_at_once_again_where_one_of_them_asks_for_it(
    server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch, queues: tuple[str, str]
) -> None:
    """All that was taken had used up its deliveries, and there is more; the other queue says: in a minute."""
    broker.enqueue("poisoned", b"poison")
    broker.claim("poisoned")
    advance(broker, 100, "poisoned")
    broker.reap("poisoned")
    broker.enqueue("poisoned", b"good")
    broker.enqueue("busy", b"")
    broker.claim("busy")
    waits: list[float] = []
    with Broker(server.url, lease=60.0, max_deliveries=1) as strict:
        monkeypatch.setattr(strict, "_wait", lambda step: waits.append(step.timeout) or Waited(False))
        (job,) = strict.claim(queues, wait=30.0)
    assert job.payload == b"good"
    assert waits == [0.001]


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
@pytest.mark.parametrize(
    ("claims", "most"),
    [(list(permutations("abcd")), 1), ([("a", f"b{n}") for n in range(MOST + 10)], MOST)],
    ids=["orders", "sets"],
)
def test_a_process_that_names_its_queues_in_many_ways_keeps_few_connections(
    server: Server, kind: str, claims: list[tuple[str, ...]], most: int
) -> None:
    """As one does that asks them in another order each time, so that none starves."""

    def clients() -> int:
        return int(server.info("clients")["connected_clients"])

    async def awaited() -> int:
        async with AsyncBroker(server.url) as broker:
            for queues in claims:
                assert await broker.claim(queues, wait=0.001) == []
            return clients()

    before = clients()
    if kind == "asyncio":
        kept = asyncio.run(awaited())
    else:
        with Broker(server.url) as broker:
            for queues in claims:
                assert broker.claim(queues, wait=0.001) == []
            kept = clients()
    assert kept - before <= most + 1, "and the one for commands"
    eventually(lambda: clients() == before, "all are given back")


def test_a_wake_up_of_one_queue_is_passed_on_by_who_finds_enough_in_another(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = broker.settings.keys("b").marker

    def both_come(step: Wait) -> Waited:
        assert marker in step.markers
        broker.enqueue("a", b"x")
        broker.enqueue("b", b"y")
        assert broker.store.raw("ZPOPMIN", marker), "the server wakes who waits with one of the markers, this one"
        return Waited(True)

    monkeypatch.setattr(broker, "_wait", both_come)
    assert [job.queue for job in broker.claim(["a", "b"], wait=30.0)] == ["a"]
    assert broker.store.raw("EXISTS", marker), "another worker hears of the job in b"


@pytest.mark.parametrize(
    "claims",
    [lambda consumer: consumer.claim("q", wait=30.0), lambda consumer: consumer.finish("q", count=1)],
    ids=["claim", "finish"],
)
def test_a_task_that_is_cancelled_in_a_claim_takes_no_lease_with_it(
    broker: Broker, server: Server, monkeypatch: pytest.MonkeyPatch, claims: Callable[[AsyncBroker], Any]
) -> None:
    async def cut_short() -> None:
        async with AsyncBroker(server.url, lease=60.0) as consumer:
            (first,) = await consumer.claim("q")  # the connection is open from here on, the levels in use are known
            await consumer.ack(first)
            sent, run = asyncio.Event(), consumer.store.run

            async def telling(command: Any) -> Any:
                sent.set()
                return await run(command)

            monkeypatch.setattr(consumer.store, "run", telling)
            server.pause()
            task = asyncio.ensure_future(claims(consumer))
            await sent.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server.resume()

    broker.enqueue_many("q", [b"", b""])
    asyncio.run(cut_short())
    (job,) = broker.claim("q")
    assert job.deliveries == 1


def test_a_bell_that_a_handler_of_signals_takes_is_handed_to_nobody_else() -> None:
    class Ringing(bytes):
        """A marker: a signal comes as it is looked for."""

        __hash__ = bytes.__hash__

        def __eq__(self, other: object) -> bool:
            ring()
            return bytes.__eq__(self, other)

    bells, taken = RestingBells[str](), list[Any]()
    for bell in ("first", "second"):
        bells.put([b"m"], bell)
    with handled_by(lambda: taken.append(bells.take([b"m"]))) as ring:
        taken.append(bells.take([Ringing(b"m")]))
    assert taken == ["second", "first"]
