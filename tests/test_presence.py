"""The roster of live workers: who is on it, for how long, and what keeping it costs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay_core import AsyncBroker, Broker, commands, presence
from relay_core.commands import workers
from relay_core.job import Job
from relay_core.keys import QueueKeys, worker_keys
from relay_core.presence import Load, Presence
from relay_core.worker import Worker
from tests.command_line import spawn
from tests.proxy import Proxy, to_socket
from tests.servers import Server, eventually
from tests.topologies import Cluster

W = worker_keys("relay")
SAYS = {"host": "h", "pid": 1, "face": "worker", "queues": ["q"], "concurrency": 2, "inflight": 0}


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


def beat(broker: Broker, name: str, alive_ms: int = 60_000, age_ms: int = 0, **says: object) -> int:
    return broker.store.run(commands.beat(W, name, SAYS | says, age_ms=age_ms, alive_ms=alive_ms))


def names(broker: Broker) -> list[str]:
    return [info.name for info in broker.workers()]


def test_a_worker_is_on_the_roster_while_it_runs_and_off_it_at_once_after(broker: Broker) -> None:
    running, go = threading.Event(), threading.Event()

    def handler(job: Job) -> None:
        running.set()
        go.wait(30)

    worker = Worker(broker, handler, ["a", "b"], concurrency=3)
    broker.enqueue("a", b"x")
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        assert running.wait(30)
        eventually(broker.workers, "the worker's first beat")
        (info,) = broker.workers()
        assert (info.name, info.host, info.pid) == (worker.name, socket.gethostname(), os.getpid())
        assert (info.face, info.queues, info.concurrency) == ("worker", ("a", "b"), 3)
        assert info.started_at <= info.beat_at <= info.now
        assert info.silence < 60
        assert asyncio.run(_workers(broker.url.path)) == [info.name]
    finally:
        go.set()
        worker.stop()
        thread.join(30)
    assert broker.workers() == []


async def _workers(path: str) -> list[str]:
    async with AsyncBroker(f"relay+unix://{path}?db=0") as broker:
        return [info.name for info in await broker.workers()]


def test_every_beat_tells_what_the_worker_holds_then(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "BEAT", 0.01)
    load = Load(("q",), 1, 0)
    one = Presence(broker, "celery", lambda: load)
    one.start()
    eventually(broker.workers, "the first beat")
    first = broker.workers()[0]
    load = Load(("q", "r"), 4, 7)
    eventually(lambda: broker.workers()[0].inflight == 7, "a later beat")
    later = broker.workers()[0]
    assert (later.queues, later.concurrency, later.face) == (("q", "r"), 4, "celery")
    assert later.beat_at >= first.beat_at
    assert abs(later.started_at - first.started_at) < 1.0
    one.stop()
    assert broker.workers() == []


def test_a_worker_that_was_killed_is_off_the_roster_when_its_time_is_over(
    server: Server, broker: Broker, tmp_path: Path
) -> None:
    (tmp_path / "handlers.py").write_text("def handle(job):\n    pass\n")
    process = spawn("worker", "handlers:handle", "-q", "q", url=server.url, cwd=tmp_path)
    try:
        eventually(broker.workers, "the worker's first beat")
        assert broker.workers()[0].pid == process.pid
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert [info.pid for info in broker.workers()] == [process.pid]
        server.cli("ZADD", W.alive, "XX", 1, broker.workers()[0].name)  # its sixteen seconds are over
        assert broker.workers() == []
    finally:
        process.kill()
        process.communicate()


def test_the_server_s_clock_decides_who_is_silent_for_too_long(server: Server, broker: Broker) -> None:
    beat(broker, "long", age_ms=90_000)
    beat(broker, "short", alive_ms=20)  # the last: a beat forgets who is gone
    eventually(lambda: names(broker) == ["long"], "the end of the short one")
    (info,) = broker.workers()
    assert abs(info.beat_at - info.started_at - 90.0) < 0.01
    assert server.cli("ZCARD", W.alive) == 2
    assert beat(broker, "third") == 2, "a beat forgets who is gone"
    assert sorted(server.cli("HKEYS", W.about)) == [b"long", b"third"]
    beat(broker, "long", alive_ms=0)
    beat(broker, "never seen", alive_ms=0)
    assert names(broker) == ["third"]
    assert server.cli("HKEYS", W.about) == [b"third"]


def test_a_worker_that_was_silent_for_too_long_comes_back_with_its_next_beat(server: Server, broker: Broker) -> None:
    beat(broker, "a", alive_ms=1)
    eventually(lambda: broker.workers() == [], "the end of its time")
    beat(broker, "a")
    assert names(broker) == ["a"]
    assert server.cli("HLEN", W.about) == 1


def test_the_roster_is_bounded_and_forgets_the_longest_silent(
    server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MAX_WORKERS", 3)
    for n in range(6):
        beat(broker, f"w{n}", alive_ms=60_000 + n)
    assert names(broker) == ["w3", "w4", "w5"]
    assert server.cli("HLEN", W.about) == 3


def test_more_workers_than_fit_a_page_are_all_read(broker: Broker) -> None:
    many = [
        commands.beat(W, f"w{n:04}", SAYS | {"pid": n}, age_ms=0, alive_ms=60_000 + n // 3)
        for n in range(workers.PAGE * 2 + 1)
    ]
    broker.store.run_many(many)
    assert names(broker) == [f"w{n:04}" for n in range(workers.PAGE * 2 + 1)]


def test_what_a_newer_release_says_of_itself_is_left_out_when_it_cannot_be_read(server: Server, broker: Broker) -> None:
    beat(broker, "known", future=[1, 2])
    server.cli("ZADD", W.alive, 2**45, "strange", 2**45, "stranger")
    server.cli("HSET", W.about, "strange", b"\xff\xfe")
    assert names(broker) == ["known"]


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_an_idle_worker_on_the_roster_still_sends_less_than_a_command_a_second(server: Server) -> None:
    with Proxy(to_socket(server.socket), unix=True) as proxy, Broker(proxy.url) as broker:
        worker = Worker(broker, lambda job: None, ["q"])
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            eventually(lambda: server.info("clients")["blocked_clients"] == "1", "the worker blocks")
            eventually(lambda: server.cli("ZCARD", W.alive), "the worker's first beat")
            began, before = time.monotonic(), proxy.requests
            thread.join(3.0)
            assert proxy.requests - before <= time.monotonic() - began
        finally:
            worker.stop()
            thread.join(30)


def test_a_worker_that_cannot_tell_its_load_is_seen_when_it_can(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(presence, "BEAT", 0.01)
    answers = iter([ValueError("not yet")])

    def load() -> Load:
        for error in answers:
            raise error
        return Load((), 1, 0)

    one = Presence(broker, "worker", load)
    one.start()
    eventually(broker.workers, "a later beat")
    assert "ValueError: not yet" in caplog.text
    one.stop()
    assert broker.workers() == []


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_server_that_is_away_keeps_no_worker_from_ending(broker: Broker, server: Server) -> None:
    one = Presence(broker, "worker", lambda: Load((), 1, 0))
    one.start()
    eventually(broker.workers, "the first beat")
    server.kill()
    one.stop()
    server.start()


def test_the_roster_lies_in_one_slot_of_a_cluster_apart_from_every_queue(cluster: Cluster) -> None:
    with Broker(cluster.url) as broker:
        beat(broker, "w")
        assert names(broker) == ["w"]
    assert {key.split(b"}")[0] for key in (W.alive, W.about)} == {b"relay:{workers"}
    assert QueueKeys("relay", "workers").jobs.split(b"}")[0] == b"relay:{workers:0"


def test_each_prefix_has_a_roster_of_its_own(server: Server, broker: Broker) -> None:
    with Broker(server.url, prefix="other") as other:
        other.store.run(commands.beat(worker_keys("other"), "w", SAYS, age_ms=0, alive_ms=60_000))
        assert names(other) == ["w"]
    assert broker.workers() == []
