"""Dramatiq workers for tests: in this process, and by Dramatiq's own command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.middleware import Middleware

from tests.servers import Server

ROOT = Path(__file__).parents[1]


@contextmanager
def running(broker: dramatiq.Broker, threads: int = 4, queues: set[str] | None = None) -> Iterator[dramatiq.Worker]:
    """A worker in this process, stopped at the end."""
    worker = dramatiq.Worker(broker, worker_threads=threads, worker_timeout=100, queues=queues)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(timeout=10_000)


def signals_of(broker: dramatiq.Broker) -> list[str]:
    """The names of the signals that the broker emits from now on."""
    seen: list[str] = []

    class Record(Middleware):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith(("before_", "after_")):
                return lambda *args, **kwargs: seen.append(name)
            return super().__getattribute__(name)

    broker.add_middleware(Record())
    del seen[:]
    return seen


class Workers:
    """`dramatiq APP ...`: a master with its worker processes, in a session of their own.

    :param folder: where the app writes a line per run, and the log goes
    :param app: the module. Default tests.dramatiq_app
    """

    def __init__(
        self,
        server: Server,
        folder: Path,
        *,
        processes: int = 1,
        threads: int = 4,
        name: str = "w",
        script: str = "dramatiq",
        app: str = "tests.dramatiq_app",
        **env: str,
    ) -> None:
        self.folder = folder
        self.name = name
        self.log = folder / f"{name}.log"
        # the script, not `python -m dramatiq`: at SIGHUP that one starts whatever `python` is on PATH
        command = [str(Path(sysconfig.get_path("scripts"), script)), app]
        command += ["--processes", str(processes), "--threads", str(threads), "--worker-shutdown-timeout", "20000"]
        settings = {"APP_URL": server.url, "APP_FOLDER": str(folder), "APP_NAME": name, **env}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
            )

    def send(self, how: signal.Signals) -> None:
        self.process.send_signal(how)

    def kill(self) -> None:
        """SIGKILL to the master and all its children at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM, and wait for the end: its exit code."""
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
        return self.process.wait(30)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def lines(folder: Path, name: str = "runs") -> list[str]:
    """What the app has written so far."""
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []
