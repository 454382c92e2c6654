"""That something has happened, for a thread that waits for it."""

from __future__ import annotations

import queue
from contextlib import suppress


class News:
    """Like an event, but safe in a signal's handler: `threading.Event` has a lock that the interrupted thread may hold.

    Of `queue.SimpleQueue` Python promises that `put` may interrupt anything.
    """

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[None] = queue.SimpleQueue()

    def tell(self) -> None:
        """End the next `wait`, or the one that is under way. From any thread, or a signal handler."""
        self._told.put(None)

    def forget(self) -> None:
        """What was told up to now."""
        with suppress(queue.Empty):
            while True:
                self._told.get_nowait()

    def wait(self, seconds: float) -> None:
        """Until something is told that was not waited for, or so many seconds have passed."""
        with suppress(queue.Empty):
            self._told.get(timeout=seconds)
