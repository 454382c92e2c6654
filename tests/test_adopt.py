"""Jobs of another queue system, taken in with their states and times."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from relay_core import AsyncBroker, Broker, hookimpl
from relay_core.errors import InvalidArgument
from relay_core.job import Arrival
from relay_core.operations import Settings
from tests.servers import Server


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


def some(now: float) -> list[Arrival]:
    return [
        Arrival("mail", "one", b"1", created_at=now - 60, headers={"from": "elsewhere"}),
        Arrival("mail", "two", b"2", priority=7),
        Arrival("mail", "later", b"3", "delayed", at=now + 3600),
        Arrival("mail", "overdue", b"4", "delayed", at=now - 5),
        Arrival("mail", "buried", b"5", "dead", at=now - 90, reason="no luck", error="ValueError('x')"),
        Arrival("bills", "one", b"6"),
    ]


def test_each_job_is_in_its_state_with_its_own_times(broker: Broker) -> None:
    now = time.time()
    assert broker.adopt(some(now)) == [True] * 6
    stats = broker.stats("mail")
    assert (stats.ready, stats.delayed, stats.dead, stats.counters["enqueued"]) == (3, 1, 1, 5)
    (later,) = broker.jobs("mail", "delayed")
    assert later.due_at == pytest.approx(now + 3600, abs=0.002)
    (buried,) = broker.dead("mail")
    assert (buried.id, buried.reason, buried.error) == ("buried", "no_luck", "ValueError('x')")
    assert buried.failed_at == pytest.approx(now - 90, abs=0.002)
    jobs = broker.claim("mail", 10)
    assert [job.payload for job in jobs] == [b"2", b"1", b"4"]
    assert jobs[1].created_at == pytest.approx(now - 60, abs=0.002)
    assert jobs[1].headers == {"from": "elsewhere"}
    broker.ack_many(jobs)
    assert broker.queues() == ["bills", "mail"]
    assert all(broker.audit(queue, repair=False).clean for queue in broker.queues())
    assert broker.requeue("mail", ["buried"]) == 1
    assert [job.payload for job in broker.claim("mail", 10)] == [b"5"]


def test_what_is_here_already_or_was_done_lately_is_not_taken_in_again(broker: Broker) -> None:
    arrivals = [Arrival("mail", f"id{n}", b"") for n in range(500)]
    assert all(broker.adopt(arrivals[:300]))
    broker.ack_many(broker.claim("mail", 100))
    assert broker.adopt(arrivals) == [False] * 300 + [True] * 200
    assert broker.stats("mail").ready == 400


def test_a_waiting_worker_wakes_for_an_adopted_job_and_for_an_earlier_due_time(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "max_block", 3600.0)  # no look in passing shall find it
    broker.adopt([Arrival("mail", "late", b"", "delayed", at=time.time() + 3600)])
    broker.adopt([Arrival("mail", "soon", b"", "delayed", at=time.time() + 0.2)])
    assert [job.id for job in broker.claim("mail", wait=3600.0)] == ["soon"]
    for arrival in (Arrival("apart", "now", b""), Arrival("apart", "later", b"", "delayed", at=time.time() + 60)):
        broker.adopt([arrival])
        assert broker.store.raw("ZPOPMIN", broker.settings.keys("apart").marker) != []


def test_each_dead_job_that_is_taken_in_is_counted(broker: Broker) -> None:
    assert broker.adopt([Arrival("mail", id, b"", "dead", at=time.time()) for id in ("one", "two")]) == [True, True]
    assert broker.stats("mail").counters["dead"] == 2


def test_nothing_is_taken_in_when_one_of_them_is_wrong(broker: Broker) -> None:
    good = Arrival("mail", "one", b"")
    for bad in (
        Arrival("mail", "has space", b""),
        Arrival("", "x", b""),
        Arrival("mail", "x", b"", priority=10),
        Arrival("mail", "x", b"", "inflight"),  # type: ignore[arg-type]
        Arrival("mail", "x", b"", "delayed", at=float("nan")),
    ):
        with pytest.raises(InvalidArgument):
            broker.adopt([good, bad])
    assert broker.stats("mail").ready == 0


def test_plugins_route_encode_and_are_told_of_adopted_jobs(server: Server) -> None:
    class Plugin:
        told: tuple[str, ...] = ()

        @hookimpl
        def relay_route_job(self, queue: str) -> str:
            return f"{queue}-2"

        @hookimpl
        def relay_encode_payload(self, payload: bytes) -> bytes:
            return payload[::-1]

        @hookimpl
        def relay_job_enqueued(self, queue: str, id: str) -> None:
            self.told += (f"{queue} {id}",)

    plugin = Plugin()
    with Broker(server.url, plugins=[plugin]) as broker:
        arrivals = [Arrival("mail", "one", b"abc"), Arrival("mail", "two", b"x", "dead")]
        broker.adopt(arrivals)
        broker.adopt(arrivals)
        assert plugin.told == ("mail-2 one",)
        assert [job.payload for job in broker.claim("mail-2")] == [b"cba"]


def test_a_full_server_refuses_to_take_jobs_in(server: Server) -> None:
    with Broker(server.url, retry_for=0.1) as broker:
        broker.adopt([Arrival("mail", "one", b"x" * 1000)])
        server.cli("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Exception, match="OOM"):
            broker.adopt([Arrival("mail", "two", b"x")])
        server.cli("CONFIG", "SET", "maxmemory", "0")
        assert broker.adopt([Arrival("mail", "two", b"x")]) == [True]


async def _adopt(url: str) -> list[bool]:
    broker = AsyncBroker(url)
    try:
        return await broker.adopt([Arrival("mail", "one", b"")])
    finally:
        await broker.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_the_asyncio_broker_adopts_too(server: Server) -> None:
    import asyncio

    assert asyncio.run(_adopt(server.url)) == [True]


def test_another_job_of_the_same_id_is_stored_under_its_other_id_and_the_same_one_is_not(broker: Broker) -> None:
    first = Arrival("mail", "one", b"1", other_id="one-a")
    second = Arrival("mail", "one", b"2", other_id="one-b")
    assert broker.adopt([first]) == [True]
    assert broker.adopt([first, second]) == [False, True]
    assert broker.adopt([second, first]) == [False, False]
    assert [(job.id, job.payload) for job in broker.jobs("mail", "ready")] == [("one", b"1"), ("one-b", b"2")]


def test_another_job_of_an_id_that_was_done_lately_is_not_lost(broker: Broker) -> None:
    broker.adopt([Arrival("mail", "one", b"1", other_id="one-a")])
    broker.ack_many(broker.claim("mail"))
    second = Arrival("mail", "one", b"2", other_id="one-b")
    assert broker.adopt([second, second]) == [True, False]
    assert [job.payload for job in broker.claim("mail", 5)] == [b"2"]
