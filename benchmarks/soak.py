"""`python -m benchmarks.soak --minutes 1`: workers are killed every few seconds, and every job is counted.

`--face celery` does the same to Celery workers: see benchmarks/celery_soak.py.

The ledger is files that the handlers append to, so that it does not depend on what is under test. Exits 1 when a job
was lost, ran before its time, or the audit finds anything; jobs that ran twice are counted, and only kills cause them.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from benchmarks import celery_soak
from benchmarks.servers import private
from relay_core import Broker, JobSpec
from tests.servers import Flavour

_HANDLER = '''
import os, random, time

def handle(job):
    """Due time and id in the payload; fails now and then; notes what it did in one write."""
    due, id = job.payload.decode().split()
    now = time.time()
    time.sleep(random.expovariate(500))
    if random.random() < 0.05:
        raise RuntimeError("now and then")
    line = f"{id} {now - float(due):.3f}\\n".encode()
    fd = os.open(f"ledger-{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line)
    os.close(fd)
'''


class Workers:
    """A few worker processes, replaced when they are killed."""

    def __init__(self, url: str, folder: Path, count: int) -> None:
        self.command = [
            sys.executable, "-m", "relay_core.cli", "--url", url, "worker", "soak_handler:handle", "--queue", "soak",
            "--concurrency", "4", "--lease", "2", "--grace", "5",
        ]  # fmt: skip
        self.folder = folder
        self.log = open(folder / "workers.log", "ab")  # noqa: SIM115 - open as long as the soak
        self.running = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, cwd=self.folder, stdout=self.log, stderr=self.log)

    def kill_one(self) -> None:
        """SIGKILL mostly, SIGTERM now and then; another takes its place."""
        index = random.randrange(len(self.running))
        victim = self.running[index]
        if random.random() < 0.75:
            victim.kill()
        else:
            victim.terminate()
        self.running[index] = self._start()
        victim.wait(timeout=30)

    def stop(self) -> None:
        for worker in self.running:
            worker.terminate()
        for worker in self.running:
            worker.wait(timeout=30)
        self.log.close()


def ledger(folder: Path) -> tuple[Counter[str], list[str]]:
    """How often each id was done, and the ids done too early."""
    done: Counter[str] = Counter()
    early = []
    for path in folder.glob("ledger-*"):
        for line in path.read_text().splitlines():
            id, late = line.split()
            done[id] += 1
            if float(late) < -0.002:  # the store counts in whole milliseconds
                early.append(id)
    return done, early


@click.command()
@click.option("--face", type=click.Choice(["core", "celery"]), default="core", show_default=True, help="Whose workers.")
@click.option("--minutes", default=1.0, show_default=True, help="How long to enqueue and kill.")
@click.option("--workers", default=3, show_default=True, help="Of the core; of Celery there is one per pool.")
@click.option("--brokers", default=1, show_default=True, help="Celery: servers in the failover list of all.")
@click.option("--kill-every", default=3.0, show_default=True, help="Mean seconds between kills.")
@click.option("--rate", default=None, type=int, help="Jobs per second. Default: 200, Celery 60.")
@click.option("--server", "flavour", type=click.Choice(["redis", "valkey"]), default="valkey", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Celery: a folder for ledgers and logs if it fails.")
def main(
    face: str,
    minutes: float,
    workers: int,
    brokers: int,
    kill_every: float,
    rate: int | None,
    flavour: Flavour,
    keep: Path | None,
) -> None:
    """Run workers under load, kill them, and count every job."""
    if face == "celery":
        outcome = celery_soak.soak(
            minutes * 60, flavour=flavour, brokers=brokers, rate=rate or 60, kill_every=kill_every, keep=keep
        )
        click.echo(f"{outcome} ({minutes:g} minutes on {flavour})")
        sys.exit(0 if outcome.well else 1)
    core(minutes * 60, workers, kill_every, rate or 200, flavour)


def core(seconds: float, workers: int, kill_every: float, rate: int, flavour: Flavour) -> None:
    """The same with `relay worker`."""
    with tempfile.TemporaryDirectory(prefix="relay-soak-") as name, private(flavour) as server:
        folder = Path(name)
        (folder / "soak_handler.py").write_text(_HANDLER)
        with Broker(server.url, lease=2.0) as broker:
            crew = Workers(server.url, folder, workers)
            sent, kills = 0, 0
            end = time.monotonic() + seconds
            next_kill = time.monotonic() + random.expovariate(1 / kill_every)
            while time.monotonic() < end:
                specs = []
                for _ in range(max(1, rate // 10)):
                    delay = random.choice((0.0, 0.0, random.uniform(0.1, 5.0)))
                    body = f"{time.time() + delay} {sent}".encode()
                    specs.append(JobSpec(body, delay=delay, priority=random.randrange(10), max_deliveries=1000))
                    sent += 1
                broker.enqueue_many("soak", specs)
                if time.monotonic() > next_kill:
                    crew.kill_one()
                    kills += 1
                    next_kill = time.monotonic() + random.expovariate(1 / kill_every)
                time.sleep(0.1)
            finish_by = time.monotonic() + 120
            while broker.stats("soak").pending and time.monotonic() < finish_by:
                time.sleep(0.2)
            crew.stop()
            done, early = ledger(folder)
            stats, report = broker.stats("soak"), broker.audit("soak")
        lost = [id for id in map(str, range(sent)) if id not in done]
        twice = sum(1 for times in done.values() if times > 1)
        click.echo(
            f"{sent} jobs, {kills} kills in {seconds:.0f} s on {flavour}: {len(lost)} lost, {twice} ran twice or more, "
            f"{len(early)} early, {stats.pending} still pending, {stats.dead} dead, audit found {len(report.findings)}"
        )
        if lost or early or stats.pending or report.findings:
            sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
