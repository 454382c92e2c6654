"""Handlers for workers that run as processes; what they do is written to a ledger in RELAY_TEST_FOLDER."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from relay_core import Job

FOLDER = Path(os.environ.get("RELAY_TEST_FOLDER", "."))
LEDGER = FOLDER / "ledger"
GO = FOLDER / "go"


def note(event: str, job: Job) -> None:
    """One write per line, so that lines of several processes do not mix."""
    line = f"{event} {job.payload.decode()} {job.deliveries}\n".encode()
    ledger = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(ledger, line)
    finally:
        os.close(ledger)


def hold(job: Job) -> None:
    """Runs until the test makes the file `go`."""
    note("start", job)
    while not GO.exists():
        time.sleep(0.01)
    note("end", job)


async def hold_async(job: Job) -> None:
    note("start", job)
    while not GO.exists():
        await asyncio.sleep(0.01)
    note("end", job)


def die(job: Job) -> None:
    """A `poison` payload ends the process."""
    note("start", job)
    if job.payload == b"poison":
        os._exit(1)


def fail(job: Job) -> None:
    note("start", job)
    raise ValueError("no luck")
