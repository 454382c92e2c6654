"""What a failover takes: acknowledged enqueues that are gone afterwards, and how long no enqueue got through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.table import Table

from relay_core import Broker
from relay_core.errors import NotDurable, Unavailable
from tests.topologies import SentinelTrio

REPLICAS = 2
PRODUCERS = 4


class Producers:
    """Threads that enqueue one job after the other, and note what was acknowledged and how long they had to wait."""

    def __init__(self, url: str, durability: str) -> None:
        self.acknowledged: set[str] = set()
        self.longest = 0.0
        self._broker = Broker(url, durability=durability, durability_timeout=1.0, retry_for=30.0)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(PRODUCERS)]

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.is_set():
            try:
                self.acknowledged.add(self._broker.enqueue("bench", b"x" * 200).id)
            except (NotDurable, Unavailable):
                continue  # not acknowledged: its producer knows
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now
        self.longest = max(self.longest, time.monotonic() - last)

    def __enter__(self) -> Producers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._broker.close()


def _planned(trio: SentinelTrio) -> None:
    trio.failover()


def _killed(trio: SentinelTrio) -> None:
    trio.wait_for_primary(other_than=trio.kill_primary())


EVENTS: dict[str, Callable[[SentinelTrio], None]] = {"planned": _planned, "primary killed": _killed}


def failover(seconds: float = 2.0) -> Table:
    """Producers at full speed through a failover of a Sentinel trio with two replicas, at each durability."""
    table = Table(title=f"Failover with {REPLICAS} replicas, {PRODUCERS} producers at full speed (Redis, Sentinel)")
    for column in ("failover", "durability", "acknowledged", "lost", "longest wait, s"):
        table.add_column(column, justify="right")
    with SentinelTrio("redis", replicas=REPLICAS) as trio:
        for event, happen in EVENTS.items():
            for durability in ("none", "replica:1", f"replica:{REPLICAS}"):
                trio.reset()
                with Producers(trio.url, durability) as producers:
                    time.sleep(seconds)
                    happen(trio)
                    time.sleep(seconds)
                stored = {id.decode() for id in trio.primary.cli("HKEYS", "relay:{bench:0}:j")}
                lost = len(producers.acknowledged - stored)
                cells = (len(producers.acknowledged), lost)
                table.add_row(event, durability, *(f"{n:,}" for n in cells), f"{producers.longest:.1f}")
    return table
