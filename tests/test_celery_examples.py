"""The examples of examples/celery on another broker than in tests/test_docs.py, which runs their README on relay, and
what of them goes on in the background.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.servers import Server, eventually

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples" / "celery"
CELERY = str(Path(sysconfig.get_path("scripts"), "celery"))


def environment_of(url: str, tmp_path: Path) -> dict[str, str]:
    """What chooses the broker, and keeps files out of the examples' folder."""
    own = {"BROKER_URL": url, "RESULTS": str(tmp_path / "results"), "DATABASE": str(tmp_path / "db")}
    return {**os.environ, **own, "PYTHONUNBUFFERED": "1"}


@contextmanager
def running(command: Sequence[str], folder: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    """A process in a session of its own, stopped by SIGTERM at the end."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def said(command: Sequence[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_the_application_runs_unchanged_on_celerys_redis_transport(server: Server, tmp_path: Path) -> None:
    environment = environment_of(f"redis+socket://{server.socket}", tmp_path)
    worker = [CELERY, "-A", "app", "worker", "-Q", "celery,mail", "-c", "2", "-l", "WARNING"]
    # no -B: from Python 3.13 on a worker and its beat are in each other's way in the schedule's file now and then
    beat = [CELERY, "-A", "app", "beat", "-s", str(tmp_path / "schedule"), "-l", "WARNING"]
    log = tmp_path / "log"
    with running(worker, EXAMPLES, environment, log), running(beat, EXAMPLES, environment, tmp_path / "beat"):
        out = said([sys.executable, "app.py", "10"], EXAMPLES, environment)
        assert "10 orders are done" in out
        text = log.read_text
        for number in range(10):
            for what in ("charged", "packed", "confirmed by mail"):
                assert f"order {number}: {what}" in text()
        eventually(lambda: "please rate it" in text() and "stock was taken" in text(), "countdown and beat")


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_beat_sends_what_is_scheduled_in_the_database_of_a_django_project(server: Server, tmp_path: Path) -> None:
    environment = environment_of(server.url, tmp_path)
    folder = EXAMPLES / "django"
    manage = [sys.executable, "manage.py"]
    said([*manage, "migrate"], folder, environment)
    said([*manage, "schedule", "1"], folder, environment)
    worker = [CELERY, "-A", "shop", "worker", "-c", "1", "-B", "-l", "WARNING"]
    with running(worker, folder, environment, tmp_path / "log"):
        told = said([*manage, "order", "tea"], folder, environment)
        assert told == "order 1 of tea: shipped\n", (tmp_path / "log").read_text()

        def reminders() -> int:
            with sqlite3.connect(environment["DATABASE"], timeout=20) as database:
                return int(database.execute("SELECT reminders FROM orders_order").fetchone()[0])

        eventually(lambda: reminders() >= 2, "two reminders from beat's database")
