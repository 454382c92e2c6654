"""What a handler of signals raises, such as a soft time limit, goes on to who called, and leaves nothing behind."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker
from relay_core.connection import SyncStore
from relay_core.connection.pool import Pool
from relay_core.settings import StoreSettings, parse_url
from tests.proxy import Proxy, to_socket
from tests.servers import Server, eventually
from tests.test_streams import PING, Actor, actor, answers, link_to  # noqa: F401 (fixture)


class TimeIsUp(Exception):
    """Like billiard's SoftTimeLimitExceeded: no BaseException."""


@contextmanager
def interrupting() -> Iterator[list[int]]:
    """In here SIGALRM raises TimeIsUp wherever the main thread is, as a soft time limit does. Yields which came."""
    alarms: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        alarms.append(number)
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield alarms
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupted(work: Callable[[], Any], at: str, when: Callable[[], object] = lambda: True) -> None:
    """Do `work`, which must end with TimeIsUp.

    :param at: the function in which the alarm shall find this thread
    :param when: what must be true besides
    """

    def ring() -> None:
        eventually(lambda: is_at(at) and when(), f"the work to wait in {at}")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    def start_and_work() -> None:
        ringer.start()
        work()

    ringer = threading.Thread(target=ring, daemon=True)
    with interrupting():
        with pytest.raises(TimeIsUp):
            start_and_work()
        ringer.join()


def is_at(function: str) -> bool:
    """Whether the main thread is in a function of this name."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


def stored(proxy: Proxy) -> bool:
    """Whether the request was answered whose reply is kept."""
    return proxy.kept > 0


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        yield proxy


@pytest.fixture
def narrow(proxy: Proxy) -> Iterator[Broker]:
    """A broker with one connection to lose, on which a lost reply costs ten seconds."""
    with Broker(proxy.url, client_name="me", max_connections=1, retry_for=2.0, socket_timeout=10.0) as broker:
        broker.enqueue("q", b"first")  # finds the server fit, and loads the scripts
        broker.claim("q")
        yield broker


@pytest.mark.parametrize("bytes_before", [0, 3], ids=["of which nothing came", "of which some came"])
def test_an_enqueue_that_waits_for_its_reply(proxy: Proxy, narrow: Broker, bytes_before: int) -> None:
    proxy.swallow_reply(b"EVALSHA", after=bytes_before)
    interrupted(lambda: narrow.enqueue("q", b"cut short", id="one"), "receive", lambda: stored(proxy))
    assert narrow.enqueue("q", b"cut short", id="one").duplicate  # it was sent, once
    assert narrow.enqueue("q", b"next").id != "one"
    assert proxy.connections == 2


def test_an_enqueue_that_waits_for_a_connection_to_open(server: Server, proxy: Proxy) -> None:
    proxy.swallow_reply(b"SETNAME")
    with Broker(proxy.url, client_name="me", max_connections=1, retry_for=2.0, socket_timeout=10.0) as broker:
        interrupted(lambda: broker.enqueue("q", b"x"), "connect", lambda: stored(proxy))
        assert not broker.enqueue("q", b"x").duplicate
        assert broker.stats("q").ready == 1


def test_a_pipeline_that_waits_for_its_replies(server: Server, proxy: Proxy, narrow: Broker) -> None:
    proxy.swallow_reply(b"EVALSHA", after=3)
    with Broker(server.url) as other:
        # all of it, as what is still on its way when its connection closes may be stored or not
        interrupted(lambda: narrow.enqueue_many("q", [b"x"] * 500), "receive", lambda: other.stats("q").ready == 500)
    assert narrow.stats("q").ready == 500
    assert narrow.enqueue("q", b"next")


def blocked(server: Server) -> int:
    return int(server.info("clients")["blocked_clients"])


def test_a_claim_that_waits_for_a_wake_up(server: Server, narrow: Broker) -> None:
    interrupted(lambda: narrow.claim("q", wait=20), "readable", lambda: blocked(server) == 1)
    eventually(lambda: blocked(server) == 0, "nobody waits on its behalf")
    narrow.enqueue("q", b"next")
    assert [job.payload for job in narrow.claim("q", wait=20)] == [b"next"]


def test_a_claim_that_opens_the_connection_of_its_bell(proxy: Proxy, narrow: Broker) -> None:
    proxy.swallow_reply(b"SETNAME")
    interrupted(lambda: narrow.claim("q", wait=20), "connect", lambda: stored(proxy))
    narrow.enqueue("q", b"next")
    assert [job.payload for job in narrow.claim("q", wait=20)] == [b"next"]


def test_a_claim_that_has_half_the_answer_of_its_bell(server: Server, proxy: Proxy, narrow: Broker) -> None:
    server.cli("ZADD", narrow.settings.keys("q").marker.decode(), "1", "x")  # rings, for nothing
    proxy.swallow_reply(b"BZPOPMIN", after=3)
    interrupted(lambda: narrow.claim("q", wait=20), "read_response", lambda: stored(proxy))
    narrow.enqueue("q", b"next")
    assert [job.payload for job in narrow.claim("q", wait=20)] == [b"next"]


def test_a_reader_reads_again_what_it_was_reading(server: Server, proxy: Proxy) -> None:
    server.cli("XGROUP", "CREATE", "s", "g", "$", "MKSTREAM")
    store = SyncStore(parse_url(proxy.url), StoreSettings(socket_timeout=10.0))
    reader = store.reader([b"s"], "g", "me")
    reader.arm(20)  # answers at once: nothing was left
    eventually(lambda: not reader.read() and not reader.armed, "the first answer")
    proxy.swallow_reply(b"XREADGROUP", after=3)
    reader.arm(20)
    server.cli("XADD", "s", "*", "name", "value")

    def work() -> None:
        eventually(lambda: reader.read(), "an entry")

    interrupted(work, "read_response")
    found: list[Any] = []

    def read() -> bool:
        reader.arm(20)
        found.extend(reader.read())
        return bool(found)

    eventually(read, "the entry")
    assert [entry.fields for entry in found] == [[b"name", b"value"]]
    reader.close()
    store.close()


def test_a_command_that_waits_to_be_sent(actor: Actor) -> None:
    accepted, done = threading.Event(), threading.Event()

    def script(client: socket.socket) -> None:
        accepted.set()
        done.wait(30)  # and reads nothing

    actor.plays(script, answers(b"+two\r\n"))
    link = link_to(actor.path)
    interrupted(lambda: link.exchange([b"x" * (1 << 24)], 1), "send", accepted.is_set)
    done.set()
    assert link.exchange([PING], 1).replies == [b"two"]
    link.close()


def test_a_sender_that_waits_for_its_reply(proxy: Proxy, narrow: Broker) -> None:
    narrow.enqueue("q", b"x")
    sender = narrow.store.sender()
    narrow.begin(narrow.operations.finish("q", (), (), 0), sender)()
    proxy.swallow_reply(b"EVALSHA", after=3)
    rest = narrow.begin(narrow.operations.finish("q", (), (), 1), sender)
    interrupted(rest, "receive", lambda: stored(proxy))
    assert narrow.begin(narrow.operations.finish("q", (), (), 0), sender)()[2] == []
    sender.close()


def test_what_is_raised_in_a_task_of_asyncio_is_no_lost_connection_either(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncBroker(server.url, max_connections=1, retry_for=2.0) as broker:
            await broker.enqueue("q", b"first")
            with monkeypatch.context() as patch:
                patch.setattr("relay_core.connection.aiostreams.FastStream.exchange", out_of_the_blue)
                with pytest.raises(TimeIsUp):
                    await broker.enqueue("q", b"cut short")
            assert (await broker.enqueue("q", b"next")).id
            assert (await broker.stats("q")).ready == 2

    async def out_of_the_blue(*_: Any) -> None:
        raise TimeIsUp

    asyncio.run(main())


def test_an_interrupt_between_the_send_and_the_wait_leaves_no_reply_for_the_next(
    narrow: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_the_blue(*_: Any) -> None:
        raise TimeIsUp

    with monkeypatch.context() as patch:
        patch.setattr("relay_core.connection.pool.Link.receive", out_of_the_blue)
        with pytest.raises(TimeIsUp):
            narrow.store.raw("ECHO", "cut short")
    assert narrow.store.raw("ECHO", "next") == b"next"


@pytest.mark.parametrize("place", ["take", "give"])
def test_an_interrupt_beside_the_pool_costs_no_connection_of_it(
    narrow: Broker, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """As if it came after the pool has handed the connection out, or before it has it back."""
    take = Pool.take

    def out_of_the_blue(pool: Pool, *_: Any) -> None:
        if place == "take":
            take(pool)
        raise TimeIsUp

    with monkeypatch.context() as patch:
        patch.setattr(Pool, place, out_of_the_blue)
        with pytest.raises(TimeIsUp):
            narrow.store.raw("ECHO", "cut short")
    assert narrow.store.raw("ECHO", "next") == b"next"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_at_any_moment(narrow: Broker) -> None:
    """Wherever it strikes: the next command gets its own reply, over a connection that the pool still has.

    Python itself swallows what is raised while it throws away an old connection.
    """
    chance, struck = random.Random(7), 0

    def until_struck(number: int) -> None:
        # a function of its own: what strikes at the end of a loop that stands in a `try` may pass its `except` by
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 400e-6))
        while len(alarms) == number:
            narrow.store.raw("ECHO", f"before {number}")

    with interrupting() as alarms:
        for number in range(400):
            try:
                until_struck(number)
            except TimeIsUp:
                struck += 1
            assert narrow.store.raw("ECHO", str(number)) == str(number).encode()
    assert struck >= 390
