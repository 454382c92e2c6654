"""The command line as processes: workers, the embedded server, terminals, start-up."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay_core import Broker
from tests.command_line import Cli, finished, spawn, working
from tests.servers import Server, eventually, free_port

HANDLERS = """
import pathlib

def note(job):
    with open("ran", "a") as ran:
        ran.write(job.payload.decode() + "\\n")

class Group:
    @staticmethod
    def inner(job):
        note(job)

number = 5
"""


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: what differs between servers is tested below the command line."""
    return str(request.param)


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry_for=2.0) as broker:
        yield broker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with handlers."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    (tmp_path / "broken.py").write_text("import os\n\nraise RuntimeError('no luck')\n")
    (tmp_path / "half.py").write_text("import not_installed_here\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    return tmp_path


# --- worker


@pytest.mark.parametrize("handler", ["handlers:note", "handlers:Group.inner"])
def test_a_worker_runs_a_handler_of_the_current_folder_and_ends_with_0(
    server: Server, broker: Broker, folder: Path, handler: str
) -> None:
    broker.enqueue_many("mail", [b"one", b"two"])
    broker.enqueue("other", b"three")
    with working(handler, "-q", "mail", "-q", "other", "-c", "2", "--json", url=server.url, cwd=folder) as stop:
        eventually(lambda: broker.stats("mail").counters.get("processed") == 2, "both jobs of mail")
        eventually(lambda: broker.stats("other").counters.get("processed") == 1, "the job of other")
        code, out, err = stop()
    assert (code, json.loads(out)) == (0, {"queues": ["mail", "other"], "processed": 3}), err
    assert set((folder / "ran").read_text().split()) == {"one", "two", "three"}
    assert "serving mail, other" in err


def test_a_worker_serves_metrics_where_it_is_told(server: Server, broker: Broker, folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with working("handlers:note", "-q", "mail", "--metrics-addr", address, url=server.url, cwd=folder) as stop:
        broker.enqueue("mail", b"one")

        def scraped() -> bool:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
                return 'relay_jobs_processed_total{queue="mail"} 1.0' in reply.read().decode()

        eventually(scraped, "the job in the metrics")
        assert stop()[0] == 0


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        ("handlers", "module:function"),
        ("handlers:missing", "has no 'missing'"),
        ("handlers:number", "is a int"),
        ("nowhere:handle", "no module 'nowhere'"),
        ("handlers.deeper:handle", "no module 'handlers.deeper'"),
        ("broken:handle", "broken.py:3"),
        ("half:handle", "No module named 'not_installed_here'"),
        ("typo:f", "typo.py:1"),
    ],
)
def test_a_handler_that_cannot_be_used_is_told_in_one_line(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, handler: str, said: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    result = Cli(server.url).run("worker", handler, "-q", "mail", code=2)
    for name in ("handlers", "broken", "half", "typo"):
        sys.modules.pop(name, None)
    assert result.stderr.startswith("Error: handler ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_worker_without_a_server_ends_with_3(folder: Path) -> None:
    url = f"relay://127.0.0.1:{free_port()}"
    code, _out, err = finished(spawn("worker", "handlers:note", "-q", "q", "--timeout", "0", url=url, cwd=folder))
    assert code == 3, err
    assert "Traceback" not in err


# --- the embedded server


def test_server_start_keeps_a_server_up_until_stop(tmp_path: Path) -> None:
    data = tmp_path / "data"
    cli = Cli(f"relay://?dir={data}")
    try:
        assert cli.json("server", "status", code=1)["running"] is False
        started = cli.json("server", "start")
        assert started["running"] is True
        assert started["kept"] is True
        os.kill(started["pid"], 0)
        assert Cli(started["url"]).json("job", "enqueue", "x", "-q", "mail")["duplicate"] is False
        assert cli.json("server", "status")["pid"] == started["pid"]
        assert cli.json("version")["server"] == started["version"]
    finally:
        stopped = cli.json("server", "stop")
    assert stopped["was_running"] is True
    assert cli.json("server", "stop")["was_running"] is False
    assert "No server runs" in cli.run("server", "status", code=1).stdout
    assert cli.json("stats", "mail")["queues"][0]["ready"] == 1, "the data stays"


def test_server_commands_need_a_folder_when_the_url_is_no_embedded_one(server: Server) -> None:
    assert "--dir" in Cli(server.url).run("server", "status", code=2).stderr


def test_without_a_url_the_embedded_server_of_the_folder_is_used_with_a_notice(tmp_path: Path) -> None:
    code, out, err = finished(spawn("job", "enqueue", "x", "-q", "mail", url=None, cwd=tmp_path))
    assert code == 0, err
    assert len(out.strip()) == 22
    assert str(tmp_path / ".relay") in err


# --- terminals


def on_a_terminal(server: Server, cwd: Path, answer: bytes, *args: str) -> tuple[int, str]:
    """Run a command whose stdin and stderr are a terminal, type an answer to its question: exit code, stdout."""
    here, there = pty.openpty()
    try:
        process = spawn(*args, url=server.url, cwd=cwd, stdin=there, stderr=there)
        os.close(there)
        seen = b""
        while b"[y/N]" not in seen:
            seen += os.read(here, 1024)
        os.write(here, answer)
        out, _err = process.communicate(timeout=30)
        return process.returncode, out
    finally:
        os.close(here)


def test_on_a_terminal_a_purge_asks_and_does_as_it_is_told(server: Server, broker: Broker, tmp_path: Path) -> None:
    broker.enqueue("mail", b"x")
    code, _out = on_a_terminal(server, tmp_path, b"n\n", "queue", "purge", "mail")
    assert code == 1
    assert broker.stats("mail").ready == 1
    code, out = on_a_terminal(server, tmp_path, b"y\n", "queue", "purge", "mail", "--json")
    assert code == 0
    assert json.loads(out)["purged"] == 1
    assert broker.stats("mail").ready == 0


def test_on_a_terminal_bulk_work_shows_a_bar_and_stdout_has_the_answer_alone(
    server: Server, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.enqueue_many("mail", [b"x"] * 150)
    for job in broker.claim("mail", 150):
        broker.nack(job, "no", dead=True)
    monkeypatch.setenv("TERM", "xterm")
    here, there = pty.openpty()
    try:
        process = spawn("dlq", "requeue", "--all", "-q", "mail", "--json", url=server.url, cwd=tmp_path, stderr=there)
        os.close(there)
        out, _err = process.communicate(timeout=30)
        assert b"150/150" in os.read(here, 65536)
    finally:
        os.close(here)
    assert json.loads(out)["requeued"] == 150


def test_a_narrow_terminal_cuts_extracts_but_no_id(server: Server, broker: Broker, tmp_path: Path) -> None:
    id = broker.enqueue("mail", b"word " * 40).id
    here, there = pty.openpty()
    try:
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
        process = spawn("job", "ls", "-q", "mail", url=server.url, cwd=tmp_path, stdout=there)
        os.close(there)
        shown = b""
        while b"\xe2\x80\xa6" not in shown:
            shown += os.read(here, 4096)
        assert finished(process)[0] == 0
    finally:
        os.close(here)
    (line,) = [line for line in shown.decode().splitlines() if id in line]
    assert "word" in line


# --- start-up


def test_version_imports_no_framework_and_no_table_printer() -> None:
    script = (
        "import sys\n"
        "from relay_core.cli.app import relay\n"
        "relay(['version', '--url', 'relay://127.0.0.1:1'], standalone_mode=False)\n"
        "heavy = {'celery', 'dramatiq', 'prometheus_client', 'rich', 'gevent'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
