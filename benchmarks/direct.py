"""relay used directly, beside other job queues on Redis: one producer, one worker process, a no-op job.

The others are installed into a folder of their own (BullMQ where there is npm). Each is used as its manual shows, with
its own defaults and with acknowledgements; BullMQ, whose default is one job at a time, with eight, as relay.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from benchmarks.rounds import medians, until_done
from benchmarks.servers import cpu_seconds
from tests.servers import Server

JOBS, ROUNDS = 3000, 3
PACKAGES = ("taskiq-redis>=1.2,<2", "streaq>=7,<8")
NODE_PACKAGES = ("bullmq@5", "ioredis@5")

_COMMON = """
import os, time

jobs, seen = int(os.environ["JOBS"]), []

def note():
    seen.append(time.time())
    if len(seen) == jobs:
        path = os.environ["DONE"]
        with open(path + ".part", "w") as file:
            file.write(repr((seen[-1] - seen[0]) / (jobs - 1)))
        os.rename(path + ".part", path)
"""

_RELAY = """
from relay_core import Broker

def noop(job):
    note()

if __name__ == "__main__":
    with Broker(f"relay://127.0.0.1:{os.environ['PORT']}/0") as broker:
        broker.enqueue("bench", b"0")
        began = time.perf_counter()
        for i in range(jobs - 1):
            broker.enqueue("bench", str(i).encode())
        print((time.perf_counter() - began) / (jobs - 1))
"""

_RELAY_ASYNCIO = """
import asyncio
from relay_core import AsyncBroker

async def noop(job):
    note()

async def send():
    async with AsyncBroker(f"relay://127.0.0.1:{os.environ['PORT']}/0") as broker:
        await broker.enqueue("bench", b"0")
        began = time.perf_counter()
        for i in range(jobs - 1):
            await broker.enqueue("bench", str(i).encode())
        print((time.perf_counter() - began) / (jobs - 1))

if __name__ == "__main__":
    asyncio.run(send())
"""

_TASKIQ = """
import asyncio
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(url=f"redis://127.0.0.1:{os.environ['PORT']}")

@broker.task
async def noop(i: int) -> None:
    note()

async def send():
    await broker.startup()
    await noop.kiq(0)
    began = time.perf_counter()
    for i in range(jobs - 1):
        await noop.kiq(i)
    print((time.perf_counter() - began) / (jobs - 1))
    await broker.shutdown()

if __name__ == "__main__":
    asyncio.run(send())
"""

_STREAQ = """
import asyncio
from streaq import Worker

worker = Worker(redis_url=f"redis://127.0.0.1:{os.environ['PORT']}")

@worker.task()
async def noop(i: int) -> None:
    note()

async def send():
    async with worker:
        await noop.enqueue(0)
        began = time.perf_counter()
        for i in range(jobs - 1):
            await noop.enqueue(i)
        print((time.perf_counter() - began) / (jobs - 1))

if __name__ == "__main__":
    asyncio.run(send())
"""


_BULLMQ = """
const { Queue, Worker } = require("bullmq");
const fs = require("fs");
const { PORT, JOBS, DONE } = process.env;
const connection = { host: "127.0.0.1", port: Number(PORT), maxRetriesPerRequest: null };

async function send() {
  const queue = new Queue("bench", { connection });
  await queue.add("noop", { i: 0 });
  const began = performance.now();
  for (let i = 0; i < JOBS - 1; i++) await queue.add("noop", { i });
  console.log((performance.now() - began) / 1000 / (JOBS - 1));
  await queue.close();
}

function work() {
  let seen = 0, first;
  new Worker("bench", async () => {
    first ??= performance.now();
    if (++seen == JOBS) {
      fs.writeFileSync(DONE + ".part", String((performance.now() - first) / 1000 / (JOBS - 1)));
      fs.renameSync(DONE + ".part", DONE);
    }
  }, { connection, concurrency: 8 });
}

process.argv[2] == "work" ? work() : send();
"""


class Peer(NamedTuple):
    """A queue: its app and the file that holds it, and the commands that send and that work."""

    name: str
    file: str
    app: str
    send: tuple[str, ...]
    work: tuple[str, ...]


def _peers(folder: Path) -> list[Peer]:
    """relay first. Installs the others."""
    own, theirs = str(Path(sys.executable).parent), str(folder / "peers" / "bin")
    venv.create(folder / "peers", with_pip=True)
    subprocess.run([f"{theirs}/pip", "install", "--quiet", *PACKAGES], check=True)
    python, relay = f"{theirs}/python", (f"{own}/relay", "worker", "run", "--queue", "bench", "--concurrency", "8")
    peers = [
        Peer(
            "relay, 8 threads", "relay_app.py", _COMMON + _RELAY, (sys.executable, "relay_app.py"),
            (*relay, "relay_app:noop"),
        ),
        Peer(
            "relay, asyncio, 8 at a time", "relay_aio.py", _COMMON + _RELAY_ASYNCIO, (sys.executable, "relay_aio.py"),
            (*relay, "relay_aio:noop"),
        ),
        Peer(
            "taskiq, stream broker", "taskiq_app.py", _COMMON + _TASKIQ, (python, "taskiq_app.py"),
            (f"{theirs}/taskiq", "worker", "taskiq_app:broker", "--workers", "1"),
        ),
        Peer(
            "streaq", "streaq_app.py", _COMMON + _STREAQ, (python, "streaq_app.py"),
            (f"{theirs}/streaq", "run", "streaq_app:worker"),
        ),
    ]  # fmt: skip
    if npm := shutil.which("npm"):
        subprocess.run([npm, "install", "--silent", *NODE_PACKAGES], cwd=folder, check=True)
        node = ("node", "bullmq_app.cjs")
        peers.append(Peer("BullMQ, 8 at a time", "bullmq_app.cjs", _BULLMQ, (*node, "send"), (*node, "work")))
    return peers


def direct(folder: Path) -> Table:
    """Medians of rounds in turn, and how many times as long as relay the others take."""
    table = Table(title=f"Direct use: a no-op job ({JOBS} jobs, medians of {ROUNDS} rounds in turn), µs per job")
    for column in ("queue", "send", "run", "server CPU", "send / relay", "run / relay", "server / relay"):
        table.add_column(column, justify="left" if column == "queue" else "right")
    peers = _peers(folder)
    found: dict[str, list[tuple[float, ...]]] = {peer.name: [] for peer in peers}
    with Server("redis", tcp=True) as server:
        for _ in range(ROUNDS):
            for peer in peers:
                found[peer.name].append(_round(folder, server, peer))
    base = medians(found[peers[0].name])
    for name, rounds in found.items():
        costs = medians(rounds)
        ratios = [f"{cost / least:.1f}" for cost, least in zip(costs, base, strict=True)]
        table.add_row(name, *(f"{cost:.0f}" for cost in costs), *ratios)
    return table


def _round(folder: Path, server: Server, peer: Peer) -> tuple[float, ...]:
    """Send all jobs, then start the worker and wait until it ran the last one."""
    server.cli("FLUSHALL")
    done = folder / "done"
    done.unlink(missing_ok=True)
    (folder / peer.file).write_text(peer.app)
    environment = {
        **os.environ, "PORT": str(server.port), "JOBS": str(JOBS), "DONE": str(done), "PYTHONPATH": str(folder),
        "RELAY_URL": f"relay://127.0.0.1:{server.port}/0",
    }  # fmt: skip
    client = server.client()
    before = cpu_seconds(client)
    sent = subprocess.run(peer.send, env=environment, cwd=folder, capture_output=True, check=True, text=True)
    with open(folder / "worker.log", "ab") as log:
        worker = subprocess.Popen(
            peer.work, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        run = until_done(done, worker, peer.name, folder / "worker.log")
        used = cpu_seconds(client) - before
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    return float(sent.stdout) * 1e6, run * 1e6, used / JOBS * 1e6
