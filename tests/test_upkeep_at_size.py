"""The scripts of schedules, of the roster and of moving in, with 20,000 rows; for jobs see test_scripts_at_size.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relay_core import Broker, commands
from relay_core.commands import NewJob, schedules, workers
from relay_core.commands.moves import MAX_BATCH
from relay_core.commands.upkeep import Adopted
from relay_core.job import NO_OPTIONS, Enqueued, Record
from relay_core.keys import QueueKeys, ScheduleKeys, WorkerKeys
from tests.servers import Server

SIZE = 20_000
Q, S, W = QueueKeys("relay", "q"), ScheduleKeys("relay"), WorkerKeys("relay")
RECORD = Record.pack(0, NO_OPTIONS, b"x")

PLANS = """
for n = 1, tonumber(ARGV[1]) do
  redis.call('HSET', KEYS[1], string.format('s%05d', n), 'plan ' .. n)
  redis.call('ZADD', KEYS[2], n, string.format('s%05d', n))
end
"""

ROSTER = """
local time = redis.call('TIME')
local now = time[1] * 1000
for n = 1, tonumber(ARGV[1]) do
  redis.call('ZADD', KEYS[1], now + ARGV[2] + n, 'w' .. n)
  redis.call('HSET', KEYS[2], 'w' .. n, now .. ' ' .. now .. ' {}')
end
"""


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


def rows(server: Server, *keys: bytes) -> list[int]:
    return [server.cli("HLEN" if server.cli("TYPE", key) == b"hash" else "ZCARD", key) for key in keys]


def test_schedules_come_due_are_advanced_changed_and_removed_among_20_000(server: Server, broker: Broker) -> None:
    server.cli("EVAL", PLANS, 2, S.plans, S.next_ticks, SIZE)
    run = broker.store.run
    first = run(schedules.due(S, 100))
    assert (len(first.ticks), first.wait_ms) == (100, 0)
    assert first.ticks[0] == ("s00001", 1, b"plan 1")
    assert run(schedules.due(S, 100, skip=SIZE - 50)).ticks[-1] == ("s20000", SIZE, b"plan 20000")
    later = first.now_ms + 3_600_000
    assert all(run(schedules.advance(S, name, plan, tick, later)) for name, tick, plan in first.ticks)
    assert not run(schedules.advance(S, *(first.ticks[0][i] for i in (0, 2, 1)), later)), "its tick is another one now"
    assert run(schedules.due(S, 1)).ticks == [("s00101", 101, b"plan 101")]
    assert run(schedules.schedule(S, "s00101", b"plan 101", b"new plan", later))[1]
    assert not run(schedules.schedule(S, "s00101", b"plan 101", b"late plan", later))[1]
    assert run(schedules.unschedule(S, "s00102"))[1] == b"plan 102"
    assert run(schedules.due(S, 1)).ticks == [("s00103", 103, b"plan 103")]
    assert rows(server, S.plans, S.next_ticks) == [SIZE - 1, SIZE - 1]


def test_the_ticks_of_20_000_schedules_store_one_job_each(server: Server, broker: Broker) -> None:
    fill = "for n = 1, tonumber(ARGV[1]) do redis.call('ZADD', KEYS[1], ARGV[2], 's' .. n) end"
    now = int(broker.stats("q").now * 1000)
    server.cli("EVAL", fill, 1, Q.ticks, SIZE, now)
    jobs = [schedules.tick(Q, f"s{n}", now + 1000, NewJob(f"j{n}", "", "", RECORD)) for n in range(1, SIZE + 1)]
    for answers in (broker.store.run_many(jobs[:MAX_BATCH]), broker.store.run_many(jobs[-MAX_BATCH:])):
        assert all(isinstance(answer, Enqueued) and not answer.duplicate for answer in answers)
    assert broker.store.run_many(jobs[:MAX_BATCH]) == [None] * MAX_BATCH
    assert broker.stats("q").ready == 2 * MAX_BATCH
    assert rows(server, Q.ticks) == [SIZE]


def test_a_roster_of_20_000_is_cut_to_its_bound_and_read_page_by_page(server: Server, broker: Broker) -> None:
    server.cli("EVAL", ROSTER, 2, W.alive, W.about, SIZE, 3_600_000)
    kept = workers.MAX_WORKERS
    while broker.store.run(workers.beat(W, "new", {}, age_ms=0, alive_ms=7_200_000)) > kept:
        pass  # a bounded number is forgotten at each beat
    assert rows(server, W.alive, W.about) == [kept, kept]
    seen: set[str] = set()
    after = 0
    while True:
        page, after = broker.store.run(workers.roster(W, after))
        if seen.issuperset(name for name, _said in page):
            break
        seen.update(name for name, _said in page)
    assert len(seen) == kept
    assert {"new", f"w{SIZE}"} <= seen
    assert "w1" not in seen, "the longest silent go first"


def test_silent_workers_are_forgotten_however_many_they_are(server: Server, broker: Broker) -> None:
    server.cli("EVAL", ROSTER, 2, W.alive, W.about, SIZE, -3_600_000)
    for _ in range(SIZE):
        if broker.store.run(workers.beat(W, "new", {}, age_ms=0, alive_ms=60_000)) == 1:
            break
    assert rows(server, W.alive, W.about) == [1, 1]
    assert [name for name, _said in broker.store.run(workers.roster(W))[0]] == ["new"]


def test_20_000_jobs_of_another_system_are_taken_in_once(broker: Broker) -> None:
    now = int(broker.stats("q").now * 1000)
    states = [("ready", 0), ("delayed", now + 3_600_000), ("dead", now - 1000)]
    jobs = []
    for n in range(SIZE):
        state, at = states[n % 3]
        why = ("rejected", "no") if state == "dead" else ("", "")
        jobs.append(Adopted(f"a{n:05}", state, at, str(now - n), *why, RECORD))
    batches = [commands.upkeep.adopt(Q, jobs[at : at + MAX_BATCH]) for at in range(0, SIZE, MAX_BATCH)]
    assert all(all(taken) for taken in broker.store.run_many(batches))
    assert not any(any(taken) for taken in broker.store.run_many(batches))
    stats = broker.stats("q")
    assert (stats.ready, stats.delayed, stats.dead) == (6667, 6667, 6666)
    assert [job.id for job in broker.claim("q", 3)] == ["a00000", "a00003", "a00006"]
    assert broker.audit("q", repair=False).clean
