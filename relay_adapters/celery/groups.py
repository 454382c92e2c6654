"""The tasks of a group go to the store together, before its `apply_async` returns.

Celery sends the tasks of a group, of a chord's header and of chunks one by one, and has each confirmed before it makes
the next. Here those of one group are gathered, and stored in few round trips.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.batching import Batch
from relay_adapters.celery.options import is_relay
from relay_core import JobSpec

if TYPE_CHECKING:
    from relay_adapters.celery.publishing import Publishing

logger = logging.getLogger("relay.celery")

MESSAGES, BYTES, SECONDS = 200, 1 << 20, 0.05
"""Most that is gathered before it is stored: a group of many tasks starts to run while it is still being sent."""

SLOW = 0.02
"""Seconds: where a generator took longer to make one of the tasks, they are sent one by one, for it may wait for what
they do."""

_MADE_BEFORE = 2
"""Tasks that Celery has made before it sends the first one: they tell nothing of how quickly others are made."""

_here = threading.local()


class Gathered(Batch):
    """What of a group was sent and is not stored yet."""

    def __init__(self, producer: Any, conf: Any, options: Mapping[str, Any]) -> None:
        # a producer gets another channel where its connection is made anew, to another broker maybe
        super().__init__(lambda: producer.channel, MESSAGES)
        self._producer, self._conf, self._options = producer, conf, options
        self._bytes, self._oldest = 0, 0.0
        self._made, self._slow = 0, False
        self.failed = False

    def takes(self, channel: Publishing) -> bool:
        """Whether the producer sends by this channel, as far as it has one: to ask it for one would connect it."""
        return self._made > _MADE_BEFORE and not self._slow and self._producer._channel is channel

    def paced(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """The tasks, as they are made. Once that is slow, none is gathered any more."""
        made = iter(tasks)
        while True:
            began = time.monotonic()
            try:
                task = next(made)
            except StopIteration:
                return
            self._made += 1
            self._slow = self._slow or time.monotonic() - began > SLOW
            if self._slow:
                self.store()
            yield task

    def make_room(self) -> None:
        """Store what there is, where it is enough or has waited long enough. Raises Unavailable and the like: then it
        is all still there, for another try."""
        if self._entries and (
            len(self._entries) >= MESSAGES or self._bytes >= BYTES or time.monotonic() - self._oldest >= SECONDS
        ):
            self.flush()

    def add(self, queue: str, spec: JobSpec, message: Any) -> None:
        if not self._entries:
            self._bytes, self._oldest = 0, time.monotonic()
        self._bytes += len(spec.payload)
        super().add(queue, spec, message)

    def flush(self) -> None:
        self.failed = True
        super().flush()
        self.failed = False

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


def gathered_for(channel: Publishing) -> Gathered | None:
    """Where this thread is sending a group through this channel, what is gathered of it."""
    gathered: Gathered | None = getattr(_here, "gathered", None)
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
                with _gathering(Gathered(producer, app.conf, options)) as gathered:
                    yield from stock(group, gathered.paced(tasks), producer, app, *args, **options)
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
def _gathering(gathered: Gathered) -> Iterator[Gathered]:
    """What this thread sends by its producer is stored when this ends, also where it raises: Celery would have sent it
    before."""
    outer = getattr(_here, "gathered", None)
    _here.gathered = gathered
    try:
        yield gathered
    except BaseException:
        if not gathered.failed:
            try:
                gathered.flush()
            except Exception as error:
                logger.error("a group was not sent to its end, nor can be stored what was: %s", error)
        raise
    finally:
        _here.gathered = outer
    gathered.store()
