"""Serving `/metrics` over HTTP: of one worker process, or of a store."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from relay_core.broker import Broker
from relay_core.errors import InvalidArgument
from relay_core.metrics.build import BuildCollector
from relay_core.metrics.depths import DepthCollector
from relay_core.metrics.recorder import Recorder

logger = logging.getLogger("relay.metrics")

LOOPBACK = "127.0.0.1"

_ADDRESS = re.compile(r"(?:(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*):)?(\d{1,5})(?:-(\d{1,5}))?")


def parse_address(address: str) -> tuple[str, range]:
    """`host:port`, `:port` or `port` (on loopback), or `host:first-last` for the first port of these that is free.

    Raises InvalidArgument.
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is not None:
        first, last = int(match[2]), int(match[3] or match[2])
        if first <= last <= 65535 and last - first < 1000:
            return (match[1] or "").strip("[]") or LOOPBACK, range(first, last + 1)
    raise InvalidArgument(
        f"metrics address must be host:port, or host:first-last for the first free port of these, got {address!r}"
    )


class Endpoint:
    """An HTTP server of a registry on a daemon thread.

    :param address: see `parse_address`; port 0 picks a free one
    :ivar port: where it listens, once it does
    """

    def __init__(self, address: str) -> None:
        self.host, self._ports = parse_address(address)
        self.port = self._ports[0]
        self._running: tuple[WSGIServer, Thread] | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def start(self, registry: CollectorRegistry) -> None:
        """Serve it. Raises OSError when it cannot listen there."""
        for port in self._ports:
            try:
                self._running = start_http_server(port, self.host, registry=registry)
            except OSError:
                if port == self._ports[-1]:
                    raise
            else:
                self.port = self._running[0].server_port
                return

    def stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            server, thread = running
            server.shutdown()
            server.server_close()
            thread.join(timeout=5.0)


class MetricsServer:
    """Serves `/metrics` of one worker process: its recorder's counts and its queues' depths.

    A worker does not depend on being watched: what stands in the way is logged, and the worker goes on.

    :param address: see `parse_address`
    :param queues: their names, or a function that tells them at each scrape
    :param tasks: see Recorder
    """

    def __init__(
        self,
        address: str,
        broker: Broker,
        queues: Sequence[str] | Callable[[], Sequence[str]],
        *,
        tasks: int = 0,
    ) -> None:
        self._server = Endpoint(address)
        self._broker = broker
        self.recorder = Recorder(tasks=tasks, plugins=broker.plugins)
        self._depths = DepthCollector(broker, queues)
        self._started = False

    @property
    def port(self) -> int:
        """The port it listens on, once started."""
        return self._server.port

    def start(self) -> None:
        """Begin to record and serve. A port in use is logged, and the worker goes on without metrics.

        In multiprocess mode it goes on recording: whoever has the port serves what all count.
        """
        try:
            self._server.start(self.recorder.exposed(self._depths, BuildCollector()))
        except OSError as error:
            where = self._server.url.removeprefix("http://").removesuffix("/metrics")
            if not self.recorder.shared:
                logger.error("no metrics: cannot listen on %s: %s; choose another address", where, error)
                return
            told = "counting for whoever serves PROMETHEUS_MULTIPROC_DIR, for this process cannot listen on %s: %s"
            logger.warning(told, where, error)
        else:
            logger.info("serving metrics at %s", self._server.url)
        self._started = True
        self._broker.plugins.register(self.recorder)

    def stop(self) -> None:
        """Call it when the last job has ended, so that the last scrape sees it."""
        if self._started:
            self._started = False
            self._server.stop()
            self._broker.plugins.unregister(self.recorder)
        self._depths.close()
