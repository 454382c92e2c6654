"""The application that the tests run under Dramatiq's command line. Every run writes a line to `runs`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.middleware import Middleware

from relay_adapters.dramatiq import RelayBroker

FOLDER = Path(os.environ.get("APP_FOLDER", "."))
NAME = os.environ.get("APP_NAME", "app")
LEASE = 1.0


class Booted(Middleware):
    """Tells that the worker is there, and what the middleware is told of messages that failed for good."""

    def after_worker_boot(self, broker: Any, worker: Any) -> None:
        note("boots", NAME)

    def after_nack(self, broker: Any, message: Any) -> None:
        note("nacks", f"{message.actor_name} {type(message.exception).__name__}")


def note(file: str, line: str) -> None:
    with open(FOLDER / file, "a") as out:
        out.write(f"{line}\n")


broker = RelayBroker(url=os.environ["APP_URL"], lease=LEASE, max_deliveries=2)
broker.add_middleware(Booted())
if "dramatiq_prom_port" in os.environ:
    from dramatiq.middleware.prometheus import Prometheus

    broker.add_middleware(Prometheus())
dramatiq.set_broker(broker)


@dramatiq.actor
def work(x: int, seconds: float = 0.0) -> None:
    """Done in `seconds`."""
    time.sleep(seconds)
    note("runs", f"{x} {NAME}")


@dramatiq.actor
def hang(x: int) -> None:
    """Runs for ever in the worker called `victim`, and is done at once in others."""
    note("starts", f"{x} {NAME}")
    while NAME == "victim":
        time.sleep(0.05)
    note("runs", f"{x} {NAME}")


@dramatiq.actor
def deadly() -> None:
    """Kills its worker process."""
    note("starts", f"deadly {NAME}")
    os._exit(9)


@dramatiq.actor(max_retries=3, min_backoff=50, max_backoff=100)
def flaky(x: int) -> None:
    """Fails twice, then works; counts by lines, since each try may be in another process."""
    note("tries", str(x))
    if (FOLDER / "tries").read_text().splitlines().count(str(x)) < 3:
        raise ValueError(f"not yet {x}")
    note("runs", f"{x} {NAME}")
