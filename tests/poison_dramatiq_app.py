"""The application of test_poison_neighbours.py under Dramatiq's command line: every run writes a line to `runs`."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import dramatiq

from relay_adapters.dramatiq import RelayBroker

RUNS = Path(os.environ["APP_FOLDER"], "runs")

broker = RelayBroker(url=os.environ["APP_URL"], lease=1.0, max_deliveries=3)
dramatiq.set_broker(broker)


class Booted(logging.Filter):
    """Set by what a worker process logs once its master knows that it is up: the master waits for half a minute for
    one that ends before that."""

    up = threading.Event()

    def filter(self, record: logging.LogRecord) -> bool:
        if "ready for action" in record.getMessage():
            self.up.set()
        return True


booted = Booted()
logging.getLogger("dramatiq.WorkerProcess(0)").addFilter(booted)


def note(line: str) -> None:
    with RUNS.open("a") as out:
        out.write(f"{line}\n")


@dramatiq.actor(queue_name="here")
def innocent(key: str) -> None:
    note(key)


@dramatiq.actor(queue_name="there")
def far_innocent(key: str) -> None:
    note(key)


@dramatiq.actor(queue_name="here")
def poison() -> None:
    """Kills its process."""
    booted.up.wait(20)
    note("poison")
    os._exit(9)
