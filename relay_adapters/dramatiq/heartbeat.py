"""The one thread of a process that keeps the leases of all its messages, prefetched and running."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from relay_adapters.dramatiq.line import Line
from relay_adapters.dramatiq.message import Lease
from relay_core import Broker, Job, Verdict
from relay_core.errors import RelayError, Unavailable
from relay_core.keeping import Keeper

logger = logging.getLogger("relay.dramatiq")


class Heartbeat(threading.Thread):
    """Extends the leases every third of a lease, whatever the workers do, also while they are paused."""

    def __init__(self, core: Broker, lines: Callable[[], Sequence[Line]]) -> None:
        super().__init__(name="relay-heartbeat", daemon=True)
        self._core = core
        self._lines = lines
        self._keeper = Keeper(core)
        self._behind: set[Line] = set()
        self._stopping = threading.Event()

    def run(self) -> None:
        failed = False
        while not self._stopping.wait(self._keeper.pause(failed)):
            before, failed = failed, False
            try:
                failed = self.beat(logging.DEBUG if before else logging.WARNING)
            except Exception:
                logger.exception("heartbeat failed; the next one is in %.1f s", self._core.settings.lease / 3)
        self._keeper.close()

    def stop(self) -> None:
        self._stopping.set()

    def beat(self, level: int = logging.WARNING) -> bool:
        """Extend all leases, and send acks that were left behind when the store was away. True: some could not be.

        :param level: at which that is logged
        """
        lines = self._lines()
        errors = extend(self._core, self._keeper.extend, [lease for line in lines for lease in line.leases()])
        # where one was behind already, it is the others' turn first: its server may keep this thread waiting
        for line in sorted((line for line in lines if line.unsent), key=self._behind.__contains__):
            try:
                line.flush(self._keeper)
                self._behind.discard(line)
            except RelayError as error:
                self._behind.add(line)
                errors.setdefault(line.queue, error)
                if isinstance(error, Unavailable):
                    break
        for queue, why in errors.items():
            logger.log(level, "heartbeat of queue %r failed, and is tried again: %s", queue, why)
        return bool(errors)


def extend(
    core: Broker, keep: Callable[[Sequence[Job]], list[Verdict | RelayError]], leases: Sequence[Lease]
) -> dict[str, RelayError]:
    """Extend these leases; marks those that are lost. By queue, why those of it could not be extended.

    :param keep: extends jobs
    """
    held, errors = [lease for lease in leases if not lease.lost], dict[str, RelayError]()
    sent = time.monotonic()
    for lease, verdict in zip(held, keep([lease.job for lease in held]), strict=True):
        # A message that was settled in the meantime is "lost" too, and need not be told of: its `lost` is not read.
        if isinstance(verdict, RelayError):
            errors.setdefault(lease.job.queue, verdict)
        elif verdict is Verdict.DONE:
            lease.until = sent + core.settings.lease
        else:
            lease.lost = True
    return errors
