"""Large payloads lie beside their records and never pass a script of the hot path: as safe there as the small ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker, Enqueued, JobSpec, commands, hookimpl
from relay_core.commands.enqueues import LARGE
from relay_core.connection import clients
from relay_core.connection.pool import Link
from relay_core.connection.steps import Outcome
from relay_core.errors import LayoutError, RelayError, StoreError, Unavailable
from relay_core.job import Job, State
from tests.proxy import Proxy, to_socket
from tests.servers import Server, eventually
from tests.topologies import Cluster

BIG = bytes(range(256)) * (LARGE // 256)
OTHER = BIG[::-1]


def apart(server: Server, queue: str = "q") -> dict[bytes, bytes]:
    """Payloads by the ids of their jobs."""
    flat = server.cli("HGETALL", f"relay:{{{queue}:0}}:y")
    return dict(zip(flat[::2], flat[1::2], strict=True))


def record(server: Server, id: str, queue: str = "q") -> bytes:
    raw: bytes = server.cli("HGET", f"relay:{{{queue}:0}}:j", id)
    return raw


@pytest.fixture
def big(broker: Broker) -> Job:
    """A claimed job with a large payload."""
    broker.enqueue("q", BIG)
    (job,) = broker.claim("q")
    return job


def test_a_large_payload_lies_beside_its_record_and_a_small_one_in_it(broker: Broker, server: Server) -> None:
    small, large = broker.enqueue("q", BIG[:-1]).id, broker.enqueue("q", BIG).id
    assert apart(server) == {large.encode(): BIG}
    assert len(record(server, small)) > LARGE > 100 > len(record(server, large))
    assert [job.payload for job in broker.claim("q", 2)] == [BIG[:-1], BIG]


@pytest.mark.parametrize("payload", [b"", b"small", BIG])
def test_large_headers_make_no_payload_a_large_one(payload: bytes, broker: Broker, server: Server) -> None:
    headers = {"large": "x" * 2 * LARGE}
    broker.enqueue("q", payload, headers=headers)
    broker.enqueue_many("q", [JobSpec(payload, headers=headers)])
    assert set(apart(server).values()) == ({BIG} if payload == BIG else set())
    assert [(job.payload, dict(job.headers)) for job in broker.claim("q", 2)] == [(payload, headers)] * 2


ENQUEUES: dict[str, Callable[[Broker], object]] = {
    "plain": lambda broker: broker.enqueue("q", BIG),
    "first of its queue": lambda broker: (broker.delete_queue("q"), broker.enqueue("q", BIG)),
    "with an id": lambda broker: broker.enqueue("q", BIG, id="mine"),
    "with options": lambda broker: broker.enqueue("q", BIG, headers={"a": "1", "b": "2"}, max_retries=3, priority=9),
    "due at once": lambda broker: broker.enqueue("q", BIG, at=1.0),
    "with a key": lambda broker: broker.enqueue("q", BIG, dedup_key="key"),
    "many": lambda broker: broker.enqueue_many("q", [JobSpec(BIG, id=f"j{n}") for n in range(3)]),
    "among small ones": lambda broker: broker.enqueue_many("q", [b"a", BIG, b"b"]),
}


@pytest.mark.parametrize("how", ENQUEUES)
def test_however_it_is_enqueued_it_is_claimed_as_it_was_and_leaves_nothing(
    how: str, broker: Broker, server: Server
) -> None:
    if how != "first of its queue":
        broker.ack_many([*broker.claim("q", 9)]) if broker.enqueue("q", b"first") else None
    ENQUEUES[how](broker)
    assert set(apart(server).values()) == {BIG}
    jobs = broker.claim("q", 9)
    assert BIG in {job.payload for job in jobs} <= {BIG, b"a", b"b"}
    assert broker.ack_many(jobs) == [1] * len(jobs)
    assert apart(server) == {}


def test_options_and_headers_are_those_of_the_enqueue(broker: Broker) -> None:
    broker.enqueue("q", BIG, headers={"apart": "no"}, max_retries=3, max_deliveries=2, dedup_key="key")
    (job,) = broker.claim("q")
    assert (dict(job.headers), job.options.max_retries, job.options.max_deliveries) == ({"apart": "no"}, 3, 2)
    broker.nack(job, dead=True)
    assert not broker.enqueue("q", b"", dedup_key="key").duplicate, "its death set the key free"


def test_a_header_of_the_name_of_the_mark_is_a_header(broker: Broker, server: Server) -> None:
    broker.enqueue("q", b"small", headers={"apart": "true"})
    (job,) = broker.claim("q")
    assert (job.payload, dict(job.headers), job.options.apart) == (b"small", {"apart": "true"}, None)


def test_a_payload_that_reads_like_the_mark_is_a_payload(broker: Broker, server: Server) -> None:
    payload = b'{"apart":true}'
    id = broker.enqueue("q", payload).id
    server.cli("HSET", broker.settings.keys("q").payloads, id, BIG)
    assert broker.audit("q", repair=False).findings == {id: "leftover"}
    assert broker.claim("q")[0].payload == payload


def drop(broker: Broker, id: str) -> None:
    assert broker.store.run(commands.drop(broker.settings.keys("q"), [id])) == [True]


def forget(broker: Broker) -> None:
    while broker.dead("q"):  # died in this very millisecond
        broker.store.run(commands.reap(broker.settings.keys("q"), max_deliveries=5, keep_ms=0))


ENDS: dict[str, Callable[[Broker, Job], object]] = {
    "ack": lambda broker, job: broker.ack(job),
    "ack_many": lambda broker, job: broker.ack_many([job]),
    "finish": lambda broker, job: broker.finish("q", [job]),
    "finish and claim": lambda broker, job: broker.finish("q", [job], [], 1),
    "drop": lambda broker, job: (broker.nack(job, dead=True), drop(broker, job.id)),
    "forget": lambda broker, job: (broker.nack(job, dead=True), forget(broker)),
    "purge dead": lambda broker, job: (broker.nack(job, dead=True), broker.purge("q", ["dead"])),
    "purge delayed": lambda broker, job: (broker.nack(job, delay=60), broker.purge("q", ["delayed"])),
    "purge ready": lambda broker, job: (broker.release(job), broker.purge("q", ["ready"])),
    "cancel dead": lambda broker, job: (broker.nack(job, dead=True), broker.cancel("q", job.id)),
    "cancel ready": lambda broker, job: (broker.release(job), broker.cancel("q", job.id)),
}


@pytest.mark.parametrize("how", ENDS)
def test_however_a_job_ends_its_payload_goes_with_it(how: str, broker: Broker, server: Server, big: Job) -> None:
    assert apart(server) == {big.id.encode(): BIG}
    ENDS[how](broker, big)
    assert apart(server) == {}
    assert broker.audit("q", repair=False).clean


WAYS_BACK: dict[str, Callable[[Broker, Job], object]] = {
    "nack": lambda broker, job: broker.nack(job, "why", 0.0),
    "release": lambda broker, job: broker.release(job),
    "requeue": lambda broker, job: (broker.nack(job, dead=True), broker.requeue("q", [job.id])),
}


@pytest.mark.parametrize("how", WAYS_BACK)
def test_whoever_gets_a_job_again_gets_its_payload(how: str, broker: Broker, big: Job) -> None:
    WAYS_BACK[how](broker, big)
    (again,) = broker.claim("q")
    assert (again.id, again.payload) == (big.id, BIG)


def test_a_nack_may_change_the_payload_to_any(broker: Broker, server: Server, big: Job) -> None:
    for payload in (OTHER, b"small", b""):
        broker.nack(big, "why", 0.0, payload=payload)
        (big,) = broker.claim("q")
        assert big.payload == payload
        assert apart(server) == {}, "a script stores what a nack changes, and it lies in the record"
    broker.ack(big)
    assert broker.audit("q", repair=False).clean


def test_people_and_tools_are_shown_payloads(broker: Broker, big: Job) -> None:
    def payloads(state: State) -> set[bytes]:
        (listed,), shown = broker.jobs("q", state), broker.show("q", big.id)
        assert shown is not None
        return {listed.payload, shown.payload}

    assert payloads("inflight") == {BIG}
    broker.release(big)
    assert payloads("ready") == {BIG}
    broker.nack(broker.claim("q")[0], dead=True)
    assert payloads("dead") == {BIG}


def test_a_page_of_dead_letters_counts_the_bytes_of_their_payloads(broker: Broker) -> None:
    broker.enqueue_many("q", [BIG] * 3)
    for job in broker.claim("q", 3):
        broker.nack(job, dead=True)
    command = commands.scan(
        broker.settings.keys("q"), (0, ""), 2**52, 200, records=True, most_bytes=2 * len(BIG) + LARGE // 2
    )
    total, page = broker.store.run(command)
    assert (total, [job.payload for job, _died in page]) == (3, [BIG, BIG])


class Told:
    """Notes the payloads of burials."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    @hookimpl
    def relay_job_dead(self, job: Job) -> None:
        self.payloads.append(job.payload)


@pytest.mark.parametrize("finder", ["claim", "reap", "a claim after a lost one", "a claim with another bound"])
def test_who_hears_of_a_burial_hears_of_the_payload(finder: str, server: Server) -> None:
    told = Told()
    with Broker(server.url, plugins=[told], lease=1.0, max_deliveries=1) as broker:
        broker.enqueue("q", BIG)
        assert broker.claim("q")
        server.cli("ZADD", broker.settings.keys("q").leases, 1, broker.jobs("q", "inflight")[0].id)
        server.cli("HSET", broker.settings.keys("q").config, "due", 1)
        if finder == "a claim after a lost one":
            broker.store.run(commands.reap(broker.settings.keys("q"), max_deliveries=1))  # whose reply nobody got
            (id,) = server.cli("ZRANGE", broker.settings.keys("q").untold, 0, -1)
            server.cli("ZADD", broker.settings.keys("q").untold, 1, id)
        if finder == "a claim with another bound":
            broker.store.run(commands.reap(broker.settings.keys("q"), max_deliveries=2))
            assert broker.stats("q").ready == 1
        with Broker(server.url, plugins=[told], max_deliveries=1) as other:
            other.reap("q") if finder == "reap" else other.claim("q")
        assert told.payloads == [BIG]


def test_the_first_of_a_queue_that_was_deleted_makes_its_name_known_again(broker: Broker, server: Server) -> None:
    broker.ack_many(broker.claim("q") if broker.enqueue("q", b"") else [])
    with Broker(server.url) as other:
        assert other.delete_queue("q")
        assert other.queues() == []
    broker.enqueue("q", BIG)
    assert broker.queues() == ["q"]


# ids that are taken


def test_a_job_that_is_there_keeps_its_payload(broker: Broker, server: Server) -> None:
    cases = [(BIG, OTHER), (BIG, b"small"), (b"small", BIG)]
    for first, second in cases:
        assert not broker.enqueue("q", first, id="mine").duplicate
        assert broker.enqueue("q", second, id="mine").duplicate
        assert broker.enqueue_many("q", [JobSpec(second, id="mine")])[0].duplicate
        assert set(apart(server).values()) == ({BIG} if first == BIG else set())
        (job,) = broker.claim("q")
        assert job.payload == first
        broker.ack(job)


@pytest.mark.parametrize("payloads", [(BIG, OTHER), (b"small", BIG), (BIG, b"small")])
def test_of_several_of_one_id_in_one_call_the_first_is_stored(
    payloads: tuple[bytes, bytes], broker: Broker, server: Server
) -> None:
    answers = broker.enqueue_many("q", [JobSpec(payload, id="mine") for payload in payloads])
    assert [answer.duplicate for answer in answers] == [False, True]
    assert [job.payload for job in broker.claim("q", 2)] == [payloads[0]]


def test_of_several_of_one_id_the_one_whose_key_is_free_is_stored_with_its_payload(broker: Broker) -> None:
    broker.enqueue("q", b"holder", dedup_key="key", priority=9)
    answers = broker.enqueue_many("q", [JobSpec(BIG, id="mine", dedup_key="key"), JobSpec(OTHER, id="mine")])
    assert [answer.duplicate for answer in answers] == [True, False]
    assert [job.payload for job in broker.claim("q", 2)] == [b"holder", OTHER]


def test_duplicates_by_key_leave_no_payload(broker: Broker, server: Server) -> None:
    first = broker.enqueue("q", BIG, dedup_key="key")
    assert broker.enqueue("q", OTHER, dedup_key="key") == Enqueued(first.id, duplicate=True)
    assert apart(server) == {first.id.encode(): BIG}


def test_what_an_enqueue_that_came_to_nothing_left_is_no_other_job_s_payload(broker: Broker, server: Server) -> None:
    broker.enqueue("q", b"first")
    server.cli("HSET", broker.settings.keys("q").payloads, "mine", OTHER)
    assert broker.audit("q").findings == {"mine": "leftover"}
    assert apart(server) == {}
    small = broker.enqueue("q", b"small", priority=9).id
    server.cli("HSET", broker.settings.keys("q").payloads, small, OTHER)
    assert broker.audit("q", repair=False).findings == broker.audit("q").findings == {small: "leftover"}
    assert (apart(server), broker.claim("q")[0].payload) == ({}, b"small")
    server.cli("HSET", broker.settings.keys("q").payloads, "mine", OTHER)
    broker.enqueue("q", BIG, id="mine")
    assert [job.payload for job in broker.claim("q", 2)] == [b"first", BIG]


# trouble on the way


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        yield proxy


@pytest.mark.parametrize("lost", ["request", "reply", "half of the reply"])
@pytest.mark.parametrize("many", [False, True])
def test_one_that_is_sent_again_is_stored_once(lost: str, many: bool, proxy: Proxy, server: Server) -> None:
    with Broker(proxy.url) as broker:
        broker.enqueue("q", BIG, id="before")
        if lost == "request":
            proxy.cut_request(b"HSETNX")
        else:
            proxy.cut_reply(b"HSETNX", after=0 if lost == "reply" else len("+OK\r\n+QUEUED\r\n"))
        if many:
            assert broker.enqueue_many("q", [JobSpec(BIG, id="mine"), b"small"])[0] == Enqueued("mine")
        else:
            assert broker.enqueue("q", BIG, id="mine") == Enqueued("mine")
        assert proxy.pending == 0
        assert apart(server) == {b"before": BIG, b"mine": BIG}
        assert [job.payload for job in broker.claim("q", 9)] == [BIG, BIG, *([b"small"] if many else [])]


def test_one_that_is_sent_again_after_it_was_done_leaves_no_payload(proxy: Proxy, server: Server) -> None:
    with Broker(proxy.url) as broker, Broker(server.url) as worker:
        broker.enqueue("q", b"before")
        job = JobSpec(BIG, id="mine").stored(BIG)
        command = commands.enqueue(broker.settings.keys("q"), [job])
        broker.store.run(command)
        worker.ack_many(worker.claim("q", 2))
        assert broker.store.run(commands.enqueue(broker.settings.keys("q"), [job], since=0.0)) == [Enqueued("mine")]
        assert (apart(server), worker.stats("q").pending) == ({}, 0)


def test_a_server_that_forgot_the_scripts_gets_them_again(broker: Broker, server: Server) -> None:
    broker.enqueue("q", BIG)
    server.cli("SCRIPT", "FLUSH")
    broker.enqueue("q", OTHER)
    server.cli("SCRIPT", "FLUSH")
    broker.enqueue_many("q", [BIG, b"small"])
    assert [job.payload for job in broker.claim("q", 9)] == [BIG, OTHER, BIG, b"small"]


def test_what_is_refused_leaves_nothing(server: Server) -> None:
    with Broker(server.url, retry_for=0.0) as broker:
        broker.enqueue("q", BIG)
        before = apart(server)
        config = broker.settings.keys("q").config
        server.cli("HSET", config, "v", 99)
        for enqueue in (broker.enqueue, lambda queue, payload: broker.enqueue_many(queue, [payload, payload])):
            with pytest.raises(LayoutError):
                enqueue("q", OTHER)
        server.cli("HSET", config, "v", 1)
        server.cli("CONFIG", "SET", "maxmemory", 1)
        try:
            with pytest.raises(Unavailable, match="memory is full"):
                broker.enqueue("q", OTHER)
        finally:
            server.cli("CONFIG", "SET", "maxmemory", 0)
        assert apart(server) == before
        assert broker.stats("q").ready == 1


def test_what_comes_between_a_transaction_s_commands_and_its_end_is_as_if_it_had_come_before(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(server.url, retry_for=0.0) as broker:
        broker.enqueue("q", BIG)
        send, end = Link.send, clients.pack_all([("EXEC",)])[0]

        def fill_up(link: Link, blocks: list[bytes]) -> Outcome | None:
            *blocks, last = blocks
            assert last.endswith(end)
            assert send(link, [*blocks, last[: -len(end)]]) is None
            eventually(lambda: b"multi=3" in server.cli("CLIENT", "LIST"), "all but its end is there")
            server.cli("CONFIG", "SET", "maxmemory", 1)
            assert link._stream
            link._stream.send(end)
            return None

        monkeypatch.setattr(Link, "send", fill_up)
        with pytest.raises(Unavailable, match="memory is full"):
            broker.enqueue("q", OTHER)
        monkeypatch.undo()
        server.cli("CONFIG", "SET", "maxmemory", 0)
        assert (list(apart(server).values()), broker.stats("q").ready) == ([BIG], 1)


def test_a_job_whose_payload_is_gone_goes_to_dead_and_its_neighbours_run(broker: Broker, server: Server) -> None:
    ids = [broker.enqueue("q", payload).id for payload in (BIG, OTHER, b"small")]
    server.cli("HDEL", broker.settings.keys("q").payloads, ids[0])
    assert broker.audit("q").findings == {ids[0]: "no_payload"}
    assert [job.payload for job in broker.claim("q", 3)] == [OTHER, b"small"]
    (dead,) = broker.dead("q")
    assert (dead.id, dead.reason) == (ids[0], "undecodable")
    assert "its payload" in str(dead.error)


def test_what_was_claimed_beside_one_that_cannot_be_fetched_reaches_its_worker(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Any:
        raise Unavailable(f"{args[0]} fails")

    broker.enqueue_many("q", [BIG, b"small"])
    monkeypatch.setattr(broker.store, "raw", fails)
    assert [job.payload for job in broker.claim("q", 2)] == [b"small"]
    broker.enqueue("q", BIG)
    with pytest.raises(RelayError, match="HMGET fails"):
        broker.claim("q")
    monkeypatch.undo()
    assert [(job.payload, job.deliveries) for job in broker.claim("q", 9)] == [(BIG, 1), (BIG, 1)], "it was handed back"


def test_a_claim_that_is_sent_again_gets_the_payload(proxy: Proxy) -> None:
    with Broker(proxy.url) as broker:
        broker.enqueue_many("q", [BIG, OTHER])
        broker.claim("q")
        proxy.cut_reply(b"EVALSHA")
        (job,) = broker.claim("q")
        assert (job.payload, proxy.pending) == (OTHER, 0)


def test_something_else_in_the_place_of_payloads_is_said(broker: Broker, server: Server) -> None:
    broker.enqueue("q", b"first")
    server.cli("SET", broker.settings.keys("q").payloads, "no hash")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        broker.enqueue("q", BIG)
    assert [job.payload for job in broker.claim("q", 9)] == [b"first"]


def test_an_async_broker_does_the_same(server: Server) -> None:
    async def live() -> None:
        async with AsyncBroker(server.url) as broker:
            await broker.enqueue("q", b"small")
            await broker.enqueue("q", BIG)
            await broker.enqueue_many("q", [OTHER])
            jobs = await broker.claim("q", 9)
            assert [job.payload for job in jobs] == [b"small", BIG, OTHER]
            assert len(apart(server)) == 2
            await broker.ack_many(jobs)
            assert apart(server) == {}

    asyncio.run(live())


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_durability_is_confirmed_of_them(shell: str, server: Server) -> None:
    options: dict[str, Any] = {"durability": "replica:1", "durability_timeout": 0.01}

    async def live() -> None:
        async with AsyncBroker(server.url, **options) as broker:
            await broker.enqueue("q", BIG)

    with Broker(server.url, **options) as broker, pytest.raises(RelayError, match="only 0 of 1 replicas"):
        asyncio.run(live()) if shell == "async" else broker.enqueue("q", BIG)
    assert list(apart(server).values()) == [BIG]


def test_they_follow_a_slot_of_a_cluster_that_moves(cluster: Cluster) -> None:
    with Broker(cluster.url) as broker:
        broker.enqueue("moving", BIG)
        slot = cluster.slot_of(broker.settings.keys("moving").jobs.decode())
        source, target = cluster.begin_move(slot)
        thread = threading.Thread(target=broker.enqueue, args=("moving", OTHER))
        thread.start()
        eventually(lambda: target.info("commandstats").get("cmdstat_asking"), "it is asked at the new owner")
        cluster.hand_over(slot, source, target)
        thread.join(30)
        broker.enqueue("moving", BIG)
        jobs = broker.claim("moving", 9)
        assert [job.payload for job in jobs] == [BIG, OTHER, BIG]
        assert broker.ack_many(jobs) == [1, 1, 1]
        assert broker.audit("moving").clean
