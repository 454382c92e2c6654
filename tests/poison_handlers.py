"""A worker with a handler that poison kills, started again whenever it dies: `python -m tests.poison_handlers URL`."""

from __future__ import annotations

import os
import sys
import time

from relay_core import Broker, Job
from relay_core.worker import Worker


def handle(job: Job) -> None:
    if job.payload == b"poison":
        os._exit(1)
    time.sleep(0.002)


def run_for_ever(url: str) -> None:
    """Each is a fork: a new Python takes seconds on a busy machine. They end when their process group is killed."""
    while True:
        if os.fork() == 0:
            Worker(Broker(url, lease=0.5), handle, ["q"], concurrency=1, prefetch=40).run()
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    run_for_ever(sys.argv[1])
