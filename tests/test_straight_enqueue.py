"""After its first job a queue is enqueued to the straight way: the same promises, and nothing kept from plugins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker, Enqueued, JobSpec, clock, hookimpl
from relay_core.commands import LongWay, command
from relay_core.errors import InvalidArgument, Unavailable
from relay_core.operations import serverclock
from tests.proxy import Proxy, to_port
from tests.servers import Server

Send = Callable[..., Enqueued]


@pytest.fixture(params=["blocking", "asyncio"])
def send_to(request: pytest.FixtureRequest) -> Iterator[Callable[..., Send]]:
    """Makes a broker at a URL, and gives its `enqueue` after a first job."""
    if request.param == "blocking":
        made: list[Broker] = []

        def blocking(url: str, **options: Any) -> Send:
            made.append(Broker(url, **options))
            made[-1].enqueue("q", b"first")
            return made[-1].enqueue

        yield blocking
        for broker in made:
            broker.close()
        return
    with asyncio.Runner() if hasattr(asyncio, "Runner") else _Runner() as runner:
        brokers: list[AsyncBroker] = []

        def awaited(url: str, **options: Any) -> Send:
            brokers.append(AsyncBroker(url, **options))
            broker = brokers[-1]
            runner.run(broker.enqueue("q", b"first"))
            return lambda *args, **kwargs: runner.run(broker.enqueue(*args, **kwargs))

        yield awaited
        for broker in brokers:
            runner.run(broker.close())


class _Runner:
    """What asyncio has since Python 3.11."""

    def __enter__(self) -> _Runner:
        self._loop = asyncio.new_event_loop()
        return self

    def run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    def __exit__(self, *_: object) -> None:
        self._loop.close()


def test_it_stores_what_the_long_way_would(redis_server: Server, send_to: Callable[..., Send]) -> None:
    send = send_to(redis_server.url)
    found = send("q", b"second", id="mine", priority=0, headers={"a": "b"})
    assert found == Enqueued("mine")
    assert send("q", b"again", id="mine") == Enqueued("mine", duplicate=True)
    assert not send("q", b"urgent", priority=9).duplicate
    with Broker(redis_server.url) as broker:
        jobs = broker.claim("q", 5)
        assert [(job.payload, job.priority, dict(job.headers)) for job in jobs] == [
            (b"urgent", 9, {}),
            (b"first", 0, {}),
            (b"second", 0, {"a": "b"}),
        ]


@pytest.mark.parametrize("fault", ["cut_reply", "cut_request"])
@pytest.mark.parametrize("options", [{}, {"id": "mine"}])
def test_a_job_whose_connection_is_cut_is_stored_once_and_is_no_duplicate(
    redis_server: Server,
    send_to: Callable[..., Send],
    fault: str,
    options: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serverclock, "LATELY", 60.0)  # however slow the machine is
    with Proxy(to_port(redis_server.port)) as proxy:
        send = send_to(proxy.url)
        send("q", b"second")  # its script is known to the server
        getattr(proxy, fault)(b"EVALSHA" if options else b"HSETNX")  # see test_plain_enqueue.py
        found = send("q", b"third", **options)
        assert not proxy.pending
    assert not found.duplicate
    with Broker(redis_server.url) as broker:
        jobs = broker.claim("q", 5)
        assert [job.payload for job in jobs] == [b"first", b"second", b"third"]
        assert jobs[-1].id == found.id


class Everything:
    """Plugins that take part in an enqueue."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, dict[str, str]]] = []

    @hookimpl
    def relay_job_enqueued(self, queue: str, id: str, headers: dict[str, str]) -> None:
        self.told.append((queue, id, dict(headers)))


class Headers:
    @hookimpl
    def relay_add_headers(self) -> dict[str, str]:
        return {"by": "plugin"}


class Routes:
    @hookimpl
    def relay_route_job(self) -> str:
        return "other"


class Encodes:
    @hookimpl
    def relay_encode_payload(self, payload: bytes) -> bytes:
        return payload.upper()


def test_plugins_have_their_say_in_every_job(redis_server: Server, send_to: Callable[..., Send]) -> None:
    with Broker(redis_server.url) as broker:
        told = Everything()
        second = send_to(redis_server.url, plugins=[told])("q", b"x", headers={"a": "b"})
        assert [(queue, headers) for queue, _id, headers in told.told] == [("q", {}), ("q", {"a": "b"})]
        assert told.told[-1][1] == second.id
        broker.purge("q")
        send_to(redis_server.url, plugins=[Headers()])("q", b"x")
        assert [dict(job.headers) for job in broker.claim("q", 5)] == [{"by": "plugin"}] * 2
        send_to(redis_server.url, plugins=[Encodes()])("q", b"x")
        assert [job.payload for job in broker.claim("q", 5)] == [b"FIRST", b"X"]
        send_to(redis_server.url, plugins=[Routes()])("other", b"x")
        assert [job.payload for job in broker.claim("other", 5)] == [b"first", b"x"]
        assert not broker.claim("q", 5)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("q", "text"), {}),
        (("q", b"x"), {"id": "two words"}),
        (("q", b"x"), {"priority": 10}),
        (("q", b"x"), {"priority": True}),
        (("q", b"x"), {"headers": {"a": 1}}),
        ((["q"], b"x"), {}),
        (("q", b"x" * 101), {}),
    ],
)
def test_it_refuses_what_the_long_way_does(
    redis_server: Server, send_to: Callable[..., Send], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    send = send_to(redis_server.url, max_payload=100)
    with pytest.raises(InvalidArgument):
        send(*args, **options)
    with pytest.raises(TypeError):
        send("q", b"x", nonsense=1)
    with Broker(redis_server.url) as broker:
        assert broker.stats("q").ready == 1


@pytest.mark.parametrize("jobs", [1, 3])
def test_who_cannot_be_told_of_its_queue_hears_that_a_job_may_be_stored(server: Server, jobs: int) -> None:
    """The queue was deleted meanwhile, and memory is full just after its first job was stored anew."""
    with Broker(server.url, retry_for=0.0) as broker:
        broker.enqueue("q", b"first")
        server.cli("FLUSHALL")
        raw = broker.store.raw

        def full(*args: Any) -> Any:
            server.cli("CONFIG", "SET", "maxmemory", "1")
            try:
                return raw(*args)
            finally:
                server.cli("CONFIG", "SET", "maxmemory", "0")

        broker.store.raw = full  # type: ignore[method-assign]
        with pytest.raises(Unavailable) as caught:
            broker.enqueue_many("q", [JobSpec(b"x", id=f"j{n}") for n in range(jobs)])
        assert caught.value.maybe_executed
        assert broker.stats("q").ready == jobs
        server.cli("FLUSHALL")
        with pytest.raises(Unavailable) as caught:
            broker.enqueue("q", b"x", id="one")
        assert caught.value.maybe_executed
        assert broker.stats("q").ready == 1


def test_a_long_way_that_is_refused_after_a_short_one_that_may_have_been_gone_says_so(server: Server) -> None:
    with Broker(server.url, retry_for=0.0) as broker:
        broker.enqueue("q", b"first")
        run = broker.store.run

        def lossy(command: Any) -> Any:
            if command.script.name == "enqueue":
                raise Unavailable("full", maybe_executed=False)
            run(command)
            return LongWay(True, id="one")  # as to a re-send

        broker.store.run = lossy  # type: ignore[method-assign]
        with pytest.raises(Unavailable) as caught:
            broker.enqueue("q", b"x", id="one")
        assert caught.value.maybe_executed
        with pytest.raises(Unavailable) as caught:
            broker.enqueue("q", b"x", id="two", delay=1.0)  # has no short way
        assert not caught.value.maybe_executed


def test_a_repeated_enqueue_is_as_old_as_it_is_though_this_machine_slept(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sleeps is the client's machine: to the server two minutes go by."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(clock.sent_now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60
    monkeypatch.setattr(command, "sent_now", lambda: clock.sent_now() + 120)
    made = Broker(server.url).operations
    flow = made.enqueue("q", JobSpec(b"x", id="one", delay=5.0), since=clock.sent_now())
    next(flow)
    sent = flow.send(None).wire()
    assert 120_000 <= int(sent[sent.index(1) + 1]) < 180_000
