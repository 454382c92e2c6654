"""A busy publisher's jobs with ids that nobody else can have are stored without a script: the same promises."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker, Enqueued, JobSpec
from relay_core.clock import sent_now
from relay_core.commands import enqueues
from relay_core.commands.enqueues import LARGE
from relay_core.connection import clients
from relay_core.connection.pool import Link
from relay_core.errors import LayoutError, NotDurable, StoreError, Unavailable
from relay_core.job import FreshId, State
from relay_core.operations import serverclock
from tests.proxy import Proxy, to_port
from tests.servers import Server, eventually
from tests.topologies import Cluster

KEY = "relay:{q:0}:"


def scripts_of(server: Server, act: Callable[[], Any]) -> tuple[int, int]:
    """How many scripts, and how many transactions, the server ran for it."""
    server.cli("CONFIG", "RESETSTAT")
    act()
    told = server.cli("INFO", "commandstats").decode()
    calls = dict(line.removeprefix("cmdstat_").split(":calls=") for line in told.split() if ":calls=" in line)
    return tuple(int(calls.get(name, "0").partition(",")[0]) for name in ("evalsha", "exec"))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asserted of a busy publisher holds however long a test takes between two jobs."""
    monkeypatch.setattr(serverclock, "LATELY", 60.0)


@pytest.fixture
def busy(broker: Broker) -> Broker:
    """One that has heard the server's time a moment ago, and that jobs of no priority are in use."""
    broker.enqueue("q", b"first")
    broker.enqueue("q", b"second")
    broker.ack_many(broker.claim("q", 2))
    return broker


def test_it_takes_no_script_and_is_the_same_job(busy: Broker, server: Server) -> None:
    found: list[Enqueued] = []
    assert scripts_of(server, lambda: found.append(busy.enqueue("q", b"x", headers={"a": "b"}))) == (0, 1)
    assert scripts_of(server, lambda: found.append(busy.enqueue("q", b"y", max_retries=3, headers={}))) == (0, 1)
    first, second = busy.claim("q", 2)
    assert (first.id, first.payload, dict(first.headers)) == (found[0].id, b"x", {"a": "b"})
    assert (second.id, second.payload) == (found[1].id, b"y")
    busy.ack_many([first, second])
    assert busy.audit("q").clean
    assert busy.stats("q").pending == 0


def test_so_it_does_for_asyncio(server: Server) -> None:
    async def main() -> None:
        async with AsyncBroker(server.url) as broker:
            await broker.enqueue("q", b"1")
            await broker.enqueue("q", b"2")
            server.cli("CONFIG", "RESETSTAT")
            await broker.enqueue("q", b"3")
            assert b"cmdstat_exec:calls=1," in server.cli("INFO", "commandstats")
            assert [job.payload for job in await broker.claim("q", 5)] == [b"1", b"2", b"3"]

    asyncio.run(main())


@pytest.mark.parametrize("more", [{}, {"max_retries": 3}], ids=["straight", "flow"])
@pytest.mark.parametrize(
    "options", [{"id": "mine"}, {"delay": 5.0}, {"dedup_key": "k"}, {"priority": 3}], ids=lambda o: next(iter(o))
)
def test_what_depends_on_what_is_there_takes_one(
    options: dict[str, Any], more: dict[str, Any], busy: Broker, server: Server
) -> None:
    scripts, transactions = scripts_of(server, lambda: busy.enqueue("q", b"x", **options, **more))
    assert scripts >= 1
    assert not transactions


@pytest.mark.parametrize("more", [{}, {"max_retries": 3}], ids=["straight", "flow"])
def test_each_queue_and_level_is_known_by_itself(more: dict[str, Any], broker: Broker, server: Server) -> None:
    def enqueue(queue: str, level: int) -> tuple[int, int]:
        return scripts_of(server, lambda: broker.enqueue(queue, f"{queue}{level}".encode(), priority=level, **more))

    for queue in ("p", "q"):
        for level in (3, 0):
            assert [enqueue(queue, level)[1] for _ in range(3)] == [0, 0, 1]
    for queue in ("p", "q"):
        assert enqueue(queue, 3) == (0, 1)
        jobs = broker.claim(queue, 9)
        assert [job.payload.decode() for job in jobs] == [f"{queue}3"] * 4 + [f"{queue}0"] * 3
        broker.ack_many(jobs)
        assert broker.audit(queue).clean


def test_so_does_the_first_after_a_while_which_asks_for_the_time(
    busy: Broker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(seconds: float) -> None:
        for module in (enqueues, serverclock):
            monkeypatch.setattr(module, "sent_now", lambda: sent_now() + seconds)

    shift(serverclock.LATELY)
    assert scripts_of(server, lambda: busy.enqueue("q", b"x")) == (1, 0)
    assert scripts_of(server, lambda: busy.enqueue("q", b"x")) == (0, 1)
    shift(-1.0)  # of another boot, by then
    assert scripts_of(server, lambda: busy.enqueue("q", b"x")) == (1, 0)


def test_its_creation_is_told_by_the_servers_clock(
    busy: Broker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def server_time() -> float:
        seconds, micros = server.cli("TIME")
        return int(seconds) + int(micros) / 1e6

    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    before = server_time()
    assert scripts_of(server, lambda: busy.enqueue("q", b"x")) == (0, 1)
    (job,) = busy.claim("q")
    # what the client heard was some time on its way, and milliseconds are cut off
    assert before - serverclock.LATELY < job.created_at <= server_time()


def test_the_time_goes_on_between_two_times_that_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    at = [100.0]
    monkeypatch.setattr(serverclock, "sent_now", lambda: at[0])
    clock = serverclock.ServerClock()
    assert clock.now_ms("q", 0) is None
    clock.set("q", 0, 5_000, at[0] - 59.0)
    assert (clock.now_ms("q", 0), clock.now_ms("q", 1), clock.now_ms("p", 0)) == (5_000, None, None)
    at[0] += 0.25
    assert clock.now_ms("q", 0) == 5_250
    at[0] += 59.75
    assert clock.now_ms("q", 0) is None
    clock.set("q", 0, 6_000, at[0])
    at[0] -= 0.1  # no clock that is used does that
    assert clock.now_ms("q", 0) is None


def test_a_time_that_was_long_on_its_way_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverclock, "sent_now", lambda: 100.0)
    clock = serverclock.ServerClock()
    clock.set("q", 0, 5_000, 100.0 - serverclock.LATELY)
    assert clock.now_ms("q", 0) is None


def test_the_time_is_asked_for_again_where_the_machine_slept_before_it_came(
    busy: Broker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def slept() -> float:
        asked.append(sent_now())
        return asked[-1] + serverclock.LATELY * len(asked)

    for module in (enqueues, serverclock):
        monkeypatch.setattr(module, "sent_now", slept)
    for _ in range(3):
        assert scripts_of(server, lambda: busy.enqueue("q", b"x")) == (1, 0)
    assert len(asked) > 3


def test_many_queues_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverclock, "MOST", 2)
    clock = serverclock.ServerClock()
    for n in range(5):
        clock.set(f"q{n}", 0, 1, sent_now())
    assert clock.now_ms("q4", 0) is not None
    assert clock.now_ms("q3", 0) is None


def test_one_whose_queue_is_deleted_meanwhile_is_found_and_its_queue_listed(busy: Broker, server: Server) -> None:
    with Broker(server.url) as operator:
        assert operator.delete_queue("q")
        found = busy.enqueue("q", b"x")
        assert not found.duplicate
        assert operator.queues() == ["q"]
        (job,) = operator.claim("q")
        assert (job.id, job.payload) == (found.id, b"x")


def test_a_worker_that_it_woke_before_its_level_was_in_use_wakes_again(busy: Broker, server: Server) -> None:
    with Broker(server.url) as operator:
        assert operator.delete_queue("q")
    flow = busy.operations.enqueue("q", JobSpec(b"x"))
    answer = busy.store.run(next(flow))  # type: ignore[arg-type]
    assert server.cli("ZPOPMIN", f"{KEY}m") == [b"w", b"0"]  # there is nothing yet that it would find
    busy.drive(flow, (answer, lambda answer: answer))
    assert server.cli("ZCARD", f"{KEY}m") == 1
    assert [job.payload for job in busy.claim("q")] == [b"x"]


def test_one_whose_level_is_not_in_use_any_more_is_found(busy: Broker, server: Server) -> None:
    with Broker(server.url) as operator:
        assert operator.delete_queue("q")
        operator.enqueue("q", b"urgent", priority=9)
        busy.enqueue("q", b"x")
        assert [job.payload for job in operator.claim("q", 5)] == [b"urgent", b"x"]
        assert operator.audit("q").clean


def test_one_whose_level_is_not_in_use_though_the_lowest_is_is_found(broker: Broker, server: Server) -> None:
    for _ in range(2):
        broker.enqueue("q", b"", priority=3)
    broker.ack_many(broker.claim("q", 9))
    with Broker(server.url) as operator:
        assert operator.delete_queue("q")
        operator.enqueue("q", b"low")
        broker.enqueue("q", b"x", priority=3)
        assert [job.payload for job in operator.claim("q", 5)] == [b"x", b"low"]
        assert operator.audit("q").clean


def test_one_whose_queue_has_settings_alone_is_found(busy: Broker, server: Server) -> None:
    with Broker(server.url) as operator:
        assert operator.delete_queue("q")
        operator.pause("q")
        busy.enqueue("q", b"x")
        assert not operator.claim("q")
        operator.resume("q")
        assert [job.payload for job in operator.claim("q")] == [b"x"]
        assert operator.audit("q").clean


@pytest.mark.parametrize("payload", [b"x", b"x" * LARGE], ids=["small", "large"])
def test_a_queue_of_a_newer_layout_refuses_it_and_holds_nothing_of_it(
    payload: bytes, busy: Broker, server: Server
) -> None:
    kept = busy.enqueue("q", b"kept").id
    server.cli("HSET", f"{KEY}c", "v", "99")
    for _ in range(3):
        with pytest.raises(LayoutError):
            busy.enqueue("q", payload)
    assert (server.cli("HKEYS", f"{KEY}j"), server.cli("LRANGE", f"{KEY}r0", 0, -1)) == ([kept.encode()],) * 2
    assert not server.cli("EXISTS", f"{KEY}y")


def test_one_that_a_newer_relay_took_at_once_is_its_own(
    busy: Broker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cli("HSET", f"{KEY}c", "v", "99")
    run = busy.store.run

    def taken(command: Any) -> Any:
        if command.script.name == "retract":
            server.cli("LPOP", f"{KEY}r0")
        return run(command)

    monkeypatch.setattr(busy.store, "run", taken)
    with pytest.raises(LayoutError):
        busy.enqueue("q", b"x")
    assert server.cli("HLEN", f"{KEY}j") == 1


@pytest.mark.parametrize("id", ["one", FreshId("one")], ids=["named", "fresh"])
def test_a_refusal_takes_no_job_of_the_same_name_with_it(
    id: str, busy: Broker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy.enqueue("q", b"theirs", id="one")
    run = busy.store.run

    def upgraded(command: Any) -> Any:
        if command.script.name == "enqueue":
            server.cli("HSET", f"{KEY}c", "v", "99")
        return run(command)

    monkeypatch.setattr(busy.store, "run", upgraded)
    with pytest.raises(LayoutError):
        busy.enqueue("q", b"mine", id=id)
    server.cli("HSET", f"{KEY}c", "v", "1")
    assert [job.payload for job in busy.claim("q")] == [b"theirs"]


def test_one_that_was_done_by_the_time_its_lost_reply_is_missed_is_not_stored_again(redis_server: Server) -> None:
    with Proxy(to_port(redis_server.port)) as proxy, Broker(proxy.url) as broker, Broker(redis_server.url) as worker:
        broker.enqueue("q", b"1")
        broker.enqueue("q", b"2")
        worker.ack_many(worker.claim("q", 2))
        settle = broker.store.settle

        def done_meanwhile(*args: Any, **kwargs: Any) -> Any:
            worker.ack_many(worker.claim("q", 5))
            return settle(*args, **kwargs)

        broker.store.settle = done_meanwhile  # type: ignore[method-assign]
        proxy.cut_reply(b"HSETNX")
        assert not broker.enqueue("q", b"3").duplicate
        assert worker.stats("q").pending == 0


@pytest.mark.parametrize("after", [0, 3, 5, 13, 14, 41, 45, 60, 80], ids=lambda after: f"{after} bytes")
def test_one_whose_reply_is_cut_anywhere_is_stored_once(after: int, redis_server: Server) -> None:
    with Proxy(to_port(redis_server.port)) as proxy, Broker(proxy.url) as broker:
        broker.enqueue("q", b"1")
        broker.enqueue("q", b"2")
        proxy.cut_reply(b"HSETNX", after=after)
        found = broker.enqueue("q", b"3")
        assert not proxy.pending
        assert not found.duplicate
        jobs = broker.claim("q", 9)
        assert [job.payload for job in jobs] == [b"1", b"2", b"3"]
        assert jobs[-1].id == found.id
        assert broker.ack_many(jobs) == [1, 1, 1]
        assert broker.audit("q").clean


def test_full_memory_refuses_it_as_a_whole(busy: Broker, server: Server) -> None:
    with Broker(server.url, retry_for=0.0) as broker:
        broker.enqueue("q", b"1")
        broker.enqueue("q", b"2")
        before = server.cli("DBSIZE"), broker.stats("q").ready
        server.cli("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Unavailable, match="memory is full") as caught:
            broker.enqueue("q", b"3")
        assert not caught.value.maybe_executed
        server.cli("CONFIG", "SET", "maxmemory", "0")
        assert (server.cli("DBSIZE"), broker.stats("q").ready) == before


def test_one_that_is_repeated_is_stored_with_the_time_of_then(busy: Broker, server: Server) -> None:
    server.cli("CONFIG", "RESETSTAT")
    server.cli("CONFIG", "SET", "maxmemory", "1")
    found: list[Enqueued] = []
    thread = threading.Thread(target=lambda: found.append(busy.enqueue("q", b"x")))
    thread.start()
    eventually(lambda: "errorstat_OOM" in server.info("errorstats"), "it is refused")
    server.cli("CONFIG", "SET", "maxmemory", "0")
    thread.join(30)
    assert server.info("commandstats").get("cmdstat_evalsha", "").startswith("calls=1,")
    assert [job.id for job in busy.claim("q", 5)] == [found[0].id]


def test_a_part_that_fails_is_told(busy: Broker, server: Server) -> None:
    server.cli("DEL", f"{KEY}m")
    server.cli("SET", f"{KEY}m", "no sorted set")
    with pytest.raises(StoreError, match="WRONGTYPE") as caught:
        busy.enqueue("q", b"x")
    assert caught.value.maybe_executed  # the other parts were done, and stay so
    assert [job.payload for job in busy.jobs("q", "ready")] == [b"x"]


def test_a_waiting_worker_wakes(busy: Broker, server: Server) -> None:
    with Broker(server.url) as worker:
        later = threading.Timer(0.2, busy.enqueue, ("q", b"x"))
        later.start()
        assert [job.payload for job in worker.claim("q", wait=10.0)] == [b"x"]
        later.join()


def test_an_id_that_is_not_fresh_after_all_is_told_and_no_job_is_lost(busy: Broker, server: Server) -> None:
    busy.enqueue("q", b"theirs", id="one")
    assert busy.enqueue("q", b"mine", id=FreshId("one")) == Enqueued("one", duplicate=True)
    assert [job.payload for job in busy.claim("q", 1)] == [b"theirs"]


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_its_durability_is_confirmed(shell: str, server: Server) -> None:
    options: dict[str, Any] = {"durability": "replica:1", "durability_timeout": 0.01}

    async def live() -> None:
        async with AsyncBroker(server.url, **options) as broker:
            broker.operations = heard.operations
            await broker.enqueue("q", b"x")

    with Broker(server.url) as heard, Broker(server.url, **options) as broker:
        for _ in range(2):
            heard.enqueue("q", b"")
        broker.operations = heard.operations

        def unconfirmed() -> None:
            with pytest.raises(NotDurable, match="only 0 of 1 replicas"):
                asyncio.run(live()) if shell == "async" else broker.enqueue("q", b"x")

        assert scripts_of(server, unconfirmed) == (0, 1)
        assert heard.stats("q").ready == 3


def test_it_follows_a_slot_of_a_cluster_that_moves(cluster: Cluster) -> None:
    with Broker(cluster.url) as broker:
        broker.enqueue("moving", b"1")
        slot = cluster.slot_of(broker.settings.keys("moving").jobs.decode())
        source, target = cluster.begin_move(slot)
        broker.operations._clock.set("moving", 0, broker.operations._clock.now_ms("moving", 0) or 1, sent_now())
        found: list[Enqueued] = []
        thread = threading.Thread(target=lambda: found.append(broker.enqueue("moving", b"2")))
        thread.start()
        eventually(lambda: target.info("commandstats").get("cmdstat_asking"), "it is asked at the new owner")
        cluster.hand_over(slot, source, target)
        thread.join(30)
        broker.enqueue("moving", b"3")
        jobs = broker.claim("moving", 9)
        assert [job.payload for job in jobs] == [b"1", b"2", b"3"]
        assert jobs[1].id == found[0].id
        assert broker.ack_many(jobs) == [1, 1, 1]
        assert broker.audit("moving").clean


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    sent: list[bytes] = []
    send = Link.send
    monkeypatch.setattr(Link, "send", lambda self, blocks: sent.extend(blocks) or send(self, blocks))
    return sent


def test_all_of_it_goes_in_one_send(busy: Broker, wires: list[bytes]) -> None:
    found = busy.enqueue("q", b"x")
    (sent,) = wires
    assert sent.startswith(clients.pack(("MULTI",)))
    assert sent.endswith(clients.pack(("EXEC",)))
    assert clients.pack(("RPUSH", f"{KEY}r0", found.id)) in sent


def test_a_flow_that_was_cut_says_that_it_may_be_stored(redis_server: Server) -> None:
    with Proxy(to_port(redis_server.port)) as proxy, Broker(proxy.url, retry_for=0.0) as broker:
        broker.enqueue("q", b"1")
        broker.enqueue("q", b"2")
        proxy.cut_reply(b"HSETNX")
        with pytest.raises(Unavailable) as caught:
            broker.drive(broker.operations.enqueue("q", JobSpec(b"3")))
        assert caught.value.maybe_executed


def test_a_large_payload_lies_apart_as_ever(busy: Broker, server: Server) -> None:
    payload = bytes(range(256)) * (LARGE // 256)
    found: list[Enqueued] = []
    assert scripts_of(server, lambda: found.append(busy.enqueue("q", payload))) == (0, 1)
    assert server.cli("HGETALL", f"{KEY}y") == [found[0].id.encode(), payload]
    assert len(server.cli("HGET", f"{KEY}j", found[0].id)) < 100
    (job,) = busy.claim("q")
    assert (job.id, job.payload) == (found[0].id, payload)
    busy.ack(job)
    assert not server.cli("EXISTS", f"{KEY}y")
    assert busy.audit("q").clean


def test_who_sends_large_payloads_alone_hears_the_time_too(server: Server) -> None:
    with Broker(server.url) as broker:
        for _ in range(2):
            broker.enqueue("q", b"x" * LARGE)
        assert scripts_of(server, lambda: broker.enqueue("q", b"x" * 2 * LARGE)) == (0, 1)


def test_a_large_one_whose_queue_is_deleted_meanwhile_keeps_its_payload(busy: Broker, server: Server) -> None:
    with Broker(server.url) as operator:
        assert operator.delete_queue("q")
        busy.enqueue("q", b"x" * LARGE)
        assert operator.queues() == ["q"]
        assert [job.payload for job in operator.claim("q")] == [b"x" * LARGE]


def test_a_large_one_that_is_not_fresh_after_all_leaves_nothing(busy: Broker, server: Server) -> None:
    busy.enqueue("q", b"theirs", id="one")
    assert busy.enqueue("q", b"x" * LARGE, id=FreshId("one")).duplicate
    assert not server.cli("EXISTS", f"{KEY}y")


class Late:
    """A first send that the network held back, as it comes after its repetition has stored the job."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        command = broker.operations.straight("q", b"x")
        assert command is not None
        assert command.plain is not None
        self._command = command
        self.id = self.comes().id

    def comes(self) -> Any:
        return self._broker.store.run(self._command)


@pytest.mark.parametrize("limit", [None, 9])
def test_one_that_comes_after_its_repetition_is_claimed_once(limit: int | None, busy: Broker) -> None:
    first, late, second = busy.enqueue("q", b"1"), Late(busy), busy.enqueue("q", b"2")
    late.comes()
    late.comes()
    third = busy.enqueue("q", b"3")
    busy.limit("q", max_inflight=limit)
    jobs = busy.claim("q", 9)
    assert [job.id for job in jobs] == [first.id, late.id, second.id, third.id]
    assert [job.payload for job in jobs] == [b"1", b"x", b"2", b"3"]
    assert busy.ack_many(jobs) == [1] * 4
    assert busy.audit("q").clean


@pytest.mark.parametrize("becomes", ["inflight", "delayed", "dead"])
def test_a_purge_of_what_is_ready_takes_no_job_that_is_not(becomes: State, busy: Broker) -> None:
    late = Late(busy)
    (job,) = busy.claim("q")
    if becomes != "inflight":
        busy.nack(job, delay=60.0, dead=becomes == "dead")
    busy.enqueue("q", b"waits")
    late.comes()
    assert busy.purge("q", states=["ready"]) == 1
    assert [stored.id for stored in busy.jobs("q", becomes)] == [late.id]
    assert busy.audit("q").clean
    if becomes == "inflight":
        busy.ack(job)


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("becomes", ["inflight", "delayed", "dead"])
def test_one_that_comes_when_its_job_was_claimed_disturbs_it_not(becomes: State, count: int, busy: Broker) -> None:
    late = Late(busy)
    (job,) = busy.claim("q")
    if becomes != "inflight":
        busy.nack(job, delay=60.0, dead=becomes == "dead")
    late.comes()
    assert not busy.claim("q", count)
    assert [stored.id for stored in busy.jobs("q", becomes)] == [late.id]
    if becomes == "inflight":
        busy.ack(job)
    assert busy.audit("q").clean
