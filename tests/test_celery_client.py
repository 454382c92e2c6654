"""`channel.client`, of which programs that were written for kombu's Redis transport ask two things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest

from relay_core import Broker
from relay_core.errors import Unavailable
from tests.celery_links import fresh, link, send
from tests.celery_workers import client_of
from tests.servers import Server, eventually


@pytest.fixture(params=["redis"])
def flavour(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def here(server: Server) -> Iterator[kombu.Connection]:
    with link(server.url) as connection:
        yield connection


def test_it_tells_how_many_messages_of_a_queue_wait_for_a_consumer(here: kombu.Connection, broker: Broker) -> None:
    name = fresh("q")
    kombu.Queue(name)(here.default_channel).declare()
    assert here.default_channel.client.llen(name) == 0
    for priority in (0, 3, 9):
        send(here, priority, key=name, priority=priority)
    broker.enqueue(name, b"not due", delay=3600)
    assert here.default_channel.client.llen(name) == 3
    taken = here.default_channel.basic_get(name)
    assert here.channel().client.llen(name) == 2, "on any channel, without what a consumer has"
    taken.ack()


def test_what_waits_for_its_time_counts_from_then_on_also_where_nobody_consumes(
    here: kombu.Connection, broker: Broker
) -> None:
    name = fresh("q")
    queue = kombu.Queue(name)(here.default_channel)
    queue.declare()
    send(here, 1, key=name)
    broker.enqueue(name, b"not due", delay=3600)
    for _ in range(2):
        broker.enqueue(name, b"due at once", delay=0.001)
    ways: list[Callable[[], int]] = [
        lambda: queue.queue_declare().message_count,
        lambda: queue.queue_declare(passive=True).message_count,
        lambda: here.default_channel.client.llen(name),
    ]
    for ask in ways:
        eventually(lambda ask=ask: ask() == 3, "those that are due count, the one of an hour from now does not")
    assert broker.stats(name).delayed == 3, "the question moves none"
    assert here.default_channel.queue_delete(name, if_empty=True) is None
    assert here.default_channel.queue_purge(name) == 4


def test_a_queue_that_nobody_used_is_empty_and_is_not_made_by_the_question(
    here: kombu.Connection, broker: Broker
) -> None:
    name = fresh("q")
    assert here.default_channel.client.llen(name) == 0
    assert name not in broker.queues()


def test_the_length_is_found_as_apps_ask_for_it(server: Server, tmp_path: Path) -> None:
    name, app = fresh("q"), client_of(server.url, tmp_path)
    for n in range(2):
        app.send_task("nowhere", (n,), queue=name)
    with app.pool.acquire(block=True) as connection:
        assert connection.default_channel.client.llen(name) == 2
    with app.connection_for_read() as connection:
        assert connection.channel().client.ping() is True
    app.close()


def test_a_ping_fails_while_the_server_is_away() -> None:
    with Server("redis") as server, link(server.url, retry_for=0.0) as connection:
        client = connection.default_channel.client
        assert client.ping() is True
        server.kill()
        with pytest.raises(Unavailable):
            client.ping()


def test_what_would_need_keys_of_kombu_s_is_refused_with_what_to_do_instead(here: kombu.Connection) -> None:
    client = here.default_channel.client
    assert not hasattr(client, "lrange")
    with pytest.raises(AttributeError, match=r"channel\.client\.lrange: .* channel\.queue_purge"):
        client.lrange("celery", 0, -1)
