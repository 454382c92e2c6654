"""A no-op Dramatiq actor on the stock RedisBroker and on relay: same server, same process count, in turn."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from benchmarks.servers import cpu_seconds
from tests.servers import Server

JOBS = 10_000
ROUNDS = 5
IDLE = 20.0
KINDS = ("stock", "relay")

_APP = """
import os, threading, time
import dramatiq

if os.environ["BROKER"].startswith("redis"):
    from dramatiq.brokers.redis import RedisBroker
    dramatiq.set_broker(RedisBroker(url=os.environ["BROKER"]))
else:
    from relay_adapters.dramatiq import RelayBroker
    dramatiq.set_broker(RelayBroker(url=os.environ["BROKER"]))

jobs, lock, seen = int(os.environ["JOBS"]), threading.Lock(), []

@dramatiq.actor
def noop(i):
    with lock:
        seen.append(time.time())
        if len(seen) == jobs:
            path = os.environ["DONE"]
            with open(path + ".part", "w") as file:
                file.write(repr(seen[-1] - seen[0]))
            os.rename(path + ".part", path)

if __name__ == "__main__":
    noop.send(0)
    began = time.perf_counter()
    for i in range(jobs - 1):
        noop.send(i)
    print(time.perf_counter() - began)
"""


class Cost(NamedTuple):
    """Of one round: time to send, time to run, and processor time of the server for both, per message, in µs."""

    send: float
    run: float
    cpu: float


def dramatiq(folder: Path) -> Table:
    """Medians of rounds in turn, and how many times faster relay is."""
    table = Table(title=f"Dramatiq: a no-op actor ({JOBS} messages, medians of {ROUNDS} rounds in turn)")
    for column in ("worker", "measure", "stock", "relay", "stock / relay", "target"):
        table.add_column(column, justify="left" if column in ("worker", "measure") else "right")
    (folder / "peer_dramatiq.py").write_text(_APP)
    with Server("redis", tcp=True) as server:
        for threads, target in ((8, "5"), (1, "10")):
            name = f"1 process x {threads} thread{'s' if threads > 1 else ''}"
            stock, relay = _side_by_side(folder, server, threads)
            for measure, a, b, aim in zip(
                ("send, µs", "run, µs", "server CPU, µs"), stock, relay, ("2", target, "2"), strict=True
            ):
                table.add_row(name, measure, f"{a:.0f}", f"{b:.0f}", f"{a / b:.1f}", aim)
        idle = [_idle_scripts(folder, server, kind) for kind in KINDS]
        ratio = f"{idle[0] / idle[1]:.0f}" if idle[1] else "-"
        table.add_row("1 process x 8 threads", "idle EVALSHA per s", f"{idle[0]:.2f}", f"{idle[1]:.2f}", ratio, "5")
    return table


def _side_by_side(folder: Path, server: Server, threads: int) -> list[Cost]:
    found: dict[str, list[Cost]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind in KINDS:
            found[kind].append(_round(folder, server, kind, threads))
    return [Cost(*(statistics.median(one) for one in zip(*found[kind], strict=True))) for kind in KINDS]


def _round(folder: Path, server: Server, kind: str, threads: int) -> Cost:
    """Send all messages, then start the worker and wait until it ran the last one."""
    server.cli("FLUSHALL")
    done = folder / "done"
    done.unlink(missing_ok=True)
    client = server.client()
    before = cpu_seconds(client)
    producer = [sys.executable, str(folder / "peer_dramatiq.py")]
    sent = subprocess.run(
        producer, env=_environment(folder, server, kind), cwd=folder, capture_output=True, check=True, text=True
    )
    with _worker(folder, server, kind, threads) as worker:
        deadline = time.monotonic() + 300
        while not done.exists():
            if time.monotonic() > deadline or worker.poll() is not None:
                raise RuntimeError(f"dramatiq on {kind} did not finish, see {folder}/worker.log")
            time.sleep(0.05)
        used = cpu_seconds(client) - before
    client.close()
    return Cost(*(seconds / JOBS * 1e6 for seconds in (float(sent.stdout), float(done.read_text()), used)))


def _environment(folder: Path, server: Server, kind: str) -> dict[str, str]:
    broker = server.url if kind == "relay" else f"redis://127.0.0.1:{server.port}/0"
    own = {"BROKER": broker, "JOBS": str(JOBS), "DONE": str(folder / "done"), "PYTHONPATH": str(folder)}
    return {**os.environ, **own}


@contextmanager
def _worker(folder: Path, server: Server, kind: str, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(Path(sys.executable).parent / "dramatiq"), "peer_dramatiq", "-p", "1", "-t", str(threads)]
    with open(folder / "worker.log", "ab") as log:
        worker = subprocess.Popen(
            command,
            env=_environment(folder, server, kind),
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield worker
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGTERM)
        worker.wait(timeout=60)


def _idle_scripts(folder: Path, server: Server, kind: str) -> float:
    """Scripts per second that an idle worker process has the server run."""
    server.cli("FLUSHALL")
    server.cli("CONFIG", "RESETSTAT")
    with _worker(folder, server, kind, 8):
        deadline = time.monotonic() + 60
        while not _scripts_run(server) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(5.0)  # the stock consumers back off to their longest pause
        before = _scripts_run(server)
        time.sleep(IDLE)
        return (_scripts_run(server) - before) / IDLE


def _scripts_run(server: Server) -> int:
    line = server.info("commandstats").get("cmdstat_evalsha", "calls=0,")
    return int(line.partition("calls=")[2].partition(",")[0])
