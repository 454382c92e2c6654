"""`relay schedule` and `relay worker --schedule`, as commands and as processes that are killed."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from relay_core import Broker
from tests.command_line import Cli, finished, spawn, working
from tests.servers import Server, eventually


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: the scripts have tests of their own on both."""
    return str(request.param)


def test_a_schedule_is_added_listed_and_removed(cli: Cli) -> None:
    line = "schedule add nightly {} -q reports --tz Europe/Berlin --missed all --catch-up 3 --priority 2 --no-overlap"
    added = cli.json(*line.split(), "--cron", "0 3 * * *", "--header", "a=b", "--max-retries", "4")
    assert added["next_at"] % 86_400 in (3600, 7200)
    cli.run("schedule", "add", "ping", "-q", "checks", "--every", "30s")
    nightly, ping = cli.json("schedule", "ls")["schedules"]
    assert nightly == added
    assert (nightly["cron"], nightly["tz"], nightly["missed"], nightly["catch_up"]) == (
        "0 3 * * *", "Europe/Berlin", "all", 3,
    )  # fmt: skip
    assert (nightly["overlap"], nightly["headers"], nightly["max_retries"]) == (False, {"a": "b"}, 4)
    assert (ping["every"], ping["payload_bytes"]) == (30.0, 0)
    shown = cli.run("schedule", "ls").stdout
    assert all(part in shown for part in ("nightly", "0 3 * * * Europe/Berlin", "all, 3, no overlap", "every 30s"))
    assert cli.json("schedule", "rm", "ping", "--dry-run")["schedules"] == [{"name": "ping", "removed": True}]
    assert len(cli.json("schedule", "ls")["schedules"]) == 2
    told = cli.json("schedule", "rm", "ping", "nope", "--yes", code=1)["schedules"]
    assert [row["removed"] for row in told] == [True, False]
    assert [row["name"] for row in cli.json("schedule", "ls")["schedules"]] == ["nightly"]
    assert "--yes" in cli.run("schedule", "rm", "nightly", code=2).stderr
    cli.run("schedule", "rm", "nightly", "-y")
    assert "relay schedule add" in cli.run("schedule", "ls").stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cron", "99 * * * *"], "99 * * * *"),
        (["--every", "1ms"], "every"),
        (["--every", "soon"], "--every"),
        ([], "either"),
        (["--every", "5s", "--cron", "* * * * *"], "either"),
        (["--cron", "* * * * *", "--tz", "Nowhere"], "Nowhere"),
    ],
)
def test_what_cannot_be_a_schedule_is_bad_input(cli: Cli, options: list[str], said: str) -> None:
    assert said in cli.run("schedule", "add", "a", "-q", "q", *options, code=2).stderr
    assert cli.json("schedule", "ls")["schedules"] == []


def test_run_once_enqueues_what_is_due_and_ends(cli: Cli, broker: Broker) -> None:
    broker.schedule("a", "q", b"x", every=0.1)
    assert cli.json("schedule", "run", "--once")["enqueued"] == 0 or broker.stats("q").ready
    eventually(lambda: cli.json("schedule", "run", "--once")["enqueued"], "its first tick")
    assert broker.claim("q")[0].payload == b"x"


def test_each_tick_is_enqueued_once_by_processes_that_are_killed_all_the_time(
    server: Server, broker: Broker, tmp_path: Path
) -> None:
    begun = broker.schedule("a", "q", every=0.1, missed="all", catch_up=1000).next_at
    assert begun is not None
    first = round(begun * 1000)
    seen: list[str] = []
    processes = [spawn("schedule", "run", url=server.url, cwd=tmp_path) for _ in range(3)]
    try:
        for killed in range(6):
            wanted = len(seen) + 10
            while len(seen) < wanted:  # workers finish the jobs meanwhile
                jobs = broker.claim("q", count=50, wait=2.0)
                seen += [job.id for job in jobs]
                broker.ack_many(jobs)
            at = random.randrange(3)
            processes[at].kill()
            finished(processes[at])
            if killed < 5:
                processes[at] = spawn("schedule", "run", url=server.url, cwd=tmp_path)
    finally:
        for process in processes:
            process.kill()
            finished(process)
    seen += [job.id for job in broker.jobs("q", "ready", limit=10_000)]
    assert seen == [f"a@{first + 100 * n}" for n in range(len(seen))]
    assert len(seen) >= 60
    assert broker.audit("q").clean


def test_run_ends_at_sigterm_and_says_what_it_did(server: Server, broker: Broker, tmp_path: Path) -> None:
    broker.schedule("a", "q", every=0.1)
    process = spawn("schedule", "run", "--json", url=server.url, cwd=tmp_path)
    eventually(lambda: broker.stats("q").ready, "a job")
    process.send_signal(signal.SIGTERM)
    code, out, err = finished(process)
    assert (code, json.loads(out)["enqueued"]) == (0, broker.stats("q").ready), err
    assert "schedule a: job a@" in err


def test_a_worker_may_run_the_schedules_beside_its_jobs(server: Server, broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("def note(job):\n    open('ran', 'a').write(job.id + '\\n')\n")
    broker.schedule("a", "q", every=0.1)
    with working("handlers:note", "-q", "q", "--schedule", url=server.url, cwd=tmp_path) as stop:
        eventually(lambda: broker.stats("q").counters.get("processed", 0) >= 2, "two ticks are worked on")
        code, _out, err = stop()
    assert code == 0, err
    ran = (tmp_path / "ran").read_text().split()
    assert len(ran) == len(set(ran)) >= 2
