"""What waiting costs and how fast it ends: wake-up time with blocked workers, commands of an idle worker."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from benchmarks.servers import FLAVOURS, private
from relay_core import Broker
from tests.servers import Server

WORKERS = 16

_CLAIMER = """
import sys, time
from relay_core import Broker
from tests.servers import Server
broker = Broker(sys.argv[1])
print("up", flush=True)
while True:
    for job in broker.claim("bench", wait=30.0):
        now = time.time()
        if job.payload == b"end":
            broker.ack(job)
            sys.exit()
        if job.payload != b"warm":
            print(now - float(job.payload), flush=True)
        broker.ack(job)
"""

_HANDLER = "def handle(job): pass\n"


def wake_up(rounds: int = 400) -> Table:
    """From just before an enqueue to the claimed job in one of 16 blocked processes, each of which ran jobs before."""
    table = Table(title=f"Idle wake-up with {WORKERS} blocked workers, ms ({rounds} jobs, one at a time)")
    for column in ("server", "p50", "p90", "p99", "target p99"):
        table.add_column(column, justify="right")
    for flavour in FLAVOURS:
        with private(flavour) as server, Broker(server.url) as broker:
            claimers = [
                subprocess.Popen([sys.executable, "-c", _CLAIMER, server.url], stdout=subprocess.PIPE, text=True)
                for _ in range(WORKERS)
            ]
            for claimer in claimers:
                assert claimer.stdout is not None
                assert claimer.stdout.readline() == "up\n"
            time.sleep(1.0)
            for _ in range(4 * WORKERS):
                # the server wakes them in turn: each has run its first jobs before the clock counts
                broker.enqueue("bench", b"warm")
                time.sleep(0.01)
            for _ in range(rounds):
                broker.enqueue("bench", repr(time.time()).encode())
                time.sleep(0.01)
            broker.enqueue_many("bench", [b"end"] * WORKERS)
            took = sorted(float(line) * 1000 for c in claimers for line in c.communicate(timeout=30)[0].split())
            cuts = statistics.quantiles(took, n=100)
            table.add_row(flavour, *(f"{cuts[i]:.2f}" for i in (49, 89, 98)), "2.00")
    return table


def commands_within(server: Server, seconds: float) -> int:
    """Watch the server for so long: how many commands clients sent, connecting and our own PINGs left out."""
    sent = 0
    client = server.client()
    with client.monitor() as monitor:  # type: ignore[no-untyped-call]
        end = time.monotonic() + seconds
        # a PING of our own ends each wait for the next line
        while time.monotonic() < end:
            client.ping()
            for line in monitor.listen():
                if line["command"] == "PING":
                    break
                # what scripts call inside the server was not sent by anybody
                sent += line["client_type"] != "lua" and not line["command"].startswith(("CLIENT", "HELLO"))
            time.sleep(0.05)
    client.close()
    return sent


def idle_commands(folder: Path, seconds: float = 20.0) -> Table:
    """Commands per second of one idle `relay worker` process."""
    table = Table(title=f"Commands of an idle worker process ({seconds:.0f} s)")
    for column in ("server", "commands per second", "target"):
        table.add_column(column, justify="right")
    (folder / "bench_handler.py").write_text(_HANDLER)
    for flavour in FLAVOURS:
        with private(flavour) as server, Broker(server.url) as broker:
            broker.enqueue("bench", b"")
            command = [sys.executable, "-m", "relay_core.cli", "--url", server.url, "worker"]
            worker = subprocess.Popen(
                [*command, "bench_handler:handle", "--queue", "bench"], cwd=folder, stderr=subprocess.DEVNULL
            )
            while broker.stats("bench").pending:
                time.sleep(0.05)
            sent = commands_within(server, seconds)
            worker.terminate()
            worker.wait(timeout=30)
            table.add_row(flavour, f"{sent / seconds:.2f}", "1.00")
    return table
