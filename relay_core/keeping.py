"""How a process that holds jobs extends their leases: what stands in the way of one queue holds up no other's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from relay_core.broker import Broker
from relay_core.commands import Verdict
from relay_core.connection import SyncStore
from relay_core.errors import RelayError
from relay_core.job import Job
from relay_core.operations import Flow

T = TypeVar("T")

AGAIN = 0.5
"""Seconds after which what could not be extended is tried again, unless a third of the lease is less."""


class Keeper:
    """Extends leases, and ends jobs in passing, for the thread of a process that keeps them.

    A server of a cluster may be away alone, or hang, for longer than the leases of the others last. So there it has a
    connection of its own, which waits for a sixth of a lease at most and leaves it to the next time to try again.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.operations = broker.operations
        self._several = broker.url.several
        self._store: SyncStore | None = None

    def extend(self, jobs: Sequence[Job]) -> list[Verdict | RelayError]:
        """What became of each, an error for those whose queue could not be told. The caller tells the plugins of what
        was lost."""
        return self.drive(self.operations.extend_each(jobs)) if jobs else []

    def ack_many(self, jobs: Sequence[Job]) -> list[Verdict]:
        """As the broker's."""
        return self.drive(self.operations.ack_many(jobs)) if self._several else self._broker.ack_many(jobs)

    def drive(self, flow: Flow[T]) -> T:
        """As the broker's, for flows of commands."""
        if not self._several:
            return self._broker.drive(flow)
        try:
            step = next(flow)
            while True:
                try:
                    answer = self._perform(step)
                except RelayError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _perform(self, step: Any) -> Any:
        if self._store is None:
            shared = self._broker.store
            self._store = SyncStore(shared.url, shared.settings.impatient(self._broker.settings.lease / 6))
        return self._store.run_many(step) if isinstance(step, list) else self._store.run(step)

    def pause(self, failed: bool) -> float:
        """Seconds until leases are to be extended again.

        :param failed: some could not be
        """
        third = self._broker.settings.lease / 3
        return min(AGAIN, third) if failed else third

    def close(self) -> None:
        """Give back the connections."""
        if self._store is not None:
            self._store.close()
            self._store = None
