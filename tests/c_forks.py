"""Forks of which Python is told nothing, as servers in C make them (uWSGI). Each in a process of its own: where another
thread asks for the interpreter's lock just then, the child may stand still, whoever forked.

`python -m tests.c_forks NAME URL` exits with 0 where that child did what its name says.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable

from relay_core import embedded
from relay_core.connection import AsyncStore, SyncStore, forks
from relay_core.settings import StoreSettings, parse_url
from tests.forking import child_of, code_of
from tests.servers import eventually
from tests.shells import count

SECONDS = 60
"""After which the kernel ends a child that stands still."""


def c_fork() -> int:
    return ctypes.PyDLL(None).fork()


def in_child(told: Callable[[], object]) -> bool:
    def work() -> object:
        signal.alarm(SECONDS)
        return told()

    return code_of(child_of(work, c_fork)) == 0


class Owner:
    """Is told of the fork, looks itself, and goes on when it may."""

    def __init__(self) -> None:
        self.told, self.go, self.passed, self.calls = threading.Event(), threading.Event(), threading.Event(), 0

    def after_fork(self) -> None:
        forks.look()
        self.calls += 1
        self.told.set()
        self.go.wait()


def has_connections_of_its_own(url: str) -> bool:
    store = SyncStore(parse_url(url), StoreSettings(retry_for=0))
    parents = store.raw("CLIENT", "ID")
    return in_child(lambda: store.raw("CLIENT", "ID") != parents) and bool(store.raw("CLIENT", "ID") == parents)


def waits_with_a_bell_of_its_own(url: str) -> bool:
    store = SyncStore(parse_url(url), StoreSettings(retry_for=0))
    bell = store.bell([b"bell"])
    bell.arm(100)

    def waits() -> bool:
        bell.arm(100)
        eventually(lambda: b"blocked_clients:2" in store.raw("INFO", "clients"), "both to wait")
        return True

    if not in_child(waits):
        return False
    store.raw("ZADD", "bell", "1", "x")
    return bell.wait(60)


def takes_no_reply_of_its_parents_sender(url: str) -> bool:
    store = SyncStore(parse_url(url), StoreSettings(retry_for=5))
    sender, command = store.sender(), count("sender")
    store.run(command)
    sender.send(command)
    assert sender.result(command) == (2, False)
    sender.send(command)  # its reply is the parent's to take
    return in_child(lambda: sender.result(command)[0] != 3) and sender.result(command) == (3, False)


def leaves_its_parents_event_loop_alone(url: str) -> bool:
    asyncio.run(both_hear(url, c_fork))
    return True


async def both_hear(url: str, fork: Callable[[], int]) -> None:
    """Both processes have the same selector: what the child closes in the loop's way is lost to the parent."""
    store = AsyncStore(parse_url(url), StoreSettings(socket_timeout=5, retry_for=0))
    await asyncio.gather(store.run(count()), store.run(count()))
    bell = store.bell([b"m"])
    await bell.arm(100)

    def work() -> bool:
        asyncio._set_running_loop(None)  # a Python 3.13 that heard of no fork takes its parent's loop for its own
        fine = asyncio.run(store.run(count("child"))) == (1, False)
        gc.collect()
        return fine

    child = child_of(work, fork)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        await asyncio.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    await store.raw("ZADD", "m", "1", "x")
    assert await bell.wait(60)
    numbers = await asyncio.gather(*(store.run(count()) for _ in range(3)))
    assert sorted(numbers) == [(3, False), (4, False), (5, False)]
    await bell.close()
    await store.close()


def closes_a_bell_whose_lookout_was_at_work(_url: str) -> bool:
    store = SyncStore(parse_url("relay+cluster://127.0.0.1:1"), StoreSettings(retry_for=0))
    bell, held, go = store.bell([b"bell"]), threading.Event(), threading.Event()

    class Slow:
        def __hash__(self) -> int:  # asked for while the lookout has its lock
            held.set()
            go.wait()
            return 0

        def is_back(self, key: bytes) -> None: ...

    slow = Slow()
    thread = threading.Thread(target=lambda: store.lookout.forget(slow))
    store.lookout.miss(b"bell", bell)
    thread.start()
    held.wait()
    closed = in_child(lambda: bell.close() is None)
    go.set()
    thread.join()
    return closed


def waits_for_no_thread_of_its_parent(_url: str) -> bool:
    lock, held, go = forks.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            go.wait()

    def take() -> bool:
        with lock:
            return True

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    taken = in_child(take)
    go.set()
    thread.join()
    return taken


def has_all_its_threads_wait_until_it_has_let_go(_url: str) -> bool:
    """One of them could else send on a connection of the parent's that another one is about to close."""
    owner = Owner()
    forks.watch(owner)

    def two() -> bool:
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

    return in_child(two)


def takes_what_it_makes_first_for_its_own(_url: str) -> bool:
    def make() -> bool:
        owner = Owner()
        owner.go.set()
        forks.watch(owner)
        forks.look()
        return owner.calls == 0

    return in_child(make)


def takes_it_well_when_python_hears_of_it_only_afterwards(_url: str) -> bool:
    """So does uWSGI with `py-call-osafterfork`: nothing was called before the fork."""

    assert embedded  # has something to do after a fork

    def hear() -> bool:
        raised: list[object] = []
        sys.unraisablehook = raised.append
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return raised == []

    return in_child(hear)


CHILD = {
    what.__name__: what
    for what in (
        has_connections_of_its_own,
        waits_with_a_bell_of_its_own,
        takes_no_reply_of_its_parents_sender,
        leaves_its_parents_event_loop_alone,
        closes_a_bell_whose_lookout_was_at_work,
        waits_for_no_thread_of_its_parent,
        has_all_its_threads_wait_until_it_has_let_go,
        takes_what_it_makes_first_for_its_own,
        takes_it_well_when_python_hears_of_it_only_afterwards,
    )
}
if sys.version_info >= (3, 13):  # which ends a process that does so
    del CHILD["takes_it_well_when_python_hears_of_it_only_afterwards"]

if __name__ == "__main__":
    os._exit(0 if CHILD[sys.argv[1]](sys.argv[2]) else 1)
