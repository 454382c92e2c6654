"""`relay demo`: three kinds of workers index the same files while one of them is killed, and nothing is lost.

The tasks themselves are in `examples/demo/`, written as a user of Celery, Dramatiq or relay writes them. This
module starts the server and the workers, as an operator would, and checks the ledger that the tasks wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from relay_core.broker import Broker
from relay_core.errors import InvalidArgument

LEASE = 3.0
"""Seconds, short so that a killed worker's jobs come back while one is watching."""

MOST_FILES = 800
OTHERS = 5
"""Flaky and postponed tasks per framework."""

DEADLINE = 110.0
"""Seconds after which the demo gives up and calls what is missing lost."""


@dataclass
class Face:
    """One framework: how to run its worker and its producer, and the queue that its tasks go to."""

    name: str
    queue: str
    worker: list[str]
    producer: str
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0


@dataclass
class Ledger:
    """What the tasks noted."""

    indexed: dict[str, str] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    flaky: dict[str, int] = field(default_factory=dict)
    postponed: dict[str, float] = field(default_factory=dict)
    runs: int = 0


def examples() -> Path:
    """The folder of the demo's tasks in the source tree. Raises InvalidArgument where there is none."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "demo"
    if not folder.is_dir():
        raise InvalidArgument(f"the demo's tasks are not at {folder}; run `make demo` in a checkout of relay")
    return folder


def real_files(folder: Path | None) -> list[Path]:
    """The Python files of a folder, by default of the running Python's standard library; at most MOST_FILES."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    pattern = "*.py" if folder is None else "*"
    left_out = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"} if folder is None else set()
    found = [p for p in sorted(root.rglob(pattern)) if p.is_file() and not left_out & set(p.relative_to(root).parts)]
    if not found:
        raise InvalidArgument(f"no files to index in {root}")
    return found[:MOST_FILES]


class Demo:
    """One run in a folder of its own."""

    def __init__(self, files: list[Path], home: Path, console: Console) -> None:
        self.files = files
        self.home = home
        self.console = console
        self.ledger_folder = home / "ledger"
        self.ledger_folder.mkdir()
        self.todo = home / "files.txt"
        self.todo.write_text("\n".join(map(str, files)))
        bin_folder = Path(sys.executable).parent
        self.faces = [
            Face(
                "celery",
                "celery",
                [str(bin_folder / "celery"), "-A", "celery_app", "worker", "--concurrency", "2", "-l", "WARNING"],
                "celery_app.py",
            ),
            Face(
                "dramatiq",
                "default",
                [str(bin_folder / "dramatiq"), "dramatiq_app", "--processes", "1", "--threads", "4"],
                "dramatiq_app.py",
            ),
            Face(
                "relay",
                "index",
                [
                    sys.executable, "-m", "relay_core.cli", "worker", "relay_app:handle", "--queue", "index",
                    "--concurrency", "4", "--lease", str(LEASE),
                ],
                "relay_app.py",
            ),
        ]  # fmt: skip
        self.broker = Broker(f"relay://?dir={home / 'data'}", quiet=True, lease=LEASE)
        self.broker.store.raw("PING")  # starts the server, which stays while this process holds it
        socket = self.broker.address().path
        self.environment = {
            **os.environ,
            "RELAY_URL": f"relay+unix://{socket}",
            "DEMO_LEDGER": str(self.ledger_folder),
            "DEMO_LEASE": str(LEASE),
            "PYTHONPATH": os.pathsep.join([str(examples()), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
        }
        self.killed = 0

    # processes

    def start(self, face: Face) -> None:
        """A worker in a process group of its own, its output in a log file."""
        log = open(self.home / f"{face.name}.log", "ab")  # noqa: SIM115 - the child keeps it
        with log:
            face.process = subprocess.Popen(
                face.worker, cwd=self.home, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        face.starts += 1

    def supervise(self) -> None:
        """Start again what ended, as any process manager does."""
        for face in self.faces:
            if face.process is not None and face.process.poll() is not None:
                self.start(face)

    def produce(self) -> list[subprocess.Popen[bytes]]:
        return [
            subprocess.Popen(
                [sys.executable, str(examples() / face.producer), str(self.todo), str(OTHERS)],
                cwd=self.home,
                env=self.environment,
            )
            for face in self.faces
        ]

    def kill_one(self) -> bool:
        """SIGKILL a whole worker, children and all, if it holds jobs at this moment."""
        face = self.faces[0]
        assert face.process is not None
        os.killpg(face.process.pid, signal.SIGSTOP)
        if not self.broker.stats(face.queue).inflight:
            os.killpg(face.process.pid, signal.SIGCONT)
            return False
        os.killpg(face.process.pid, signal.SIGKILL)
        face.process.wait()
        self.killed += 1
        return True

    def stop(self) -> None:
        for face in self.faces:
            if face.process is not None:
                _signal_group(face.process, signal.SIGTERM)
        deadline = time.monotonic() + 8
        for face in self.faces:
            if face.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    face.process.wait(max(0.1, deadline - time.monotonic()))
                _signal_group(face.process, signal.SIGKILL)
                face.process.wait()

    # the ledger

    def lines(self) -> Iterator[dict[str, Any]]:
        for path in self.ledger_folder.glob("*.jsonl"):
            for line in path.read_bytes().splitlines():
                yield json.loads(line)

    def read(self) -> dict[str, Ledger]:
        ledgers = {face.name: Ledger() for face in self.faces}
        for line in self.lines():
            ledger = ledgers[line["face"]]
            ledger.runs += 1
            if line["task"] == "index":
                ledger.indexed[line["key"]] = line["digest"]
                ledger.latencies.append(line["done"] - line["sent"])
            elif line["task"] == "flaky":
                ledger.flaky[line["key"]] = line["tries"]
            elif line["task"] == "postponed":
                ledger.postponed[line["key"]] = line["done"] - line["sent"]
        return ledgers

    def progress(self, ledgers: dict[str, Ledger]) -> int:
        return sum(len(x.indexed) + len(x.flaky) + len(x.postponed) for x in ledgers.values())

    @property
    def total(self) -> int:
        return len(self.faces) * (len(self.files) + 2 * OTHERS)

    def settled(self) -> bool:
        """All is done, and the task that kills its worker is in dead."""
        return not any(self.broker.stats(face.queue).pending for face in self.faces)

    # the run

    def run(self) -> bool:
        """True when nothing was lost."""
        began = time.monotonic()
        for face in self.faces:
            self.start(face)
        producers = self.produce()
        bar = Progress(
            TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self.console,
        )  # fmt: skip
        with bar:
            task = bar.add_task(f"indexing {len(self.files)} files, three times", total=self.total)
            while time.monotonic() - began < DEADLINE:
                ledgers = self.read()
                done = self.progress(ledgers)
                bar.update(task, completed=done)
                begun = len(ledgers["celery"].indexed) > len(self.files) // 20
                if begun and not self.killed and self.kill_one():
                    bar.console.print("  SIGKILL to the Celery worker and its children, in the middle of its work")
                self.supervise()
                produced = all(producer.poll() is not None for producer in producers)
                if produced and self.settled():
                    bar.update(task, completed=self.progress(self.read()))
                    break
                time.sleep(0.2 if self.killed else 0.02)
        for producer in producers:
            if producer.poll() is None:
                producer.kill()
            producer.wait()
        return self.report(self.read(), time.monotonic() - began)

    def report(self, ledgers: dict[str, Ledger], took: float) -> bool:
        """Print the table and what was found; True when nothing was lost."""
        table = Table(title=f"{len(self.files)} files, indexed by each framework in {took:.1f} s together")
        for column in ("framework", "enqueued", "processed", "retried", "dead", "reaped", "p50", "p99"):
            table.add_column(column, justify="left" if column == "framework" else "right")
        problems: list[str] = []
        expected = {str(path): _digest(path) for path in self.files}
        for face in self.faces:
            ledger = ledgers[face.name]
            counters = self.broker.stats(face.queue).counters
            retried = sum(max(0, tries - 1) for tries in ledger.flaky.values())
            p50, p99 = _percentiles(ledger.latencies)
            cells = [counters.get(name, 0) for name in ("enqueued", "processed")]
            cells += [retried, counters.get("dead", 0), counters.get("reaped", 0)]
            table.add_row(face.name, *map(str, cells), p50, p99)
            problems += self.problems(face, ledger, expected)
        self.console.print(table)
        if not self.killed:
            problems.append("no worker could be killed in the middle: the Celery worker was done too early")
        self.tell_stories()
        for problem in problems[:20]:
            self.console.print(f"[red]LOST OR WRONG[/red] {problem}")
        if problems:
            self.console.print(f"The workers' logs and the data are in {self.home}")
        else:
            lost = f"all {len(self.files)} files indexed by all {len(self.faces)}"
            self.console.print(f"[green]Nothing was lost:[/green] {lost}, one worker killed, its jobs taken over.")
        return not problems

    def problems(self, face: Face, ledger: Ledger, expected: dict[str, str]) -> list[str]:
        found = [f"{face.name}: {path} was not indexed" for path in expected.keys() - ledger.indexed.keys()]
        found += [
            f"{face.name}: {path} has another digest"
            for path, digest in ledger.indexed.items()
            if expected[path] != digest
        ]
        if len(ledger.flaky) < OTHERS:
            found.append(f"{face.name}: {OTHERS - len(ledger.flaky)} tasks that fail twice never worked")
        if len(ledger.postponed) < OTHERS:
            found.append(f"{face.name}: {OTHERS - len(ledger.postponed)} postponed tasks never ran")
        early = {key: late for key, late in ledger.postponed.items() if late < 2}
        found += [f"{face.name}: {key} ran {late:.2f} s after it was sent" for key, late in early.items()]
        stats = self.broker.stats(face.queue)
        if stats.pending:
            found.append(f"{face.name}: {stats.pending} jobs are still in queue {face.queue!r}")
        if not (audit := self.broker.audit(face.queue)).clean:
            found.append(f"{face.name}: the audit found {audit.findings}")
        return found

    def tell_stories(self) -> None:
        """The tasks that went wrong on purpose."""
        for face in self.faces:
            for job in self.broker.dead(face.queue):
                self.console.print(f"  {face.name}: a task that kills its worker is in dead: {job.reason}, {job.error}")
        dropped = self.broker.stats("index").counters.get("deduplicated", 0)
        self.console.print(f"  relay: {dropped} duplicates were dropped; delayed tasks waited in the store")
        starts = ", ".join(f"{face.name} {face.starts}" for face in self.faces)
        self.console.print(f"  worker processes started: {starts}")


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _digest(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _percentiles(values: list[float]) -> tuple[str, str]:
    if len(values) < 2:
        return "-", "-"
    cuts = statistics.quantiles(values, n=100)
    return f"{cuts[49]:.2f} s", f"{cuts[98]:.2f} s"


def run(folder: Path | None = None, *, keep: bool = False, console: Console | None = None) -> bool:
    """Run the demo: True when nothing was lost. `keep` leaves its folder, with logs and data."""
    console = console or Console()
    files = real_files(folder)
    home = Path(tempfile.mkdtemp(prefix="relay-demo-"))
    demo = Demo(files, home, console)
    fine = False
    try:
        fine = demo.run()
    finally:
        demo.stop()
        demo.broker.close()
        if fine and not keep:
            shutil.rmtree(home, ignore_errors=True)
    return fine
