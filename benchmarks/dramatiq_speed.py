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

from benchmarks.rounds import medians, until_done
from benchmarks.servers import cpu_seconds
from tests.servers import Server

JOBS = 10_000
ROUNDS = 5
GROUP = 100
IDLE = 20.0
PICKUPS = 150
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

@dramatiq.actor
def stamp(due):
    # how late it runs, in seconds
    late = time.time() - due
    with open(os.environ["DONE"], "a") as file:
        file.write(f"{late!r}\\n")

if __name__ == "__main__":
    noop.send(0)
    size = int(os.environ["GROUP"])
    began = time.perf_counter()
    for at in range(1, jobs, size):
        if size == 1:
            noop.send(at)
        else:
            dramatiq.group(noop.message(i) for i in range(at, min(at + size, jobs))).run()
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
        stock_each, relay_each = (statistics.median(times) for times in _sent_in_groups(folder, server))
        ratio = f"{stock_each / relay_each:.1f}"
        table.add_row("none", f"send in groups of {GROUP}, µs", f"{stock_each:.0f}", f"{relay_each:.0f}", ratio, "2")
        idle = [_idle_scripts(folder, server, kind) for kind in KINDS]
        ratio = f"{idle[0] / idle[1]:.0f}" if idle[1] else "-"
        table.add_row("1 process x 8 threads", "idle EVALSHA per s", f"{idle[0]:.2f}", f"{idle[1]:.2f}", ratio, "5")
    return table


def dramatiq_pickup(folder: Path) -> Table:
    """How late a message starts on an idle worker: one that is sent now, and one whose delay is over."""
    table = Table(title=f"Dramatiq: from when a message is due to its run on an idle worker, ms ({PICKUPS} each)")
    for column in ("message", "broker", "p50", "p99", "target p99"):
        table.add_column(column, justify="left" if column in ("message", "broker") else "right")
    (folder / "peer_dramatiq.py").write_text(_APP)
    with Server("redis", tcp=True) as server:
        for what, delay, target in (("sent now", 0, "5"), ("delayed by 0.5 s", 500, "50")):
            for kind in KINDS:
                late = _lateness(folder, server, kind, delay)
                cuts = statistics.quantiles(late, n=100)
                aim = target if kind == "relay" else "-"
                table.add_row(what, kind, f"{cuts[49] * 1000:.1f}", f"{cuts[98] * 1000:.1f}", aim)
    return table


_SENDER = """
import random, sys, time
import peer_dramatiq
delay, count = int(sys.argv[1]), int(sys.argv[2])
peer_dramatiq.stamp.send(time.time())  # connects
time.sleep(1.0)
for _ in range(count):
    due = time.time() + delay / 1000
    peer_dramatiq.stamp.send_with_options(args=(due,), **({"delay": delay} if delay else {}))
    time.sleep(random.uniform(0.05, 0.25))
"""


def _lateness(folder: Path, server: Server, kind: str, delay: int) -> list[float]:
    server.cli("FLUSHALL")
    done = folder / "done"
    done.unlink(missing_ok=True)
    with _worker(folder, server, kind, 8):
        time.sleep(3.0)  # it has booted, and found nothing
        sender = [sys.executable, "-c", _SENDER, str(delay), str(PICKUPS)]
        subprocess.run(sender, env=_environment(folder, server, kind), cwd=folder, check=True)
        deadline = time.monotonic() + 60
        while len(late := _numbers(done)[1:]) < PICKUPS and time.monotonic() < deadline:
            time.sleep(0.1)
    return late


def _numbers(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().split()] if file.exists() else []


def _side_by_side(folder: Path, server: Server, threads: int) -> list[Cost]:
    found: dict[str, list[Cost]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind in KINDS:
            found[kind].append(_round(folder, server, kind, threads))
    return [Cost(*medians(found[kind])) for kind in KINDS]


def _round(folder: Path, server: Server, kind: str, threads: int) -> Cost:
    """Send all messages, then start the worker and wait until it ran the last one."""
    server.cli("FLUSHALL")
    done = folder / "done"
    done.unlink(missing_ok=True)
    client = server.client()
    before = cpu_seconds(client)
    sent = _send(folder, server, kind)
    with _worker(folder, server, kind, threads) as worker:
        run = until_done(done, worker, f"dramatiq on {kind}", folder / "worker.log")
        used = cpu_seconds(client) - before
    client.close()
    return Cost(*(seconds / JOBS * 1e6 for seconds in (sent, run, used)))


def _send(folder: Path, server: Server, kind: str, size: int = 1) -> float:
    """Seconds that it took to send all messages, so many at a time."""
    producer = [sys.executable, str(folder / "peer_dramatiq.py")]
    environment = _environment(folder, server, kind) | {"GROUP": str(size)}
    sent = subprocess.run(producer, env=environment, cwd=folder, capture_output=True, check=True, text=True)
    return float(sent.stdout)


def _sent_in_groups(folder: Path, server: Server) -> tuple[list[float], ...]:
    """Per message, in µs, of both kinds in turn."""
    found: tuple[list[float], ...] = ([], [])
    for _ in range(ROUNDS):
        for kind, times in zip(KINDS, found, strict=True):
            server.cli("FLUSHALL")
            times.append(_send(folder, server, kind, GROUP) / JOBS * 1e6)
    return found


def _environment(folder: Path, server: Server, kind: str) -> dict[str, str]:
    broker = server.url if kind == "relay" else f"redis://127.0.0.1:{server.port}/0"
    own = {"BROKER": broker, "JOBS": str(JOBS), "DONE": str(folder / "done")}
    own |= {"GROUP": "1", "PYTHONPATH": str(folder)}
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
