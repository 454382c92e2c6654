"""The bells of a broker at which nobody waits just now."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Generic, TypeVar

from relay_core.connection import forks

B = TypeVar("B")

MOST = 32
"""Bells that are kept. Each has a connection, and two more descriptors."""


class RestingBells(Generic[B]):
    """Kept for whoever waits for the same markers next, in whatever order; for any thread.

    The longest unused one makes room: there are as many sets of markers as a process has ways to name its queues.
    """

    def __init__(self) -> None:
        self._bells: deque[tuple[frozenset[bytes], B]] = deque()
        self._lock = forks.Lock()

    def take(self, markers: Iterable[bytes]) -> B | None:
        """One for these markers, if there is one."""
        wanted = frozenset(markers)
        with self._lock:
            for kept in reversed(list(self._bells)):
                if kept[0] == wanted:
                    with suppress(ValueError):  # a signal's handler took it just now
                        self._bells.remove(kept)
                        return kept[1]
        return None

    def put(self, markers: Iterable[bytes], bell: B) -> B | None:
        """Keep it. Returns the one that had to make room, to be closed."""
        with self._lock:
            self._bells.append((frozenset(markers), bell))
            return self._bells.popleft()[1] if len(self._bells) > MOST else None

    def take_all(self) -> list[B]:
        """All of them, to be closed."""
        with self._lock:
            bells = [bell for _markers, bell in self._bells]
            self._bells.clear()
            return bells
