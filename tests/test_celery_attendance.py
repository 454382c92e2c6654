"""What a process tells the store of the queues that it consumes from: who was there, and who has gone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import kombu
import pytest

from relay_core.errors import RelayError, Unavailable
from tests.servers import Server, eventually


@pytest.fixture
def channel(server: Server) -> Any:
    with kombu.Connection(server.url) as connection:
        yield connection.channel()


def leaves(monkeypatch: pytest.MonkeyPatch, channel: Any, before: Callable[[], None]) -> None:
    """Call `before` before the channel's store is told that a consumer has left."""
    run = channel.attendance._run

    def hooked(command: Any) -> Any:
        if command.script.name.endswith("leave"):
            before()
        return run(command)

    monkeypatch.setattr(channel.attendance, "_run", hooked)


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

    leaves(monkeypatch, channel, held_up)
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

    leaves(monkeypatch, channel, cut_off_once)
    consume_for_a_moment(channel)
    eventually(lambda: len(tries) == 2, "the second goodbye")
    eventually(lambda: channel.queue_delete("box", if_unused=True) == 0, "nobody is there")


def test_a_server_that_is_away_is_asked_ever_less_often_and_the_log_says_so_once(
    channel: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attendance, pauses, away = channel.attendance, list[float](), [True]
    stock = attendance.failed

    def failed(error: RelayError) -> float:
        pauses.append(stock(error))
        attendance._wake.set()  # nobody waits for it here
        return pauses[-1]

    def cut_off() -> None:
        if away[0]:
            raise Unavailable("cut off, for this test")

    monkeypatch.setattr(attendance, "failed", failed)
    leaves(monkeypatch, channel, cut_off)
    with caplog.at_level(logging.WARNING, "relay.celery"):
        consume_for_a_moment(channel)
        eventually(lambda: len(pauses) > 6, "seven tries")
        assert pauses[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]
        assert len([record for record in caplog.records if "cut off" in record.getMessage()]) == 1
        away[0] = False
        eventually(lambda: attendance._thread is None, "the store to be told")
        away[0], before = True, len(pauses)
        consume_for_a_moment(channel)
        eventually(lambda: len(pauses) > before, "another try")
        assert pauses[before] == 1.0
        away[0] = False
    eventually(lambda: attendance._thread is None, "the store to be told")


def test_what_the_store_has_forgotten_by_itself_is_not_told(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attendance = channel.attendance

    def cut_off() -> None:
        raise Unavailable("cut off, for this test")

    leaves(monkeypatch, channel, cut_off)
    consume_for_a_moment(channel)
    eventually(lambda: attendance._failures, "a goodbye that failed")
    with attendance._lock:
        (gone,) = attendance._left.values()
        assert 10 < gone.until - time.monotonic() <= 60
        gone.until = 0.0
    attendance._wake.set()
    eventually(lambda: attendance._thread is None, "the thread to end")
    assert not attendance._left
