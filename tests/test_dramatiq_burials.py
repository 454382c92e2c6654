"""Messages that went to dead without an answer are told of beside their queue, which goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import RedisBackend, StubBackend

import relay_core
from relay_adapters.dramatiq import RelayBroker
from tests.dramatiq_workers import running
from tests.servers import Server, eventually


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = RelayBroker(url=server.url, lease=1.0, max_deliveries=1)
    dramatiq.set_broker(broker)
    yield broker
    broker.close()


@pytest.fixture
def results() -> Iterator[Server]:
    with Server("redis", tcp=True) as results:
        yield results


def doom(server: Server, actor: dramatiq.Actor[[], Any]) -> dramatiq.Message[Any]:
    """A message whose only delivery will have ended without an answer."""
    sent = actor.send()
    with relay_core.Broker(server.url, lease=0.1) as gone:
        assert len(gone.claim(actor.queue_name, wait=5)) == 1
    return sent


def noted(broker: RelayBroker, queue: str) -> int:
    return int(broker.core.store.raw("ZCARD", broker.core.settings.keys(queue).untold))


def test_a_queue_goes_on_while_a_result_backend_answers_nothing(
    broker: RelayBroker, server: Server, results: Server
) -> None:
    ran: list[int] = []
    mourned = threading.Event()
    client = redis.Redis(port=results.port, socket_timeout=None)
    broker.add_middleware(Results(backend=RedisBackend(client=client)))  # type: ignore[no-untyped-call]

    @dramatiq.actor
    def mourn(message: dict[str, Any], error: dict[str, str]) -> None:
        assert error["type"] == "WorkerLost"
        mourned.set()

    @dramatiq.actor(store_results=True, on_failure="mourn", queue_name="risky")
    def deadly() -> None:
        raise AssertionError("its workers are gone")

    @dramatiq.actor(queue_name="risky")
    def innocent(x: int) -> None:
        ran.append(x)

    sent = doom(server, deadly)
    innocent.send(1)
    results.pause()
    with running(broker, threads=1):
        eventually(lambda: broker.get_queue_message_counts("risky")[2] == 1, "the message to go to dead")
        innocent.send(2)
        eventually(lambda: ran == [1, 2], "its neighbours to run")
        assert noted(broker, "risky") == 1
        assert not mourned.is_set()
        results.resume()
        with pytest.raises(ResultFailure, match="WorkerLost"):
            sent.get_result(block=True, timeout=30_000)
        assert mourned.wait(30)
        eventually(lambda: not noted(broker, "risky"), "no note is left")
    assert ran == [1, 2]
    client.close()


def test_a_result_backend_that_can_store_no_failure_keeps_nobody_else_from_hearing_of_it(
    broker: RelayBroker, server: Server
) -> None:
    class Unable(StubBackend):
        def store_exception(self, *args: Any) -> None:
            raise NotImplementedError

    mourned = threading.Event()
    broker.add_middleware(Results(backend=Unable()))  # type: ignore[no-untyped-call]

    @dramatiq.actor
    def mourn(message: dict[str, Any], error: dict[str, str]) -> None:
        mourned.set()

    @dramatiq.actor(store_results=True, on_failure="mourn", queue_name="risky")
    def deadly() -> None:
        raise AssertionError("its workers are gone")

    doom(server, deadly)
    with running(broker):
        assert mourned.wait(30)
        eventually(lambda: not noted(broker, "risky"), "no note is left")


def test_middleware_that_raises_as_it_hears_of_a_burial_has_heard_of_it(broker: RelayBroker, server: Server) -> None:
    class Skips(Middleware):
        heard = 0

        def before_nack(self, broker: Any, message: Any) -> None:
            self.heard += 1
            raise SkipMessage

    skips = Skips()
    broker.add_middleware(skips)

    @dramatiq.actor(queue_name="risky")
    def deadly() -> None:
        raise AssertionError("its workers are gone")

    doom(server, deadly)
    with running(broker):
        eventually(lambda: skips.heard, "the middleware to hear of it")
        eventually(lambda: not noted(broker, "risky"), "no note is left")
    assert skips.heard == 1
