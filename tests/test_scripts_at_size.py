"""Every script with 20,000 jobs in each state: right results, bounded batches, and no limit of Lua is met."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from relay_core import commands
from relay_core.broker import Broker
from relay_core.clock import sent_now
from relay_core.commands import Ack, Nack, NewJob, Verdict
from relay_core.commands.moves import MAX_BATCH
from relay_core.job import NO_OPTIONS, Claimed, Job, Record
from relay_core.keys import QueueKeys
from relay_core.validation import JobSpec
from tests.servers import Server

SIZE = 20_000
Q = QueueKeys("relay", "q")

# 20,000 jobs in each state, as the moves would have left them; ids tell the state. Delayed are due ARGV[2]
# ms from now, leases end ARGV[3] ms from now.
FILL = """
local time = redis.call('TIME')
local now = time[1] * 1000
local function fill(letter, put)
  for n = 1, tonumber(ARGV[1]) do
    local id = string.format('%s%05d', letter, n)
    redis.call('HSET', KEYS[1], id, string.format('%.0f %d 0 \\nx', now, n % 10))
    put(id, n)
  end
end
fill('r', function(id, n) redis.call('RPUSH', KEYS[5 + n % 10 + 1], id) end)
fill('d', function(id, n) redis.call('ZADD', KEYS[3], now + ARGV[2] + n, id) end)
fill('l', function(id, n)
  redis.call('ZADD', KEYS[4], now + ARGV[3] + n, id)
  redis.call('HSET', KEYS[2], id, '1:' .. n .. ':a 0 h')
end)
fill('x', function(id, n)
  redis.call('ZADD', KEYS[5], now - 60000 + n / 1000, id)
  redis.call('HSET', KEYS[2], id, '1:' .. n .. ':a 0 n')
  redis.call('HSET', KEYS[16], id, '1 rejected\\nno')
end)
redis.call('HSET', KEYS[17], 'v', 1, 'levels', '9876543210', 'due', now + math.min(ARGV[2], ARGV[3]))
redis.call('HSET', KEYS[18], 'claimed', ARGV[1] * 2)
"""
DAY = 86_400_000


def fill(server: Server, delayed_ms: int = DAY, leases_ms: int = DAY) -> None:
    """Delayed jobs are due, and leases end, from so many ms on; negative: all of them are over."""
    keys = (Q.jobs, Q.owners, Q.delayed, Q.leases, Q.dead, *Q.ready, Q.errors, Q.config, Q.counters)
    server.cli("EVAL", FILL, len(keys), *keys, SIZE, delayed_ms, leases_ms)


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, lease=3600.0) as broker:
        yield broker


def depths(broker: Broker) -> tuple[int, int, int, int]:
    found = broker.stats("q")
    return found.ready, found.delayed, found.inflight, found.dead


def tokens(first: int, count: int) -> list[tuple[str, str]]:
    return [(f"l{n:05}", f"1:{n}:a") for n in range(first, first + count)]


def test_the_largest_batch_of_every_move_beside_20_000_jobs_in_each_state(server: Server, broker: Broker) -> None:
    fill(server)
    run, many = broker.store.run, MAX_BATCH
    new = [
        NewJob(f"n{n:05}", "" if n % 2 else f"+{DAY}", f"0:key{n}", Record.pack(3, NO_OPTIONS, b"x"))
        for n in range(many)
    ]
    assert not any(answer.duplicate for answer in run(commands.enqueue(Q, new)))
    assert all(answer.duplicate for answer in run(commands.enqueue(Q, new)))
    claimed = broker.claim("q", many)
    assert [job.id for job in claimed] == [f"r{n:05}" for n in range(9, 10 * many, 10)]
    assert broker.extend(claimed) == [Verdict.DONE] * many
    assert broker.release(claimed) == [Verdict.DONE] * many
    again = broker.claim("q", many)
    assert [job.id for job in again] == [job.id for job in claimed]
    assert broker.ack_many(again) == [Verdict.DONE] * many
    assert broker.ack_many(again) == [Verdict.ALREADY] * many
    acks = [Ack(id, token) for id, token in tokens(1, many)]
    nacks = [Nack(id, token, 0 if n % 2 else -1, 3, "why", "no") for n, (id, token) in enumerate(tokens(201, many))]
    done = run(commands.finish(Q, acks, nacks, many, 60_000, "b", max_deliveries=5))
    assert set(done.acked) == {Verdict.DONE}
    assert [*done.nacked] == [Verdict.DEAD, Verdict.DONE] * (many // 2)
    assert done.claim is not None
    assert len(done.claim.grants) == many
    nacks = [Nack(id, token, DAY, 3, "why", "no") for id, token in tokens(401, many)]
    assert set(run(commands.nack(Q, nacks))) == {Verdict.DONE}
    # taken: 200 acked before, 200 leased by the finish; added: 100 enqueued, 100 retried at once
    assert depths(broker) == (SIZE - many, SIZE + many // 2 + many, SIZE - 2 * many, SIZE + many // 2)
    assert broker.audit("q", repair=False).findings == {}


def test_20_000_jobs_of_all_levels_are_stored_in_batches_and_claimed_in_order(broker: Broker) -> None:
    specs = [JobSpec(b"x" * 500, id=f"n{n:05}", priority=n % 10) for n in range(SIZE)]
    assert [answer.id for answer in broker.enqueue_many("q", specs)] == [spec.id for spec in specs]
    assert all(answer.duplicate for answer in broker.enqueue_many("q", specs[:1000]))
    assert [job.id for job in broker.claim("q", MAX_BATCH)] == [f"n{n:05}" for n in range(9, 10 * MAX_BATCH, 10)]
    assert depths(broker) == (SIZE - MAX_BATCH, 0, MAX_BATCH, 0)


def test_a_claim_that_is_sent_again_finds_its_jobs_among_20_000_leases(server: Server) -> None:
    fill(server)
    with Broker(server.url) as broker:
        command = commands.finish(Q, (), (), MAX_BATCH, 3 * DAY, "again", max_deliveries=5)
        first = broker.store.run(command)
        resent = command.parse(server.cli("EVALSHA", *command.wire(sent_now())), True)
        assert first.claim is not None
        assert resent.claim is not None
        assert sorted(resent.claim.grants) == sorted(first.claim.grants)
        assert depths(broker) == (SIZE - MAX_BATCH, SIZE, SIZE + MAX_BATCH, SIZE)


def test_an_enqueue_that_is_sent_again_looks_through_all_receipts_once(server: Server, broker: Broker) -> None:
    receipts = [f"done{n:05} 1:{n}:abcdefabcdt{int(time.time()):x}" for n in range(11_000)]
    for at in range(0, len(receipts), 1000):
        server.cli("RPUSH", Q.finished, *receipts[at : at + 1000])
    ids = [f"done{n:05}" for n in range(100)] + [f"fresh{n}" for n in range(100)]
    command = commands.enqueue(Q, [NewJob(id, "", "", Record.pack(0, NO_OPTIONS, b"x")) for id in ids])
    broker.store.raw("PING")
    server.cli("SCRIPT", "LOAD", command.script.text)
    server.cli("CONFIG", "RESETSTAT")
    assert [answer.id for answer in command.parse(server.cli("EVALSHA", *command.wire(sent_now())), True)] == ids
    calls = {name: int(found.split("=")[1].split(",")[0]) for name, found in server.info("commandstats").items()}
    assert calls["cmdstat_lrange"] == 1, "all receipts are read once for each job"
    assert max(calls.values()) <= 2, f"once for each job: {calls}"
    assert broker.stats("q").ready == 100


def test_receipts_are_trimmed_by_an_ack_of_one_too(server: Server, broker: Broker) -> None:
    for at in range(0, 11_000, 1000):
        server.cli("RPUSH", Q.finished, *(f"done{n:05} 1:{n}:abcdefabcd" for n in range(at, at + 1000)))
    broker.enqueue_many("q", [b"x"] * 2)
    for job in broker.claim("q", 2):
        broker.ack(job)
    assert server.cli("LLEN", Q.finished) == 10_001
    assert broker.stats("q").counters["processed"] == 11_002


def test_a_claim_sweeps_a_bounded_few_of_20_000_due_jobs_and_expired_leases(server: Server, broker: Broker) -> None:
    fill(server, -DAY, -DAY)
    jobs = broker.claim("q", 10)
    assert len(jobs) == 10
    assert depths(broker) == (SIZE + 2 * MAX_BATCH - 10, SIZE - MAX_BATCH, SIZE - MAX_BATCH + 10, SIZE)
    counters = broker.stats("q").counters
    assert (counters["promoted"], counters["reaped"]) == (MAX_BATCH, MAX_BATCH)


@pytest.mark.parametrize("how", ["reap", "promote"])
def test_20_000_are_swept_in_bounded_batches_and_none_is_left(server: Server, broker: Broker, how: str) -> None:
    fill(server, -DAY, -DAY)
    move: Callable[[str], int] = broker.reap if how == "reap" else broker.promote
    counts = []
    while count := move("q"):
        counts.append(count)
    assert counts == [MAX_BATCH] * (SIZE // MAX_BATCH)
    swept = (2 * SIZE, SIZE, 0, SIZE) if how == "reap" else (2 * SIZE, 0, SIZE, SIZE)
    assert depths(broker) == swept
    heads = [job.id for job in broker.jobs("q", "ready", 3)]
    # reaped ones waited longest and go to the head; promoted ones are new and go to the end
    assert heads[0][0] == ("l" if how == "reap" else "r")


def test_expired_leases_of_jobs_past_their_deliveries_fill_the_dead(server: Server) -> None:
    fill(server, DAY, -DAY)
    with Broker(server.url, max_deliveries=1) as broker:
        while broker.reap("q"):
            pass
        assert depths(broker) == (SIZE, SIZE, 0, 2 * SIZE)


def test_old_dead_jobs_are_dropped_in_bounded_batches(server: Server) -> None:
    fill(server)
    with Broker(server.url, keep_dead=1.0) as broker:
        broker.reap("q")
        assert broker.stats("q").dead == SIZE - MAX_BATCH


def test_everything_is_listed_page_by_page_in_its_order(server: Server, broker: Broker) -> None:
    fill(server)
    for state, letter in (("delayed", "d"), ("inflight", "l"), ("dead", "x")):
        found = broker.jobs("q", state, limit=2 * SIZE)  # type: ignore[arg-type]
        assert [job.id for job in found] == [f"{letter}{n:05}" for n in range(1, SIZE + 1)]
        assert {job.state for job in found} == {state}
    ready = broker.jobs("q", "ready", limit=2 * SIZE)
    assert [job.id for job in ready] == [
        f"r{n:05}" for level in range(9, -1, -1) for n in range(1, SIZE + 1) if n % 10 == level
    ]
    assert [job.id for job in broker.jobs("q", "ready", limit=5, skip=3998)] == [job.id for job in ready[3998:4003]]
    assert broker.show("q", "r19999").state == "ready"  # type: ignore[union-attr]
    assert broker.show("q", "l20000").deliveries == 1  # type: ignore[union-attr]


def test_20_000_dead_jobs_are_requeued_and_then_purged_and_cancelled(server: Server, broker: Broker) -> None:
    fill(server)
    seen: list[int] = []
    assert broker.requeue("q", progress=seen.append) == SIZE
    assert (sum(seen), max(seen)) == (SIZE, MAX_BATCH)
    assert depths(broker) == (2 * SIZE, SIZE, SIZE, 0)
    assert broker.audit("q", repair=False).findings == {}
    states = broker.cancel_many(
        "q", [*(f"r{n:05}" for n in range(1, 101)), *(f"d{n:05}" for n in range(1, 201)), "l00001"]
    )
    assert states == ["ready"] * 100 + ["delayed"] * 200 + ["inflight"]
    seen.clear()
    assert broker.purge("q", ["ready", "delayed", "dead"], progress=seen.append) == 3 * SIZE - 300
    assert max(seen) == MAX_BATCH
    assert depths(broker) == (0, 0, SIZE, 0)
    assert server.cli("HLEN", Q.jobs) == SIZE
    assert broker.audit("q", repair=False).findings == {}


def test_an_audit_mends_thousands(server: Server, broker: Broker) -> None:
    fill(server)
    for at in range(1, 2001, 500):
        server.cli("ZREM", Q.delayed, *(f"d{n:05}" for n in range(at, at + 500)))
        server.cli("HDEL", Q.jobs, *(f"x{n:05}" for n in range(at, at + 500)))
    report = broker.audit("q")
    assert report.checked == 4 * SIZE
    assert sorted(set(report.findings.values())) == ["no_record", "no_state"]
    assert len(report.findings) == 4000
    assert depths(broker) == (SIZE + 2000, SIZE - 2000, SIZE, SIZE - 2000)
    assert broker.audit("q").clean


def test_a_worker_drains_20_000_jobs_by_the_finish_script(server: Server, broker: Broker) -> None:
    fill(server)
    done: set[str] = set()
    jobs: Claimed | list[Job] = broker.claim("q", MAX_BATCH)
    while jobs:
        done |= {job.id for job in jobs}
        verdicts, _nacked, jobs = broker.finish("q", jobs, [], MAX_BATCH)
        assert set(verdicts) == {Verdict.DONE}
    assert done == {f"r{n:05}" for n in range(1, SIZE + 1)}
    assert depths(broker) == (0, SIZE, SIZE, SIZE)
    assert broker.stats("q").counters["processed"] == SIZE
    assert server.cli("LLEN", Q.finished) <= 11_000
