"""A child of fork lets go of its parent's connections, and the parent goes on as if there were no child."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable

from relay_core.connection import AsyncStore, SyncStore, forks
from relay_core.settings import StoreSettings, parse_url
from tests.servers import Server, eventually
from tests.shells import count


def test_the_event_loop_of_the_parent_still_hears_its_server(server: Server) -> None:
    """Both processes have the same selector: what the child closes in the loop's way is lost to the parent."""
    store = AsyncStore(parse_url(server.url), StoreSettings(socket_timeout=5, retry_for=0))

    async def child_ended(child: int) -> int:
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            await asyncio.sleep(0.01)
        return os.waitstatus_to_exitcode(ended[1])

    async def main() -> None:
        await asyncio.gather(store.run(count()), store.run(count()))
        bell = store.bell([b"m"])
        await bell.arm(100)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if asyncio.run(store.run(count("child"))) == (1, False) else 2
                gc.collect()
            finally:
                os._exit(code)
        assert await child_ended(child) == 0
        server.cli("ZADD", "m", "1", "x")
        assert await bell.wait(5)
        numbers = await asyncio.gather(*(store.run(count()) for _ in range(3)))
        assert sorted(numbers) == [(3, False), (4, False), (5, False)]
        await bell.close()
        await store.close()

    asyncio.run(main())


def test_the_connections_of_a_dead_parent_end_although_its_child_lives(server: Server) -> None:
    """The child never uses the store: it must let go at once, or the server goes on waking the dead parent."""

    def clients() -> int:
        return int(server.info("clients")["connected_clients"])

    before = clients()
    ready, go = os.pipe()
    parent = os.fork()
    if parent == 0:
        code = 1
        try:

            async def main() -> None:
                store = AsyncStore(parse_url(server.url), StoreSettings())
                await store.run(count())
                bell = store.bell([b"m"])
                await bell.arm(100)
                if os.fork() == 0:
                    os.close(go)
                    os.read(ready, 1)  # until the test ends
                os._exit(0)

            asyncio.run(main())
        finally:
            os._exit(code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0
        eventually(lambda: clients() <= before, "server forgets the parent", 10)
    finally:
        os.close(go)
        os.close(ready)


def c_fork() -> int:
    """A fork of which Python is told nothing, as a server in C makes them (uWSGI)."""
    return ctypes.PyDLL(None).fork()


def ends_well(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def in_child(told: Callable[[], bool]) -> int:
    """Run it in a child that Python hears nothing of: its process id. It exits with 0 where that was true."""
    child = c_fork()
    if child == 0:
        code = 1
        try:
            code = 0 if told() else 2
        finally:
            os._exit(code)
    return child


def test_a_child_that_python_hears_nothing_of_has_connections_of_its_own(server: Server) -> None:
    store = SyncStore(parse_url(server.url), StoreSettings(socket_timeout=5, retry_for=0))
    parents = store.raw("CLIENT", "ID")
    assert ends_well(in_child(lambda: store.raw("CLIENT", "ID") != parents))
    assert store.raw("CLIENT", "ID") == parents
    store.close()


def test_a_child_that_python_hears_nothing_of_waits_for_no_thread_of_its_parent() -> None:
    lock, held, go = forks.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def take() -> bool:
        signal.alarm(20)
        with lock:
            return True

    child = in_child(take)
    assert ends_well(child)
    go.set()
    thread.join()


def test_all_threads_of_such_a_child_wait_until_it_has_let_go() -> None:
    """One of them could else send on a connection of the parent's that another one is about to close."""
    owner = _Owner()
    forks.watch(owner)

    def two() -> bool:
        signal.alarm(20)
        first = threading.Thread(target=forks.look)
        first.start()
        owner.told.wait()
        second = threading.Thread(target=lambda: (forks.look(), owner.passed.set()))
        second.start()
        early = owner.passed.wait(0.05)
        owner.go.set()
        first.join()
        second.join()
        return not early and owner.calls == 1

    assert ends_well(in_child(two))


class _Owner:
    """Is told of the fork, looks itself, and goes on when it may."""

    def __init__(self) -> None:
        self.told, self.go, self.passed, self.calls = threading.Event(), threading.Event(), threading.Event(), 0

    def after_fork(self) -> None:
        forks.look()
        self.calls += 1
        self.told.set()
        self.go.wait()


def test_what_such_a_child_makes_first_is_not_taken_for_its_parents() -> None:
    def make() -> bool:
        owner = _Owner()
        owner.go.set()
        forks.watch(owner)
        forks.look()
        return owner.calls == 0

    assert ends_well(in_child(make))


def test_a_child_that_python_hears_of_only_afterwards_takes_that_well() -> None:
    """So does uWSGI with `py-call-osafterfork`: nothing was called before the fork."""

    def hear() -> bool:
        raised: list[object] = []
        sys.unraisablehook = raised.append
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return raised == []

    assert ends_well(in_child(hear))
