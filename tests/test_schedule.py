"""Recurring jobs: one job per tick, with many processes, kills, slow processes and changed plans."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from relay_core import AsyncBroker, Broker, commands, hookimpl
from relay_core.commands import Command
from relay_core.errors import AuthError, InvalidArgument, Unavailable
from relay_core.keys import LAYOUT, ScheduleKeys
from relay_core.operations import Flow
from relay_core.schedule import Schedule, ScheduleRunner, cron, flows
from tests.servers import Near, Server, eventually
from tests.topologies import Cluster

S = ScheduleKeys("relay")


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry_for=2.0) as broker:
        yield broker


def ready(broker: Broker, queue: str = "q") -> list[str]:
    return [job.id for job in broker.jobs(queue, "ready", limit=10_000)]


def move_back(server: Server, name: str, seconds: float) -> int:
    """As if it had been stored, and nobody had run schedules since, so much earlier: unix ms of the tick due now."""
    ms = round(seconds * 1000)
    plan = json.loads(server.cli("HGET", S.plans, name))
    server.cli("HSET", S.plans, name, json.dumps(plan | {"anchor_ms": plan["anchor_ms"] - ms}))
    tick = int(server.cli("ZSCORE", S.next_ticks, name)) - ms
    server.cli("ZADD", S.next_ticks, tick, name)
    return tick


class Steps:
    """A process that may be held up, or die, before any of its commands: by default one that looks at the schedules."""

    def __init__(self, broker: Broker, flow: Flow[Any] | None = None) -> None:
        self.broker = broker
        self.flow = flow or flows.run_due(broker.operations)
        self.step: Any = next(self.flow)

    def until(self, script: str) -> Steps:
        """Go on to just before this script is sent."""
        while not (isinstance(self.step, Command) and self.step.script.name == script):
            self.step = self.flow.send(self.broker._perform(self.step))
        return self

    def finish(self) -> Any:
        try:
            while True:
                self.step = self.flow.send(self.broker._perform(self.step))
        except StopIteration as stop:
            return stop.value


# --- storing


def test_a_schedule_is_stored_listed_changed_and_removed(broker: Broker, near: Near) -> None:
    made = broker.schedule("b", "q", b"x", every=60.0, priority=3, headers={"a": "b"})
    broker.schedule("a", "other", cron="0 3 * * *", tz="Europe/Berlin")
    assert made.next_at == near(broker.stats("q").now + 60)
    listed = broker.schedules()
    assert [one.schedule.name for one in listed] == ["a", "b"]
    assert listed[1] == made
    assert listed[1].schedule == Schedule("b", "q", b"x", every=60.0, priority=3, headers={"a": "b"})
    changed = broker.schedule("b", "q", b"y", every=3600.0)
    assert changed.next_at == near(broker.stats("q").now + 3600)
    assert broker.unschedule("b") is True
    assert broker.unschedule("b") is False
    assert [one.schedule.name for one in broker.schedules()] == ["a"]
    broker.unschedule("a")
    assert broker.run_due().wait is None, "no tick is left of those that are gone"


def test_storing_the_same_again_keeps_its_next_tick(broker: Broker, server: Server) -> None:
    broker.schedule("a", "q", b"x", every=3600.0)
    tick = move_back(server, "a", 1800)
    assert broker.schedule("a", "q", b"x", every=3600.0).next_at == tick / 1000


def test_a_wrong_queue_or_schedule_stores_nothing(broker: Broker) -> None:
    for options in ({"queue": ""}, {"queue": "q" * 256}, {"name": "a b"}, {"priority": 11}):
        with pytest.raises(InvalidArgument):
            broker.schedule(**({"name": "a", "queue": "q", "every": 1.0} | options))  # type: ignore[arg-type]
    assert broker.schedules() == []


def test_two_who_change_a_schedule_at_once_leave_one_of_their_plans(broker: Broker, server: Server) -> None:
    broker.schedule("a", "q", every=60.0)
    slow = Steps(broker, flows.schedule(broker.operations, Schedule("a", "q", b"first", every=60.0))).until("schedule")
    broker.schedule("a", "elsewhere", b"second", every=60.0)
    slow.finish()
    assert [one.schedule.payload for one in broker.schedules()] == [b"first"]
    last = server.cli("ZSCORE", broker.settings.keys("elsewhere").ticks, "a")
    assert last is not None, "the plan that was replaced is shut out, not the one that was seen first"


def test_a_plan_moves_on_only_as_it_was_seen(broker: Broker, server: Server) -> None:
    broker.schedule("a", "q", every=60.0)
    plan, tick = server.cli("HGET", S.plans, "a"), int(server.cli("ZSCORE", S.next_ticks, "a"))
    for seen, done in ((b"{}", tick), (plan, tick - 1), (b"", tick)):
        assert broker.store.run(commands.advance(S, "a", seen, done, tick + 1)) is False
    assert broker.store.run(commands.advance(S, "nobody", plan, tick, tick + 1)) is False
    assert int(server.cli("ZSCORE", S.next_ticks, "a")) == tick
    assert broker.store.run(commands.advance(S, "a", plan, tick, tick + 60_000)) is True
    assert int(server.cli("ZSCORE", S.next_ticks, "a")) == tick + 60_000


# --- one job per tick


def test_a_tick_enqueues_one_job_with_all_that_was_asked_and_an_id_of_its_own(
    broker: Broker, server: Server, near: Near
) -> None:
    broker.schedule("a", "q", b"x", every=60.0, priority=7, max_retries=2, max_deliveries=3, headers={"k": "v"})
    assert broker.run_due().enqueued == []
    tick = move_back(server, "a", 60)
    done = broker.run_due()
    assert done.enqueued == [("a", "q", f"a@{tick}")]
    assert done.wait == near(60)
    assert broker.run_due().enqueued == []
    (job,) = broker.claim("q")
    assert (job.id, job.payload, job.priority, job.headers) == (f"a@{tick}", b"x", 7, {"k": "v"})
    assert (job.options.max_retries, job.options.max_deliveries) == (2, 3)
    assert broker.queues() == ["q"]
    broker.ack(job)
    assert broker.stats("q").counters == {"enqueued": 1, "claimed": 1, "processed": 1}
    assert broker.audit("q").clean


def test_a_process_that_was_held_up_cannot_enqueue_a_tick_that_was_done_long_ago(
    broker: Broker, server: Server
) -> None:
    broker.schedule("a", "q", every=60.0)
    move_back(server, "a", 60)
    slow = Steps(broker).until("tick")
    assert len(broker.run_due().enqueued) == 1
    broker.ack(broker.claim("q")[0])
    server.cli("DEL", broker.settings.keys("q").finished)  # ten thousand jobs later
    assert slow.finish().enqueued == []
    assert ready(broker) == []


def test_a_process_that_dies_after_the_enqueue_leaves_a_tick_that_the_next_one_finds_done(
    broker: Broker, server: Server, near: Near
) -> None:
    broker.schedule("a", "q", every=60.0)
    tick = move_back(server, "a", 60)
    Steps(broker).until("advance")  # and no further
    assert ready(broker) == [f"a@{tick}"]
    again = broker.run_due()
    assert again.enqueued == []
    assert again.wait == near(60)
    assert ready(broker) == [f"a@{tick}"]
    assert int(server.cli("ZSCORE", S.next_ticks, "a")) == tick + 60_000


def test_no_tick_comes_after_a_removal_or_of_the_old_plan_after_a_change(
    broker: Broker, server: Server, near: Near
) -> None:
    for change in ("remove", "move", "keep"):
        broker.schedule("a", "q", every=60.0)
        move_back(server, "a", 60)
        slow = Steps(broker).until("tick")
        if change == "remove":
            broker.unschedule("a")
        else:
            broker.schedule("a", "elsewhere" if change == "move" else "q", b"new", every=3600.0)
        assert slow.finish().enqueued == []
        assert ready(broker) == []
        if change != "remove":
            assert broker.schedules()[0].next_at == near(broker.stats("q").now + 3600)
        broker.unschedule("a")


def test_a_schedule_that_is_stored_anew_after_its_removal_ticks_again(broker: Broker, server: Server) -> None:
    for _ in range(2):
        broker.schedule("a", "q", every=0.1)
        eventually(lambda: broker.run_due().enqueued, "its first tick")
        broker.unschedule("a")


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_many_runners_enqueue_each_tick_once_while_workers_finish_the_jobs(server: Server, broker: Broker) -> None:
    begun = broker.schedule("a", "q", every=0.1, missed="all").next_at
    assert begun is not None
    brokers = [Broker(server.url) for _ in range(4)]
    runners = [ScheduleRunner(one) for one in brokers]
    threads = [threading.Thread(target=runner.run) for runner in runners]
    seen: list[str] = []
    for thread in threads:
        thread.start()
    try:
        while len(seen) < 20:
            for job in broker.claim("q", count=10, wait=1.0):
                seen.append(job.id)
                broker.ack(job)
    finally:
        for runner in runners:
            runner.stop()
        for thread in threads:
            thread.join()
        for one in brokers:
            one.close()
    seen += ready(broker)
    first = round(begun * 1000)
    assert seen == [f"a@{first + 100 * n}" for n in range(len(seen))]
    assert sum(runner.enqueued for runner in runners) == len(seen)


def test_a_lost_reply_enqueues_no_second_job(broker: Broker, server: Server) -> None:
    broker.schedule("a", "q", every=60.0)
    move_back(server, "a", 60)
    slow = Steps(broker).until("tick")
    broker._perform(slow.step)  # its reply never comes
    slow.finish()
    assert len(ready(broker)) == 1


# --- missed ticks and overlap


def test_a_runner_outlives_a_login_that_is_refused_for_a_while(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    broker.schedule("s", "q", every=0.1)
    runner, refused = ScheduleRunner(broker), []
    wait = runner._bell.wait

    def refuses(timeout: float) -> bool:
        if not refused:
            refused.append(True)
            raise AuthError("wrong or missing password")
        return wait(timeout)

    monkeypatch.setattr(runner._bell, "wait", refuses)
    thread = threading.Thread(target=runner.run)
    thread.start()
    eventually(lambda: refused and broker.stats("q").ready > 0, "a tick after it")
    runner.stop()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize(("missed", "expected"), [("once", 1), ("skip", 1), ("all", 10)])
def test_missed_ticks_go_by_the_policy(broker: Broker, server: Server, missed: str, expected: int) -> None:
    broker.schedule("a", "q", every=60.0, missed=missed)
    tick = move_back(server, "a", 600)
    assert [id for _name, _queue, id in broker.run_due().enqueued] == [
        f"a@{tick + 60_000 * n}" for n in range(10 - expected, 10)
    ]
    assert broker.run_due().enqueued == []


def test_skip_leaves_out_a_tick_that_is_over_a_minute_late(broker: Broker, server: Server, near: Near) -> None:
    broker.schedule("a", "q", every=3600.0, missed="skip")
    tick = move_back(server, "a", 3600 + 90)
    assert broker.run_due().enqueued == []
    assert int(server.cli("ZSCORE", S.next_ticks, "a")) > tick
    assert broker.run_due().wait == near(3600 - 90)


def test_what_a_queue_knows_of_its_last_tick_goes_forward_only(broker: Broker) -> None:
    """The server's clock may go back, as at a failover."""
    q = broker.settings.keys("q")
    for moment in (2000, 1000):
        broker.store.run(commands.retire(q, "a", moment))
    assert broker.store.raw("ZSCORE", q.ticks, "a") == b"2000"


def test_a_queue_forgets_the_ticks_of_schedules_that_are_long_gone(broker: Broker, server: Server) -> None:
    ticks = broker.settings.keys("q").ticks
    broker.store.raw("ZADD", ticks, 1, "gone")
    broker.schedule("a", "q", every=60.0)
    move_back(server, "a", 60)
    broker.run_due()
    assert broker.store.raw("ZRANGE", ticks, 0, -1) == [b"a"]


def test_a_plan_whose_first_send_was_stored_is_stored_by_the_second_one_too(broker: Broker) -> None:
    command = commands.schedule(S, "a", b"", b"plan", 1000)
    assert [broker.store.run(command)[1] for _ in range(2)] == [True, True]


def test_a_tick_of_another_priority_hides_no_job_of_its_queue(broker: Broker, server: Server) -> None:
    for level in (2, 9):
        broker.enqueue("q", b"x", priority=level)
    broker.schedule("a", "q", every=60.0, priority=5)
    move_back(server, "a", 60)
    marker = broker.settings.keys("q").marker
    broker.store.raw("DEL", marker)
    broker.run_due()
    assert broker.store.raw("ZCARD", marker) == 1, "a worker is woken"
    assert [job.priority for job in broker.claim("q", 10)] == [9, 5, 2]


def test_a_tick_is_passed_over_while_an_earlier_job_is_not_over(broker: Broker, server: Server) -> None:
    broker.schedule("a", "q", every=60.0, overlap=False)
    tick = move_back(server, "a", 120)
    (first,) = broker.run_due().enqueued
    (job,) = broker.claim("q")
    server.cli("DEL", broker.settings.keys("q").ticks)  # or it would know the tick
    move_back(server, "a", 60)
    done = broker.run_due()
    assert (done.enqueued, len(done.passed_over)) == ([], 1)
    assert broker.stats("q").counters["deduplicated"] == 1
    broker.ack(job)
    server.cli("DEL", broker.settings.keys("q").ticks)
    move_back(server, "a", 60)
    assert len(broker.run_due().enqueued) == 1
    assert first[2] == f"a@{tick + 60_000}"
    assert broker.audit("q").clean


# --- trouble


def test_a_plan_that_cannot_be_read_is_logged_and_keeps_nobody_from_ticking(
    broker: Broker, server: Server, caplog: pytest.LogCaptureFixture, near: Near
) -> None:
    broker.schedule("newer", "q", every=60.0)
    broker.schedule("plain", "q", every=60.0)
    server.cli("HSET", S.plans, "newer", server.cli("HGET", S.plans, "newer").replace(b'"v":1', b'"v":9'))
    server.cli("ZADD", S.next_ticks, 1, "newer")
    move_back(server, "plain", 60)
    with caplog.at_level(logging.ERROR):
        done = broker.run_due()
    assert [name for name, _queue, _id in done.enqueued] == ["plain"]
    assert done.wait == near(60)
    assert "newer" in caplog.text
    assert server.cli("ZSCORE", S.next_ticks, "newer") == b"1", "its tick is for those who can read it"
    assert [one.schedule.name for one in broker.schedules()] == ["plain"]
    with pytest.raises(InvalidArgument, match="newer"):
        broker.schedule("newer", "q", every=60.0)
    assert broker.unschedule("newer")


def test_a_process_without_croniter_leaves_cron_schedules_to_those_that_have_it(
    broker: Broker, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(25):  # more than a page
        broker.schedule(f"cron{n}", "q", cron="* * * * *", missed="all")
        server.cli("ZADD", S.next_ticks, int(server.cli("ZSCORE", S.next_ticks, f"cron{n}")) - 180_000, f"cron{n}")
    broker.schedule("plain", "q", every=60.0)
    move_back(server, "plain", 60)
    with monkeypatch.context() as without:
        cron._croniter.cache_clear()
        without.setitem(sys.modules, "croniter", None)
        assert [name for name, _queue, _id in broker.run_due().enqueued] == ["plain"]
    done = broker.run_due().enqueued
    assert len(done) >= 25 * 3, "no tick was lost"
    assert "schedule cron0 cannot be run by this process, and is left to others" in caplog.text
    assert "pip install 'relay-queue[schedule]'" in caplog.text


def test_a_runner_says_once_what_it_cannot_run_before_that_is_due(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker.schedule("nightly", "q", cron="0 3 29 2 *")
    broker.schedule("plain", "q", every=0.1)
    cron._croniter.cache_clear()
    monkeypatch.setitem(sys.modules, "croniter", None)
    runner = ScheduleRunner(broker)
    thread = threading.Thread(target=runner.run)
    thread.start()
    eventually(lambda: runner.enqueued > 2, "a few rounds")
    runner.stop()
    thread.join(30)
    assert caplog.text.count("schedule nightly cannot be run by this process") == 1


def test_a_look_ends_though_ticks_come_faster_than_they_are_run(broker: Broker, server: Server) -> None:
    broker.schedule("a", "q", every=0.1, missed="all")
    tick = move_back(server, "a", 1)
    look = Steps(broker).until("advance")
    broker._perform(look.step)
    eventually(lambda: broker.store.run(commands.due(S, 1)).ticks, "the next tick")
    done = look.finish()
    assert done.wait == 0.0
    assert [id for _name, _queue, id in done.enqueued] == ready(broker)
    left = broker.store.run(commands.due(S)).ticks
    assert [name for name, _tick, _plan in left] == ["a"], "what came meanwhile is for the next look"
    assert ready(broker)[0] == f"a@{tick}"


def test_a_queue_that_refuses_its_job_does_not_keep_the_others_from_ticking(
    broker: Broker, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(25):
        broker.schedule(f"bad{n}", "newer", every=60.0)
        move_back(server, f"bad{n}", 600)
    broker.schedule("good", "q", every=60.0)
    tick = move_back(server, "good", 60)
    server.cli("HSET", broker.settings.keys("newer").config, "v", LAYOUT + 1)
    with caplog.at_level(logging.ERROR):
        done = broker.run_due()
    assert [id for _name, _queue, id in done.enqueued] == [f"good@{tick}"]
    assert "queue 'newer' refuses its job" in caplog.text
    assert done.wait == 1.0, "it is tried again, and not at once"
    server.cli("HSET", broker.settings.keys("newer").config, "v", LAYOUT)
    assert len(broker.run_due().enqueued) == 25, "no tick was lost by the refusal"


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_full_server_refuses_a_tick_which_comes_when_there_is_room(server: Server) -> None:
    with Broker(server.url, retry_for=0.0) as broker:
        broker.schedule("a", "q", every=60.0)
        tick = move_back(server, "a", 60)
        server.cli("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Unavailable, match="maxmemory"):
            broker.run_due()
        server.cli("CONFIG", "SET", "maxmemory", "0")
        assert [id for _name, _queue, id in broker.run_due().enqueued] == [f"a@{tick}"]


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_schedule_can_be_removed_when_memory_is_full(server: Server) -> None:
    with Broker(server.url, retry_for=0.0) as broker:
        broker.schedule("a", "q", every=60.0)
        server.cli("CONFIG", "SET", "maxmemory", "1")
        assert broker.unschedule("a")
        assert server.cli("ZCARD", broker.settings.keys("q").ticks) == 1, "ticks that are on their way are shut out"


def test_a_client_whose_clock_is_a_day_off_changes_nothing(
    broker: Broker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86_400)
    broker.schedule("a", "q", every=3600.0)
    assert broker.run_due().enqueued == []
    tick = move_back(server, "a", 3600)
    assert [id for _name, _queue, id in broker.run_due().enqueued] == [f"a@{tick}"]


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_hundreds_of_schedules_are_carried_out_in_bounded_pages(broker: Broker, server: Server) -> None:
    for n in range(300):
        broker.schedule(f"s{n:03}", "q", b"x" * 100, every=600.0)
        move_back(server, f"s{n:03}", 600)
    assert len(broker.run_due().enqueued) == 300
    assert len(ready(broker)) == 300


# --- hooks, runner, faces


class Codec:
    """Payloads in reverse, all jobs to another queue, and what was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []

    @hookimpl
    def relay_encode_payload(self, payload: bytes) -> bytes:
        return payload[::-1]

    @hookimpl
    def relay_decode_payload(self, payload: bytes) -> bytes:
        return payload[::-1]

    @hookimpl
    def relay_route_job(self, queue: str) -> str:
        return f"{queue}-routed"

    @hookimpl
    def relay_add_headers(self, payload: bytes, headers: Mapping[str, str]) -> dict[str, str]:
        return {"of": f"{payload.decode()} for {headers['tenant']}"}

    @hookimpl
    def relay_job_enqueued(self, queue: str, id: str, headers: Mapping[str, str]) -> None:
        self.told.append((f"enqueued {headers['of']}", queue, id))

    @hookimpl
    def relay_job_deduplicated(self, queue: str, id: str) -> None:
        self.told.append(("deduplicated", queue, id))


def test_plugins_encode_route_and_are_told(server: Server) -> None:
    codec = Codec()
    with Broker(server.url, plugins=[codec]) as broker:
        broker.schedule("a", "q", b"secret", every=60.0, overlap=False, headers={"tenant": "ann"})
        assert b"secret" not in server.cli("HGET", S.plans, "a")
        assert broker.schedules()[0].schedule.payload == b"secret"
        tick = move_back(server, "a", 60)
        broker.run_due()
        broker.run_due()
        (job,) = broker.claim("q-routed")
        assert (job.payload, job.headers) == (b"secret", {"tenant": "ann", "of": "secret for ann"})
        move_back(server, "a", 60)
        server.cli("DEL", broker.settings.keys("q-routed").ticks)
        broker.run_due()
    id = f"a@{tick}"
    assert codec.told == [("enqueued secret for ann", "q-routed", id), ("deduplicated", "q-routed", id)]


class Spoilt:
    """A plugin whose headers cannot be had at first, and then cannot be stored."""

    answers: ClassVar[list[Any]] = [OSError("no tenant"), {"n": 1}, {}]

    @hookimpl
    def relay_add_headers(self) -> dict[str, str]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_plugin_that_spoils_a_tick_does_not_lose_it(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with Broker(server.url, plugins=[Spoilt()]) as broker:
        broker.schedule("a", "q", every=60.0)
        tick = move_back(server, "a", 60)
        assert [broker.run_due().enqueued for _ in range(3)] == [[], [], [("a", "q", f"a@{tick}")]]
    assert caplog.text.count("schedule a: no job is made of its tick, trying again") == 2
    assert "OSError('no tenant')" in caplog.text


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_waiting_runner_learns_of_a_new_schedule_at_once_and_stops_when_it_is_told(
    server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_core.schedule.runner._LONGEST", 3600.0)  # no look in passing shall find it
    broker.schedule("later", "q", every=3600.0)
    runner = ScheduleRunner(broker)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        eventually(lambda: b"bzpopmin" in server.cli("CLIENT", "LIST"), "it waits")
        with Broker(server.url) as other:
            other.schedule("soon", "q", every=0.1)
        eventually(lambda: ready(broker), "its first tick")
    finally:
        runner.stop()
        thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_runner_waits_for_a_server_that_is_away(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with Broker(server.url, retry_for=0.1) as broker:
        broker.schedule("a", "q", every=0.1)
        runner = ScheduleRunner(broker)
        thread = threading.Thread(target=runner.run)
        thread.start()
        try:
            eventually(lambda: runner.enqueued, "it begins")
            server.kill()
            eventually(lambda: "cannot be looked at" in caplog.text, "it notices")
            server.start()
            runner.enqueued = 0
            broker.schedule("b", "q", every=0.1)
            eventually(lambda: runner.enqueued, "it goes on")
        finally:
            runner.stop()
            thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_runner_whose_server_is_away_stops_all_the_same(server: Server) -> None:
    with Broker(server.url, retry_for=3600) as broker:
        broker.schedule("a", "q", every=0.1)
        runner = ScheduleRunner(broker)
        thread = threading.Thread(target=runner.run)
        thread.start()
        eventually(lambda: runner.enqueued, "it begins")
        server.kill()
        runner.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_the_async_broker_has_the_same_schedules(server: Server) -> None:
    async def scenario() -> None:
        async with AsyncBroker(server.url) as broker:
            stored = await broker.schedule("a", "q", b"x", every=60.0)
            assert await broker.schedules() == [stored]
            tick = move_back(server, "a", 60)
            assert (await broker.run_due()).enqueued == [("a", "q", f"a@{tick}")]
            assert await broker.unschedule("a")

    asyncio.run(scenario())


@pytest.mark.slow
def test_schedules_work_in_a_cluster_whatever_slot_their_queues_are_in(cluster: Cluster) -> None:
    with Broker(cluster.url) as broker:
        names = [f"q{n}" for n in range(8)]
        for name in names:
            broker.schedule(name, name, every=0.1, missed="all", catch_up=1000)  # a slow machine may miss many
        found: dict[str, list[str]] = {name: [] for name in names}

        def ticked() -> bool:
            broker.run_due()
            found.update({name: ready(broker, name) for name in names})
            return all(len(ids) >= 3 for ids in found.values())

        eventually(ticked, "three ticks of each")
        for name, ids in found.items():
            ticks = [int(id.rpartition("@")[2]) for id in ids]
            assert ticks == list(range(ticks[0], ticks[0] + 100 * len(ticks), 100)), name


def test_the_python_of_the_page_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "schedules.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block.replace('Broker("relay://")', f"Broker({server.url!r})"), {})
    assert "nightly" in capsys.readouterr().out
    assert server.cli("HKEYS", S.plans) == [b"nightly"]
