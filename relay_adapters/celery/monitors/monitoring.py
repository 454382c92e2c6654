"""What a Celery worker shows of itself: its place in the roster of live workers, and `/metrics` where asked for.

`broker_transport_options={"metrics_addr": "127.0.0.1:9191"}` is the one setting; `metrics_tasks` gives so many task
names a label of their own. Both are of the worker's main process, which claims and acks for all its children; what
their tasks enqueue they count themselves, where prometheus-client's multiprocess mode is on.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from typing import Any

from relay_adapters.celery.holding import children
from relay_adapters.celery.holding.leases import leases_of
from relay_adapters.celery.options import shared_broker
from relay_adapters.celery.outcomes import announcing
from relay_core.errors import InvalidArgument
from relay_core.presence import Load, Presence

logger = logging.getLogger("relay.celery")

_UID = "relay-monitoring"


class Monitoring:
    """One running Celery worker. It begins before the first claim, and ends after the pool has drained."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._pid = os.getpid()
        self._broker = shared_broker(consumer.connection)
        self._presence = Presence(self._broker, "celery", self._load)
        self._server = self._server_of(consumer.connection.transport_options or {})

    def _server_of(self, options: dict[str, Any]) -> Any:
        address = options.get("metrics_addr")
        if address is None:
            return None
        try:
            from relay_core.metrics import MetricsServer

            return MetricsServer(address, self._broker, self._queues, tasks=options.get("metrics_tasks", 0))
        except ImportError as error:
            logger.error("no metrics: %s", error)
        except InvalidArgument as error:
            logger.error("no metrics: broker_transport_options: %s", error)
        return None

    def _queues(self) -> list[str]:
        """Those it takes tasks from now; remote control can change them."""
        tasks = self._consumer.task_consumer
        return sorted(queue.name for queue in list(tasks.queues)) if tasks is not None else []

    def _load(self) -> Load:
        # a task whose message is acked before it runs holds no lease, and is at hand all the same
        state = sys.modules.get("celery.worker.state")
        reserved = len(state.reserved_requests) if state is not None else 0
        concurrency = getattr(self._consumer.controller, "concurrency", 0) or 0
        return Load(self._queues(), concurrency, max(leases_of(self._broker).holding, reserved))

    def start(self) -> None:
        if self._server is not None:
            self._server.start()
        self._presence.start()
        announcing.begin(self._consumer)

    def stop(self) -> None:
        if self._pid == os.getpid():  # children of the pool inherit this object, but not what it runs
            announcing.end(self._consumer)
            self._presence.stop()
            if self._server is not None:
                self._server.stop()


_running: dict[int, Monitoring] = {}


def watch_workers() -> None:
    """Called at each connect: from now on a Celery worker of this process is shown. Programs without Celery are not."""
    signals = sys.modules.get("celery.signals")
    if signals is not None:
        signals.worker_ready.connect(_ready, weak=False, dispatch_uid=_UID)
        signals.worker_shutdown.connect(_shutdown, weak=False, dispatch_uid=_UID)


_counts_in = 0
"""The process in which that was looked at."""


def count_in_child(client: Any) -> None:
    """Called at each connect: in a child of a prefork pool, enqueues go into the multiprocess folder if there is one.

    A child that was forked once its worker served metrics has the worker's recorder, which does so.
    """
    global _counts_in
    if _counts_in == os.getpid() or "PROMETHEUS_MULTIPROC_DIR" not in os.environ or not children.here():
        return
    _counts_in = os.getpid()
    options = client.transport_options or {}
    if options.get("metrics_addr") is None or _running:
        return
    with suppress(ImportError, InvalidArgument):  # the main process has said what is wrong
        from relay_core.metrics import Recorder

        plugins = shared_broker(client).plugins
        plugins.register(Recorder(tasks=options.get("metrics_tasks", 0), plugins=plugins))


def _ready(sender: Any, **_: Any) -> None:
    transport = getattr(sender.connection, "transport", None)
    if getattr(transport, "driver_name", None) != "relay-queue" or id(sender.controller) in _running:
        return
    monitoring = _running[id(sender.controller)] = Monitoring(sender)
    monitoring.start()
    atexit.register(monitoring.stop)  # a cold shutdown sends no signal


def _shutdown(sender: Any, **_: Any) -> None:
    monitoring = _running.pop(id(sender), None)
    if monitoring is not None:
        monitoring.stop()
        atexit.unregister(monitoring.stop)
