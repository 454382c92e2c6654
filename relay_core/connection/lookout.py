"""Looks out for servers of a cluster that are away, for those who have others to turn to meanwhile."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from relay_core.connection import forks
from relay_core.errors import Unavailable

if TYPE_CHECKING:
    from relay_core.connection.sync import SyncStore

EVERY = 0.75
"""Seconds from one look to the next."""

PATIENCE = 0.5
"""Seconds that a server may take to let connect, and to answer: one that hangs is asked anew all the time, so that it
is known soon after its return."""


ASK_EVERY = 2.0
"""Seconds from one question for the topology to the next: to look at a server that is dead costs the others nothing."""


class Misses(Protocol):
    def is_back(self, key: bytes) -> None:
        """The server of a key that it misses answers again. Called on the lookout's thread."""


class Lookout:
    """For any thread, and in a child of fork. Where something is missed it has a thread of its own, as a server that
    hangs holds up who asks it, with connections of their own. The thread keeps no one alive who misses something.
    """

    def __init__(self, open_store: Callable[[], SyncStore]) -> None:
        """:param open_store: makes one that asks once and waits for `PATIENCE`"""
        self._open_store = open_store
        self._lock = forks.Lock()
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._missed: dict[bytes, weakref.WeakSet[Misses]] = {}
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def miss(self, key: bytes, one: Misses) -> None:
        """Tell `one` when the server of the key answers, not before the next look."""
        with self._lock:
            self._missed.setdefault(key, weakref.WeakSet()).add(one)
            if self._thread is None and not self._closed.is_set():
                thread = threading.Thread(target=self._look_out, name="relay-lookout", daemon=True)
                thread.start()  # where that is refused, the next miss tries again
                self._thread = thread

    def forget(self, one: Misses) -> None:
        """It misses nothing any more."""
        with self._lock:
            for missing in self._missed.values():
                missing.discard(one)

    def close(self) -> None:
        with self._lock:
            self._missed.clear()
            self._closed.set()

    def _look_out(self) -> None:
        store, pause = self._open_store(), EVERY
        try:
            while not self._closed.wait(pause) and (keys := self._left()):
                began = time.monotonic()
                for key, answer in zip(keys, store.raw_many([("EXISTS", key) for key in keys]), strict=True):
                    if not isinstance(answer, Unavailable):  # what else is the matter is told to who asks next
                        self._is_back(key)
                pause = max(0.1, began + EVERY - time.monotonic())
        finally:
            store.close()
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _left(self) -> list[bytes]:
        """What is still missed. If nothing, the thread ends, and the next miss starts another."""
        with self._lock:
            self._missed = {key: missing for key, missing in self._missed.items() if missing}
            if not self._missed:
                self._thread = None
            return list(self._missed)

    def _is_back(self, key: bytes) -> None:
        with self._lock:
            missing = self._missed.pop(key, ())
        for one in list(missing):
            one.is_back(key)
