"""`celery worker` processes for tests, and the app they run, as a client in the test's process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.utils.nodenames import gethostname

from tests.servers import Server, eventually

ROOT = Path(__file__).parents[1]
POOLS: Mapping[str, tuple[str, ...]] = {
    "prefork": ("-P", "prefork", "-c", "2"),
    "solo": ("-P", "solo"),
    "threads": ("-P", "threads", "-c", "2"),
    "gevent": ("-P", "gevent", "-c", "4"),
}

STARTS = (
    pytest.param({}, id="forked"),
    pytest.param({"worker_pool_start_method": "spawn"}, id="spawned", marks=pytest.mark.since("celery", "5.7")),
)
"""How a prefork pool starts its children: settings of the app."""


def results_of(server: Server) -> str:
    """The URL of a result backend on a server."""
    return f"redis://127.0.0.1:{server.port}/1" if server.tcp else f"redis+socket://{server.socket}?virtual_host=1"


def client_of(url: str, folder: Path, results: str | None = None, **conf: Any) -> Celery:
    """An app that sends to the workers' tasks by name. It is not the current app of any other test.

    Its results are asked for: a backend that listens for them would do so when its server is gone.
    """
    app = Celery("tests.celery_app", broker=url, backend=results, set_as_current=False)
    app.conf.update({"broker_connection_retry_on_startup": True, **conf})
    if results is not None:
        app.backend.on_task_call = lambda *_args, **_options: None
        app.backend.remove_pending_result = lambda result: result
    return app


class CeleryWorker:
    """One `celery worker`, in a session of its own.

    :param options: `broker_transport_options`
    :param conf: further settings of the app
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        *flags: str,
        name: str = "w",
        results: str | None = None,
        options: Mapping[str, Any] | None = None,
        conf: Mapping[str, Any] | None = None,
        ready: bool = True,
    ) -> None:
        self.name, self.folder, self.log = name, folder, folder / f"{name}.log"
        command = [str(Path(sysconfig.get_path("scripts"), "celery")), "-A", "tests.celery_app", "worker"]
        command += ["-n", f"{name}@%h", "-l", "INFO", *flags]
        environment = {
            **os.environ,
            "APP_URL": url,
            "APP_FOLDER": str(folder),
            "APP_NAME": name,
            "APP_OPTIONS": json.dumps(options or {}),
            "APP_CONF": json.dumps(conf or {}),
            "PYTHONWARNINGS": "ignore",
            **({"APP_RESULTS": results} if results else {}),
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        if ready:
            self.ready()

    def ready(self) -> None:
        eventually(lambda: self.logged("ready.") or self.process.poll() is not None, f"start of {self.name}", 60)
        assert self.process.poll() is None, self.text

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def logged(self, text: str) -> bool:
        return text in self.text

    def children(self, client: Celery) -> list[int]:
        """Process ids, of the prefork pool's, once all of them take tasks."""
        name = f"{self.name}@{gethostname()}"

        def are_up() -> bool:
            pool = client.control.inspect([name], timeout=20, limit=1).stats()[name]["pool"]
            return bool(pool["writes"]["inqueues"]["total"] == pool["max-concurrency"])

        eventually(are_up, "all children of the pool")
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        # where they are spawned, there is a process that looks after semaphores, too
        named = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
        return [child for child, command in named.items() if b"semaphore_tracker" not in command]

    def send(self, how: signal.Signals) -> None:
        self.process.send_signal(how)

    def kill(self) -> None:
        """SIGKILL to the worker and all its children at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and wait for the end: its exit code."""
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
        return self.process.wait(seconds)

    def __enter__(self) -> CeleryWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def lines(folder: Path, name: str = "runs", start: str = "") -> list[str]:
    """What the tasks have written so far, of those lines that begin so."""
    path = folder / name
    found = path.read_text().splitlines() if path.exists() else []
    return [line for line in found if line.startswith(start)]
