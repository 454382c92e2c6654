"""The same no-op task on a framework's stock Redis broker and on relay: same server, same process count, in turn."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from benchmarks.servers import cpu_seconds
from tests.servers import Server

JOBS = 4000
ROUNDS = 3

_COUNT = '''
import os, threading, time

_lock, _seen = threading.Lock(), []

def note():
    """Called by each task: the file appears once the last one ran."""
    with _lock:
        _seen.append(time.time())
        if len(_seen) == int(os.environ["JOBS"]):
            path = os.environ["DONE"]
            with open(path + ".part", "w") as file:
                file.write(repr(_seen[-1] - _seen[0]))
            os.rename(path + ".part", path)
'''

_SEND = """
if __name__ == "__main__":
    import time
    send(0)
    began = time.perf_counter()
    for i in range(int(os.environ["JOBS"]) - 1):
        send(i)
    print(time.perf_counter() - began)
"""

_CELERY = """
import os
from celery import Celery
from counting import note

app = Celery("peer_celery", broker=os.environ["BROKER"])
app.conf.task_ignore_result = True

@app.task
def noop(i):
    note()

def send(i):
    noop.delay(i)
"""

_DRAMATIQ = """
import os
import dramatiq
from counting import note

if os.environ["BROKER"].startswith("redis"):
    from dramatiq.brokers.redis import RedisBroker
    dramatiq.set_broker(RedisBroker(url=os.environ["BROKER"]))
else:
    from relay_adapters.dramatiq import RelayBroker
    dramatiq.set_broker(RelayBroker(url=os.environ["BROKER"]))

@dramatiq.actor
def noop(i):
    note()

def send(i):
    noop.send(i)
"""

_BIN = Path(sys.executable).parent
WORKERS: Mapping[str, tuple[str, list[str]]] = {
    "celery -P solo": (
        "peer_celery",
        [str(_BIN / "celery"), "-A", "peer_celery", "worker", "-P", "solo", "-l", "ERROR"],
    ),
    "dramatiq, 1 thread": ("peer_dramatiq", [str(_BIN / "dramatiq"), "peer_dramatiq", "-p", "1", "-t", "1"]),
    "dramatiq, 8 threads": ("peer_dramatiq", [str(_BIN / "dramatiq"), "peer_dramatiq", "-p", "1", "-t", "8"]),
}


def _url(server: Server, kind: str) -> str:
    if kind == "relay":
        return server.url
    port = server.connection()["port"]
    return f"redis://127.0.0.1:{port}/0"


def _round(folder: Path, server: Server, module: str, command: list[str], kind: str) -> tuple[float, float, float]:
    """Seconds to send, seconds to run, server processor time: each per job, in µs."""
    server.cli("FLUSHALL")
    done = folder / "done"
    done.unlink(missing_ok=True)
    environment = {
        **os.environ, "BROKER": _url(server, kind), "JOBS": str(JOBS), "DONE": str(done), "PYTHONPATH": str(folder),
    }  # fmt: skip
    client = server.client()
    before = cpu_seconds(client)
    producer = [sys.executable, str(folder / f"{module}.py")]
    sending = float(
        subprocess.run(producer, env=environment, cwd=folder, capture_output=True, check=True, text=True).stdout
    )
    with open(folder / "worker.log", "ab") as log:
        worker = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while not done.exists():
        if time.monotonic() > deadline or worker.poll() is not None:
            raise RuntimeError(f"{command[0]} on {kind} did not finish, see {folder}/worker.log")
        time.sleep(0.05)
    used = cpu_seconds(client) - before
    os.killpg(worker.pid, signal.SIGTERM)
    worker.wait(timeout=60)
    running = float(done.read_text())
    return tuple(seconds / JOBS * 1e6 for seconds in (sending, running, used))  # type: ignore[return-value]


def frameworks(folder: Path) -> Table:
    """Medians of rounds in turn, and how many times faster relay is."""
    for name, text in (("counting", _COUNT), ("peer_celery", _CELERY + _SEND), ("peer_dramatiq", _DRAMATIQ + _SEND)):
        (folder / f"{name}.py").write_text(text)
    table = Table(
        title=f"A no-op task on stock Redis brokers and on relay ({JOBS} tasks, medians of {ROUNDS} rounds in turn)"
    )
    for column in ("worker", "measure", "stock", "relay", "stock / relay"):
        table.add_column(column, justify="left" if column in ("worker", "measure") else "right")
    with Server("redis", tcp=True) as server:
        for name, (module, command) in WORKERS.items():
            found: dict[str, list[tuple[float, float, float]]] = {"stock": [], "relay": []}
            for _ in range(ROUNDS):
                for kind in found:
                    found[kind].append(_round(folder, server, module, command, kind))
            stock, relay = (
                [statistics.median(one) for one in zip(*found[kind], strict=True)] for kind in ("stock", "relay")
            )
            for measure, a, b in zip(("send, µs", "run, µs", "server CPU, µs"), stock, relay, strict=True):
                table.add_row(name, measure, f"{a:.0f}", f"{b:.0f}", f"{a / b:.1f}")
    return table
