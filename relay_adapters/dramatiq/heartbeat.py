"""The one thread of a process that keeps the leases of all its messages, prefetched and running."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from relay_adapters.dramatiq.line import Line
from relay_adapters.dramatiq.message import Lease
from relay_core import Broker, Verdict, commands
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import RelayError

logger = logging.getLogger("relay.dramatiq")


class Heartbeat(threading.Thread):
    """Extends the leases every third of a lease, whatever the workers do, also while they are paused."""

    def __init__(self, core: Broker, lines: Callable[[], Sequence[Line]]) -> None:
        super().__init__(name="relay-heartbeat", daemon=True)
        self._core = core
        self._lines = lines
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self._core.settings.lease / 3):
            try:
                self.beat()
            except Exception:
                logger.exception("heartbeat failed; the next one is in %.1f s", self._core.settings.lease / 3)

    def stop(self) -> None:
        self._stopping.set()

    def beat(self) -> None:
        """Extend all leases, and send acks that were left behind when the store was away."""
        for line in self._lines():
            try:
                extend(self._core, line.queue, line.leases())
                line.flush()
            except RelayError as error:
                logger.warning("heartbeat of queue %r failed, and is tried again: %s", line.queue, error)


def extend(core: Broker, queue: str, leases: Sequence[Lease]) -> None:
    """Extend these leases; marks those that are lost. Raises RelayError."""
    settings = core.settings
    for start in range(0, len(leases), MAX_BATCH):
        batch = [lease for lease in leases[start : start + MAX_BATCH] if not lease.lost]
        if not batch:
            continue
        sent = time.monotonic()
        receipts = [(lease.job.id, lease.job.token) for lease in batch]
        verdicts = core.store.run(commands.extend(settings.keys(queue), receipts, settings.lease_ms))
        for lease, verdict in zip(batch, verdicts, strict=True):
            # A message that was settled in the meantime is "lost" too, and need not be told of: its `lost` is not read.
            if verdict is Verdict.DONE:
                lease.until = sent + settings.lease
            else:
                lease.lost = True
