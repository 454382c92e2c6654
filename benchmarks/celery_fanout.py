"""What a broadcast costs: mailboxes beside one job per bound queue. `python -m benchmarks.celery_fanout`"""

from __future__ import annotations

import time
from typing import Any

import kombu as library
from rich.console import Console
from rich.table import Table

import relay_adapters.celery  # noqa: F401 - a bare kombu.Connection does not load kombu's plugins
from benchmarks.servers import cpu_seconds, private
from tests.servers import Server

kombu: Any = library  # it has no types

QUEUES, MESSAGES, BYTES, ROUNDS = 100, 100, 500, 2
KINDS: dict[str, dict[str, Any]] = {
    "jobs": {},
    "mailboxes": {"durable": False, "auto_delete": True, "expires": 60, "message_ttl": 60},
}


def measure(server: Server, options: dict[str, Any]) -> tuple[float, float]:
    """(ms per publish, µs of the server's processor per delivery) to so many consumed queues of one exchange."""
    server.reset()
    exchange, got = kombu.Exchange("events", "fanout", durable=False), 0

    def receive(_body: Any, _message: Any) -> None:
        nonlocal got
        got += 1

    with kombu.Connection(server.url) as here, kombu.Connection(server.url) as there:
        for number in range(QUEUES):
            queue = kombu.Queue(f"q{number}", exchange, **options)
            kombu.Consumer(here.channel(), [queue], callbacks=[receive], no_ack=True).consume()
        producer = kombu.Producer(there.channel(), exchange)
        producer.publish("warm")
        while got < QUEUES:
            here.drain_events(timeout=10)
        before, began = cpu_seconds(server.client()), time.perf_counter()
        for _ in range(MESSAGES):
            producer.publish("m" * BYTES)
        took = time.perf_counter() - began
        while got < QUEUES * (MESSAGES + 1):
            here.drain_events(timeout=10)
        used = cpu_seconds(server.client()) - before
    return took / MESSAGES * 1e3, used / QUEUES / MESSAGES * 1e6


def main() -> None:
    table = Table(title=f"A fanout to {QUEUES} consumed queues, {BYTES} bytes")
    for column in ("round", "queues", "ms per publish", "µs of the server per delivery"):
        table.add_column(column, justify="right")
    with private("redis") as server:
        for turn in range(1, ROUNDS + 1):
            for kind, options in KINDS.items():
                publish, delivery = measure(server, options)
                table.add_row(str(turn), kind, f"{publish:.2f}", f"{delivery:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
