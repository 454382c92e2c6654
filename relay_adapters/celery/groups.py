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
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.batching import Batch
from relay_adapters.celery.options import is_relay
from relay_core import JobSpec

if TYPE_CHECKING:
    from relay_adapters.celery.publishing import Publishing

logger = logging.getLogger("relay.celery")

MESSAGES, BYTES, SECONDS = 200, 1 << 20, 0.05
"""Most that is gathered before it is stored: a group of many tasks starts to run while it is still being sent, and one
that takes its time to make its tasks keeps none back for longer than the next one takes."""

_here = threading.local()


class Gathered(Batch):
    """What of a group was sent and is not stored yet."""

    def __init__(self, producer: Any) -> None:
        # a producer gets another channel where its connection is made anew, to another broker maybe
        super().__init__(lambda: producer.channel, MESSAGES)
        self._producer = producer
        self._bytes, self._oldest = 0, 0.0
        self.failed = False

    def takes(self, channel: Publishing) -> bool:
        """Whether the producer sends by this channel, as far as it has one: to ask it for one would connect it."""
        return self._producer._channel is channel

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
                with _gathering(producer, app.conf, options):
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
def _gathering(producer: Any, conf: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """What this thread sends by this producer is stored when this ends, also where it raises: Celery would have sent it
    before."""
    outer = getattr(_here, "gathered", None)
    gathered = _here.gathered = Gathered(producer)
    try:
        yield
    except BaseException:
        if not gathered.failed:
            try:
                gathered.flush()
            except Exception as error:
                logger.error("a group was not sent to its end, nor can be stored what was: %s", error)
        raise
    finally:
        _here.gathered = outer
    flush, retry = gathered.flush, options.get("retry")
    if conf.task_publish_retry if retry is None else retry:
        policy = {**(conf.task_publish_retry_policy or {}), **(options.get("retry_policy") or {})}
        flush = producer.connection.ensure(producer, flush, **policy)
    with producer.connection._reraise_as_library_errors():
        flush()
