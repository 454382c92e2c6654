"""`relay exporter`: Prometheus metrics of a whole store."""

from __future__ import annotations

import logging
import queue
import signal
import sys
from typing import Any

import click

from relay_core.cli.output import emit
from relay_core.cli.session import Command, Session, pass_session
from relay_core.errors import InvalidArgument, RelayError

logger = logging.getLogger("relay.exporter")

ADDRESS = "127.0.0.1:9808"


class CannotListen(RelayError):
    """The address of the exporter is taken, or is not this machine's."""


@click.command("exporter", cls=Command)
@click.option(
    "--addr",
    default=ADDRESS,
    show_default=True,
    metavar="HOST:PORT",
    help="Where to serve; loopback if without a host.",
)
@click.option(
    "--queue", "-q", "patterns", multiple=True, metavar="PATTERN", help="Only such queues, e.g. 'mail*'; repeatable."
)
@click.option(
    "--max-queues", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Most queues to serve."
)
@pass_session
def exporter(session: Session, addr: str, patterns: tuple[str, ...], max_queues: int) -> None:
    """Serve lifetime counters, depths, ages, pauses and workers of all queues at /metrics until SIGTERM or Ctrl-C.

    The store counts for itself, so every process is seen: prefork children of Celery, Dramatiq's processes,
    producers. One exporter per store is enough. While the store is away it says relay_store_up 0.
    """
    try:
        from prometheus_client import CollectorRegistry

        from relay_core.metrics import BuildCollector, Endpoint, StoreCollector
    except ImportError as error:
        raise InvalidArgument(
            f"relay exporter needs prometheus-client ({error}): pip install 'relay-queue[metrics]'"
        ) from error

    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server = Endpoint(addr)
    broker = session.open(client_name="relay-exporter")
    collector = StoreCollector(broker, patterns, max_queues)
    registry = CollectorRegistry()
    registry.register(collector)
    registry.register(BuildCollector())
    stopped: queue.SimpleQueue[None] = queue.SimpleQueue()  # safe in a signal's handler, as an event is not

    def on_signal(*_: Any) -> None:
        stopped.put(None)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            server.start(registry)
        except OSError as error:
            raise CannotListen(f"cannot listen on {addr}: {error}; choose another with --addr") from error
        logger.info("serving %s of %s", server.url, broker.url.safe())
        stopped.get()
        server.stop()
    finally:
        collector.close()
        for number, old in before.items():
            signal.signal(number, old)
    if session.json:
        emit(session, {"url": server.url})
