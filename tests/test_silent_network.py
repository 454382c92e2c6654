"""A network that forgets a connection and tells nobody: who waits on it finds out in time, and goes on over another."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from relay_core.connection import AsyncStore, SyncStore, clients
from relay_core.errors import Unavailable
from relay_core.settings import StoreSettings, parse_url
from tests.proxy import Proxy, to_socket
from tests.servers import Server, eventually
from tests.shells import Face, Open, kind, store_at  # noqa: F401 (fixtures)

BLOCK, TIMEOUT = 0.1, 0.5
FOREVER = 600.0
"""Seconds that nothing here comes near, unless it waits for what does not come."""


@pytest.fixture(autouse=True)
def _prompt_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_core.connection.bell.SERVER_LATE", 0.3)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: Proxy, store_at: Open) -> Face:
    return store_at(proxy.url, socket_timeout=TIMEOUT)


def blocked(server: Server) -> int:
    return int(server.info("clients")["blocked_clients"])


def ring(server: Server) -> None:
    server.cli("ZADD", "m", "1", "x")


def test_a_wait_on_a_forgotten_connection_is_unavailable_and_the_next_one_is_over_a_new_one(
    server: Server, proxy: Proxy, store: Face
) -> None:
    bell = store.bell([b"m"])
    proxy.forget(b"BZPOPMIN")
    bell.arm(BLOCK)
    with pytest.raises(Unavailable, match="has not answered in time"):
        bell.wait(FOREVER)
    assert not bell.armed
    eventually(lambda: blocked(server) == 0, "the server gives up")
    ring(server)
    assert bell.wait(FOREVER)
    bell.close()


def test_the_connection_of_an_earlier_wait_is_given_up_in_its_own_time(
    server: Server, proxy: Proxy, store: Face
) -> None:
    """BZPOPMIN of the first stays outstanding for the second, which would wait for longer."""
    bell = store.bell([b"m"])
    proxy.forget(b"BZPOPMIN")
    assert not bell.wait(BLOCK / 10)
    with pytest.raises(Unavailable, match="has not answered in time"):
        bell.wait(FOREVER)
    bell.close()


@pytest.mark.parametrize(("late", "slow"), [(FOREVER, TIMEOUT), (0.0, FOREVER)], ids=["server", "network"])
def test_one_that_is_late_to_say_that_the_server_gives_up_is_waited_for(
    proxy: Proxy, store_at: Open, monkeypatch: pytest.MonkeyPatch, late: float, slow: float
) -> None:
    monkeypatch.setattr("relay_core.connection.bell.SERVER_LATE", late)
    bell = store_at(proxy.url, socket_timeout=slow).bell([b"m"])
    assert not bell.wait(BLOCK / 10)
    proxy.delay = 2 * TIMEOUT
    assert not bell.wait(2 * BLOCK)
    assert not bell.wait(3 * TIMEOUT)
    assert proxy.connections == 2
    bell.close()


@pytest.mark.parametrize("rings", [False, True], ids=["gave up", "rang"])
def test_after_a_long_sleep_of_this_process_what_has_come_is_read_first(
    server: Server, store_at: Open, monkeypatch: pytest.MonkeyPatch, rings: bool
) -> None:
    bell = store_at(server.url).bell([b"m"])
    bell.arm(FOREVER if rings else 1.0)
    eventually(lambda: blocked(server) == 1, "the bell is armed")
    if rings:
        ring(server)
    eventually(lambda: blocked(server) == 0, "the server answers")
    later = time.monotonic() + 1000
    monkeypatch.setattr("relay_core.connection.bell.monotonic", lambda: later)
    monkeypatch.setattr("relay_core.connection.aiobell.monotonic", lambda: later)
    assert bell.wait(0.0) is rings
    bell.close()


def test_a_loop_hears_of_it_whatever_it_asks(server: Server, proxy: Proxy) -> None:
    """It selects on the bell, which never speaks, and asks once a second: whether it rang, or whether it is armed."""
    store = SyncStore(parse_url(proxy.url), StoreSettings(socket_timeout=TIMEOUT))
    bells = [store.bell([b"m"]) for _ in range(2)]
    proxy.forget(b"BZPOPMIN", times=2)
    for bell in bells:
        bell.arm(BLOCK)
        assert bell.armed
    eventually(lambda: not any(bell.armed for bell in bells), "the answers are overdue")
    with pytest.raises(Unavailable, match="has not answered in time"):
        bells[0].rung()
    with pytest.raises(Unavailable, match="has not answered in time"):
        bells[1].arm(BLOCK)
    eventually(lambda: blocked(server) == 0, "the server gives up")
    for bell in bells:
        bell.arm(FOREVER)
        assert bell.armed
    eventually(lambda: blocked(server) == 2, "new connections wait")
    ring(server)
    assert select.select([fd for bell in bells for fd in bell.filenos()], [], [], FOREVER)[0]
    assert sum(bell.rung() for bell in bells) == 1
    for bell in bells:
        bell.close()
    store.close()


def test_an_answer_that_lies_unread_leaves_a_bell_armed(
    server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SyncStore(parse_url(proxy.url), StoreSettings(socket_timeout=TIMEOUT))
    bell = store.bell([b"m"])
    bell.arm(FOREVER)
    eventually(lambda: blocked(server) == 1, "the bell is armed")
    ring(server)
    assert select.select(bell.filenos(), [], [], FOREVER)[0]
    later = time.monotonic() + 1000
    monkeypatch.setattr("relay_core.connection.bell.monotonic", lambda: later)
    assert bell.armed
    bell.arm(BLOCK)
    assert bell.rung()
    bell.close()
    store.close()


@pytest.mark.parametrize("asks", ["read", "arm"])
def test_a_reader_reads_over_a_new_connection_what_went_to_the_forgotten_one(
    server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    server.cli("XGROUP", "CREATE", "s", "g", "$", "MKSTREAM")
    store = SyncStore(parse_url(proxy.url), StoreSettings(socket_timeout=TIMEOUT))
    reader = store.reader([b"s"], "g", "me")
    reader.arm(BLOCK)  # answers at once: nothing was left
    eventually(lambda: not reader.read() and not reader.armed, "the first answer")
    proxy.forget(b"XREADGROUP")
    reader.arm(FOREVER)
    eventually(lambda: blocked(server) == 1, "the reader waits")
    server.cli("XADD", "s", "*", "name", "value")
    with monkeypatch.context() as patch:
        patch.setattr("relay_core.connection.bell.monotonic", lambda: time.monotonic() + 2 * FOREVER)
        with pytest.raises(Unavailable, match="has not answered in time"):
            reader.read() if asks == "read" else reader.arm(BLOCK)
    reader.arm(BLOCK)
    assert select.select(reader.filenos(), [], [], FOREVER)[0]
    assert [entry.fields for entry in reader.read()] == [[b"name", b"value"]]
    reader.close()
    store.close()


def asks_after(sock: Any) -> list[int]:
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    options = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
    return [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *options]


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="as Linux calls them")
@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_the_system_asks_after_silent_connections(tcp_server: Server) -> None:
    url, settings = parse_url(tcp_server.url), StoreSettings()
    store = SyncStore(url, settings)
    bell, link = store.bell([b"m"]), store.link(next(iter(store.locate([b"m"]).values())))
    bell.arm(FOREVER)
    assert link.exchange([clients.pack(("PING",))], 1).replies == [b"PONG"]
    for sock in (link.socket, bell.sockets()[0]):
        assert asks_after(sock) == [1, 30, 10, 3]
    link.close()
    bell.close()
    store.close()

    async def main() -> list[int]:
        store = AsyncStore(url, settings)
        address = (await store.find([b"m"]))[b"m"]
        connection = clients.aio_connection(url, settings, address, "store")
        await connection.connect()
        found = asks_after(clients.transport_of(connection).get_extra_info("socket"))
        await connection.disconnect()
        await store.close()
        return found

    assert asyncio.run(main()) == [1, 30, 10, 3]
