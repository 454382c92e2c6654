"""The tasks of a group go to the store together, before its `apply_async` returns.

Celery sends the tasks of a group, of a chord's header and of chunks one by one, and has each confirmed before it makes
the next. Here those of one group are gathered, and stored in few round trips.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.options import is_relay
from relay_adapters.celery.sending.batching import Batch
from relay_core.connection import forks
from relay_core.errors import RelayError
from relay_core.operations.enqueueing import Placed

if TYPE_CHECKING:
    from relay_adapters.celery.sending.publishing import Publishing

logger = logging.getLogger("relay.celery")

MESSAGES, BYTES, SECONDS = 200, 1 << 20, 0.05
"""Most that is gathered before it is stored: a group of many tasks starts to run while it is still being sent."""

_TICK, _PAUSE, _IDLE = 0.02, 0.5, 5.0
"""Seconds between looks at what was gathered, until the next after one that met an error, and until a thread that has
nothing to look at ends."""

_here: ContextVar[Gathered | None] = ContextVar("relay_gathered", default=None)
"""The group that is being sent here. A greenlet has its own, whether its threads are gevent's or not."""


class Gathered(Batch):
    """What of a group was sent and is not stored yet. Its own thread adds to it; another may store what is old.

    :ivar ended: True once the group was sent: what its producer sends from then on is none of its tasks
    :ivar failed: True when the last flush found the server away, or was refused
    """

    def __init__(self, producer: Any, conf: Any, options: Mapping[str, Any]) -> None:
        # a producer gets another channel where its connection is made anew, to another broker maybe
        super().__init__(lambda: producer.channel, MESSAGES)
        self._producer, self._conf, self._options = producer, conf, options
        self._bytes, self._oldest, self._not_before = 0, 0.0, 0.0
        self.ended = self.failed = False
        self._lock = threading.RLock()
        forks.watch(self)

    def after_fork(self) -> None:
        """What was gathered is the parent's to store."""
        self._lock = threading.RLock()
        self.ended = True
        self.discard()

    def takes(self, channel: Publishing) -> bool:
        """Whether the producer sends by this channel, as far as it has one: to ask it for one would connect it."""
        return not self.ended and self._producer._channel is channel

    def make_room(self) -> None:
        """Store what there is, where it is enough or has waited long enough. Raises Unavailable and the like: then it
        is all still there, for another try."""
        with self._lock:
            if len(self._entries) >= MESSAGES or self._bytes >= BYTES or self._is_old():
                self.flush()

    def _is_old(self) -> bool:
        """Whether there is something, and for long enough."""
        return bool(self._entries or self._taken) and time.monotonic() - self._oldest >= SECONDS

    def add(self, queue: str, placed: Placed, message: Any) -> None:
        with self._lock:
            first = not self._entries
            if first:
                self._bytes, self._oldest = 0, time.monotonic()
            self._bytes += len(placed.job.record)
            super().add(queue, placed, message)
        if first:
            _minder.mind(self)

    def flush(self) -> None:
        with self._lock:
            self.failed = False
            try:
                super().flush()
            except RelayError:
                self.failed = True
                raise

    def flush_old(self) -> None:
        """Store what has waited long enough, from another thread than the group's, which is left to hear of errors."""
        if not self._lock.acquire(blocking=False):
            return  # it is being stored
        try:
            channel = self._producer._channel
            if channel is not None and self._is_old() and time.monotonic() >= self._not_before:
                self._store_all(channel)
        except Exception as error:
            self._not_before = time.monotonic() + _PAUSE
            logger.debug("tasks of a group are not stored yet: %s", error)
        finally:
            self._lock.release()

    def store(self) -> None:
        """Flush, and try again as Celery's settings and the group's options say. Raises kombu's OperationalError."""
        if not (self._entries or self._taken):
            return
        flush, retry, connection = self.flush, self._options.get("retry"), self._producer.connection
        if self._conf.task_publish_retry if retry is None else retry:
            policy = {**(self._conf.task_publish_retry_policy or {}), **(self._options.get("retry_policy") or {})}
            flush = connection.ensure(self._producer, flush, **policy)
        with connection._reraise_as_library_errors():
            flush()


class _Minder:
    """A thread that stores what was gathered while the next task is being made: that may take as long as it likes, or
    wait for what the earlier ones do."""

    def __init__(self) -> None:
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may send a group, too
        self._minded: set[Gathered] = set()
        self._more = threading.Event()
        self._thread: threading.Thread | None = None

    def mind(self, gathered: Gathered) -> None:
        with self._lock:
            self._minded.add(gathered)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="relay-celery-groups", daemon=True)
                with suppress(RuntimeError):  # too many threads just now; the next group tries it again
                    thread.start()
                    self._thread = thread
        self._more.set()

    def forget(self, gathered: Gathered) -> None:
        with self._lock:
            self._minded.discard(gathered)

    def _run(self) -> None:
        while True:
            if not self._more.wait(_IDLE):
                with self._lock:
                    if not self._minded:
                        self._thread = None
                        return
            time.sleep(_TICK)
            with self._lock:
                minded = list(self._minded)
                if not minded:
                    self._more.clear()
            for gathered in minded:
                gathered.flush_old()


_minder = _Minder()


def gathered_for(channel: Publishing) -> Gathered | None:
    """Where a group is being sent here through this channel, what is gathered of it."""
    gathered = _here.get()
    return gathered if gathered is not None and gathered.takes(channel) else None


def install(transport: type) -> None:
    """For groups that are sent over this kind of transport. Repeating it is harmless."""
    canvas: Any = sys.modules.get("celery.canvas")
    if canvas is not None and not hasattr(canvas.group._apply_tasks, "relay_stock"):
        canvas.group._apply_tasks = _together(canvas.group._apply_tasks, transport)


def _together(stock: Callable[..., Iterator[Any]], transport: type) -> Callable[..., Iterator[Any]]:
    def _apply_tasks(
        group: Any, tasks: Any, producer: Any = None, app: Any = None, *args: Any, **options: Any
    ) -> Iterator[Any]:
        app = app or group.app
        with app.producer_or_acquire(producer) as producer:
            if _is_ours(producer, transport):
                with _gathering(Gathered(producer, app.conf, options)):
                    yield from stock(group, tasks, producer, app, *args, **options)
            else:
                yield from stock(group, tasks, producer, app, *args, **options)

    _apply_tasks.relay_stock = stock  # type: ignore[attr-defined]
    return _apply_tasks


def _is_ours(producer: Any, transport: type) -> bool:
    """Whether it sends over that transport, whichever broker of its list it may have to turn to."""
    connection = producer.connection
    return isinstance(getattr(connection, "transport", None), transport) and all(
        is_relay(str(url)) for url in connection.alt or ()
    )


@contextmanager
def _gathering(gathered: Gathered) -> Iterator[None]:
    """What is sent here by its producer is stored when this ends, also where it raises: Celery would have sent it
    before."""
    outer = _here.get()
    if outer is not None:
        outer.store()  # its earlier tasks come first
    _here.set(gathered)
    try:
        yield
        gathered.store()
    except BaseException:
        if not gathered.failed:
            try:
                gathered.flush()
            except Exception as error:
                logger.error("a group was not sent to its end, nor can be stored what was: %s", error)
        raise
    finally:
        gathered.ended = True
        _here.set(outer)
        _minder.forget(gathered)
