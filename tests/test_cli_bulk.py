"""`relay dlq` in bulk: filters, bounded batches, and runs that are killed and go on."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from relay_core import Broker, commands, hookimpl
from relay_core.cli import dlq, sift
from relay_core.errors import InvalidArgument
from relay_core.job import Job, JobSummary, StoredJob
from relay_core.keys import QueueKeys
from relay_core.plugins import Plugins
from tests.command_line import Cli, finished, spawn
from tests.servers import Server, eventually

Q = QueueKeys("relay", "mail")
MANY = 100_000
SOME = 40_000

# ARGV[1] dead jobs, every second one by a timeout; ARGV[2] of them die in each millisecond, the last one just now
FILL = """
local time = redis.call('TIME')
local now, count, per_ms = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[1]), tonumber(ARGV[2])
for n = 1, count do
  local id, died = string.format('x%06d', n), now - math.floor((count - n) / per_ms)
  redis.call('HSET', KEYS[1], id, string.format('%.0f 0 0 \\n', died) .. ARGV[3])
  redis.call('HSET', KEYS[2], id, '1:' .. n .. ':a 0 n')
  redis.call('HSET', KEYS[3], id, string.format('%.0f rejected\\n', died) .. (n % 2 == 0 and 'Timeout' or 'refused'))
  redis.call('ZADD', KEYS[4], died, id)
end
redis.call('HSET', KEYS[5], 'v', 1, 'levels', '0')
"""


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is mostly enough; what shows that the scripts work runs on both."""
    return str(request.param)


def fill(server: Server, count: int, *, per_ms: int = 7, payload: bytes = b"x") -> None:
    keys = (Q.jobs, Q.owners, Q.errors, Q.dead, Q.config)
    server.cli("EVAL", FILL, len(keys), *keys, count, per_ms, payload)


def depths(broker: Broker) -> tuple[int, int]:
    stats = broker.stats("mail")
    return stats.ready, stats.dead


@pytest.fixture
def small_replies(server: Server) -> Iterator[None]:
    """The server cuts off whoever asks for more than a page."""
    server.cli("CONFIG", "SET", "client-output-buffer-limit", "normal 1mb 0 0")
    yield
    server.cli("CONFIG", "SET", "client-output-buffer-limit", "normal 0 0 0")


class Naming:
    """Even ids are of the task `even`."""

    @hookimpl
    def relay_describe_job(self, job: Job | StoredJob) -> JobSummary:
        return JobSummary("even" if int(job.id[1:]) % 2 == 0 else "odd")


@pytest.fixture
def named_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_core.broker_base.Plugins", lambda plugins: Plugins([Naming()], installed=False))


@pytest.mark.usefixtures("small_replies")
def test_100_000_dead_jobs_are_picked_by_their_error_in_bounded_replies(
    server: Server, cli: Cli, broker: Broker
) -> None:
    fill(server, MANY)
    assert cli.json("dlq", "purge", "-q", "mail", "--error", "timeout", "--dry-run")["purged"] == MANY // 2
    assert depths(broker) == (0, MANY)
    assert cli.json("dlq", "requeue", "-q", "mail", "--error", "TIMEOUT")["requeued"] == MANY // 2
    assert depths(broker) == (MANY // 2, MANY // 2)
    assert cli.json("dlq", "purge", "-q", "mail", "--all", "--yes")["purged"] == MANY // 2
    assert depths(broker) == (MANY // 2, 0)
    assert broker.audit("mail", repair=False).clean
    assert server.cli("EXISTS", Q.bulk) == 0


@pytest.mark.usefixtures("named_tasks")
def test_large_payloads_are_read_a_few_at_a_time(server: Server, cli: Cli) -> None:
    fill(server, 100, payload=b"x" * 2**20)
    tracemalloc.start()
    try:
        assert len(cli.json("dlq", "ls", "-q", "mail", "--task", "even", "--limit", "1000")["jobs"]) == 50
        assert cli.json("dlq", "requeue", "-q", "mail", "--task", "even")["requeued"] == 50
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 2**20, "of 100 MiB that lie in the store"


@pytest.mark.usefixtures("named_tasks")
def test_payloads_larger_than_a_page_are_read_one_by_one(server: Server, cli: Cli) -> None:
    fill(server, 4, payload=b"x" * 5 * 2**20)
    assert len(cli.json("dlq", "ls", "-q", "mail", "--task", "even")["jobs"]) == 2


@pytest.mark.parametrize("size", [1, 199, 200, 201, 450])
def test_jobs_that_died_in_the_same_millisecond_are_all_met_once(
    server: Server, cli: Cli, broker: Broker, size: int
) -> None:
    fill(server, size, per_ms=1000)
    listed = cli.json("dlq", "ls", "-q", "mail", "--limit", "1000")
    assert [job["id"] for job in listed["jobs"]] == [f"x{n:06}" for n in range(1, size + 1)]
    assert cli.json("dlq", "requeue", "-q", "mail", "--all")["requeued"] == size
    assert depths(broker) == (size, 0)


@pytest.mark.parametrize("flavour", ["valkey", "redis"], indirect=True)
def test_ids_are_passed_in_the_order_of_their_bytes(server: Server, broker: Broker) -> None:
    ids = ["B", "a", "A", "ab", "_", "!", "~", "Z", "b", "aB", "-", "1", "10", "2"]
    server.cli("ZADD", Q.dead, *(word for id in ids for word in ("5", id)))
    for first, *rest in (sorted(ids)[at:] for at in range(len(ids))):
        _left, rows = broker.store.run(commands.scan(Q, (5, first), 5, 200, records=False))
        assert [job.id for job, _died in rows] == rest


def test_since_is_a_duration_or_a_moment(cli: Cli, broker: Broker, server: Server) -> None:
    fill(server, 10, per_ms=1)
    times = [int(score) for score in server.cli("ZRANGE", Q.dead, 0, -1, "WITHSCORES")[1::2]]
    server.cli("ZADD", Q.dead, times[0] - 3 * 3_600_000, "x000001", times[1] - 3_600_000, "x000002")
    assert cli.json("dlq", "requeue", "-q", "mail", "--since", "2h", "--dry-run")["requeued"] == 9
    assert cli.json("dlq", "requeue", "-q", "mail", "--since", "30m", "--dry-run")["requeued"] == 8
    moment = datetime.fromtimestamp(times[7] / 1000, timezone.utc).isoformat()
    assert [job["id"] for job in cli.json("dlq", "ls", "-q", "mail", "--since", moment)["jobs"]] == [
        "x000008", "x000009", "x000010",
    ]  # fmt: skip
    assert cli.json("dlq", "purge", "-q", "mail", "--since", str(times[7] / 1000), "--yes")["purged"] == 3
    assert depths(broker) == (0, 7)
    for nonsense in ("yesterday", "-5", "-2h"):
        result = cli.run("dlq", "ls", "-q", "mail", "--since", nonsense, code=2)
        assert "--since" in result.stderr
        assert "2h" in result.stderr


def test_a_queue_whose_name_is_mistyped_is_not_taken_for_an_empty_one(server: Server, cli: Cli) -> None:
    fill(server, 1)
    server.cli("SADD", "relay:queues", "mail")
    for command in ("dlq ls", "dlq requeue --all", "dlq purge --error x --yes", "dlq purge --all --dry-run", "job ls"):
        told = cli.run(*command.split(), "-q", "mial", code=1).stderr
        assert "queue 'mial': nothing was ever enqueued to it; did you mean 'mail'?" in told


@pytest.mark.parametrize("flavour", ["valkey", "redis"], indirect=True)
def test_a_limit_goes_with_every_filter(server: Server, cli: Cli, broker: Broker) -> None:
    fill(server, 1000)
    assert cli.json("dlq", "purge", "-q", "mail", "--error", "timeout", "--limit", "201", "--yes")["purged"] == 201
    assert cli.json("dlq", "requeue", "-q", "mail", "--all", "--limit", "250")["requeued"] == 250
    assert depths(broker) == (250, 1000 - 201 - 250)
    assert cli.json("dlq", "purge", "-q", "mail", "--all", "--limit", "7", "--dry-run")["purged"] == 7
    assert "--limit" in cli.run("dlq", "requeue", "x000001", "-q", "mail", "--limit", "1", code=2).stderr


def killed(server: Server, broker: Broker, folder: Path, *args: str) -> int:
    """Start a command, SIGKILL it when it has moved some batches: how many jobs it moved."""
    before = depths(broker)[1]
    process = spawn("dlq", *args, url=server.url, cwd=folder)
    eventually(lambda: depths(broker)[1] < before - 1000, "it is on its way")
    process.kill()
    finished(process)
    return before - depths(broker)[1]


@pytest.mark.parametrize(("verb", "yes"), [("requeue", []), ("purge", ["--yes"])])
def test_a_killed_run_goes_on_where_it_stopped(
    server: Server, cli: Cli, broker: Broker, tmp_path: Path, verb: str, yes: list[str]
) -> None:
    fill(server, SOME)
    args = (verb, "-q", "mail", "--error", "timeout", *yes)
    moved = killed(server, broker, tmp_path, *args)
    assert moved < SOME // 2, "it was killed before its end"
    noted = cli.run("dlq", verb, "-q", "mail", "--error", "timeout", "--dry-run").stderr
    assert "--resume" in noted, "a run that does not go on says that it could"
    result = cli.run("dlq", *args, "--resume", "--json")
    assert "Going on with a run" in result.stderr
    told = json.loads(result.stdout)
    assert told[f"{verb}d"] == SOME // 2 - moved
    # a batch may have been done and not noted
    assert told["looked_at"] <= SOME - 2 * moved + 200
    assert depths(broker) == (SOME // 2 if verb == "requeue" else 0, SOME // 2)
    assert server.cli("EXISTS", Q.bulk) == 0, "a run that came to its end leaves nothing behind"
    assert broker.audit("mail", repair=False).clean


def test_a_killed_run_never_exceeds_its_limit(server: Server, cli: Cli, broker: Broker, tmp_path: Path) -> None:
    fill(server, SOME)
    limit = SOME // 2
    moved = killed(server, broker, tmp_path, "requeue", "-q", "mail", "--all", "--limit", str(limit))
    told = cli.json("dlq", "requeue", "-q", "mail", "--all", "--limit", str(limit), "--resume")
    assert moved <= told["before"] <= moved + 200
    assert limit - 200 <= depths(broker)[0] <= limit


def test_a_batch_that_was_moved_and_not_noted_counts_for_the_limit(
    server: Server, cli: Cli, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server, 1000)
    move, batches = dlq._move, []

    def dying(*args: Any) -> int:
        batches.append(move(*args))
        if len(batches) == 2:
            raise InvalidArgument("the process ends here")
        return batches[-1]

    monkeypatch.setattr(dlq, "_move", dying)
    cli.run("dlq", "requeue", "-q", "mail", "--all", "--limit", "300", code=2)
    assert depths(broker) == (300, 700)
    told = cli.json("dlq", "requeue", "-q", "mail", "--all", "--limit", "300", "--resume")
    assert (told["requeued"], told["before"]) == (0, 300)
    assert depths(broker) == (300, 700)


def test_the_place_of_a_run_that_was_given_up_is_forgotten(
    server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server, 10)
    old = '{"at": [1, "a"], "done": 3, "began": 1.0}'
    server.cli("HSET", Q.bulk, '["requeued", null, null, null]', old, '["purged", null, "x", null]', old)
    result = cli.run("dlq", "requeue", "-q", "mail", "--all", "--resume")
    assert "Going on" not in result.stderr
    assert server.cli("EXISTS", Q.bulk) == 0


def test_a_run_goes_over_dead_jobs_while_others_add_and_remove(server: Server, cli: Cli, broker: Broker) -> None:
    fill(server, 20_000)
    stop = threading.Event()
    added: list[str] = []

    def others() -> None:
        with Broker(server.url) as mine:
            while not stop.is_set():
                ids = [job.id for job in mine.dead("mail", 3)]
                mine.requeue("mail", ids[:1])
                mine.store.run(commands.drop(Q, ids[2:]))
                mine.enqueue("mail", b"new", priority=9)
                for job in mine.claim("mail"):
                    mine.nack(job, "refused", dead=True)
                    added.append(job.id)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        eventually(lambda: added, "others are at it")
        cli.run("dlq", "requeue", "-q", "mail", "--error", "timeout")
    finally:
        stop.set()
        thread.join()
    left = broker.dead("mail", 100_000)
    assert not [job.id for job in left if job.error == "Timeout"]
    assert broker.audit("mail", repair=False).clean


@pytest.mark.parametrize("flavour", ["valkey", "redis"], indirect=True)
def test_a_purge_leaves_a_job_that_was_requeued_in_the_meantime(
    server: Server, cli: Cli, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server, 3)
    read = sift.pages

    def too_late(*args: Any, **options: Any) -> Iterator[sift.Page]:
        for page in read(*args, **options):
            broker.requeue("mail", ["x000002"])
            yield page

    monkeypatch.setattr(sift, "pages", too_late)
    assert cli.json("dlq", "purge", "-q", "mail", "--all", "--yes")["purged"] == 2
    assert depths(broker) == (1, 0)
    assert broker.stats("mail").counters["purged"] == 2


def test_dead_jobs_are_purged_when_memory_is_full(server: Server, cli: Cli) -> None:
    fill(server, 1000)
    server.cli("CONFIG", "SET", "maxmemory", "1")
    assert cli.json("--timeout", "0.1", "dlq", "purge", "-q", "mail", "--error", "timeout", "--yes")["purged"] == 500
    assert cli.json("--timeout", "0.1", "dlq", "purge", "-q", "mail", "--all", "--yes")["purged"] == 500


def test_a_run_that_ends_by_an_error_says_how_to_go_on(
    server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server, 1000)
    drop, calls = commands.drop, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            server.cli("SCRIPT", "FLUSH")
            server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            server.cli("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        return drop(*args)

    monkeypatch.setattr(commands, "drop", failing)
    result = cli.run("dlq", "purge", "-q", "mail", "--all", "--yes", code=1)
    assert "maxmemory-policy" in result.stderr
    assert "400 purged; the same command with --resume goes on" in result.stderr
    server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
    monkeypatch.setattr(commands, "drop", drop)
    assert cli.json("dlq", "purge", "-q", "mail", "--all", "--yes", "--resume")["purged"] == 600
