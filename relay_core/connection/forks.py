"""After a fork, the child lets go of its parent's connections: it sends nothing on them and ends nothing.

Python tells of its own forks. A server that forks in C, such as uWSGI, has Python hear of nothing unless it is told to:
there the child finds out by its process id, before it sends, locks or makes anything of what is here.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forked(Protocol):
    def after_fork(self) -> None:
        """Called in a fresh child, before it uses what its parent had."""


_watched: weakref.WeakSet[Forked] = weakref.WeakSet()
_here = os.getpid()
"""The process that all these belong to."""
_turns: dict[int, threading.RLock] = {}
"""By process id, so that a child never waits for a thread of its parent."""
_turning = 0
"""The process whose turn it is."""


def watch(owner: Forked) -> None:
    """Have `owner.after_fork()` called in children of this process, for as long as it lives."""
    look()  # or it would be taken for the parent's
    _watched.add(owner)


def look() -> None:
    """To be called before anything is used that may be the parent's."""
    if os.getpid() != _here:
        _turn(os.getpid())


def _turn(pid: int) -> None:
    global _here, _turning
    with _turns.setdefault(pid, threading.RLock()):  # its other threads wait
        if pid not in (_here, _turning):  # those that are told may look, too
            _turning = pid
            for owner in list(_watched):
                owner.after_fork()
            _here, _turning = pid, 0
            _turns.clear()


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
        look()
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
    """In a namespace of its own it may bear its parent's process id."""
    global _here, _turning
    _here = _turning = 0
    _turns.clear()
    look()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
