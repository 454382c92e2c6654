"""After a fork, the child lets go of its parent's connections: it sends nothing on them and ends nothing."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forked(Protocol):
    def after_fork(self) -> None:
        """Called in a fresh child, before anything else of it runs."""


_watched: weakref.WeakSet[Forked] = weakref.WeakSet()


def watch(owner: Forked) -> None:
    """Have `owner.after_fork()` called in children of this process, for as long as it lives."""
    _watched.add(owner)


class Lock:
    """A lock of a module or a long-lived object that is free in the child of a fork, whichever thread held it.

    A signal's handler may run what takes it, too, as its own thread holds it.
    """

    def __init__(self) -> None:
        self.after_fork()
        watch(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()


def let_go(descriptor: int) -> None:
    """Point this process's copy of a descriptor at nothing.

    An event loop of the parent has it registered in a selector that both processes share. To close it in the
    loop's own way would take it out of there for the parent too, which then waits for ever.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(nothing, descriptor, inheritable=False)
    finally:
        os.close(nothing)


def _in_child() -> None:
    for owner in list(_watched):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
