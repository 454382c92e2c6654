"""What a Celery worker holds and did not start is handed back by the thread that keeps the leases: its event loop has
another broker to turn to, and must not wait for one that is away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from threading import Event, Thread, get_ident
from typing import Any
from unittest.mock import Mock

import kombu
import pytest
from celery import Celery

from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.messages.envelope import unpack
from relay_adapters.celery.workers.request import Request
from relay_core import Broker
from tests.celery_links import Inbox, Loop, fresh, link, send
from tests.servers import Server, eventually


@pytest.fixture
def loop(server: Server) -> Iterator[Loop]:
    with link(server.url) as connection:
        yield Loop(connection, 4)


@pytest.fixture
def tellers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads that told a server what is handed back."""
    told: list[int] = []
    stock = Leases.flush

    def flush(leases: Leases) -> None:
        told.append(get_ident())
        stock(leases)

    monkeypatch.setattr(Leases, "flush", flush)
    return told


def handed_back(broker: Broker, loop: Loop, count: int) -> None:
    eventually(lambda: broker.stats(loop.queue).ready == count, f"{count} to be handed back")
    assert [job.deliveries for job in broker.claim(loop.queue, 10)] == [1] * count, "it did not count as a delivery"


def test_what_was_claimed_and_not_delivered(loop: Loop, broker: Broker, tellers: list[int]) -> None:
    for n in range(6):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.watch._deliver = lambda: 0
    loop.until(lambda: len(loop.watch.waiting) == 4, "messages that wait")
    loop.channel.close()
    handed_back(broker, loop, 6)
    assert tellers
    assert get_ident() not in tellers


def test_it_comes_back_in_the_order_in_which_it_came(broker: Broker, server: Server) -> None:
    with link(server.url) as connection:
        inbox = Inbox(connection, kombu.Queue("q"), prefetch=20)
        for n in range(25):
            send(connection, n, key="q")
        inbox.wait(20)
        inbox.channel.close()
        assert [int(job.payload.rpartition(b"\n")[2]) for job in broker.claim("q", 25)] == list(range(25))


def test_before_its_process_ends_acks_that_are_under_way_are_waited_for(
    loop: Loop, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that sends them would die with the process."""
    leases: Leases = loop.channel.leases
    under_way, go = Event(), Event()
    stock = leases.broker.operations.ack_each

    def slow(jobs: Any) -> Any:
        under_way.set()
        assert go.wait(30)
        return (yield from stock(jobs))

    monkeypatch.setattr(leases.broker.operations, "ack_each", slow)
    monkeypatch.setattr("relay_adapters.celery.holding.leases._UNDER_WAY", 60.0)
    send(loop.channel.connection.client, 1, key=loop.queue)
    loop.until(lambda: loop.got, "the message")
    leases.ack_later(loop.got[0].delivery_tag)
    assert under_way.wait(30)
    ended = Thread(target=leases.end)
    ended.start()
    ended.join(0.3)
    assert ended.is_alive()
    go.set()
    ended.join(30)
    assert not ended.is_alive()
    assert broker.stats(loop.queue).pending == 0


def test_what_a_lost_connection_had_delivered(
    loop: Loop, broker: Broker, tellers: list[int], redis_server: Server
) -> None:
    for n in range(4):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: len(loop.got) == 4, "the messages")
    loop.channel.connection.close_connection(loop.channel.connection)
    with link(redis_server.url) as other:  # the next one of a list of brokers
        there = Loop(other, 4)
        there.until(lambda: broker.stats(loop.queue).ready == 4, "all to be handed back")
    handed_back(broker, loop, 4)
    assert tellers
    assert get_ident() not in tellers


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "not started"])
def test_the_message_of_a_task(loop: Loop, broker: Broker, tellers: list[int], cancelled: bool) -> None:
    app = Celery(set_as_current=False, broker="relay://")

    @app.task(name="task", acks_late=True, shared=False)
    def task() -> None:
        raise AssertionError("nobody runs it")

    message = app.amqp.as_task_v2("id", task.name)
    client = loop.channel.connection.client
    send(client, message.body, key=loop.queue, headers=message.headers, **message.properties)
    loop.until(lambda: loop.got, "the message")
    request = Request(loop.got[0], app=app, task=task, on_ack=None, on_reject=lambda *_args: None)
    if cancelled:
        request.on_accepted(os.getpid(), 0.0)
        request.cancel(Mock())
    else:
        request._not_started()
    handed_back(broker, loop, 1)
    assert tellers
    assert get_ident() not in tellers
    app.close()


@pytest.mark.parametrize("prefetch", [5, 1])
def test_what_came_for_a_consumer_that_is_cancelled_comes_back_in_its_order(
    loop: Loop, broker: Broker, prefetch: int
) -> None:
    """Also where a smaller prefetch count leaves no credit to look at it."""

    def cancel(message: Any) -> None:
        loop.channel.basic_qos(0, prefetch, False)
        loop.channel.basic_cancel(*[tag for tag, queue in loop.channel._tag_to_queue.items() if queue == loop.queue])

    loop.received = cancel
    kombu.Queue(other := fresh("other"))(loop.channel).declare()
    loop.channel.basic_consume(other, False, lambda message: None, fresh("tag"))
    for n in range(4):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: broker.stats(loop.queue).ready == 3, "the others to be handed back")
    assert loop.channel._unacked == {loop.got[0].delivery_tag}
    assert [json.loads(unpack(job.payload)["body"]) for job in broker.claim(loop.queue, 3)] == [1, 2, 3]
