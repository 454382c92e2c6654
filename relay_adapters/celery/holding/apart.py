"""What keeps a message that may kill its process apart from the others, so that it takes none of them to dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay_core import Job

if TYPE_CHECKING:
    from relay_adapters.celery.holding.leases import Leases


class Apart:
    """The suspect (see `Settings.is_suspect`) that this process holds, if any. From any thread.

    While it is not settled the process claims nothing. It is delivered once the process holds nothing else: Celery
    gives back nothing that it has prefetched, so that has a lease's time to end.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._lock = threading.RLock()
        self._tag: str | None = None
        self._wake: Callable[[], None] | None = None
        self._deadline = 0.0

    def concerns(self, job: Job) -> bool:
        """Whether a job that was just claimed is a suspect."""
        return job.deliveries > 1 and self._leases.broker.settings.is_suspect(job)

    def take(self, tag: str, wake: Callable[[], None]) -> bool:
        """This one is the suspect from now on. False: another one is.

        :param wake: called whenever `seconds` or `shut` may have changed, from any thread
        """
        with self._lock:
            if self.shut:
                return False
            self._tag, self._wake = tag, wake
            self._deadline = time.monotonic() + self._leases.broker.settings.lease
            return True

    @property
    def shut(self) -> bool:
        """True while nothing may be claimed: until the suspect was settled or handed back.

        One that Celery does not start, for a rate limit, holds up the others for two leases and no longer.
        """
        if self._tag is None:
            return False
        with self._lock:  # lest it forgets the next suspect, which another thread takes
            held = None if self._tag is None else self._leases.get(self._tag)
            if held is not None and not held.acked:
                overdue = time.monotonic() > self._deadline + self._leases.broker.settings.lease
                if held.started or not (held.task and overdue):
                    return True
            self._tag = self._wake = None
            return False

    def seconds(self, tag: str) -> float:
        """For how long a message must still not be delivered. 0 for any but the suspect."""
        if tag != self._tag or self._leases.holding <= 1:
            return 0.0
        return max(0.0, self._deadline - time.monotonic())

    def changed(self) -> None:
        """The process holds less than before."""
        if self._tag is not None and (wake := self._wake) is not None:
            wake()
