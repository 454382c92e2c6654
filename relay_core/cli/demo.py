"""`relay demo`: three kinds of workers index the same files while one of them is killed, and nothing is lost.

The tasks themselves are in `examples/demo/`, written as a user of Celery, Dramatiq or relay writes them. This
module starts the server and the workers, as an operator would; `demo_report` checks the ledger that the tasks wrote.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relay_core.broker import Broker
from relay_core.cli.demo_report import Ledgers, Part, Plan, part, table
from relay_core.errors import InvalidArgument

LEASE = 3.0
"""Seconds, short so that a killed worker's jobs come back while one is watching."""

MOST_FILES = 800
MOST_BYTES = 32 * 2**20
"""Of one file: each is read as a whole."""

OTHERS = 5
"""Flaky and delayed tasks per framework, and duplicates where there is a word for them."""

DELAY = 2.0
"""Seconds that the delayed tasks wait."""

DELIVERIES = 3
"""After which the task that kills its worker is dead."""

DEADLINE = 110.0
"""Seconds after which the demo gives up and calls what is missing lost."""


@dataclass
class Face:
    """One framework: how to run its worker and its producer, and the queue that its tasks go to.

    :ivar dedup: whether its publish has a word for duplicates
    :ivar own: tasks beside the files, the flaky and the delayed ones: the one that kills its worker
    """

    name: str
    queue: str
    worker: list[str]
    producer: str
    dedup: bool = True
    own: int = 1
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run went. `problems` is empty when nothing was lost."""

    files: int
    seconds: float
    parts: list[Part]
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        frameworks = {each.framework: each.row for each in self.parts}
        return {
            "files": self.files, "seconds": round(self.seconds, 3), "lost": bool(self.problems),
            "problems": self.problems, "frameworks": frameworks,
        }  # fmt: skip


def examples() -> Path:
    """The folder of the demo's tasks in the source tree. Raises InvalidArgument where there is none."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "demo"
    if not folder.is_dir():
        raise InvalidArgument(f"the demo's tasks are not at {folder}; run `make demo` in a checkout of relay")
    return folder


def real_files(folder: Path | None) -> list[Path]:
    """The files of a folder, by default the modules of the running Python's standard library; at most MOST_FILES."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    pattern = "*.py" if folder is None else "*"
    left_out = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"} if folder is None else set()
    found = [p for p in sorted(root.rglob(pattern)) if not left_out & set(p.relative_to(root).parts) and _fit(p)]
    if not found:
        raise InvalidArgument(
            f"no files to index in {root}: there must be one that can be read, of at most {MOST_BYTES} bytes"
        )
    return found[:MOST_FILES]


def _fit(path: Path) -> bool:
    """A file that can be read, whose name is text of one line."""
    try:
        name = str(path).encode()
        return path.is_file() and path.stat().st_size <= MOST_BYTES and os.access(path, os.R_OK) and b"\n" not in name
    except (OSError, UnicodeEncodeError):
        return False


class Demo:
    """One run in a folder of its own.

    :param lease: seconds after which a silent worker's jobs go to others
    """

    def __init__(self, files: list[Path], home: Path, console: Console, lease: float = LEASE) -> None:
        self.files = files
        self.home = home
        self.console = console
        self.ledger_folder = home / "ledger"
        self.ledger_folder.mkdir()
        self.todo = home / "files.txt"
        self.todo.write_text("\n".join(map(str, files)))
        self.faces = _faces(lease)
        self.ledgers = Ledgers(self.ledger_folder, [face.name for face in self.faces])
        self.plan = Plan({str(path): _digest(path) for path in files}, OTHERS, DELAY, DELIVERIES, OTHERS)
        self.broker = Broker(f"relay://?dir={home / 'data'}", quiet=True, lease=lease)
        self.broker.store.raw("PING")  # starts the server, which stays while this process holds it
        self.environment = {
            **os.environ,
            "RELAY_URL": f"relay+unix://{self.broker.address().path}",
            "DEMO_LEDGER": str(self.ledger_folder),
            "DEMO_LEASE": str(lease),
            "DEMO_DELAY": str(DELAY),
            "DEMO_DELIVERIES": str(DELIVERIES),
            "PYTHONPATH": os.pathsep.join([str(examples()), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
        }
        self.killed = 0

    # processes

    def start(self, face: Face) -> None:
        """A worker in a process group of its own, its output in a log file."""
        with self._log(face) as log:
            face.process = subprocess.Popen(
                face.worker, cwd=self.home, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        face.starts += 1

    def _log(self, face: Face) -> Any:
        return open(self.home / f"{face.name}.log", "ab")

    def supervise(self) -> None:
        """Start again what ended, as any process manager does."""
        for face in self.faces:
            if face.process is not None and face.process.poll() is not None:
                _signal_group(face.process, signal.SIGKILL)  # what its master may have left
                self.start(face)

    def produce(self) -> list[subprocess.Popen[bytes]]:
        """A producer per framework, beside its worker."""
        started = []
        for face in self.faces:
            command = [sys.executable, str(examples() / face.producer), str(self.todo), str(OTHERS)]
            with self._log(face) as log:
                started.append(subprocess.Popen(command, cwd=self.home, env=self.environment, stdout=log, stderr=log))
        return started

    def kill_one(self) -> bool:
        """SIGKILL the whole Celery worker, children and all, while it runs the task that waits for that."""
        face, ledger = self.faces[0], self.ledgers["celery"]
        if not ledger.events["begun"] or len(ledger.indexed) <= len(self.files) // 20:
            return False
        assert face.process is not None
        _signal_group(face.process, signal.SIGKILL)
        face.process.wait()
        (self.ledger_folder / "killed").touch()
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

    # the run

    @property
    def total(self) -> int:
        return len(self.faces) * (len(self.files) + 2 * OTHERS)

    def settled(self) -> bool:
        """All is done, and the tasks that kill their workers are in dead."""
        return not any(self.broker.stats(face.queue).pending for face in self.faces)

    @contextlib.contextmanager
    def producing(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        producers = self.produce()
        try:
            yield producers
        finally:
            for producer in producers:
                if producer.poll() is None:
                    producer.kill()
                producer.wait()

    def run(self) -> Outcome:
        """Run everything to its end, and tell what came of it."""
        began = time.monotonic()
        for face in self.faces:
            self.start(face)
        bar = Progress(
            TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self.console,
        )  # fmt: skip
        with self.producing() as producers, bar:
            task = bar.add_task(f"indexing {len(self.files)} files, three times", total=self.total)
            while time.monotonic() - began < DEADLINE:
                bar.update(task, completed=self.ledgers.look())
                if not self.killed and self.kill_one():
                    bar.console.print("  SIGKILL to the Celery worker and its children, in the middle of its work")
                self.supervise()
                produced = all(producer.poll() is not None for producer in producers)
                if produced and self.settled():
                    break
                time.sleep(0.1)
            bar.update(task, completed=self.ledgers.look())
            failed = [
                f"{face.name}: the producer ended with {producer.returncode}"
                for face, producer in zip(self.faces, producers, strict=True)
                if producer.poll()
            ]
        return self.report(failed, time.monotonic() - began)

    def report(self, problems: list[str], took: float) -> Outcome:
        """Print the table and what was found."""
        parts = [
            part(
                face.name,
                face.queue,
                sent=len(self.files) + 2 * OTHERS + face.own,
                has_dedup=face.dedup,
                ledger=self.ledgers[face.name],
                plan=self.plan,
                broker=self.broker,
            )
            for face in self.faces
        ]
        files, frameworks = len(self.files), len(self.faces)
        self.console.print(table(f"{files} files, indexed by each framework in {took:.1f} s together", parts))
        problems = [*problems, *self._killing(parts[0]), *(problem for each in parts for problem in each.problems)]
        for each in parts:
            for story in each.stories:
                self.console.print(f"  {each.framework}: {story}", soft_wrap=True)
        self.console.print(
            f"  celery: {parts[0].row['reaped']} jobs were taken over from workers that died, the one that was killed "
            f"among them; {self.killed} was killed in the middle",
            soft_wrap=True,
        )
        starts = ", ".join(f"{face.name} {face.starts}" for face in self.faces)
        self.console.print(f"  tasks with a delay waited in the store; workers started: {starts}", soft_wrap=True)
        for problem in problems[:20]:
            self.console.print(f"[red]LOST OR WRONG[/red] {problem}", soft_wrap=True)
        if len(problems) > 20:
            self.console.print(f"[red]... and {len(problems) - 20} more[/red]")
        if problems:
            self.console.print(f"The workers' logs and the data are in {self.home}", soft_wrap=True)
        else:
            self.console.print(
                f"[green]Nothing was lost:[/green] all {files} files indexed by all {frameworks}, one worker killed, "
                "its jobs taken over.",
                soft_wrap=True,
            )
        return Outcome(files, took, parts, problems)

    def _killing(self, celery: Part) -> list[str]:
        if not self.killed:
            return ["no worker was killed: the Celery worker never came to the middle of its work"]
        done = self.ledgers["celery"].events["slow"]
        if not done:
            return ["celery: the task that ran when its worker was killed was not taken over"]
        return [] if celery.row["reaped"] else ["celery: no lease of the killed worker was ended"]


def _faces(lease: float) -> list[Face]:
    celery = [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "--concurrency", "2", "-l", "WARNING"]
    dramatiq = [sys.executable, "-m", "dramatiq", "dramatiq_app", "--processes", "1", "--threads", "4"]
    # else its master waits for 30 s for a child that a task has killed before it could say that it is up
    dramatiq += ["--worker-fork-timeout", "2000"]
    relay = [
        sys.executable, "-m", "relay_core.cli", "worker", "relay_app:handle", "--queue", "index",
        "--concurrency", "4", "--lease", str(lease), "--max-deliveries", str(DELIVERIES),
    ]  # fmt: skip
    return [
        Face("celery", "celery", celery, "celery_app.py", own=2),  # and one that runs when the worker is killed
        Face("dramatiq", "default", dramatiq, "dramatiq_app.py", dedup=False),
        Face("relay", "index", relay, "relay_app.py"),
    ]


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _digest(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


def run(
    folder: Path | None = None, *, keep: bool = False, lease: float = LEASE, console: Console | None = None
) -> Outcome:
    """Run the demo. `keep` leaves its folder, with logs and data; so does a run that lost something.

    Raises InvalidArgument where a framework is not installed, or there is nothing to index.
    """
    missing = [name for name in ("celery", "dramatiq") if find_spec(name) is None]
    if missing:
        raise InvalidArgument(f"the demo needs {' and '.join(missing)}: pip install 'relay-queue[all]'")
    console = console or Console()
    files = real_files(folder)
    home = Path(tempfile.mkdtemp(prefix="relay-demo-"))
    wanted = keep
    try:
        demo = Demo(files, home, console, lease)
        try:
            outcome = demo.run()
        finally:
            demo.stop()
            demo.broker.close()
        wanted |= bool(outcome.problems)
        return outcome
    finally:  # also after Ctrl-C
        if not wanted:
            shutil.rmtree(home, ignore_errors=True)
