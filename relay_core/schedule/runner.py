"""`ScheduleRunner`: carries out schedules until it is stopped."""

from __future__ import annotations

import logging
import math
import time
from inspect import iscoroutinefunction
from typing import Protocol, TypeVar

from relay_core.connection import SyncStore
from relay_core.errors import InvalidArgument, RelayError
from relay_core.keys import ScheduleKeys
from relay_core.operations import Flow, Operations, Settings
from relay_core.schedule import flows

T = TypeVar("T")

logger = logging.getLogger("relay.schedule")

_LONGEST = 5.0
"""Seconds after which it looks again, whatever it knows: another process may have taken the wake-up and died."""


_FAREWELL = 1.0
"""Seconds after a stop for which what is under way is still repeated."""


class Driver(Protocol):
    """What is used of a Broker, which is built on this package."""

    settings: Settings
    operations: Operations

    @property
    def store(self) -> SyncStore: ...

    def drive(self, flow: Flow[T]) -> T: ...


class ScheduleRunner:
    """Enqueues the job of each tick when it comes. Run as many of them as you like: each tick gets one job."""

    def __init__(self, broker: Driver) -> None:
        drive = getattr(broker, "drive", None)
        if drive is None or iscoroutinefunction(drive):
            raise InvalidArgument(
                f"ScheduleRunner needs a Broker, got {broker!r}; with an AsyncBroker, await broker.run_due() in a loop"
            )
        self._broker = broker
        self._bell = broker.store.bell([ScheduleKeys(broker.settings.prefix).alarm])
        self._unread = flows.Unread()
        self._looked = False
        self._stopped = False
        self._until = math.inf
        self.enqueued = 0

    def run(self) -> int:
        """Work until `stop`: how many jobs it enqueued. A server that cannot be reached is waited for."""
        try:
            with self._broker.store.hurried(until=lambda: self._until):
                while not self._stopped:
                    self._rest(self._look())
        finally:
            self._bell.close()
        return self.enqueued

    def stop(self) -> None:
        """End `run` soon: a server that is away is tried for another second. From any thread, or a signal handler."""
        self._until = time.monotonic() + _FAREWELL
        self._stopped = True
        self._bell.wake()

    def _look(self) -> float:
        try:
            if not self._looked:
                self._broker.drive(flows.tell_unread(self._broker.operations, self._unread))
                self._looked = True
            done = self._broker.drive(flows.run_due(self._broker.operations, self._unread))
        except RelayError as error:
            logger.warning("the schedules cannot be looked at, trying again: %s", error)
            return 1.0
        for name, queue, id in done.enqueued:
            logger.info("schedule %s: job %s in queue %r", name, id, queue)
        for name, tick in done.passed_over:
            logger.info("schedule %s: the tick at %.3f is passed over, an earlier job is not over", name, tick / 1000)
        self.enqueued += len(done.enqueued)
        return _LONGEST if done.wait is None else min(done.wait, _LONGEST)

    def _rest(self, seconds: float) -> None:
        if self._stopped or seconds <= 0:
            return
        try:
            self._bell.wait(max(0.001, seconds))
        except RelayError:  # a login that is refused for a while, too: the next look says so
            time.sleep(min(0.2, seconds))
