"""`relay top` and `relay worker ls`: what goes on now, over all faces, on wide and narrow terminals."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from relay_core import Broker, JobSpec, commands
from relay_core.cli.top import Looks, _left_out, render
from relay_core.keys import LAYOUT, worker_keys
from relay_core.worker import Worker
from tests.command_line import Cli, environment, working
from tests.servers import Near, Server, eventually


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: the scripts have tests of their own on both."""
    return str(request.param)


LEFT = b"\x1b[?1049l"
"""What a terminal is told when a program has used its whole screen and gives it back."""

Shows = Callable[[bytes], bool]


def beat(broker: Broker, name: str, face: str, *queues: str, inflight: int = 0) -> None:
    """A worker process that tells of itself."""
    host, pid, _random = name.split(":")
    says = {"host": host, "pid": int(pid), "face": face, "queues": queues, "concurrency": 4, "inflight": inflight}
    broker.store.run(commands.beat(worker_keys("relay"), name, says, age_ms=90_000, alive_ms=3_600_000))


def test_live_workers_of_every_face_are_listed_and_picked(cli: Cli, broker: Broker) -> None:
    assert "No such workers" in cli.run("worker", "ls").stdout
    began = time.monotonic()
    beat(broker, "web1:12:a", "celery", "mail", "other", inflight=7)
    beat(broker, "web2:34:b", "dramatiq", "mail")
    beat(broker, "web3:56:c", "worker", "reports")
    listed = cli.json("worker", "ls")["workers"]
    assert [(one["host"], one["pid"], one["face"]) for one in listed] == [
        ("web1", 12, "celery"), ("web2", 34, "dramatiq"), ("web3", 56, "worker"),
    ]  # fmt: skip
    assert (listed[0]["queues"], listed[0]["inflight"], listed[0]["concurrency"]) == (["mail", "other"], 7, 4)
    assert 0 <= listed[0]["silence"] < 1 + time.monotonic() - began
    assert listed[0]["beat_at"] - listed[0]["started_at"] == pytest.approx(90)
    assert [one["pid"] for one in cli.json("worker", "ls", "-q", "mail")["workers"]] == [12, 34]
    assert [one["pid"] for one in cli.json("worker", "ls", "--face", "worker")["workers"]] == [56]
    shown = cli.run("worker", "ls").stdout
    assert re.search(r"web3 +56 +relay +reports +4 +0 +1m 30s +\S+ ago", shown)


def test_a_worker_process_is_listed_while_it_runs_and_gone_when_it_has_stopped(
    server: Server, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "handlers.py").write_text("def note(job): pass\n")
    with working("handlers:note", "-q", "mail", url=server.url, cwd=tmp_path) as stop:
        eventually(lambda: cli.json("worker", "ls")["workers"], "it tells of itself")
        (one,) = cli.json("worker", "ls")["workers"]
        assert (one["face"], one["queues"], one["concurrency"]) == ("worker", ["mail"], 1)
        assert stop()[0] == 0
    assert cli.json("worker", "ls")["workers"] == []


def test_the_name_of_the_run_command_may_be_left_out(cli: Cli) -> None:
    for args in (["worker"], ["worker", "run"]):
        assert "MODULE:HANDLER" in cli.run(*args, "--help").stdout
        assert "Missing argument" in cli.run(*args, code=2).stderr
        assert "module:function" in cli.run(*args, "-q", "mail", "nothing", code=2).stderr


def test_rates_are_what_was_counted_between_two_looks(broker: Broker) -> None:
    looks = Looks(broker, ["mail"])
    broker.enqueue_many("mail", [b"x"] * 10)
    (first,) = looks.look().rows
    assert (first.enqueued, first.processed, first.failed) == (None, None, None)
    broker.enqueue_many("mail", [JobSpec(b"x", max_retries=0)] * 30)
    jobs = broker.claim("mail", count=40)
    broker.ack_many(jobs[:10])
    for job in jobs[10:14]:
        broker.nack(job, "no", delay=60)
    broker.nack(jobs[39], "no", dead=True)
    time.sleep(0.05)
    (second,) = looks.look().rows
    passed = second.stats.now - first.stats.now
    assert second.enqueued == pytest.approx(30 / passed)
    assert second.processed == pytest.approx(10 / passed)
    assert second.failed == pytest.approx(5 / passed)


def test_p99_of_the_wait_leaves_out_one_in_a_hundred(server: Server, broker: Broker, near: Near) -> None:
    q = broker.settings.keys("mail")
    now = int(server.cli("TIME")[0]) * 1000

    def ready(level: int, waits: list[int]) -> None:
        for at, wait in enumerate(waits):
            id = f"{level}-{at}"
            server.cli("HSET", q.jobs, id, f"{now - wait * 1000} {level} 0 \nx")
            server.cli("RPUSH", q.ready[level], id)

    ready(0, [3600, 1800] + [20] * 198)
    assert Looks(broker, ["mail"]).look().rows[0].wait == near(20)
    ready(5, [40])
    assert Looks(broker, ["mail"]).look().rows[0].wait == near(40), "of several priorities the longest"
    assert broker.stats("mail").oldest_at == pytest.approx(now / 1000 - 3600)


def test_once_is_one_document_over_all_queues(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b"x")
    broker.enqueue("later", b"x", delay=60)
    broker.pause("mail")
    beat(broker, "web1:12:a", "celery", "mail", inflight=3)
    told = cli.json("top", "--interval", "100ms")
    assert (told["workers"], told["worker_inflight"]) == (1, 3)
    later, mail = told["queues"]
    assert (later["queue"], later["delayed"], later["p99_wait"]) == ("later", 1, None)
    assert (mail["ready"], mail["paused"], mail["workers"], mail["enqueued_per_second"]) == (1, True, 1, 0)
    assert [row["queue"] for row in cli.json("top", "later", "--interval", "0.1")["queues"]] == ["later"]
    assert "did you mean 'mail'" in cli.run("top", "mial", code=1).stderr
    shown = cli.run("top", "--once", "--interval", "100ms").stdout
    assert "mail (paused)" in shown
    assert "p99 wait" in shown


@pytest.mark.parametrize("width", [10, 24, 40, 60, 80, 200])
def test_on_a_narrow_terminal_columns_are_left_out_and_never_cut(broker: Broker, width: int) -> None:
    for name in ("mail", "a-queue-with-quite-a-long-name-for-a-terminal"):
        broker.enqueue(name, b"x")
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(render(Looks(broker, []).look(), width, 24))
    head, columns, *rows = out.getvalue().splitlines()
    assert all(len(line) <= width for line in (head, columns, *rows))
    assert set(re.split(r"\s{2,}", columns.strip())) <= {
        "queue", "ready", "delayed", "inflight", "dead", "in/s", "done/s", "fail/s", "p99 wait", "workers",
    }  # fmt: skip
    assert ("ready" in columns) is (width > 20)
    assert ("delayed" in columns) is (width > 100)
    assert len(rows) == 2


def test_of_queues_that_do_not_fit_the_terminal_the_ones_that_wait_longest_are_shown(
    server: Server, broker: Broker
) -> None:
    for n in range(30):
        broker.enqueue(f"q{n:02}", b"x")
    stuck = broker.settings.keys("q29")
    server.cli("HSET", stuck.jobs, "old", f"{(int(server.cli('TIME')[0]) - 600) * 1000} 0 0 \nx")
    server.cli("LPUSH", stuck.ready[0], "old")
    out = io.StringIO()
    Console(file=out, width=80).print(render(Looks(broker, []).look(), 80, 12, "cannot be reached"))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 12
    assert lines[2].split()[0] == "q29"
    assert "and 23 queues more" in lines[-2]
    assert "cannot be reached" in lines[-1]


def test_a_queue_that_cannot_be_read_hides_no_other(server: Server, cli: Cli, broker: Broker) -> None:
    for name in ("mail", "newer"):
        broker.enqueue(name, b"x")
    server.cli("HSET", broker.settings.keys("newer").config, "v", LAYOUT + 1)
    for command in (("top", "--interval", "0.1"), ("stats",), ("queue", "ls")):
        told = cli.json(*command)
        assert [row["queue"] for row in told["queues"]] == ["mail"]
        assert "has layout 2" in told["left_out"]["newer"]
        shown = cli.run(*command)
        assert "mail" in shown.stdout
        assert "Warning: queue 'newer' is left out: " in shown.stderr
    out = io.StringIO()
    frame = Looks(broker, []).look()
    Console(file=out, width=200).print(render(frame, 200, 12, _left_out(frame)))
    assert "queue 'newer' cannot be read: " in out.getvalue()
    assert "has layout 2" in cli.run("stats", "newer", code=1).stderr
    audited = cli.json("audit", code=1)
    assert ([row["queue"] for row in audited["queues"]], list(audited["left_out"])) == (["mail"], ["newer"])


@contextmanager
def on_a_terminal(server: Server, folder: Path, kind: str) -> Iterator[tuple[subprocess.Popen[bytes], int, Shows]]:
    """`relay top` on a terminal of this kind (TERM): the process, the terminal, and whether it has shown a text."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "relay_core.cli", "top", "--interval", "100ms"],
        cwd=folder, env=environment(server.url) | {"TERM": kind}, stdin=other, stdout=other, stderr=other,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(other)
    seen = b""

    def shows(text: bytes) -> bool:
        nonlocal seen
        while select.select([main], [], [], 0.05)[0]:
            try:
                seen += os.read(main, 65536)
            except OSError:  # the terminal is gone
                break
        return text in seen

    try:
        yield process, main, shows
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(main)
    assert b"Traceback" not in seen


def test_it_is_live_on_a_terminal_and_ctrl_c_ends_it_with_0(server: Server, broker: Broker, tmp_path: Path) -> None:
    broker.enqueue("mail", b"x")
    with on_a_terminal(server, tmp_path, "xterm") as (process, main, shows):
        eventually(lambda: shows(b"1 ready"), "the first look")
        broker.enqueue_many("mail", [b"x"] * 6)
        eventually(lambda: shows(b"7 ready"), "a later look")
        os.write(main, b"\x03")
        eventually(lambda: shows(LEFT), "it leaves the screen as it was")
        assert process.wait(10) == 0


def test_it_leaves_the_screen_as_it_was_when_it_is_told_to_end(server: Server, broker: Broker, tmp_path: Path) -> None:
    with on_a_terminal(server, tmp_path, "xterm") as (process, _main, shows):
        eventually(lambda: shows(b"0 ready"), "the first look")
        process.terminate()
        eventually(lambda: shows(LEFT), "it leaves the screen as it was")
        assert process.wait(10) == 128 + signal.SIGTERM


def test_on_a_dumb_terminal_it_looks_twice_and_ends(server: Server, broker: Broker, tmp_path: Path) -> None:
    broker.enqueue("mail", b"x")
    with on_a_terminal(server, tmp_path, "dumb") as (process, _main, shows):
        eventually(lambda: shows(b"1 ready"), "one look")
        assert process.wait(10) == 0


def test_a_worker_that_is_killed_is_gone_from_the_list_after_its_beats_have_ended(cli: Cli, broker: Broker) -> None:
    worker = Worker(broker, lambda job: None, ["mail"])
    thread = threading.Thread(target=worker.run)
    thread.start()
    eventually(lambda: cli.json("worker", "ls")["workers"], "it tells of itself")
    worker.stop()
    thread.join()
    beat(broker, "gone:1:a", "worker", "mail")
    keys = worker_keys("relay")
    broker.store.raw("ZADD", keys.alive, 1, "gone:1:a")
    assert cli.json("worker", "ls")["workers"] == []
