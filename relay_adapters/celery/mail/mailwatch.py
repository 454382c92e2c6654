"""The wake-ups of one channel's mailboxes: their messages come by the very connection that waits for them."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from relay_core.connection import Reader, SyncStore

BLOCK = 20.0
"""Seconds after which the wait at the server is begun anew."""

AT_ONCE = 1000
"""Most messages handed over in one turn of a loop."""


class MailWatch:
    """Like watch.Watch, for mailboxes: never held up by the credit for tasks."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.bell: Reader | None = None
        self.look_at = 0.0
        self._boxes: tuple[str, ...] = ()
        self._seat = 0

    def arm(self) -> Reader | None:
        """Wait for messages where there is nothing left to hand over."""
        channel = self.channel
        boxes = tuple(channel.boxes)
        self.look_at = time.monotonic() + 60.0
        if set(boxes) != set(self._boxes):
            self.close()
        if not boxes:
            return None
        if self.bell is None:
            self.bell = self._reader(boxes)
        if self.bell.gone:
            channel.attendance.touch(list(boxes))
        if not self.bell.armed and not channel.mail:
            self.bell.arm(BLOCK)
        return self.bell

    def sockets(self) -> list[Any]:
        """What a loop selects on for reading."""
        return self.bell.sockets() if self.bell is not None else []

    def _reader(self, boxes: tuple[str, ...]) -> Reader:
        """A reader that begins behind what this process has received before, with what an earlier one left unread."""
        places, attendance = self.channel.topology.places, self.channel.attendance
        self._boxes, self._seat = boxes, attendance.sit(id(self.channel), boxes)
        waiting = {queue: id for queue, seat, id, _packed in self.channel.mail if seat == self._seat}
        found = {queue: waiting.get(queue) or attendance.last(queue, self._seat) for queue in boxes}
        last = {places.box(queue): id for queue, id in found.items() if id}
        store: SyncStore = self.channel.broker.store
        return store.reader([places.box(queue) for queue in boxes], "q", attendance.reader(self._seat), last)

    def quiet(self, now: float) -> bool:
        """True when a turn of a loop in which no descriptor spoke has nothing for this watch."""
        bell = self.bell
        return bell is not None and bell.armed and not bell.gone and not self.channel.mail and now < self.look_at

    def look(self, ask: bool = True) -> int:
        """Hand over what has come: how many messages. One at a time where a caller counts them by `drain_events`.

        :param ask: whether something may have come; False where the descriptors are known to be silent
        """
        channel = self.channel
        if channel.closed or not channel.boxes:
            return 0
        if ask and self.bell is not None and not self.bell.gone:
            queues = {channel.topology.places.box(queue): queue for queue in self._boxes}
            channel.mail.extend((queues[e.stream], self._seat, e.id, e.fields[3]) for e in self.bell.read())
        delivered, most = 0, AT_ONCE if channel.connection.looping else 1
        while delivered < most and not channel.closed and (found := channel.next_mail()) is not None:
            channel.deliver(*found)
            delivered += 1
        return delivered

    starving = False
    """Its bell is armed whenever nothing waits."""

    @property
    def busy(self) -> bool:
        """True when the next turn of the loop should come at once."""
        return bool(self.channel.mail) and bool(self.channel.qos.can_consume())

    def wake(self) -> None:
        """End the wait of another thread. May be called from any thread."""
        if (bell := self.bell) is not None:
            bell.wake()

    def reads(self, queue: str) -> bool:
        return queue in self._boxes

    def leave(self, queue: str) -> None:
        """Its consumer is cancelled. What has come and was not handed over is the store's to tell again: to the next
        consumer in this process, which may be another channel's, and to that one alone."""
        self.close()
        self.channel.mail = deque(row for row in self.channel.mail if row[0] != queue)

    def close(self) -> None:
        if self.bell is not None:
            self.bell.close()
            self.bell = None
        self._boxes = ()
