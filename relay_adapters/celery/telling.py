"""A thread that tells result backends of buried tasks.

One may be slow or away for hours, and whoever finds a task buried has an event loop to turn, or leases to keep.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from relay_core import Broker, Job, NotYet
from relay_core.connection import forks
from relay_core.errors import RelayError

logger = logging.getLogger("relay.celery")

_OURS = 20.0
"""Seconds for which it is left to this process to tell of a burial: others do so after half a minute."""

_AGAIN = 5.0
"""Seconds until a backend is asked again on account of a task of which the store keeps no note."""

_BUGS = (TypeError, LookupError, AttributeError, NotImplementedError)
"""What a backend raises that is there and cannot do it, be it asked again or not."""

_Key = tuple[int, str, str, str]


@dataclass(slots=True)
class _Burial:
    key: _Key
    broker: Broker | None
    job: Job
    why: str
    tried: threading.Event = field(default_factory=threading.Event)


class Teller:
    """Takes burials in hand. Their notes stay in the store until the backend was told, for this process may die.

    :param tell: raises what the backend does, and asks the function that it is given before it changes anything: a
        backend that was waited for may have been told by another process meanwhile
    """

    def __init__(self, tell: Callable[[Job, str, Callable[[], bool]], None]) -> None:
        self._tell = tell
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Burial] = queue.SimpleQueue()
        self._until: dict[_Key, float] = {}
        self._thread: threading.Thread | None = None

    def take(self, broker: Broker, job: Job, why: str) -> None:
        """A burial that is noted in the store. Raises NotYet, always: the broker hears of it when it is done."""
        key = (id(broker), job.queue, job.id, job.token)
        with self._lock:
            if key not in self._until:
                self._queue.put(_Burial(key, broker, job, why))
            self._until[key] = time.monotonic() + _OURS  # what waits here, and is handed out again, is ours anew
            self._begin()
        raise NotYet("a thread of the worker tells the result backend")

    def tell(self, job: Job, why: str, patience: float) -> None:
        """A death that is noted nowhere, and told of for as long as this process lives. A backend that is there is told
        on return; one that is not, or takes longer than `patience` seconds, holds up nobody."""
        burial = _Burial((0, job.queue, job.id, job.token), None, job, why)
        with self._lock:
            self._until[burial.key] = math.inf
            self._queue.put(burial)
            self._begin()
        burial.tried.wait(patience)

    def _begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="celery-burials", daemon=True)
            self._thread.start()

    def _is_ours(self, key: _Key) -> bool:
        return time.monotonic() < self._until[key]

    def _work(self) -> None:
        while True:
            burial = self._queue.get()
            key, job, again = burial.key, burial.job, False
            try:
                if self._is_ours(key):
                    self._tell(job, burial.why, partial(self._is_ours, key))
                    _done(burial)
            except _BUGS:
                logger.exception("task %s went to dead, and its result backend cannot be told", job.id)
                _done(burial)
            except (Exception, SystemExit) as error:  # whatever the backend raises, or a callback
                logger.warning("task %s went to dead; its result backend is told of it later: %r", job.id, error)
                again = burial.broker is None
            finally:
                burial.tried.set()
                if not again:
                    with self._lock:
                        del self._until[key]
            if again:
                timer = threading.Timer(_AGAIN, self._queue.put, (burial,))
                timer.daemon = True
                timer.start()


def _done(burial: _Burial) -> None:
    if burial.broker is None:
        return
    try:
        burial.broker.told(burial.job)
    except RelayError as error:
        id = burial.job.id
        logger.warning("task %s went to dead, and its result backend may be told of it twice: %s", id, error)
