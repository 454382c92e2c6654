"""A prefork worker that loses its connection while its children begin what they were given: nothing starts twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.utils.nodenames import gethostname

from relay_adapters.celery.holding import children, heartbeat
from relay_adapters.celery.holding.forgotten import Forgotten
from relay_adapters.celery.holding.leases import _DECISION, Leases
from relay_adapters.celery.holding.owed import LINGER
from relay_adapters.celery.messages.tags import new_tag
from relay_core import Broker
from tests.celery_workers import STARTS, CeleryWorker, client_of, lines
from tests.servers import Server, eventually

Held = tuple[children.Board, Leases, str]
TASKS = {"hold": "acked when it ends", "hold_early": "acked as it starts"}


@pytest.mark.parametrize("conf", STARTS)
def test_what_a_child_begins_when_the_connection_is_lost_runs_once(
    server: Server, tmp_path: Path, conf: Mapping[str, Any]
) -> None:
    flags = ("-P", "prefork", "-c", "2", "--prefetch-multiplier", "2", "--include", "tests.celery_hold_close")
    with Broker(server.url) as broker, CeleryWorker(server.url, tmp_path, *flags, conf=conf) as worker:
        client = client_of(server.url, tmp_path)
        pool = worker.children(client)
        _all(pool, signal.SIGSTOP)
        for name in TASKS:
            client.send_task(f"tests.celery_app.{name}", [name, "go"])
        client.send_task("tests.celery_app.run", ["waits"])  # for a child that is free
        eventually(lambda: broker.stats("celery").inflight == 3, "the tasks to be fetched")
        # each answer is a turn of its loop: in the third one after the tasks came it has written to its children
        for _ in range(3):
            assert client.control.ping([f"w@{gethostname()}"], timeout=20, limit=1)
        client.close()

        server.cli("CLIENT", "KILL", "TYPE", "normal")
        eventually(lambda: lines(tmp_path, "connection"), "the loss to be noticed")
        _all(pool, signal.SIGCONT)
        eventually(lambda: len(lines(tmp_path, "started")) == len(TASKS), "the children to begin")
        (tmp_path / "see-to-it").touch()
        eventually(lambda: _count(broker, "released") > 0, "the task that waits to be handed back")
        assert _count(broker, "released") == 1

        (tmp_path / "go").touch()
        eventually(lambda: len(lines(tmp_path)) == 3 and broker.stats("celery").pending == 0, "all to be done")
        assert sorted(line.split()[0] for line in lines(tmp_path)) == ["hold", "hold_early", "waits"]
        assert sorted(line.split()[0] for line in lines(tmp_path, "started")) == sorted(TASKS)
        assert _count(broker, "processed") == 3


def _count(broker: Broker, what: str) -> int:
    return broker.stats("celery").counters.get(what, 0)


def _all(pids: list[int], how: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, how)


@pytest.fixture
def held(broker: Broker) -> Iterator[Held]:
    """A message that a worker holds, and the memory that it shares with its children: here, with itself."""
    board, leases = children.Board(os.getpid()), Leases(broker)
    broker.enqueue("q", b"")
    job = broker.claim("q")[0]
    tag = new_tag(job)
    leases.add(tag, job)
    row = board.row()
    row.sure(job.expires_at)
    row.held(tag)
    leases.rows = row, board.row()
    yield board, leases, tag
    leases.hand_back([tag], started=True)


def test_what_a_child_has_started_is_not_handed_back(held: Held, broker: Broker) -> None:
    board, leases, tag = held
    assert board.may_start(tag)
    leases.hand_back([tag])
    assert (leases.holding, broker.stats("q").inflight) == (1, 1)
    assert leases.ack_later(tag), "its ack is taken, as that of a task of which Celery said that it runs"
    leases.flush()
    assert broker.stats("q").counters["processed"] == 1


def test_what_was_handed_back_is_not_started_by_a_child(held: Held, broker: Broker) -> None:
    board, leases, tag = held
    leases.hand_back([tag])
    assert (leases.holding, broker.stats("q").ready) == (0, 1)
    assert not board.may_start(tag)


def test_a_child_that_is_about_to_start_is_waited_for(held: Held, broker: Broker) -> None:
    board, leases, tag = held
    does = children._does(int(tag.partition(".")[0]))

    def decide(what: int) -> None:
        board.memory[does] = children.DECIDES
        threading.Timer(_DECISION / 5, board.memory.__setitem__, (does, what)).start()

    decide(children.RUNS)
    leases.hand_back([tag])
    assert (leases.holding, broker.stats("q").inflight) == (1, 1)
    leases.get(tag).started = False
    decide(0)
    leases.hand_back([tag])
    assert (leases.holding, broker.stats("q").ready) == (0, 1)


def test_a_child_that_is_frozen_as_it_is_about_to_start_holds_nobody_up(held: Held, broker: Broker) -> None:
    board, leases, tag = held
    board.memory[children._does(int(tag.partition(".")[0]))] = children.DECIDES
    leases.hand_back([tag])
    assert (leases.holding, broker.stats("q").ready) == (0, 1)
    assert not board.may_start(tag), "when it looks later"


def test_a_worker_shares_one_memory_with_its_children_however_often_it_connects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They have it from when they were started. A process that was forked from one has its own."""
    prefork = SimpleNamespace(process_initializer=print)
    monkeypatch.setattr(children, "_board", None)
    found: list[Any] = []
    for _ in range(2):
        children.install(prefork)
        found.append((children._board, prefork.process_initializer))
    assert found[0] == found[1]
    found[0][0].pid = 0
    assert children.row()._memory is None, "it is another process's"
    children.install(prefork)
    assert children._board is not found[0][0]
    assert children.row()._memory is not None
    children._board.pid = 0
    monkeypatch.setattr(children, "_child", os.getpid())
    children.install(prefork)
    assert children._board.pid == 0, "a child has its parent's"


@pytest.mark.usefixtures("by_hand")
def test_a_child_says_what_becomes_of_the_task_that_it_runs(held: Held) -> None:
    board, leases, tag = held
    request, said = {"properties": {"delivery_tag": tag}}, list[int]()

    def look() -> None:
        said.append(leases.rows[False].does(tag))

    def trace(*_: Any) -> None:
        look()
        for begun in (True, False):
            board.moving(begun)
            look()

    board.guarded(trace)(None, "id", request)
    look()
    board.moving(True)  # of no task that runs here
    look()
    assert said == [children.RUNS, children.MOVED, children.RUNS, children.ENDED, children.ENDED]
    leases.hand_back([tag], started=True)
    assert leases.holding == 1, "its ack comes"
    leases.rows[False].lost(tag)
    with pytest.raises(Forgotten):
        board.guarded(trace)(None, "id", request)


@pytest.mark.usefixtures("by_hand")
def test_of_a_task_that_ended_its_delivery_in_a_child_there_is_nothing_left_to_ack(held: Held, broker: Broker) -> None:
    board, leases, tag = held
    one = leases.get(tag)
    assert one is not None

    def retries(*_: Any) -> None:
        board.moving(True)
        broker.nack(one.job)
        board._end(children.MOVED)

    board.guarded(retries)(None, "id", {"properties": {"delivery_tag": tag}})
    leases.heartbeat.extend()
    assert not one.lost
    assert not leases.ack_later(tag)
    assert (leases.holding, leases.owed.acks) == (0, False)


@pytest.mark.usefixtures("by_hand")
def test_what_waits_for_word_of_a_server_that_is_away_is_handed_back_once_its_lease_is_over(
    held: Held, broker: Broker
) -> None:
    board, leases, tag = held
    does = children._does(int(tag.partition(".")[0]))
    for said, until in ((children.WAITS, time.monotonic() + 60), (0, 0.0), (children.RUNS, 0.0)):
        board.memory[does] = said
        leases.rows[False].sure(until)
        leases.heartbeat._give_up()
        assert leases.holding == 1
    board.memory[does] = children.WAITS
    leases.heartbeat._give_up()
    assert leases.holding == 0
    assert not board.may_start(tag)
    leases.flush()
    assert broker.stats("q").ready == 1


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("under_way", [False, True])
def test_what_is_acked_as_it_starts_and_waits_for_word_is_handed_back_in_place_of_its_ack(
    held: Held, broker: Broker, under_way: bool
) -> None:
    """But not where the server may have that ack."""
    board, leases, tag = held
    board.memory[children._does(int(tag.partition(".")[0]))] = children.WAITS
    leases.rows[False].sure(0.0)
    leases.ack_later(tag)
    taken = leases.owed.take_acks("q") if under_way else []
    leases.heartbeat._give_up()
    assert (leases.holding, leases.owed.acks) == (under_way, False)
    leases.owed.unsent(taken)
    leases.flush()
    assert (broker.stats("q").ready, broker.stats("q").counters.get("processed", 0)) == (not under_way, under_way)


@pytest.mark.usefixtures("by_hand")
def test_no_lease_is_said_to_be_sure_until_it_is_known_what_became_of_an_ack(held: Held, broker: Broker) -> None:
    """That of a task which is acked as it starts, and waits for word. That is asked for ever again; leases that are
    sure are extended every third of one."""
    _board, leases, tag = held
    beat, row = leases.heartbeat, leases.rows[False]
    assert LINGER < beat.work() <= broker.settings.lease / 3
    row.sure(0.0)
    leases.ack_later(tag)
    taken = leases.owed.take_acks("q")
    beat._next = 0.0
    assert beat.work() <= LINGER
    assert row.until == 0.0
    leases.sent(taken, broker.ack_many([one.job for one in taken]))
    beat._next = 0.0
    assert beat.work() > LINGER
    assert row.until > 0.0


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("gone", [False, True])
def test_what_is_acked_as_it_starts_runs_if_that_ack_was_taken(held: Held, broker: Broker, gone: bool) -> None:
    """Whatever its lease; else another worker has it."""
    board, leases, tag = held
    leases.ack_later(tag)
    taken = leases.owed.take_acks("q")
    if gone:
        broker.release(taken[0].job)
    leases.sent(taken, broker.ack_many([one.job for one in taken]))
    leases.rows[False].sure(time.monotonic() + 60 if gone else 0.0)
    assert board.may_start(tag) is not gone


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("runs", [False, True])
def test_a_worker_that_stops_hands_back_what_does_not_run_a_moment_later(
    held: Held, broker: Broker, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    """It looks again soon for whether it was told to stop: a third of a lease may be long."""
    _board, leases, tag = held
    beat, stops = leases.heartbeat, list[bool]()
    for name, answer in (("is_worker", True), ("shutting_down", stops), ("running_tags", {tag} if runs else set())):
        monkeypatch.setattr(f"relay_adapters.celery.holding.heartbeat.{name}", lambda answer=answer: answer)
    assert 0 < beat.work() <= heartbeat._NOTICE
    stops.append(True)
    assert 0 < beat.work() <= heartbeat._SETTLES
    assert leases.holding == 1
    beat._leave_at = 0.001  # long ago
    beat.work()
    assert (leases.holding, broker.stats("q").ready) == (runs, not runs)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("here", [True, False])
def test_what_was_lost_is_not_started(held: Held, broker: Broker, here: bool) -> None:
    _board, leases, tag = held
    one = leases.get(tag)
    assert one is not None
    one.until, until = 0.0, one.until
    assert leases.start(tag, here) is not here, "a child looks itself whether its lease is over"
    one.started, one.until = False, until
    broker.release(one.job)
    leases.heartbeat.extend()
    assert not leases.start(tag, here)


def test_to_hand_back_a_server_that_was_just_away_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that stops does so channel by channel, and would wait for each."""
    with Server("redis", tcp=True) as own, Broker(own.url, retry_for=0.1, socket_timeout=1.0) as broker:
        leases, here, flush, waited = Leases(broker), threading.get_ident(), Leases.flush, []
        broker.enqueue_many("q", [b"1", b"2"])
        tags = []
        for job in broker.claim("q", 2):
            tags.append(new_tag(job))
            leases.add(tags[-1], job)

        def flushes(self: Leases) -> None:
            waited.append(threading.get_ident())
            flush(self)

        monkeypatch.setattr(Leases, "flush", flushes)
        own.pause()
        leases.hand_back(tags[:1])
        assert here in waited
        waited.clear()
        leases.hand_back(tags[1:])
        assert here not in waited
        own.resume()
        eventually(lambda: broker.stats("q").ready == 2, "both to be handed back")
        eventually(lambda: not leases.owed.away, "the server to be known as there")


@pytest.mark.parametrize("macos", [False, True])
def test_who_is_handed_the_descriptor_of_the_shared_memory_shares_it(
    macos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if macos:
        monkeypatch.delattr(os, "memfd_create")
    board = children.Board(os.getpid())
    board.row().lost("7.x")
    child = children.Board(os.getpid(), os.dup(board.descriptor))
    assert not child.may_start("7.x")
    assert child.may_start("8.x")
    assert board.row().does("8.x") == children.RUNS
