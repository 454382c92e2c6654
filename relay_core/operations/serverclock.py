"""The server's time as a publisher knows it, which saves asking for it with each job.

Clients send durations, and a job's creation is told by the server's clock alone, whatever a client's own one says. A
busy publisher has heard that clock a moment ago, and counts on from there by one that no setting of the time moves.
"""

from __future__ import annotations

from relay_core.clock import sent_now
from relay_core.operations.base import MOST

LATELY = 1.0
"""Seconds for which one is counted on from what the server said."""


class ServerClock:
    """What the servers of queues said last, and when. Each may have a time of its own, in a Cluster."""

    def __init__(self) -> None:
        self._heard: dict[tuple[str, int], tuple[int, float]] = {}

    def set(self, queue: str, level: int, now_ms: int, asked: float) -> None:
        """A job of that level was stored, and this was the time.

        :param asked: `sent_now()` before; what was said long after may have been said long ago
        """
        now = sent_now()
        if now - asked >= LATELY:
            return
        if len(self._heard) >= MOST:
            self._heard.clear()
        self._heard[queue, level] = now_ms, now

    def forget(self, queue: str, level: int) -> None:
        """A job of that level found something else than there was."""
        self._heard.pop((queue, level), None)

    def now_ms(self, queue: str, level: int) -> int | None:
        """The server's time, unix ms, at most what it takes to send something behind; None where it was not heard for
        that level lately."""
        heard = self._heard.get((queue, level))
        if heard is None:
            return None
        past = sent_now() - heard[1]
        return heard[0] + int(past * 1000) if 0 <= past < LATELY else None
