"""What a Dramatiq worker process shows of itself: its place in the roster, `/metrics`, and the runs of its actors."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from relay_adapters.dramatiq.message import RelayMessage
from relay_core.errors import InvalidArgument
from relay_core.presence import Load, Presence

if TYPE_CHECKING:
    from relay_adapters.dramatiq.broker import RelayBroker
    from relay_core.metrics import MetricsServer


class Monitoring:
    """Begins before a worker's threads do, and ends after them: the broker tells it of the signals it emits.

    :param address: where to serve `/metrics`, see relay_core.metrics.parse_address. None: nowhere
    :param tasks: see relay_core.metrics.Recorder
    """

    def __init__(self, broker: RelayBroker, address: str | None, tasks: int) -> None:
        self._broker = broker
        self._address = address
        self._tasks = tasks
        self._workers: dict[int, tuple[Presence, MetricsServer | None]] = {}
        self._began: dict[str, float] = {}
        if address is not None:
            self._server()  # what is wrong with the settings is said now, not in each worker

    def _server(self) -> MetricsServer | None:
        if self._address is None:
            return None
        try:
            import prometheus_client  # noqa: F401, its own error says the least

            from relay_core.metrics import MetricsServer
        except ImportError as error:
            raise InvalidArgument(
                f"metrics_addr {self._address!r} needs prometheus-client ({error}): pip install 'relay-queue[metrics]'"
            ) from error
        queues = self._broker.queues
        return MetricsServer(self._address, self._broker.core, lambda: sorted(queues.copy()), tasks=self._tasks)

    def boot(self, worker: Any) -> None:
        """A worker is about to start its threads."""
        server = self._server()
        if server is not None:
            server.start()
        presence = Presence(self._broker.core, "dramatiq", lambda: self._load(worker))
        presence.start()
        self._workers[id(worker)] = presence, server

    def shutdown(self, worker: Any) -> None:
        """All threads of a worker have ended, and so have its messages."""
        presence, server = self._workers.pop(id(worker), (None, None))
        if presence is not None:
            presence.stop()
        if server is not None:
            server.stop()

    def _load(self, worker: Any) -> Load:
        queues = worker.consumer_whitelist or self._broker.queues
        return Load(sorted(queues.copy()), worker.worker_threads, self._broker.held())

    def run_started(self, message: Any) -> None:
        """The actor is about to run."""
        plugins = self._broker.core.plugins
        if isinstance(message, RelayMessage):
            plugins.notify("relay_run_started", job=message.lease.job)
            if plugins.wants("relay_run_ended"):
                self._began[message.lease.job.token] = time.monotonic()

    def run_ended(self, message: Any, error: BaseException | None) -> None:
        """The actor is done; what becomes of the message is not yet told to the store."""
        if self._began and isinstance(message, RelayMessage):
            job = message.lease.job
            began = self._began.pop(job.token, None)
            if began is not None:
                seconds = time.monotonic() - began
                self._broker.core.plugins.notify("relay_run_ended", job=job, seconds=seconds, error=error)
