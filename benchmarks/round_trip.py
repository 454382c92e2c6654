"""What looking out for a reply before the thread sleeps is worth: a confirmed enqueue with it and without, in turn."""

from __future__ import annotations

import statistics
import time
from unittest.mock import patch

import redis
from rich.table import Table

from benchmarks.servers import cpu_seconds
from relay_core import Broker
from relay_core.connection.busypoll import no_poll
from tests.servers import Server

SENT, ROUNDS = 2000, 9
PAYLOAD = bytes(200)


def round_trip() -> Table:
    """Medians, in µs per enqueue: by the clock, and processor time of the client and of the server."""
    table = Table(title=f"One enqueue at a time, µs (medians of {ROUNDS} rounds of {SENT} in turn)")
    for column in ("waiting for the reply", "clock", "client CPU", "server CPU"):
        table.add_column(column, justify="left" if column == "waiting for the reply" else "right")
    with Server("redis", tcp=True) as server, Broker(server.url) as awake, Broker(server.url) as asleep:
        with patch("relay_core.connection.pool.busy_poll", lambda _socket: no_poll):
            asleep.enqueue("bench", PAYLOAD)  # opens its one connection
        found: dict[str, list[tuple[float, float, float]]] = {"asleep at once": [], "awake for a moment": []}
        client = server.client()
        for _ in range(ROUNDS):
            for broker, rounds in zip((asleep, awake), found.values(), strict=True):
                rounds.append(_round(broker, client))
    for name, rounds in found.items():
        table.add_row(name, *(f"{statistics.median(figure):.0f}" for figure in zip(*rounds, strict=True)))
    return table


def _round(broker: Broker, client: redis.Redis) -> tuple[float, float, float]:
    used, began, own = cpu_seconds(client), time.perf_counter(), time.process_time()
    for _ in range(SENT):
        broker.enqueue("bench", PAYLOAD)
    figures = time.perf_counter() - began, time.process_time() - own, cpu_seconds(client) - used
    return figures[0] / SENT * 1e6, figures[1] / SENT * 1e6, figures[2] / SENT * 1e6
