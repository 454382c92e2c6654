"""What a process tells the store of the queues that it consumes from: who was there, and who has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import kombu
import pytest

from relay_adapters.celery.attendance import Attendance
from relay_core.errors import Unavailable
from tests.servers import Server, eventually


@pytest.fixture
def channel(server: Server) -> Any:
    with kombu.Connection(server.url) as connection:
        yield connection.channel()


def leaves(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Call `before` before the store is told that a consumer has left."""
    run = Attendance._run

    def hooked(self: Attendance, command: Any) -> Any:
        if command.script.name.endswith("leave"):
            before()
        return run(self, command)

    monkeypatch.setattr(Attendance, "_run", hooked)


def consume_for_a_moment(channel: Any) -> None:
    queue = kombu.Queue("box", durable=False, auto_delete=True, expires=10, message_ttl=5)
    with kombu.Consumer(channel, [queue], no_ack=True):
        pass


def test_a_queue_whose_consumer_is_just_being_signed_off_is_unused(
    channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held_up() -> None:
        begun.set()
        assert go_on.wait(30)

    leaves(monkeypatch, held_up)
    consume_for_a_moment(channel)
    assert begun.wait(30)  # the thread is on its way to tell the store
    answers: list[Any] = []
    deleting = threading.Thread(target=lambda: answers.append(channel.queue_delete("box", if_unused=True)))
    deleting.start()
    deleting.join(0.2)
    go_on.set()
    deleting.join(30)
    assert answers == [0]


def test_a_consumer_that_could_not_be_signed_off_is_signed_off_later(
    channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def cut_off_once() -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            raise Unavailable("cut off, for this test")

    leaves(monkeypatch, cut_off_once)
    consume_for_a_moment(channel)
    eventually(lambda: len(tries) == 2, "the second goodbye")
    eventually(lambda: channel.queue_delete("box", if_unused=True) == 0, "nobody is there")
