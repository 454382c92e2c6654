"""Looks out for a reply for a moment before its thread sleeps.

A server near by answers in less time than a thread takes to fall asleep and to be woken, and when the thread is awake
neither side pays for that: `make bench BENCH=round-trip`.
"""

from __future__ import annotations

import _socket
import os
import select
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

PATIENCE: Final = 100e-6
"""Seconds of one look: a server on the same machine takes less, one across most networks more."""
_MISSES = 8
_SELDOM = 64

_give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: None)


class BusyPoll:
    """Calling it looks once. After eight looks in a row that met no reply it looks for each 64th only.

    :param ready: says whether there is something to read, without blocking
    """

    __slots__ = ("_misses", "_ready")

    def __init__(self, ready: Callable[[], Any]) -> None:
        self._ready = ready
        self._misses = 0

    def __call__(self) -> None:
        """Return once there is something to read, after `PATIENCE`, or at once where looking was in vain so far."""
        if self._misses >= _MISSES and self._misses % _SELDOM:
            self._misses += 1
            return
        deadline, ready = time.perf_counter() + PATIENCE, self._ready
        while not (ready() or ready() or ready()):  # to give way takes longer than a look
            if time.perf_counter() > deadline:
                self._misses += 1
                return
            _give_way()  # to the server, should it share this core
        self._misses = 0


def busy_poll(socket: Any) -> Callable[[], None]:
    """What looks out for replies on a connected socket: nothing under gevent, where a read blocks no thread."""
    if not isinstance(socket, _socket.socket) or not hasattr(select, "poll"):
        return no_poll
    poller = select.poll()
    poller.register(socket, select.POLLIN)
    return BusyPoll(partial(poller.poll, 0))


def no_poll() -> None:
    """Leave the waiting to the read."""
