"""Celery with its stock Redis transport and with relay: the same app, task, server and flags, in turn.

`send` is `noop.delay()` in a loop, or groups of 100 in one. `run` is a backlog being worked off: from the first task's
start to the last one's.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from benchmarks.idle import commands_within
from benchmarks.rounds import medians
from benchmarks.servers import cpu_seconds
from tests.servers import Server

JOBS = 4000
ROUNDS = 3
KINDS = ("stock", "relay")

_APP = """
import os
from celery import Celery

app = Celery("bench_app", broker=os.environ["BROKER"])
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True
done = os.open(os.environ["DONE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@app.task
def noop(i, *large):
    os.write(done, b".")

if __name__ == "__main__":
    import time
    from celery import group
    jobs, size = int(os.environ["JOBS"]), int(os.environ["GROUP"])
    large = ("x" * int(os.environ["BYTES"]),) if "BYTES" in os.environ else ()
    noop.delay(0)
    began = time.perf_counter()
    for at in range(1, jobs, size):
        if size == 1:
            noop.delay(at, *large)
        else:
            group(noop.s(i) for i in range(at, min(at + size, jobs))).apply_async()
    print((time.perf_counter() - began) / (jobs - 1))
"""

POOLS: Mapping[str, tuple[int, list[str], float]] = {
    "solo": (1, ["-P", "solo"], 5.0),
    "prefork 1": (1, ["-P", "prefork", "-c", "1"], 2.4),
    "prefork 2": (1, ["-P", "prefork", "-c", "2"], 1.0),
    "prefork 8": (1, ["-P", "prefork", "-c", "8"], 1.0),
    "groups, prefork 2": (100, ["-P", "prefork", "-c", "2"], 1.0),
}
"""Pool -> how many tasks are sent at a time, flags of the worker, and how many times faster than stock it is meant to
be."""

_SENDING, _CPU_SHARE, _IDLE = 1.8, 0.40, 2.0

_LARGE, _LARGE_JOBS = (1_000, 10_000, 30_000, 100_000), 500


def _url(server: Server, kind: str) -> str:
    return server.url if kind == "relay" else f"redis://127.0.0.1:{server.port}/0"


def _environment(folder: Path, server: Server, kind: str, jobs: int, size: int = 1) -> dict[str, str]:
    own = {"BROKER": _url(server, kind), "JOBS": str(jobs), "GROUP": str(size), "DONE": str(folder / "done")}
    return {**os.environ, **own, "PYTHONPATH": str(folder)}


@contextmanager
def _worker(folder: Path, environment: dict[str, str], flags: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "celery", "-A", "bench_app", "worker", "-l", "WARNING", *flags]
    with open(folder / "worker.log", "ab") as log:
        worker = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield worker
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            raise


def _round(
    folder: Path, server: Server, kind: str, size: int, flags: list[str], jobs: int = JOBS, large: int | None = None
) -> tuple[float, float, float]:
    """Per task, in µs: to send so many at a time, to run, and processor time of the server for both.

    :param large: bytes of an argument of each task
    """
    server.cli("FLUSHALL")
    done = folder / "done"
    done.unlink(missing_ok=True)
    environment = _environment(folder, server, kind, jobs, size)
    if large is not None:
        environment["BYTES"] = str(large)
    client = server.client()
    before = cpu_seconds(client)
    sent = subprocess.run(
        [sys.executable, "bench_app.py"], env=environment, cwd=folder, capture_output=True, check=True, text=True
    )
    first = last = 0.0
    with _worker(folder, environment, flags) as worker:
        deadline = time.monotonic() + 120
        while not last:
            now, count = time.monotonic(), done.stat().st_size
            if now > deadline or worker.poll() is not None:
                log = (folder / "worker.log").read_text()[-2000:]
                raise RuntimeError(f"{' '.join(flags)} on {kind} ran {count} of {jobs} tasks\n{log}")
            first = first or (now if count else 0.0)
            last = now if count >= jobs else 0.0
            time.sleep(0.002)
        used = cpu_seconds(client) - before
    client.close()
    return float(sent.stdout) * 1e6, (last - first) / jobs * 1e6, used / jobs * 1e6


def celery(folder: Path) -> Table:
    """Medians of rounds in turn, how many times faster relay is, and what was aimed at."""
    (folder / "bench_app.py").write_text(_APP)
    table = Table(title=f"Celery, a no-op task ({JOBS} tasks, medians of {ROUNDS} rounds in turn, one Redis server)")
    for column in ("measure", "stock", "relay", "stock / relay", "target"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    sending: dict[int, dict[str, list[float]]] = defaultdict(lambda: {kind: [] for kind in KINDS})
    with Server("redis", tcp=True) as server:
        for name, (size, flags, target) in POOLS.items():
            found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
            for _ in range(ROUNDS):
                for kind in KINDS:
                    found[kind].append(_round(folder, server, kind, size, flags))
                    sending[size][kind].append(found[kind][-1][0])
            (_, stock, stock_cpu), (_, relay, relay_cpu) = medians(found["stock"]), medians(found["relay"])
            table.add_row(f"{name}: run, µs", f"{stock:.0f}", f"{relay:.0f}", f"{stock / relay:.2f}", f"≥ {target:g}")
            table.add_row(
                f"{name}: server CPU, µs", f"{stock_cpu:.0f}", f"{relay_cpu:.0f}", f"{stock_cpu / relay_cpu:.2f}",
                f"≥ {1 / _CPU_SHARE:g}",
            )  # fmt: skip
    for size, sent in sending.items():
        name = "send" if size == 1 else f"send in groups of {size}"
        stock, relay = (statistics.median(sent[kind]) for kind in KINDS)
        table.add_row(f"{name}, µs", f"{stock:.0f}", f"{relay:.0f}", f"{stock / relay:.2f}", f"≥ {_SENDING:g}")
    return table


def celery_large(folder: Path) -> Table:
    """Tasks with an argument of so many bytes, and a worker of two processes."""
    (folder / "bench_app.py").write_text(_APP)
    table = Table(title=f"Celery, large arguments, prefork 2 ({_LARGE_JOBS} tasks, medians of {ROUNDS} rounds in turn)")
    for column in ("bytes, measure", "stock", "relay", "stock / relay"):
        table.add_column(column, justify="left" if column.startswith("bytes") else "right")
    with Server("redis", tcp=True) as server:
        for large in _LARGE:
            found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
            for _ in range(ROUNDS):
                for kind in KINDS:
                    one = _round(folder, server, kind, 1, ["-P", "prefork", "-c", "2"], _LARGE_JOBS, large)
                    found[kind].append(one)
            both = zip(("send", "run", "server CPU"), medians(found["stock"]), medians(found["relay"]), strict=True)
            for measure, stock, relay in both:
                table.add_row(f"{large:,}, {measure}, µs", f"{stock:.0f}", f"{relay:.0f}", f"{stock / relay:.2f}")
    return table


def celery_memory(folder: Path) -> Table:
    """What a task that waits costs the server."""
    (folder / "bench_app.py").write_text(_APP)
    table = Table(title=f"Celery, bytes of the server per task that waits ({JOBS} tasks)")
    for column in ("stock", "relay", "stock / relay"):
        table.add_column(column, justify="right")
    sizes: dict[str, float] = {}
    with Server("redis", tcp=True) as server:
        for kind in KINDS:
            server.cli("FLUSHALL")
            used: list[int] = []
            environment = _environment(folder, server, kind, JOBS)
            for _ in range(2):  # the first also bring what no task costs: scripts, connections
                subprocess.run(
                    [sys.executable, "bench_app.py"], env=environment, cwd=folder, check=True, capture_output=True
                )
                used.append(int(server.client().info("memory")["used_memory"]))
            sizes[kind] = (used[1] - used[0]) / JOBS
    table.add_row(f"{sizes['stock']:.0f}", f"{sizes['relay']:.0f}", f"{sizes['stock'] / sizes['relay']:.1f}")
    return table


def celery_idle(folder: Path, seconds: float = 20.0) -> Table:
    """Commands per second of one idle worker with all its defaults: gossip, heartbeat events, remote control."""
    (folder / "bench_app.py").write_text(_APP)
    table = Table(title=f"Commands per second of an idle Celery worker, prefork ({seconds:.0f} s)")
    for column in ("stock", "relay", "target"):
        table.add_column(column, justify="right")
    rates: dict[str, float] = {}
    with Server("redis", tcp=True) as server:
        for kind in KINDS:
            server.cli("FLUSHALL")
            environment = _environment(folder, server, kind, jobs=2)
            (folder / "done").unlink(missing_ok=True)
            with _worker(folder, environment, ["-c", "1"]):
                subprocess.run(
                    [sys.executable, "bench_app.py"], env=environment, cwd=folder, check=True, capture_output=True
                )
                while (folder / "done").stat().st_size < 2:
                    time.sleep(0.05)
                time.sleep(3.0)  # what the first task left to do is not idling
                rates[kind] = commands_within(server, seconds) / seconds
    table.add_row(f"{rates['stock']:.2f}", f"{rates['relay']:.2f}", f"≤ {_IDLE:g}")
    return table
