"""One channel's wake-ups: a bell on the queues it consumes, armed only while it has credit."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.options import RETRY_IN_LIST
from relay_adapters.celery.receiving.ahead import Ahead
from relay_adapters.celery.receiving.consuming import Delivery
from relay_adapters.celery.receiving.qos import BATCH
from relay_adapters.celery.workerstate import shutting_down, waiting_in_pool
from relay_core.connection import Bell, Sender

if TYPE_CHECKING:
    from relay_adapters.celery.channel import Channel

SLICE = 0.002
"""Seconds for which messages are handed over in one go. A pool that runs a task in the loop's own thread takes its
time there, and what Celery put off until the loop's next turn waits for that: rejects and control commands."""


_SOON = 0.02
"""Seconds for which a claim of few messages is put off at most: what waits in the pool may wait for a process that is
slow or gone, while others are idle."""


class Watch:
    """Claims for one channel, and hands over what was claimed."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.queues: tuple[str, ...] = ()
        self.look_at = 0.0
        """Monotonic time of the next look even without a wake-up."""
        self.hungry = True
        """True when there may be messages that no wake-up will tell of: after a time without credit."""
        self.waiting: deque[Delivery] = deque()
        """Claimed, and not delivered yet."""
        self.ahead: Ahead | None = None
        """The claim that is on its way, if one is."""
        self._sender: Sender | None = None
        self._rang = set(channel.consumed)
        """The queues of which a wake-up may have been taken that no claim has passed on yet, where work remains: by the
        bell of an earlier connection, too."""
        self._delivering = self._failed = False
        self._put_off_until: float | None = None
        """Monotonic time, where a claim of few was put off."""

    @property
    def bell(self) -> Bell | None:
        return self.channel.bell

    def arm(self) -> Bell | None:
        """Wait for wake-ups where the channel consumes and has credit. Raises Unavailable."""
        channel, bell = self.channel, self._listen()
        if bell is None:
            return None
        # while there is more than was claimed, no wake-up has to say so
        if not self.hungry and not bell.armed and self.ahead is None and channel.qos.room(len(self.waiting)):
            bell.arm(channel.broker.settings.max_block)
        return bell

    def _listen(self) -> Bell | None:
        """The bell of the queues that are consumed by now."""
        queues = self.channel.consumed
        if queues != self.queues and set(queues) != set(self.queues):
            self._silence()
        if self.bell is None and queues:
            self.channel.bell = self.channel.broker.store.bell([self.channel.marker(queue) for queue in queues])
            self.queues, self._rang = queues, set(queues)
        return self.bell

    @property
    def starving(self) -> bool:
        """True when there may be messages, and no wake-up would tell of them: who sleeps now would sleep past them."""
        room = self.channel.qos.room(len(self.waiting))
        listens = self.bell is None or self.bell.armed or self.ahead is not None
        return self.hungry and not listens and room > 0 and self._enough(room)

    def sockets(self) -> list[Any]:
        """What a loop selects on for reading."""
        return [socket for source in (self.bell, self._sender) if source is not None for socket in source.sockets()]

    def quiet(self, now: float) -> bool:
        """True when a turn of a loop in which no descriptor spoke has nothing for this watch."""
        bell = self.bell
        if bell is None or self.waiting or now >= self.look_at:
            return False
        if self.ahead is not None:
            return waiting_in_pool() > 0 and not self.ahead.settled
        if self.hungry:  # acks that are pending go along with the claim that comes
            room = self.channel.qos.room()
            return not self._wants(room, now) if room else not self._rang
        if self.channel.leases.owed.pending(self.channel.there):
            return False
        return bell.armed or not self.channel.qos.can_consume()

    def look(self, ask: bool = True) -> int:
        """What there is to do now, in either kind of loop: how many messages were delivered. Raises Unavailable.

        :param ask: whether the bell may have rung; False where its descriptors are known to be silent
        """
        channel, bell = self.channel, self.bell
        if channel.closed or not channel.consumed:
            return 0
        rung = ask and bell is not None and bell.rung()
        if ask and not rung and self.ahead is None and self._sender is not None:
            self._sender.rest()
        now = time.monotonic()
        if rung and bell is not None:
            self._rang.update(queue for queue in self.queues if channel.marker(queue) in bell.popped)
        if self.ahead is not None:
            return self._deliver()
        room = 0 if self.waiting else channel.qos.room()
        if room and (rung or self._wants(room, now)):
            if not waiting_in_pool() or not self._claim_ahead(room):
                self._claim(room)
            return self._deliver()
        if room == 0:
            self.hungry = True
            if self._rang:
                with self._hurried():
                    channel.pass_on(self._rang)
        if now >= self.look_at:
            # without credit there is nothing to look for before an ack
            self.look_at = now + channel.broker.settings.max_block
        return self._deliver()

    def _wants(self, room: int, now: float) -> bool:
        """Whether to claim without a wake-up.

        On a queue with more to give, a claim of few messages is put off a little while the pool still has some
        waiting: that saves two of three round trips where tasks are short.
        """
        if self.hungry:
            return self._enough(room)
        return now >= self.look_at or self.channel.leases.owed.pending(self.channel.there)

    def _enough(self, room: int) -> bool:
        """Whether a claim of so many is worth its round trip by now. Where it is put off, the next look comes soon."""
        most = min(BATCH, self.channel.qos.prefetch_count)
        if room * 4 >= most * 3 or not waiting_in_pool() or self.channel.leases.untold:
            return True
        now = time.monotonic()
        if self._put_off_until is None:
            self._put_off_until = now + _SOON
        if now >= self._put_off_until:
            return True
        self.look_at = self._put_off_until if now >= self.look_at else min(self.look_at, self._put_off_until)
        return False

    def _claim(self, room: int, ahead: Ahead | None = None) -> None:
        self._listen()
        try:
            with self._hurried():
                found, retry_after = self.channel.claim(room, self._rang, ahead)
        except BaseException:
            self.hungry = True
            self._rang.update(self.queues)
            raise
        if self._rang:
            self._rang.intersection_update(self.channel.there)  # the bell rings for the others once they are back
        self.waiting.extend(found)
        self._put_off_until = None
        # less than was asked for is all there is, and the next message rings
        self.hungry = len(found) >= room or self.channel.leases.apart.shut
        longest = self.channel.broker.settings.max_block
        self.look_at = time.monotonic() + (longest if retry_after is None else min(longest, retry_after))

    def _hurried(self) -> AbstractContextManager[None]:
        """An event loop waits for no broker that is away: it has others to turn to, and a pool to look after."""
        channel = self.channel
        return channel.broker.store.hurried(RETRY_IN_LIST) if channel.connection.looping else nullcontext()

    def _claim_ahead(self, room: int) -> bool:
        """Send a claim and see to its reply later. False where this is not to be done."""
        channel = self.channel
        if not channel.connection.looping or channel.leases.apart.shut:
            return False
        if self._sender is None:
            self._sender = channel.broker.store.sender()
        self.ahead = channel.claim_ahead(room, self._sender, self._rang)
        if self.ahead is None:
            return False
        self._put_off_until = None
        self.look_at = time.monotonic() + channel.broker.settings.max_block
        return True

    def _take(self) -> bool:
        """Take the reply of the claim that is on its way, unless there are other things to do until it is there."""
        ahead = self.ahead
        if ahead is None or (waiting_in_pool() and time.monotonic() < self.look_at and not ahead.arrived()):
            return False
        self.ahead = None
        self._claim(ahead.room, ahead)
        self.hungry = self.hungry or bool(self._rang)
        return True

    def _deliver(self) -> int:
        channel, delivered = self.channel, 0
        if channel.connection.looping:
            ends = time.monotonic() + SLICE
        else:
            # who drains by calls counts the messages by them, as kombu's helpers do; Celery's workers do not
            ends = math.inf if channel.leases.tasks and not channel.singly else 0.0
        self._failed = False
        self._return_unwanted()
        while not channel.closed and (delivered == 0 or time.monotonic() < ends):
            if not (self.waiting or (self._take() and self.waiting)):
                break
            if self.waiting[0][1] not in channel.consumed:
                self._return_unwanted()
                continue
            if not channel.qos.can_consume() or self._held_back():
                break
            if len(self.waiting) == 1 and self.hungry and self.ahead is None:
                # a pool that runs a task in the loop's own thread runs the last one meanwhile
                room = channel.qos.room(1)
                if room and self._enough(room):
                    self._claim_ahead(room)
            raw, queue = self.waiting.popleft()
            delivered += 1
            self._hand_over(raw, queue)
        return delivered

    def _return_unwanted(self) -> None:
        """What came for a consumer that was cancelled goes back, with credit and without. In one move: one by one, each
        would come before the one that it followed."""
        consumed = self.channel.consumed
        if rest := [one for one in self.waiting if one[1] not in consumed]:
            self.waiting = deque(one for one in self.waiting if one[1] in consumed)
            self.channel.take_back(rest)

    def deliver_rest(self, queue: str) -> None:
        """Its consumer is being cancelled, and gets what is on its way to it, as over AMQP and as its credit allows. If
        a callback or an error ends it, it wants no more, nor if a callback's error was the last that it heard."""
        channel = self.channel
        rest = [one for one in self.waiting if one[1] == queue]
        self.waiting = deque(one for one in self.waiting if one[1] != queue)
        try:
            while rest and not (self._delivering or self._failed or sys.exc_info()[1]) and queue in channel.consumed:
                if channel.leases.apart.shut or not channel.qos.can_consume():
                    break
                self._hand_over(*rest.pop(0))
        finally:
            channel.take_back(rest)

    def _hand_over(self, raw: Any, queue: str) -> None:
        before, self._delivering = self._delivering, True
        try:
            self.channel.deliver(raw, queue)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._delivering = before

    def _held_back(self) -> bool:
        """Whether the next one has to wait until this process holds nothing else. What is done is told at once then."""
        leases = self.channel.leases
        if not leases.apart.shut:
            return False
        tag = self.waiting[0][0]["properties"]["delivery_tag"]
        if leases.apart.seconds(tag):
            with self._hurried():
                leases.flush()
        wait = leases.apart.seconds(tag)
        if wait:
            self.look_at = time.monotonic() + wait
        return wait > 0

    def wake(self) -> None:
        """End the wait of another thread. May be called from any thread."""
        if (bell := self.bell) is not None:
            bell.wake()

    @property
    def busy(self) -> bool:
        """True when the next turn of the loop should come at once."""
        if not self.waiting or not self.channel.qos.can_consume():
            return False
        apart = self.channel.leases.apart
        return not (apart.shut and apart.seconds(self.waiting[0][0]["properties"]["delivery_tag"]))

    def _silence(self) -> None:
        if self.bell is not None:
            self.bell.close()
            self.channel.bell = None
        self.queues = ()
        self.hungry = True

    def close(self) -> None:
        """No more wake-ups; what was not delivered is handed back."""
        self._silence()
        # a server that is away must not keep the loop from connecting anew
        wait = shutting_down() or not self.channel.connection.looping
        ahead, self.ahead, sender, self._sender = self.ahead, None, self._sender, None
        if ahead is not None:
            ahead.hand_back() if wait else self.channel.leases.abandon(ahead)
        elif sender is not None:
            sender.close()
        if self.waiting:
            left, self.waiting = list(self.waiting), deque()
            self.channel.take_back(left, wait)
