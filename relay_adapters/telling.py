"""A thread that tells result backends of tasks and messages that ended without being run.

One may be slow or away for hours, and who finds or revokes such a task has an event loop to turn, or leases to keep.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count

from relay_core import Broker, Job, NotYet
from relay_core.connection import forks
from relay_core.errors import RelayError

_OURS = 20.0
"""Seconds for which it is left to this process to tell of a burial: others do so after half a minute."""

_SOONEST, _LONGEST = 5.0, 60.0
"""Seconds until a backend is asked again about a task of which the store keeps no note; they double each time."""

PATIENCE = 1.0
"""Seconds for which an event loop waits for a result backend, so that one which is there is told before it goes on."""

BUGS = (TypeError, LookupError, AttributeError, NotImplementedError)
"""What a backend raises that is there and cannot do it, be it asked again or not."""

Tell = Callable[[Callable[[], bool]], object]
"""Tells a backend, and raises what that does. It asks the function that it is given before it changes anything: a
backend that was waited for may have been told by another process meanwhile."""

_Key = tuple[int, str, str, str]


@dataclass(slots=True)
class _News:
    """
    :ivar key: of a burial that is noted in the store, else None
    :ivar told: called when the backend was told
    """

    what: str
    tell: Tell
    key: _Key | None = None
    told: Callable[[], object] = lambda: None
    pause: float = 0.0
    tried: threading.Event = field(default_factory=threading.Event)


class Teller:
    """Takes news in hand. Notes of burials stay in the store until the backend was told, for this process may die.

    :param framework: whose backends they are
    :param unit: what a job is called there
    """

    def __init__(self, framework: str, unit: str) -> None:
        self._framework, self._unit = framework, unit
        self._logger = logging.getLogger(f"relay.{framework}")
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._until: dict[_Key, float] = {}
        self._later: list[tuple[float, int, _News]] = []
        self._thread: threading.Thread | None = None

    def take(self, broker: Broker, job: Job, tell: Tell) -> None:
        """A burial that is noted in the store. Raises NotYet, always: the broker hears of it when it is done."""
        key = (id(broker), job.queue, job.id, job.token)
        with self._lock:
            known = key in self._until
            self._until[key] = time.monotonic() + _OURS  # what waits here, and is handed out again, is ours anew
            if not known:
                what = f"{self._unit} {job.id} went to dead"
                self._queue.put(_News(what, tell, key, partial(self._done, broker, job, what)))
            self._begin()
        raise NotYet("a thread of the worker tells the result backend")

    def tell(self, what: str, tell: Tell, patience: float) -> None:
        """What is noted nowhere, and told for as long as this process lives. A backend that is there is told on return;
        one that is not, or takes longer than `patience` seconds, holds up nobody."""
        news = _News(what, tell, pause=_SOONEST)
        with self._lock:
            self._queue.put(news)
            self._begin()
        news.tried.wait(patience)

    def _begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name=f"relay-{self._framework}-results", daemon=True)
            self._thread.start()

    def _is_ours(self, key: _Key | None) -> bool:
        return key is None or time.monotonic() < self._until[key]

    def _work(self) -> None:
        for turn in count():
            news = self._next()
            try:
                if self._is_ours(news.key):
                    news.tell(partial(self._is_ours, news.key))
                    news.told()
            except BUGS:
                self._logger.exception("%s, and its result backend cannot be told", news.what)
                news.told()
            except (Exception, SystemExit) as error:  # whatever the backend raises, or a callback
                level = logging.DEBUG if news.tried.is_set() else logging.WARNING
                self._logger.log(level, "%s; its result backend is told of it later: %r", news.what, error)
                if news.key is None:
                    heappush(self._later, (time.monotonic() + news.pause, turn, news))
                    news.pause = min(_LONGEST, 2 * news.pause)
            finally:
                news.tried.set()
                if news.key is not None:
                    with self._lock:
                        del self._until[news.key]

    def _next(self) -> _News:
        while True:
            pause = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
            try:
                return self._queue.get(timeout=pause)
            except queue.Empty:
                if self._later[0][0] <= time.monotonic():
                    return heappop(self._later)[2]

    def _done(self, broker: Broker, job: Job, what: str) -> None:
        try:
            broker.told(job)
        except RelayError as error:
            self._logger.warning("%s, and its result backend may be told of it twice: %s", what, error)
