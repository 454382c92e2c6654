"""One store in many hands: threads, children of fork, event loops, greenlets, and the limit on connections."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest

from relay_core import Broker
from relay_core.commands.command import Command
from relay_core.connection import AsyncStore, SyncStore
from relay_core.connection.pool import Link, Pool
from relay_core.errors import InvalidArgument, Unavailable
from relay_core.settings import StoreSettings, StoreUrl, parse_url
from tests.forking import child_of, code_of
from tests.proxy import Proxy, to_socket
from tests.servers import Flavour, Server, eventually
from tests.shells import count, script
from tests.signals import handled_by


@pytest.fixture
def server(flavour: Flavour) -> Iterator[Server]:
    """One of its own: connections are counted here, and an adapter keeps its own as long as this process lives."""
    with Server(flavour) as server:
        yield server


@pytest.fixture
def store(server: Server) -> Iterator[SyncStore]:
    store = SyncStore(parse_url(server.url), StoreSettings())
    yield store
    store.close()


def clients(server: Server) -> int:
    """How many connections the server has besides this one."""
    return int(server.info("clients")["connected_clients"]) - 1


# --- threads


def test_many_threads_never_get_each_others_replies(server: Server, store: SyncStore) -> None:
    def work(name: str) -> list[int]:
        return [store.run(count(name))[0] for _ in range(200)]

    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(work, [f"n{i}" for i in range(16)]))
    assert results == [list(range(1, 201))] * 16
    assert clients(server) <= 16


def test_connections_are_used_again(server: Server, store: SyncStore) -> None:
    store.run(count())
    before = int(server.info("stats")["total_connections_received"])
    for _ in range(50):
        store.run(count())
    store.run_many([count()] * 50)
    assert int(server.info("stats")["total_connections_received"]) == before


def test_threads_share_no_more_connections_than_the_limit(server: Server) -> None:
    store = SyncStore(parse_url(server.url), StoreSettings(max_connections=2))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: [store.run(count()) for _ in range(50)], range(8)))
    assert server.cli("GET", "n") == b"400"
    assert clients(server) == 2
    store.close()


def test_who_finds_all_connections_in_use_for_too_long_is_told_the_limit(server: Server) -> None:
    store = SyncStore(parse_url(server.url), StoreSettings(max_connections=1, retry_for=0.1))
    store.run(count())
    with ThreadPoolExecutor(1) as other:
        holder = other.submit(store.raw, "BLPOP", "nothing", 2)
        eventually(lambda: server.info("clients")["blocked_clients"] == "1", "the connection is held")
        with pytest.raises(Unavailable, match="max_connections") as refused:
            store.run(count())
        assert not refused.value.maybe_executed
        server.cli("LPUSH", "nothing", "x")
        holder.result()
    assert store.run(count()) == (2, False)
    store.close()


def test_who_waits_for_a_connection_gets_it_before_who_gives_it_back_and_takes_one_again(server: Server) -> None:
    store = SyncStore(parse_url(server.url), StoreSettings(max_connections=1))
    stop, commands = threading.Event(), [store.run(count())[0]]

    def go_on() -> None:
        while not stop.is_set():
            commands.append(store.run(count())[0])

    with ThreadPoolExecutor(1) as other:
        greedy = other.submit(go_on)
        try:
            eventually(lambda: len(commands) > 10, "the other thread runs commands")
            mine = [store.run(count())[0] for _ in range(50)]
        finally:
            stop.set()
        greedy.result()
    assert mine[-1] - mine[0] < 5 * len(mine)  # about one of the other's each time
    store.close()


def test_a_connection_that_its_user_lost_is_made_anew_for_who_waits() -> None:
    """What interrupts a thread may come before it could give its connection back."""
    pool = Pool(lambda: Link(Mock()), limit=1, patience=0.2)
    held = [pool.take()]
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(pool.take)
        eventually(lambda: pool._waiting, "the other thread to wait")
        held.clear()
        assert waiting.result() is not None


def test_a_handler_of_signals_runs_commands_also_while_its_thread_is_taking_a_connection(server: Server) -> None:
    store, handled = SyncStore(parse_url(server.url), StoreSettings()), []
    store.run(count())

    class Ringing(list[Any]):
        """The idle connections: a signal comes as one is taken."""

        def pop(self, *args: Any) -> Any:
            ring()
            return super().pop(*args)

    def handle() -> None:
        (pool,) = store._pools.values()
        pool._idle = list(pool._idle)
        handled.append(store.run(count("handled")))

    with handled_by(handle) as ring:
        (pool,) = store._pools.values()
        pool._idle = Ringing(pool._idle)
        store.run(count())
    assert handled == [(1, False)]
    store.close()


def test_a_handler_of_signals_opens_a_broker_also_while_its_thread_is_opening_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(server.url) as broker, handled_by(lambda: broker.enqueue("q", b"handled")) as ring:
        address = broker.address

        def ringing() -> StoreUrl:
            ring()
            return address()

        monkeypatch.setattr(broker, "address", ringing)
        broker.enqueue("q", b"")
        assert broker.stats("q").ready == 2
        assert clients(server) == 1, "both use the store that was opened first"


def test_closing_a_store_closes_its_connections_and_refuses_later_commands(server: Server) -> None:
    store = SyncStore(parse_url(server.url), StoreSettings())
    store.run(count())
    store.close()
    eventually(lambda: clients(server) == 0, "the connection is closed")
    with pytest.raises(Unavailable, match="closed"):
        store.run(count())
    store.close()


def test_closing_a_store_ends_its_retries(server: Server) -> None:
    store = SyncStore(parse_url("relay+unix:///nonexistent/socket"), StoreSettings(retry_for=60))
    with ThreadPoolExecutor(1) as other:
        trying = other.submit(store.raw, "PING")
        time.sleep(0.05)
        began = time.monotonic()
        store.close()
        with pytest.raises(Unavailable):
            trying.result(30)
    assert time.monotonic() - began < 10


def test_an_embedded_url_is_refused_until_its_server_runs() -> None:
    for shell in (SyncStore, AsyncStore):
        with pytest.raises(InvalidArgument, match="embedded"):
            shell(parse_url("relay://"))


# --- fork


def test_a_child_of_fork_uses_connections_of_its_own(server: Server, store: SyncStore) -> None:
    mine = store.raw("CLIENT", "ID")
    assert code_of(child_of(lambda: store.raw("CLIENT", "ID") != mine)) == 0
    assert store.raw("CLIENT", "ID") == mine, "the parent's session went on"


def test_children_of_fork_and_their_parent_never_get_each_others_replies(server: Server, store: SyncStore) -> None:
    store.run(count("parent"))

    def counts(name: str) -> bool:
        return [store.run(count(name))[0] for _ in range(100)] == list(range(1, 101))

    children = [child_of(partial(counts, f"child{i}")) for i in range(8)]
    assert [store.run(count("parent"))[0] for _ in range(100)] == list(range(2, 102))
    assert [code_of(child) for child in children] == [0] * 8


def test_a_fork_while_another_thread_uses_the_store_leaves_no_lock_behind(server: Server, store: SyncStore) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            store.run(count("busy"))

    with ThreadPoolExecutor(4) as threads:
        busy = [threads.submit(work) for _ in range(4)]
        try:
            assert [code_of(child_of(lambda: store.run(count("child")))) for _ in range(20)] == [0] * 20
        finally:
            stop.set()
        for one in busy:
            one.result()


# --- event loops


def test_an_async_store_may_be_used_from_one_loop_after_another(server: Server) -> None:
    store = AsyncStore(parse_url(server.url), StoreSettings())
    assert [asyncio.run(store.run(count()))[0] for _ in range(3)] == [1, 2, 3]


def test_many_tasks_never_get_each_others_replies(server: Server) -> None:
    async def work() -> list[Any]:
        store = AsyncStore(parse_url(server.url), StoreSettings(max_connections=5))

        async def one(name: str) -> list[int]:
            return [(await store.run(count(name)))[0] for _ in range(50)]

        try:
            return await asyncio.gather(*(one(f"n{i}") for i in range(20)))
        finally:
            await store.close()

    assert asyncio.run(work()) == [list(range(1, 51))] * 20


def test_a_task_that_waits_for_a_connection_gets_it_before_one_that_takes_it_again(server: Server) -> None:
    async def work() -> None:
        store = AsyncStore(parse_url(server.url), StoreSettings(max_connections=1))
        await store.run(count())
        stop = asyncio.Event()

        async def go_on() -> None:
            while not stop.is_set():
                await store.run(count())

        greedy = asyncio.ensure_future(go_on())
        await asyncio.sleep(0)
        mine = [(await store.run(count()))[0] for _ in range(50)]
        stop.set()
        await greedy
        assert mine[-1] - mine[0] < 5 * len(mine)  # about one of the other's each time
        await store.close()

    asyncio.run(work())


def test_a_cancelled_command_leaves_no_reply_for_the_next(server: Server) -> None:
    async def work() -> None:
        with Proxy(to_socket(server.socket), unix=True) as proxy:
            store = AsyncStore(parse_url(proxy.url), StoreSettings(max_connections=1))
            await store.run(count("a"))
            proxy.delay = 0.3
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(store.run(count("a")), 0.1)
            proxy.delay = 0.0
            assert await store.run(count("b")) == (1, False)
            await store.close()

    asyncio.run(work())


def test_a_cancelled_wait_for_a_connection_does_not_lose_it(server: Server) -> None:
    async def work() -> None:
        store = AsyncStore(parse_url(server.url), StoreSettings(max_connections=1))
        holder = asyncio.ensure_future(store.raw("BLPOP", "nothing", 5))
        await asyncio.sleep(0.1)
        waiting = asyncio.ensure_future(store.run(count()))
        await asyncio.sleep(0.05)
        waiting.cancel()
        server.cli("LPUSH", "nothing", "x")
        await holder
        assert await asyncio.wait_for(store.run(count()), 5) == (1, False)
        await store.close()

    asyncio.run(work())


# --- other surroundings


def run_python(code: str, *args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_greenlets_wait_at_the_same_time(server: Server) -> None:
    code = """
    from gevent import monkey; monkey.patch_all()
    import sys, time, gevent
    from relay_core.connection import SyncStore
    from relay_core.settings import StoreSettings, parse_url
    store = SyncStore(parse_url(sys.argv[1]), StoreSettings())
    bells = [store.bell([b"m%d" % i]) for i in range(4)]
    began = time.monotonic()
    waits = [gevent.spawn(bell.wait, 20) for bell in bells]
    gevent.sleep(0.2)
    for i in range(4):
        store.raw("ZADD", b"m%d" % i, 0, "w")
    gevent.joinall(waits, raise_error=True)
    assert [wait.value for wait in waits] == [True] * 4
    assert time.monotonic() - began < 10
    """
    run_python(code, server.url)


def test_the_stores_work_without_hiredis(server: Server) -> None:
    code = """
    import sys
    sys.modules["hiredis"] = None
    import asyncio
    from relay_core.connection import AsyncStore, SyncStore
    from relay_core.settings import StoreSettings, parse_url
    from tests.shells import count
    url = parse_url(sys.argv[1])
    store = SyncStore(url, StoreSettings())
    assert store.run(count("relay:\u00e9")) == (1, False)
    assert store.run_many([count("relay:\u00e9")] * 3) == [(2, False), (3, False), (4, False)]
    assert store.raw("SET", "x", b"\\x00\\r\\n\\xff" * 100000) == b"OK"
    assert store.raw("GET", "x") == b"\\x00\\r\\n\\xff" * 100000
    bell = store.bell([b"m"])
    assert not bell.wait(0.01)
    store.raw("ZADD", "m", 0, "w")
    assert bell.wait(5)
    async def work():
        store = AsyncStore(url, StoreSettings())
        assert await store.run(count("relay:\u00e9")) == (5, False)
        bell = store.bell([b"m"])
        assert not await bell.wait(0.01)
        await store.raw("ZADD", "m", 0, "w")
        assert await bell.wait(5)
        await bell.close()
        await store.close()
    asyncio.run(work())
    """
    run_python(code, server.url)


def test_a_payload_of_many_megabytes_goes_and_comes_back(server: Server, store: SyncStore) -> None:
    big = os.urandom(1 << 20) * 12
    echo = script("return ARGV[1]")
    assert store.run(Command(echo, (b"k",), (big,), lambda reply, _resent: reply)) == big

    async def work() -> list[Any]:
        other = AsyncStore(parse_url(server.url), StoreSettings())
        try:
            return await other.run_many([Command(echo, (b"k",), (big,), lambda reply, _resent: reply)] * 2)
        finally:
            await other.close()

    assert asyncio.run(work()) == [big, big]
