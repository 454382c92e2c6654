"""After its first job a queue is enqueued to the straight way: the same promises, and nothing kept from plugins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker, Enqueued, hookimpl
from relay_core.errors import InvalidArgument
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
    redis_server: Server, send_to: Callable[..., Send], fault: str, options: dict[str, str]
) -> None:
    with Proxy(to_port(redis_server.port)) as proxy:
        send = send_to(proxy.url)
        send("q", b"second")  # its script is known to the server
        getattr(proxy, fault)(b"EVALSHA")
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
