"""What the benchmarks of whole workers share: rounds that end when the worker says so, and their medians."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """The median of each figure over rounds of the same figures."""
    return [statistics.median(one) for one in zip(*rounds, strict=True)]


def until_done(done: Path, worker: subprocess.Popen[bytes], name: str, log: Path, seconds: float = 300.0) -> float:
    """Wait until the worker has written the file: the number in it. Raises RuntimeError with the end of its log."""
    deadline = time.monotonic() + seconds
    while not done.exists():
        if time.monotonic() > deadline or worker.poll() is not None:
            raise RuntimeError(f"{name} did not finish\n{log.read_text()[-2000:]}")
        time.sleep(0.05)
    return float(done.read_text())
