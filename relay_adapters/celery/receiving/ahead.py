"""A claim that is on its way while the event loop hands on and runs what it has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay_adapters.celery.messages.tags import new_tag
from relay_core.errors import RelayError
from relay_core.job import Claimed

if TYPE_CHECKING:
    from relay_adapters.celery.holding.leases import Leases
    from relay_core.connection import Sender


class Ahead:
    """Sent when made, with the acks of its queue that are pending.

    Where a task holds the loop up, the thread that keeps the leases takes the reply: what was claimed is held, too.

    :param sender: whose command before this one is answered
    :param woken: whether a wake-up was taken, for the claim to pass on
    :param wake: called when the reply was taken, by whichever thread, to make the loop turn
    :ivar room: how many messages were asked for
    :ivar settled: True once the reply was taken
    :ivar abandoned: True once nobody will `take` what comes of it
    :ivar tags: delivery tags of what was claimed, by which the leases hold it, once it is settled
    """

    def __init__(
        self, leases: Leases, sender: Sender, queue: str, room: int, woken: bool, wake: Callable[[], None]
    ) -> None:
        self.queue, self.room = queue, room
        self.abandoned = False
        self.tags: list[str] = []
        self._leases = leases
        self._sender = sender
        self._wake = wake
        self._acks = leases.owed.take_acks(queue)
        self._lock = threading.Lock()
        self._found = Claimed()
        self._error: RelayError | None = None
        self.settled = False
        broker = leases.broker
        self._over = time.monotonic() + broker.settings.lease
        try:
            flow = broker.operations.finish(queue, [held.job for held in self._acks], (), room, woken)
            self._rest = broker.begin(flow, sender)
        except BaseException:
            leases.unsent(self._acks)
            raise
        leases.set_out(self)

    def arrived(self) -> bool:
        """True when `take` will not have to wait for the server, unless the claim has to be repeated."""
        if not self._lock.acquire(blocking=False):
            return True  # the other thread is taking it
        try:
            return self.settled or self._sender.arrived()
        finally:
            self._lock.release()

    def settle(self, wait: bool = True) -> bool:
        """Take the reply, where nobody has done so yet, and hold what was claimed. From any thread.

        :param wait: False: only if it is there, and nobody else is at it; else the answer is False
        """
        if not self._lock.acquire(blocking=wait):
            return False
        try:
            if not self.settled:
                if not (wait or self._sender.arrived()):
                    return False
                self.settled = True
                self._settle()
        finally:
            self._lock.release()
        self._wake()  # a loop whose thread this is not would not hear of it any more
        return True

    def _settle(self) -> None:
        try:
            acked, _nacked, self._found = self._rest()
        except RelayError as error:
            self._error = error
            self._leases.unsent(self._acks)
            return
        except BaseException:
            self._leases.unsent(self._acks)
            raise
        self._leases.sent(self._acks, acked)
        for job in self._found:
            self.tags.append(new_tag(job))
            self._leases.add(self.tags[-1], job)

    def take(self) -> Claimed:
        """What was claimed, in the order of `tags`; what the leases no longer hold was handed back meanwhile. Waits,
        and raises what the claim did."""
        self.settle()
        self._leases.come_home(self)
        if self._error is not None:
            raise self._error
        return self._found

    def hand_back(self, wait: bool = True) -> bool:
        """For when nobody is there any more to take it. False where that has to wait for the reply."""
        if not self.settle(wait):
            if time.monotonic() < self._over:
                return False
            self._leases.unsent(self._acks)  # what it claimed, if it did, is leased no longer
        self._leases.come_home(self)
        self._sender.close()
        self._leases.hand_back(self.tags)
        return True
