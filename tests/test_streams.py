"""A connection byte by byte, blocking and asyncio, as hiredis reads it and as redis-py alone does."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import pytest
from redis.exceptions import ResponseError

from relay_core.connection import clients, streams
from relay_core.connection.aiopool import AsyncLink
from relay_core.connection.pool import Link
from relay_core.connection.replies import Verdict, judge_cut
from relay_core.connection.steps import Address, Outcome
from relay_core.settings import StoreSettings, StoreUrl, parse_url
from tests.servers import Server

Script = Callable[[socket.socket], None]


@pytest.fixture(params=["hiredis", "without"], autouse=True)
def _parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.setattr(streams, "_Reader", None)


class Actor:
    """A server on a unix socket that does what it is told with each connection, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []

    def plays(self, *scripts: Script) -> None:
        def run() -> None:
            for script in scripts:
                with self._listener.accept()[0] as client:
                    script(client)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def close(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[Actor]:
    made = Actor(tmp_path / "s")
    yield made
    made.close()


class Exchanges(Protocol):
    """What the tests do with a connection of either kind."""

    def exchange(self, blocks: list[bytes], count: int) -> Outcome: ...

    def close(self) -> None: ...


class _Awaited:
    """An asyncio connection, used from outside its loop."""

    def __init__(self, link: AsyncLink) -> None:
        self.link = link
        self.loop = asyncio.new_event_loop()

    def exchange(self, blocks: list[bytes], count: int) -> Outcome:
        return self.loop.run_until_complete(self.link.exchange(blocks, count))

    def close(self) -> None:
        self.loop.run_until_complete(self.link.close())
        self.loop.run_until_complete(asyncio.sleep(0))  # the transport ends
        self.loop.close()


Connect = Callable[..., Exchanges]


def _place(path: Path, timeout: float) -> tuple[StoreUrl, StoreSettings, Address]:
    return parse_url(f"relay+unix://{path}?db=0"), StoreSettings(socket_timeout=timeout), Address(str(path), 0)


def link_to(path: Path, timeout: float = 10.0) -> Link:
    return Link(clients.connection(*_place(path, timeout), "store"))


def awaited_link_to(path: Path, timeout: float = 10.0) -> _Awaited:
    return _Awaited(AsyncLink(clients.aio_connection(*_place(path, timeout), "store")))


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Connect:
    return link_to if request.param == "blocking" else awaited_link_to


def answers(*pieces: bytes) -> Script:
    """Each piece by itself, once something was asked; then waits until the client goes."""

    def script(client: socket.socket) -> None:
        client.recv(100)
        for piece in pieces:
            client.sendall(piece)
        while client.recv(1 << 16):
            pass

    return script


PING = clients.pack(("PING",))


def test_replies_of_every_kind_come_in_order_and_errors_in_their_places(server: Server, connect: Connect) -> None:
    link = connect(server.socket)
    wires = [
        ("PING",), ("GET", "none"), ("EVAL", "return {1, 'a', {}, {false, 2}}", 0), ("NOSUCHCOMMAND",),
        ("EVAL", "return 'x\\r\\ny'", 0), ("EVAL", "return {}", 0), ("EVAL", "return -7", 0),
    ]  # fmt: skip
    outcome = link.exchange([clients.pack(wire) for wire in wires], len(wires))
    assert outcome.failure is None
    error = outcome.replies.pop(3)
    assert isinstance(error, ResponseError)
    assert error.__traceback__ is None
    assert outcome.replies == [b"PONG", None, [1, b"a", [], [None, 2]], b"x\r\ny", [], -7]
    assert link.exchange([PING], 1).replies == [b"PONG"]
    link.close()


def test_a_reply_in_many_pieces_is_put_together(actor: Actor, connect: Connect) -> None:
    reply = b"*2\r\n$5\r\nhe\r\no\r\n:12\r\n"
    actor.plays(answers(*(reply[i : i + 1] for i in range(len(reply)))))
    link = connect(actor.path)
    assert link.exchange([PING], 1).replies == [[b"he\r\no", 12]]
    link.close()


def test_what_came_before_the_server_closed_is_kept(actor: Actor, connect: Connect) -> None:
    def script(client: socket.socket) -> None:
        client.recv(100)
        client.sendall(b"+one\r\n$10\r\nhal")

    actor.plays(script)
    outcome = connect(actor.path).exchange([PING + PING], 2)
    assert outcome.replies == [b"one"]
    assert outcome.sent
    assert outcome.failure is not None
    assert judge_cut(outcome.failure, "here").verdict is Verdict.UNKNOWN


def test_silence_ends_after_the_timeout_and_closes_the_connection(actor: Actor, connect: Connect) -> None:
    actor.plays(answers(b"+one\r\n"), answers(b"+two\r\n"))
    link = connect(actor.path, timeout=0.05)
    outcome = link.exchange([PING + PING], 2)
    assert outcome.replies == [b"one"]
    assert outcome.sent
    assert outcome.failure is not None
    assert judge_cut(outcome.failure, "here").verdict is Verdict.UNKNOWN
    assert link.exchange([PING], 1).replies == [b"two"]
    link.close()


def test_a_server_that_does_not_read_holds_nobody_up_for_longer_than_the_timeout(
    actor: Actor, connect: Connect
) -> None:
    done = threading.Event()
    actor.plays(lambda client: (done.wait(10), None)[1])
    outcome = connect(actor.path, timeout=0.05).exchange([b"x" * (1 << 23)], 1)
    done.set()
    assert outcome.replies == []
    assert outcome.failure is not None


def test_an_interrupt_while_a_reply_is_awaited_leaves_no_reply_for_the_next(actor: Actor) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Interrupt

    actor.plays(answers(), answers(b"+two\r\n"))
    link = link_to(actor.path)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Interrupt):
            link.exchange([PING], 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert link.exchange([PING], 1).replies == [b"two"]
    link.close()


def test_signals_do_not_put_the_timeout_off(actor: Actor) -> None:
    rung: list[int] = []
    actor.plays(answers())
    link = link_to(actor.path, timeout=0.2)
    before = signal.signal(signal.SIGALRM, lambda number, _frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        assert link.exchange([PING], 1).failure is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung


def test_a_server_that_turns_clients_away_did_not_run_the_command(actor: Actor, connect: Connect) -> None:
    actor.plays(answers(b"-ERR max number of clients reached\r\n"))
    outcome = connect(actor.path).exchange([PING], 1)
    assert outcome.replies == []
    assert outcome.failure is not None
    assert judge_cut(outcome.failure, "here").verdict is Verdict.NOT_EXECUTED


def test_what_is_no_reply_at_all_closes_the_connection(actor: Actor, connect: Connect) -> None:
    actor.plays(answers(b"HTTP/1.1 400 Bad Request\r\n"), answers(b"+two\r\n"))
    link = connect(actor.path)
    assert link.exchange([PING], 1).failure is not None
    assert link.exchange([PING], 1).replies == [b"two"]
    link.close()


def test_a_task_that_is_cancelled_leaves_no_reply_for_the_next(actor: Actor) -> None:
    asked = threading.Event()

    def script(client: socket.socket) -> None:
        client.recv(100)
        asked.set()
        while client.recv(1 << 16):
            pass

    actor.plays(script, answers(b"+two\r\n"))
    awaited = awaited_link_to(actor.path)

    async def cut_short() -> None:
        task = asyncio.ensure_future(awaited.link.exchange([PING], 1))
        await asyncio.to_thread(asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    awaited.loop.run_until_complete(cut_short())
    assert awaited.exchange([PING], 1).replies == [b"two"]
    awaited.close()


@pytest.mark.parametrize("then", [b"+nobody asked\r\n", b""], ids=["unasked", "closed"])
def test_a_connection_that_is_out_of_step_after_a_rest_is_opened_again(
    actor: Actor, connect: Connect, monkeypatch: pytest.MonkeyPatch, then: bytes
) -> None:
    monkeypatch.setattr("relay_core.connection.pool.LOOK_AFTER", 0.0)
    monkeypatch.setattr("relay_core.connection.aiopool.LOOK_AFTER", 0.0)
    resting, done = threading.Event(), threading.Event()

    def script(client: socket.socket) -> None:
        client.recv(100)
        client.sendall(b"+one\r\n")
        resting.wait(10)
        if then:
            client.sendall(then)
        else:
            client.close()
        done.set()
        with suppress(ConnectionResetError):  # who closes a socket with something unread on it resets it
            while then and client.recv(1 << 16):
                pass

    actor.plays(script, answers(b"+two\r\n"))
    link = connect(actor.path)
    assert link.exchange([PING], 1).replies == [b"one"]
    resting.set()
    assert done.wait(10)
    assert link.exchange([PING], 1).replies == [b"two"]
    link.close()


def test_an_event_loop_takes_no_more_than_one_block_off_a_sender_whose_server_does_not_read(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    done = threading.Event()
    actor.plays(lambda client: (done.wait(10), None)[1])
    awaited = awaited_link_to(actor.path, timeout=0.05)
    real = clients.transport_of

    def watched(connection: Any) -> Any:
        transport = real(connection)
        write = transport.write

        def noted(data: bytes) -> None:
            written.append(len(data))
            write(data)

        monkeypatch.setattr(transport, "write", noted)
        return transport

    monkeypatch.setattr("relay_core.connection.aiostreams.transport_of", watched)
    outcome = awaited.exchange([b"x" * (1 << 22)] * 4, 4)
    done.set()
    assert outcome.failure is not None
    if streams.new_reader() is not None:
        assert written == [1 << 22]
    awaited.close()


def test_a_connection_that_ends_as_the_last_bytes_leave_for_it_is_not_waited_for(tmp_path: Path) -> None:
    """Within one turn of the event loop: the task is told to go on, and before it does the connection is lost."""
    path = tmp_path / "half"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        awaited = awaited_link_to(path)

        async def exchange(size: int) -> tuple[int, Outcome]:
            """The server reads what it is given in one turn, and then says that it has no more to say."""
            asked = asyncio.ensure_future(awaited.link.exchange([b"x" * size], 1))
            await asyncio.to_thread(select.select, [listener], [], [], 10)
            with listener.accept()[0] as client:
                await asyncio.to_thread(select.select, [client], [], [], 10)
                client.setblocking(False)
                taken = 0
                with suppress(BlockingIOError):
                    while some := client.recv(1 << 20):
                        taken += len(some)
                client.shutdown(socket.SHUT_WR)
                return taken, await asyncio.wait_for(asked, 30)

        at_once, _outcome = awaited.loop.run_until_complete(exchange(1 << 22))
        rest = 70_000  # more than asyncio keeps before it holds up who writes, and sent in one go
        taken, outcome = awaited.loop.run_until_complete(exchange(at_once + rest))
        assert taken == at_once
        assert outcome.failure is not None
        awaited.close()


def test_large_commands_and_replies_pass_in_any_number_of_pieces(server: Server, connect: Connect) -> None:
    link = connect(server.socket)
    body = bytes(range(256)) * (1 << 14)  # 4 MiB
    blocks = [clients.pack(("SET", f"large{i}", body)) for i in range(4)]
    blocks += [clients.pack(("GET", f"large{i}")) for i in range(4)]
    outcome = link.exchange(blocks, 8)
    assert outcome.failure is None
    assert outcome.replies == [b"OK"] * 4 + [body] * 4
    link.close()


def test_who_takes_the_place_of_file_functions_does_not_take_that_of_connections(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such_file(*_: object) -> int:
        raise OSError(9, "Bad file descriptor in the fake file system")

    monkeypatch.setattr("os.write", no_such_file)
    monkeypatch.setattr("os.readv", no_such_file, raising=False)
    link = link_to(server.socket)
    assert link.exchange([PING], 1).replies == [b"PONG"]
    link.close()


class Own(socket.socket):
    """Reads in a way of its own, as TLS does."""

    def recv_into(self, buffer: Any, *args: Any) -> int:
        buffer[:3] = b"own"
        return 3

    def sendall(self, data: Any, *args: Any) -> None:
        super().sendall(b"own " + data)


@pytest.mark.parametrize("kind", [socket.socket, Own])
def test_only_plain_sockets_are_read_and_written_past_python(kind: type[socket.socket]) -> None:
    ours, theirs = socket.socketpair()
    with kind(fileno=ours.detach()) as made, theirs:
        made.settimeout(10)
        buffer = bytearray(100)
        send, read = streams.direct_send(made), streams.direct_read(made, buffer)
        send(b"abc")
        assert theirs.recv(100) == (b"own abc" if kind is Own else b"abc")
        theirs.send(b"de")
        assert buffer[: read()] == (b"own" if kind is Own else b"de")


def test_what_the_system_does_not_take_or_have_at_once_is_waited_for() -> None:
    ours, theirs = socket.socketpair()
    block = bytes(1 << 22)
    with ours, theirs:
        ours.settimeout(0.05)
        buffer = bytearray(100)
        send, read = streams.direct_send(ours), streams.direct_read(ours, buffer)
        with pytest.raises(TimeoutError):
            read()
        with pytest.raises(TimeoutError):
            send(block)
        with pytest.raises(TimeoutError):
            send(b"x")
        ours.settimeout(10)
        reading = threading.Thread(target=lambda: [theirs.recv(1 << 16) for _ in range(200)])
        reading.start()
        send(block)
        theirs.send(b"done")
        assert buffer[: read()] == b"done"
        theirs.shutdown(socket.SHUT_WR)
        assert read() == 0
        ours.shutdown(socket.SHUT_WR)
        reading.join(10)


def test_a_connection_that_was_closed_leaves_the_next_one_of_its_number_alone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        send, read = streams.direct_send(ours), streams.direct_read(ours, bytearray(100))
        number = ours.fileno()
        ours.close()
        other, far = socket.socketpair()
        with other, far:
            assert number in (other.fileno(), far.fileno())
            other.send(b"to far")
            far.send(b"to other")
            for use in (lambda: send(b"x"), read):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    use()
            assert (far.recv(100), other.recv(100)) == (b"to far", b"to other")


def test_a_handler_of_signals_that_raises_while_a_number_is_packed_does_not_crash_the_process() -> None:
    # one that cannot be written stands for it, as the two fail in the same place
    code = "from relay_core.connection.clients import pack\ntry: pack((10**5000,))\nexcept ValueError: print('raised')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "raised\n", (done.returncode, done.stderr)
