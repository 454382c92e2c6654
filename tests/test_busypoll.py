"""How a thread looks out for a reply before it sleeps: what it asks, and when it gives up asking."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys

import pytest

from relay_core import Broker
from relay_core.connection import busypoll
from relay_core.connection.busypoll import BusyPoll, busy_poll
from tests.servers import Server


class Questions:
    """Answers "nothing yet" until it is told otherwise, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer_at: int | None = None

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked == self.answer_at


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Questions:
    """A clock that moves by a fortieth of the patience each time somebody looks at it."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks) * busypoll.PATIENCE / 40)
    return Questions()


def test_it_returns_at_the_first_sight_of_a_reply(questions: Questions) -> None:
    questions.answer_at = 3
    BusyPoll(questions)()
    assert questions.asked == 3


def test_it_asks_no_longer_than_its_patience_and_gives_way_after_every_third_look(
    questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave_way = []
    monkeypatch.setattr(busypoll, "_give_way", lambda: gave_way.append(questions.asked))
    BusyPoll(questions)()
    assert questions.asked == 3 * 41
    assert gave_way == list(range(3, 3 * 41, 3))


def test_far_servers_are_looked_out_for_seldom_until_one_answers_in_time(questions: Questions) -> None:
    look = BusyPoll(questions)

    def asked() -> int:
        before = questions.asked
        look()
        return questions.asked - before

    assert [bool(asked()) for _ in range(8)] == [True] * 8
    assert [number for number in range(8, 200) if asked()] == [64, 128, 192]
    for _ in range(200, 256):
        assert not asked()
    questions.answer_at = questions.asked + 2
    assert asked() == 2
    assert [bool(asked()) for _ in range(8)] == [True] * 8


def test_a_real_socket_is_asked_and_left_unread() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        look = busy_poll(ours)
        assert isinstance(look, BusyPoll)
        look()
        assert look._misses == 1
        theirs.send(b"+OK\r\n")
        look()
        assert look._misses == 0
        assert ours.recv(100) == b"+OK\r\n"
        theirs.close()
        look()  # an end is something to read
        assert look._misses == 0


def test_an_exchange_looks_once_after_all_was_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[socket.socket] = []
    monkeypatch.setattr("relay_core.connection.pool.busy_poll", lambda connected: lambda: looks.append(connected))
    with Broker(server.url) as broker:
        broker.enqueue("q", b"first")  # finds the server fit, and loads the scripts
        looks.clear()
        broker.enqueue("q", b"one")
        assert len(looks) == 1
        broker.enqueue_many("q", [b"more"] * 1000)  # a pipeline
        assert len(looks) == 2
        assert all(isinstance(connected, socket.socket) for connected in looks)


_GEVENT = """
from gevent import monkey; monkey.patch_all()
import sys
from relay_core import Broker
from relay_core import Broker
from relay_core.connection import busypoll
def fail(self): raise SystemExit("it looked")
busypoll.BusyPoll.__call__ = fail
with Broker(sys.argv[1]) as broker:
    broker.enqueue("q", b"x")
    print(broker.stats("q").ready)
"""


def test_gevent_is_left_to_switch(server: Server) -> None:
    run = [sys.executable, "-c", _GEVENT, server.url]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "1\n"
