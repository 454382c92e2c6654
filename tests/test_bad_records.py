"""Records that no relay has written end alone: every kind of worker, view and tool goes on beside them."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker, Job, RetryPolicy
from relay_core.errors import InvalidRecord
from relay_core.job import Options, Record
from relay_core.worker import Worker
from tests.command_line import Cli, finished, spawn
from tests.hostile import ODD, SPOILED, put, put_strays
from tests.servers import Server, eventually

RETRY = RetryPolicy(base=0.0, max_retries=2)


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry=RETRY, retry_for=2.0) as broker:
        yield broker


def settled(broker: Broker, queue: str, spoiled: dict[str, str]) -> None:
    """All that was put there has ended: the spoiled in the dead letters, each with a reason and an error that says
    what is wrong, and the rest ran."""
    assert broker.stats(queue).pending == 0
    found = broker.dead(queue, limit=1000)
    assert {job.id: spoiled[job.id] for job in found} == spoiled
    assert all(job.reason == "undecodable" for job in found)
    for job in found:
        assert "does not decode: " in str(job.error), spoiled[job.id]
        assert job.deliveries == 1, spoiled[job.id]


@pytest.mark.parametrize("name", SPOILED)
def test_a_record_that_cannot_be_read_is_refused_where_it_is_read(name: str) -> None:
    with pytest.raises(InvalidRecord, match=r"does not decode: .{10,}"):
        Record.unpack(SPOILED[name])


@pytest.mark.parametrize("name", ODD)
def test_a_record_that_is_only_odd_is_read_as_what_it_says(name: str) -> None:
    record = Record.unpack(ODD[name])
    assert record.payload == b"odd"
    again = record.options.to_json()  # as a retry with another payload stores it
    assert Options.from_json(again).to_json() == again


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("retry base below zero", "retry base must be a number of at least 0.0, got '-1'"),
        ("max_retries -5", "option max_retries must be a whole number from 0 to 1000000, got -5"),
        ("headers of numbers", 'option headers must be texts by their names, got {"relay_adapter":7}'),
        ("dedup_key half a pair", r'option dedup_key must be a text, got "\\ud800"'),
        ("options a list", "options are a list"),
        ("priority 42", "its first line is not `<created ms> <priority 0..9>"),
        ("created no number", "created at b'soon'"),
        ("max deliveries over the bound", "max deliveries must be at most 1000000, got 1000001"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(name: str, said: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        Record.unpack(SPOILED[name])
    assert said.replace("\\\\", "\\") in str(caught.value)


# --- a claim


@pytest.mark.parametrize("name", [*SPOILED, *ODD])
@pytest.mark.parametrize("count", [1, 10], ids=["one", "many"])
def test_a_claim_passes_over_what_is_spoiled_and_gives_the_rest(name: str, count: int, broker: Broker) -> None:
    named = put(broker, "mail", {name: {**SPOILED, **ODD}[name]})
    ran: list[bytes] = []
    for _ in range(10):
        for job in broker.claim("mail", count=count):
            ran.append(job.payload)
            assert job.ready_at >= 0
            assert job.age() >= 0
            broker.ack(job)
    spoiled = named if name in SPOILED else {}
    assert sorted(ran) == sorted([b"good-0", b"good-1"] + [b"odd"] * (not spoiled))
    settled(broker, "mail", spoiled)
    assert broker.audit("mail").clean


@pytest.mark.parametrize("name", ODD)
def test_an_odd_record_fails_retries_and_dies_as_any_other(name: str, broker: Broker) -> None:
    put(broker, "mail", {name: ODD[name]})
    deaths = 0
    for _ in range(20):
        for job in broker.claim("mail", count=10):
            if job.payload == b"odd":
                broker.nack(job, "failed", 0.0, payload=b"odd")
                deaths += 1
            else:
                broker.ack(job)
    assert 1 <= deaths <= 21
    assert broker.stats("mail").pending == 0 or deaths == 20  # `retry: {}` and the like leave 20 retries to the broker
    assert {job.reason for job in broker.dead("mail")} <= {"max_retries"}


def test_an_async_claim_passes_over_them_all(broker: Broker, server: Server) -> None:
    named = put(broker, "mail", {**SPOILED, **ODD})
    put_strays(broker, "mail")

    async def run() -> Counter[bytes]:
        ran: Counter[bytes] = Counter()
        async with AsyncBroker(server.url) as claiming:
            while (await claiming.stats("mail")).pending:
                for job in await claiming.claim("mail", count=7):
                    ran[job.payload] += 1
                    await claiming.ack(job)
        return ran

    check(asyncio.run(run()), broker, named)


def check(ran: Counter[bytes], broker: Broker, named: dict[str, str]) -> None:
    """All records and strays were put into `mail`, and ran."""
    good = {b"good-%d" % n: 1 for n in range(len(named) + 1)}
    assert ran == {**good, b"odd": len(ODD), b"stray": 1}
    settled_without_strays(broker, named)


def settled_without_strays(broker: Broker, named: dict[str, str]) -> None:
    broker.audit("mail")
    assert broker.audit("mail").clean
    settled(broker, "mail", {id: name for id, name in named.items() if name in SPOILED})


# --- workers


class Ledger:
    """A handler that notes what runs."""

    def __init__(self) -> None:
        self.ran: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def __call__(self, job: Job) -> None:
        with self._lock:
            self.ran[job.payload] += 1


@pytest.mark.parametrize("kind", ["threads", "loop"])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_worker_outlives_them_all(kind: str, concurrency: int, broker: Broker) -> None:
    named = put(broker, "mail", {**SPOILED, **ODD})
    put_strays(broker, "mail")
    ledger = Ledger()

    async def later(job: Job) -> None:
        ledger(job)

    worker = Worker(broker, ledger if kind == "threads" else later, ["mail"], concurrency=concurrency)
    errors: list[BaseException] = []
    thread = threading.Thread(target=lambda: _caught(worker.run, errors))
    thread.start()
    try:
        eventually(lambda: bool(errors) or sum(ledger.ran.values()) > len(named) + len(ODD) + 1, "all that can be run")
        eventually(lambda: bool(errors) or not broker.stats("mail").pending, "all that is in hand")
    finally:
        worker.stop()
        thread.join(30)
    assert not errors
    check(ledger.ran, broker, named)


def _caught(run: Callable[[], Any], errors: list[BaseException]) -> None:
    try:
        run()
    except BaseException as error:
        errors.append(error)


@pytest.mark.parametrize("kind", ["threads", "loop"])
def test_a_worker_whose_handler_fails_outlives_them_all(kind: str, broker: Broker, caplog: Any) -> None:
    """What is asked of a record only once its job has failed: its policy, its retries, its dedup key."""
    caplog.set_level(logging.CRITICAL, "relay.worker")
    named = put(broker, "mail", {**SPOILED, **ODD})
    runs: Counter[bytes] = Counter()

    def fail(job: Job) -> None:
        runs[job.payload] += 1
        if job.payload == b"odd":
            raise ValueError("odd")

    async def fail_later(job: Job) -> None:
        fail(job)

    worker = Worker(broker, fail if kind == "threads" else fail_later, ["mail"])
    errors: list[BaseException] = []
    thread = threading.Thread(target=lambda: _caught(worker.run, errors))
    thread.start()
    try:
        # two of them bring a policy of their own, by which they wait for their next try
        eventually(
            lambda: bool(errors) or (len(broker.dead("mail", limit=1000)) >= len(named) - 2 and _calm(broker)),
            "the end of all others",
        )
    finally:
        worker.stop()
        thread.join(30)
    assert not errors
    assert all(runs[b"good-%d" % n] == 1 for n in range(len(named) + 1))
    reasons = {named[job.id]: job.reason for job in broker.dead("mail", limit=1000)}
    assert {name: reason for name, reason in reasons.items() if name in SPOILED} == dict.fromkeys(
        SPOILED, "undecodable"
    )
    assert {reason for name, reason in reasons.items() if name in ODD} == {"max_retries"}
    assert runs[b"odd"] <= 3 * len(ODD) + 40


def _calm(broker: Broker) -> bool:
    stats = broker.stats("mail")
    return stats.ready + stats.inflight == 0


def test_the_relay_worker_command_outlives_them_all(broker: Broker, server: Server, tmp_path: Path) -> None:
    named = put(broker, "mail", {**SPOILED, **ODD})
    put_strays(broker, "mail")
    module = "def handle(job):\n    with open('ran', 'ab', 0) as file:\n        file.write(job.payload + b'\\n')\n"
    (tmp_path / "noting.py").write_text(module)
    worker = spawn("worker", "noting:handle", "--queue", "mail", "--concurrency", "2", url=server.url, cwd=tmp_path)
    try:
        eventually(
            lambda: worker.poll() is not None or not broker.stats("mail").pending, "all that is in the queue", 30
        )
    finally:
        worker.terminate()
        code, _out, said = finished(worker)
    assert code == 0, said
    assert "Traceback" not in said
    ran = Counter((tmp_path / "ran").read_bytes().splitlines())
    check(ran, broker, named)


# --- views and tools


@pytest.fixture
def everywhere(broker: Broker) -> dict[str, str]:
    """All records in `mail`: ready, and the half of them dead."""
    named = put(broker, "mail", {**SPOILED, **ODD})
    q = broker.settings.keys("mail")
    for id in list(named)[::2]:
        broker.store.raw("LREM", q.ready[0], 1, id)
        broker.store.raw("ZADD", q.dead, 1_700_000_000_000, id)
        broker.store.raw("HSET", q.errors, id, b"\xff soon\n\xff")
        broker.store.raw("HSET", q.owners, id, b"x:\xff")
    put_strays(broker, "mail")
    return named


def test_views_show_them_all(everywhere: dict[str, str], broker: Broker) -> None:
    assert {job.id for job in broker.jobs("mail", "ready", limit=1000)} >= set(list(everywhere)[1::2])
    assert {job.id for job in broker.dead("mail", limit=1000)} >= set(list(everywhere)[::2])
    for id, name in everywhere.items():
        job = broker.show("mail", id)
        assert job is not None
        assert job.payload == (b"odd" if name in ODD else SPOILED[name])
    broker.stats("mail")


def test_the_command_line_shows_moves_and_mends_them_all(
    everywhere: dict[str, str], broker: Broker, server: Server
) -> None:
    cli = Cli(server.url)
    for state in ("ready", "dead", "delayed", "inflight"):
        cli.run("job", "ls", "--queue", "mail", "--state", state, "--limit", "1000")
        cli.json("job", "ls", "--queue", "mail", "--state", state, "--limit", "1000")
    for id in everywhere:
        cli.run("job", "show", id, "--queue", "mail")
        assert cli.json("job", "show", id, "--queue", "mail")["id"] == id
    cli.run("stats")
    cli.json("stats")
    cli.run("dlq", "ls", "--queue", "mail", "--limit", "1000")
    cli.run("dlq", "ls", "--queue", "mail", "--task", "x")
    cli.run("audit", "mail", code=1)
    cli.run("audit", "mail")
    cli.run("dlq", "requeue", "--queue", "mail", "--all", "--yes")
    assert broker.dead("mail") == []


def test_spoiled_jobs_are_requeued_cancelled_and_purged(everywhere: dict[str, str], broker: Broker) -> None:
    broker.audit("mail")
    dead = [job.id for job in broker.dead("mail", limit=1000)]
    assert broker.requeue("mail") == len(dead)
    assert broker.cancel_many("mail", dead[:10]) == ["ready"] * 10
    ready = broker.stats("mail").ready
    assert broker.purge("mail", ["ready"]) == ready
    assert broker.stats("mail").pending == 0


def test_json_of_a_spoiled_job_is_json(everywhere: dict[str, str], server: Server) -> None:
    for line in Cli(server.url).run("job", "ls", "--queue", "mail", "--limit", "1000", "--json").stdout.splitlines():
        json.loads(line)
