"""`python -m benchmarks [NAME...]`: all of them without a name, see `known`."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import celery_speed, client, direct, dramatiq_speed, engine, failover, idle, round_trip


def main(names: list[str]) -> int:
    """Run the named benchmarks and print their tables."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as folder:
        known: dict[str, Callable[[], Table]] = {
            "processor": engine.processor,
            "memory": engine.memory,
            "depth": engine.depth,
            "wake-up": idle.wake_up,
            "round-trip": round_trip.round_trip,
            "client": lambda: client.client(Path(folder)),
            "celery": lambda: celery_speed.celery(Path(folder)),
            "celery-large": lambda: celery_speed.celery_large(Path(folder)),
            "celery-memory": lambda: celery_speed.celery_memory(Path(folder)),
            "celery-idle": lambda: celery_speed.celery_idle(Path(folder)),
            "dramatiq": lambda: dramatiq_speed.dramatiq(Path(folder)),
            "dramatiq-pickup": lambda: dramatiq_speed.dramatiq_pickup(Path(folder)),
            "direct": lambda: direct.direct(Path(folder)),
            "idle": lambda: idle.idle_commands(Path(folder)),
            "failover": failover.failover,
        }
        if unknown := set(names) - known.keys():
            console.print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
            return 2
        console.print(f"Python {platform.python_version()} on {platform.machine()}, {platform.system()}")
        for name in names or known:
            console.print(known[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
