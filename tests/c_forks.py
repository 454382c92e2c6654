"""Forks of which Python is told nothing, as servers in C make them (uWSGI). Each in a process of its own: where another
thread asks for the interpreter's lock just then, the child may stand still, whoever forked.

`python -m tests.c_forks NAME URL` exits with 0 where that child did what its name says.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

from relay_core import embedded
from relay_core.connection import SyncStore, forks
from relay_core.settings import StoreSettings, parse_url
from tests.forking import child_of, code_of

SECONDS = 60
"""After which the kernel ends a child that stands still."""


def in_child(told: Callable[[], object]) -> bool:
    def work() -> object:
        signal.alarm(SECONDS)
        return told()

    return code_of(child_of(work, ctypes.PyDLL(None).fork)) == 0


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
        waits_for_no_thread_of_its_parent,
        has_all_its_threads_wait_until_it_has_let_go,
        takes_what_it_makes_first_for_its_own,
        takes_it_well_when_python_hears_of_it_only_afterwards,
    )
}

if __name__ == "__main__":
    os._exit(0 if CHILD[sys.argv[1]](sys.argv[2]) else 1)
