"""Which of relay's errors Dramatiq gets to see as its own."""

from __future__ import annotations

import logging
from threading import Thread
from typing import TYPE_CHECKING

from dramatiq.errors import ConnectionClosed

from relay_core.errors import RelayError, StoreError, Unavailable

if TYPE_CHECKING:
    from dramatiq import Worker

logger = logging.getLogger("relay.dramatiq")


class DramatiqErrors:
    """`with DramatiqErrors():` raises Dramatiq's ConnectionClosed when the store is away. Around every message, so it
    is no generator."""

    kinds: tuple[type[RelayError], ...] = (Unavailable,)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self.kinds):
            raise ConnectionClosed(error) from error  # type: ignore[no-untyped-call]


class WorkerErrors(DramatiqErrors):
    """The same for Dramatiq's own threads, which try again after it, and may die of anything else.

    So they do when the server refuses, too: who mends its users or settings shall not have to restart the workers.
    One per process, for all of its consumers.

    :ivar in_vain: True once a worker that is ending has found the store away. It has waited for it, and does not do so
        again for each queue that has something to hand back: that runs elsewhere when its leases have ended
    """

    kinds = (Unavailable, StoreError)

    def __init__(self) -> None:
        self._ending = False
        self._left: set[object] = set()  # work queues; no leak, for a broker keeps its workers among its middleware
        self.in_vain = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._ending and not self.in_vain and isinstance(error, Unavailable):
            self.in_vain = True
            logger.warning("what this worker holds is not handed back, but runs when its leases have ended: %s", error)
        super().__exit__(kind, error, trace)

    def worker_ends(self, worker: Worker) -> None:
        """It was told to stop."""
        self._ending = True
        self._left.add(worker.work_queue)

    def worker_ended(self) -> None:
        """Nothing of it is left."""
        self._ending = self.in_vain = False

    def ends(self, thread: Thread) -> bool:
        """Whether this is a consumer thread of a worker that was told to stop, which may be long ago: Dramatiq starts
        one in each worker that there was, when a queue is declared."""
        return getattr(thread, "work_queue", None) in self._left
