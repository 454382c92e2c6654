"""`relay job`, `relay dlq`, `relay queue` and `relay stats` do to the store what they say, and only that."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from relay_core import Broker, hookimpl
from relay_core.job import Job, JobSummary, StoredJob
from relay_core.plugins import Plugins
from tests.command_line import Cli


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: the scripts have tests of their own on both."""
    return str(request.param)


def bury(broker: Broker, *payloads: bytes, error: str = "no luck", queue: str = "mail") -> list[str]:
    """Dead jobs: their ids."""
    broker.enqueue_many(queue, payloads)
    jobs = broker.claim(queue, count=len(payloads))
    for job in jobs:
        broker.nack(job, error, dead=True)
    return [job.id for job in jobs]


# --- enqueue


def test_an_enqueued_job_carries_all_that_was_asked(cli: Cli, broker: Broker) -> None:
    line = "job enqueue héllo -q mail --priority 7 --id mine --dedup-key k --dedup-for 1h --max-retries 2"
    more = "--max-deliveries 3 --header lang=fr --header a=b=c --delay 0"
    assert cli.run(*line.split(), *more.split()).stdout == "mine\n"
    (job,) = broker.claim("mail")
    assert (job.id, job.payload, job.priority) == ("mine", "héllo".encode(), 7)
    assert job.headers == {"lang": "fr", "a": "b=c"}
    assert job.options.dedup_key == "k"
    assert job.options.dedup_ms == 3_600_000
    assert (job.options.max_retries, job.options.max_deliveries) == (2, 3)


def test_a_payload_comes_from_stdin_or_a_file_byte_by_byte(cli: Cli, broker: Broker, tmp_path: Path) -> None:
    body = bytes(range(256)) + b"\r\n"
    path = tmp_path / "body"
    path.write_bytes(body)
    cli.run("job", "enqueue", f"@{path}", "-q", "mail")
    cli.run("job", "enqueue", "-", "-q", "mail", input=body)
    assert [job.payload for job in broker.claim("mail", count=2)] == [body, body]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("500ms", 0.5), ("5m", 300), ("2h", 7200), ("7d", 604800)]
)
def test_a_delay_may_have_a_unit(cli: Cli, text: str, seconds: float) -> None:
    id = cli.json("job", "enqueue", "x", "-q", "mail", "--delay", text)["id"]
    job = cli.json("job", "show", id, "-q", "mail")
    assert job["state"] == "delayed"
    assert job["due_at"] - job["created_at"] == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["2040-01-31T09:00:00+01:00", "2040-01-31T08:00:00Z", "2211609600"])
def test_a_moment_is_iso_or_unix_seconds(cli: Cli, text: str) -> None:
    id = cli.json("job", "enqueue", "x", "-q", "mail", "--at", text)["id"]
    due = cli.json("job", "show", id, "-q", "mail")["due_at"]
    assert datetime.fromtimestamp(due, timezone.utc) == datetime(2040, 1, 31, 8, tzinfo=timezone.utc)


def test_a_duplicate_is_told_with_the_id_of_the_first(cli: Cli) -> None:
    first = cli.json("job", "enqueue", "x", "-q", "mail", "--dedup-key", "k")
    second = cli.json("job", "enqueue", "y", "-q", "mail", "--dedup-key", "k")
    assert second == {"id": first["id"], "queue": "mail", "duplicate": True}
    assert first["id"] in cli.run("job", "enqueue", "y", "-q", "mail", "--dedup-key", "k").stderr


# --- ls and show


def test_jobs_of_every_state_are_listed_and_a_state_can_be_picked(cli: Cli, broker: Broker) -> None:
    (dead,) = bury(broker, b"bad")
    running = broker.enqueue("mail", b"run").id
    broker.claim("mail")
    ready, later = broker.enqueue("mail", b"now").id, broker.enqueue("mail", b"later", delay=60).id
    states = {job["id"]: job["state"] for job in cli.json("job", "ls", "-q", "mail")["jobs"]}
    assert states == {ready: "ready", later: "delayed", running: "inflight", dead: "dead"}
    picked = cli.json("job", "ls", "-q", "mail", "--state", "delayed", "--state", "dead")["jobs"]
    assert {job["id"] for job in picked} == {later, dead}
    shown = cli.run("job", "ls", "-q", "mail").stdout
    assert all(id in shown for id in states), "no id is cut"


def test_a_list_that_was_cut_says_so(cli: Cli, broker: Broker) -> None:
    broker.enqueue_many("mail", [b"x"] * 5)
    assert cli.json("job", "ls", "-q", "mail", "--limit", "4")["more"] is True
    assert cli.json("job", "ls", "-q", "mail", "--limit", "5")["more"] is False
    assert "--limit" in cli.run("job", "ls", "-q", "mail", "--limit", "4").stderr


def test_a_job_is_shown_with_its_failure_and_its_headers(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b'{"to": 1}', id="j1", headers={"lang": "fr"})
    broker.nack(broker.claim("mail")[0], "smtp is down", delay=60)
    job = cli.json("job", "show", "j1", "-q", "mail")
    assert job["state"] == "delayed"
    assert job["payload"] == '{"to": 1}'
    assert job["payload_base64"] is None
    assert job["error"] == "smtp is down"
    assert job["headers"] == {"lang": "fr"}
    assert (job["deliveries"], job["retries"]) == (1, 1)
    shown = cli.run("job", "show", "j1", "-q", "mail").stdout
    assert all(part in shown for part in ("j1", "delayed", "smtp is down", "lang=fr", '"to": 1'))


def test_a_payload_that_is_no_text_is_shown_safely_and_raw_is_exact(cli: Cli, broker: Broker) -> None:
    body = b"\xff\x00\x1b[31m"
    broker.enqueue("mail", body, id="j1")
    assert cli.json("job", "show", "j1", "-q", "mail")["payload_base64"] == "/wAbWzMxbQ=="
    assert "ff 00 1b" in cli.run("job", "show", "j1", "-q", "mail").stdout
    assert cli.run("job", "show", "j1", "-q", "mail", "--raw").stdout_bytes == body


def test_text_of_others_cannot_steer_the_terminal(cli: Cli, broker: Broker) -> None:
    (id,) = bury(broker, b"\x1b[2J [bold]hi[/bold]", error="\x1b]0;title\x07", queue="q\x1b[1m")
    for line in (["job", "ls"], ["dlq", "show", id], ["job", "show", id]):
        shown = cli.run(*line, "-q", "q\x1b[1m").stdout
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert "[bold]hi" in shown
    assert "\x1b" not in cli.run("stats").stdout


class Describer:
    """Reads payloads such as `send:5` as the task's name and argument, and undoes an encoding."""

    @hookimpl
    def relay_describe_job(self, job: Job | StoredJob) -> JobSummary:
        name, _, args = job.payload.decode().partition(":")
        return JobSummary(name, args=args, extra={"unit": "test"})

    @hookimpl
    def relay_decode_payload(self, payload: bytes, queue: str) -> bytes:
        return payload.removeprefix(b"wrapped ")


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line with a plugin that knows the payloads."""
    monkeypatch.setattr("relay_core.broker_base.Plugins", lambda _plugins: Plugins([Describer()], installed=False))


@pytest.mark.usefixtures("described")
def test_jobs_are_decoded_and_described_by_plugins(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b"wrapped send:5", id="j1")
    job = cli.json("job", "show", "j1", "-q", "mail")
    assert job["payload"] == "send:5"
    assert job["task"] == "send"
    assert job["summary"]["args"] == "5"
    assert job["summary"]["extra"] == {"unit": "test"}
    assert "send 5" in cli.run("job", "ls", "-q", "mail").stdout


@pytest.mark.usefixtures("described")
def test_dead_jobs_are_picked_by_task_and_by_error(cli: Cli, broker: Broker) -> None:
    bury(broker, b"send:1", b"fetch:1", error="Timeout after 5 s")
    bury(broker, b"send:2", error="refused")
    listed = cli.json("dlq", "ls", "-q", "mail", "--task", "send", "--error", "timeout")["jobs"]
    assert [(job["task"], job["error"]) for job in listed] == [("send", "Timeout after 5 s")]
    assert cli.json("dlq", "requeue", "-q", "mail", "--task", "send", "--dry-run")["requeued"] == 2
    assert cli.json("dlq", "requeue", "-q", "mail", "--all", "--task", "send", "--limit", "1")["requeued"] == 1
    assert [job.payload for job in broker.claim("mail", count=9)] == [b"send:1"]
    assert cli.json("dlq", "purge", "-q", "mail", "--error", "REFUSED", "--yes")["purged"] == 1
    assert [job.payload for job in broker.dead("mail")] == [b"fetch:1"]


# --- dlq


def test_requeue_by_id_moves_these_and_tells_of_those_that_are_not_dead(cli: Cli, broker: Broker) -> None:
    one, two, three = bury(broker, b"1", b"2", b"3")
    told = cli.json("dlq", "requeue", one, three, "nope", "-q", "mail", code=1)
    assert (told["requeued"], told["not_dead"]) == (2, 1)
    assert [job.id for job in broker.dead("mail")] == [two]
    assert broker.stats("mail").ready == 2


def test_requeue_all_stops_at_its_limit(cli: Cli, broker: Broker) -> None:
    bury(broker, *(b"%d" % i for i in range(5)))
    dead = [job.id for job in broker.dead("mail")]
    assert cli.json("dlq", "requeue", "--all", "-q", "mail", "--limit", "3")["requeued"] == 3
    assert [job.id for job in broker.dead("mail")] == dead[3:]


def test_requeue_dry_run_changes_nothing(cli: Cli, broker: Broker) -> None:
    one, _two = bury(broker, b"1", b"2")
    assert cli.json("dlq", "requeue", "--all", "-q", "mail", "--dry-run")["requeued"] == 2
    assert cli.json("dlq", "requeue", one, "-q", "mail", "--dry-run")["requeued"] == 1
    assert broker.stats("mail").dead == 2


def test_purge_of_dead_jobs_by_id_leaves_what_is_not_dead(cli: Cli, broker: Broker) -> None:
    one, two = bury(broker, b"1", b"2")
    ready = broker.enqueue("mail", b"3").id
    told = cli.json("dlq", "purge", one, ready, "-q", "mail", "--yes", code=1)
    assert (told["purged"], told["not_dead"]) == (1, 1)
    assert [job.id for job in broker.dead("mail")] == [two]
    assert broker.stats("mail").ready == 1


def test_dlq_show_refuses_a_job_that_is_not_dead(cli: Cli, broker: Broker) -> None:
    id = broker.enqueue("mail", b"x").id
    assert "is ready, not dead" in cli.run("dlq", "show", id, "-q", "mail", code=1).stderr


# --- what destroys


def test_without_yes_and_without_a_terminal_nothing_is_destroyed(cli: Cli, broker: Broker) -> None:
    (dead,) = bury(broker, b"1")
    ready = broker.enqueue("mail", b"2").id
    for line in (
        ["queue", "purge", "mail"],
        ["dlq", "purge", "--all", "-q", "mail"],
        ["dlq", "purge", dead, "-q", "mail"],
        ["job", "cancel", ready, "-q", "mail"],
    ):
        assert "--yes" in cli.run(*line, code=2).stderr
    assert (broker.stats("mail").dead, broker.stats("mail").ready) == (1, 1)


def test_dry_runs_tell_what_would_go_and_leave_it(cli: Cli, broker: Broker) -> None:
    bury(broker, b"1")
    ready = broker.enqueue("mail", b"2").id
    broker.enqueue("mail", b"3", delay=60)
    assert cli.json("queue", "purge", "mail", "--dry-run")["purged"] == 2
    assert cli.json("queue", "purge", "mail", "--state", "dead", "--dry-run")["purged"] == 1
    assert cli.json("dlq", "purge", "--all", "-q", "mail", "--dry-run")["purged"] == 1
    told = cli.json("job", "cancel", ready, "-q", "mail", "--dry-run")["jobs"]
    assert told == [{"id": ready, "state": "ready", "cancelled": False}]
    stats = broker.stats("mail")
    assert (stats.ready, stats.delayed, stats.dead) == (1, 1, 1)


def test_purge_drops_ready_and_delayed_jobs_and_leaves_the_others(cli: Cli, broker: Broker) -> None:
    bury(broker, b"1")
    broker.enqueue("mail", b"2")
    broker.claim("mail")
    broker.enqueue_many("mail", [b"x"] * 450)
    broker.enqueue("mail", b"3", delay=60)
    assert cli.json("queue", "purge", "mail", "--yes")["purged"] == 451
    stats = broker.stats("mail")
    assert (stats.ready, stats.delayed, stats.inflight, stats.dead) == (0, 0, 1, 1)
    assert cli.json("queue", "purge", "mail", "--state", "dead", "-y")["purged"] == 1
    assert broker.audit("mail").clean


def test_cancel_takes_out_what_waits_and_leaves_what_runs(cli: Cli, broker: Broker) -> None:
    running = broker.enqueue("mail", b"1").id
    broker.claim("mail")
    waiting = broker.enqueue("mail", b"2").id
    result = cli.run("job", "cancel", waiting, running, "nope", "-q", "mail", "--yes", code=1)
    assert f"job {waiting} of queue 'mail': cancelled" in result.stdout
    assert f"job {running} of queue 'mail': is running" in result.stderr
    assert "job nope of queue 'mail': is not there" in result.stderr
    stats = broker.stats("mail")
    assert (stats.ready, stats.inflight) == (0, 1)
    again = broker.enqueue("mail", b"3").id
    assert cli.json("job", "cancel", again, "-q", "mail", "--yes")["jobs"][0]["cancelled"] is True


# --- queues


def test_a_pause_holds_claims_back_until_it_is_ended(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b"x")
    cli.run("queue", "pause", "mail")
    assert broker.claim("mail").limited == "paused"
    assert "paused" in cli.run("queue", "ls").stdout
    cli.run("queue", "resume", "mail")
    assert len(broker.claim("mail")) == 1


def test_a_pause_of_an_unknown_queue_works_and_is_noted(cli: Cli, broker: Broker) -> None:
    assert "nothing was ever enqueued to queue 'early'." in cli.run("queue", "pause", "early").stderr
    broker.enqueue("early", b"x")
    assert "queue 'eraly'; did you mean 'early'?" in cli.run("queue", "pause", "eraly").stderr
    assert broker.claim("early").limited == "paused"
    assert cli.run("queue", "resume", "early").stderr == ""


def test_limits_that_are_not_named_stay(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b"x")
    for line, limits in (
        ("--rate 90/m", {"rate": 1.5, "burst": 2, "max_inflight": None}),
        ("--max-inflight 7", {"rate": 1.5, "burst": 2, "max_inflight": 7}),
        ("--burst 9", {"rate": 1.5, "burst": 9, "max_inflight": 7}),
        ("--rate 20", {"rate": 20, "burst": 20, "max_inflight": 7}),
        ("", {"rate": 20, "burst": 20, "max_inflight": 7}),
        ("--none", {"rate": None, "burst": None, "max_inflight": None}),
    ):
        assert cli.json("queue", "limit", "mail", *line.split())["limits"] == limits
    cli.run("queue", "limit", "mail", "--max-inflight", "1")
    broker.enqueue("mail", b"y")
    assert len(broker.claim("mail", count=2)) == 1


def test_stats_tell_depths_levels_ages_and_counters(cli: Cli, broker: Broker) -> None:
    bury(broker, b"1")
    broker.enqueue("mail", b"2", priority=9)
    broker.enqueue("mail", b"3")
    broker.enqueue("mail", b"4", delay=60)
    (stats,) = cli.json("stats", "mail")["queues"]
    assert (stats["ready"], stats["delayed"], stats["inflight"], stats["dead"]) == (2, 1, 0, 1)
    assert stats["ready_by_level"] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert 0 <= stats["oldest_age"] < 30
    assert 30 < stats["next_due_in"] <= 60
    assert stats["counters"]["enqueued"] == 4
    assert abs(stats["at"] - time.time()) < 30
    shown = cli.run("stats").stdout
    assert "2 (9:1 0:1)" in shown
    assert cli.json("stats")["queues"][0]["queue"] == "mail"


def test_bulk_work_keeps_stdout_to_its_answer(cli: Cli, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_core.cli.output._REPORT_EVERY", 0.0)
    broker.enqueue_many("mail", [b"x"] * 500)
    result = cli.run("queue", "purge", "mail", "--yes", "--json")
    assert json.loads(result.stdout)["purged"] == 500
    assert "purged: 500 of 500" in result.stderr
