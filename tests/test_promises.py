"""The promises of the design about jobs and their moves, each by a test that fails when it is broken.

Waiting and waking are in test_waking.py, limits and retries in test_limits.py, the auditor in test_audit.py,
observers in test_observation.py.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from relay_core import commands, hookimpl, scripts
from relay_core.broker import Broker
from relay_core.commands import Ack, Command, LongWay, Verdict
from relay_core.errors import LeaseLost, Unavailable, UnsafeStore
from relay_core.job import Claimed, Enqueued, Job
from relay_core.validation import JobSpec
from relay_core.worker.held import Held
from tests.aging import age_by
from tests.proxy import Proxy, to_socket
from tests.servers import Flavour, Server, eventually

ROOT = Path(__file__).parent.parent


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


@pytest.fixture
def hasty(server: Server) -> Iterator[Broker]:
    """A broker whose leases end after a tenth of a second."""
    with Broker(server.url, lease=0.1, max_deliveries=2) as broker:
        yield broker


def one(broker: Broker, queue: str = "q", wait: float = 10.0) -> Job:
    (job,) = broker.claim(queue, wait=wait)
    return job


def depths(broker: Broker, queue: str = "q") -> tuple[int, int, int, int]:
    found = broker.stats(queue)
    return found.ready, found.delayed, found.inflight, found.dead


# 1. At least once, never silently lost


def test_acknowledged_enqueues_survive_a_kill_of_the_server(flavour: Flavour) -> None:
    with Server(flavour, options={"appendonly": "yes", "appendfsync": "no"}) as server:
        stored: list[str] = []

        def produce(name: str) -> None:
            with Broker(server.url, retry_for=0.0) as broker:
                for n in itertools.count():
                    try:
                        stored.append(broker.enqueue("q", b"x" * 100, id=f"{name}-{n}").id)
                    except Unavailable:
                        return

        producers = [threading.Thread(target=produce, args=(name,)) for name in ("a", "b")]
        for producer in producers:
            producer.start()
        eventually(lambda: len(stored) > 300, "enqueues")
        server.kill()
        for producer in producers:
            producer.join(30)
        server.start()
        with Broker(server.url) as broker:
            kept = {job.id for job in broker.jobs("q", "ready", limit=1_000_000)}
            assert set(stored) - kept == set()
            assert broker.audit("q").clean


HOLDER = """
import sys, time
from relay_core import Broker
broker = Broker(sys.argv[1], lease=0.5)
print(broker.claim("q", wait=20)[0].id, flush=True)
time.sleep(600)
"""


def test_the_job_of_a_killed_worker_runs_again(server: Server, broker: Broker) -> None:
    broker.enqueue("q", b"x", id="it")
    with subprocess.Popen([sys.executable, "-c", HOLDER, server.url], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "it\n"
        worker.kill()
    job = one(broker)
    assert (job.id, job.deliveries) == ("it", 2)
    broker.ack(job)
    assert depths(broker) == (0, 0, 0, 0)


def test_no_document_promises_exactly_once() -> None:
    texts = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("relay_*/**/*.py")]
    assert len(texts) > 20
    assert [str(path) for path in texts if re.search(r"exactly[- ]once", path.read_text(), re.IGNORECASE)] == []


# 2. Every move is one script


def test_every_move_is_one_request(server: Server) -> None:
    with Proxy(to_socket(server.socket), unix=True) as proxy, Broker(proxy.url) as broker:
        for _ in range(8):
            broker.enqueue("q", b"x")
            broker.enqueue("r", b"x")
        broker.ack(one(broker))
        moves: list[Callable[[], object]] = [
            lambda: broker.enqueue("q", b"x"),
            lambda: broker.claim("q"),
            lambda: broker.extend(held),
            lambda: broker.nack(held, delay=5),
            lambda: broker.release(other),
            lambda: broker.reap("q"),
            lambda: broker.promote("q"),
            lambda: broker.cancel("q", held.id),
            lambda: broker.finish("r", [fresh.pop()], [], 2),
            lambda: broker.finish("q", [third], [(retried, again)], 2),
        ]
        held, other, third, retried = broker.claim("q", 4)
        fresh, again = broker.claim("r", 2), broker.operations.nack_of(retried)
        for move in moves:
            move()  # the server may have to be told the script first
            before = proxy.requests
            with suppress(LeaseLost):
                move()
            assert proxy.requests == before + 1


@pytest.mark.parametrize("why", ["limit", "retries", "due"])
def test_where_claims_take_the_long_way_they_take_it_at_once(server: Server, why: str) -> None:
    with Proxy(to_socket(server.socket), unix=True) as proxy, Broker(proxy.url) as broker:
        broker.enqueue_many("q", [JobSpec(b"x", delay=0.001 if why == "due" else None)] * 8)
        if why == "limit":
            broker.limit("q", max_inflight=100)
        for job in broker.claim("q", 8) if why == "retries" else ():
            broker.nack(job, delay=0.0)
        held = Claimed()
        while not held:  # without a wait, whose connection is another one: its requests would be counted at any time
            held = broker.claim("q")
        broker.finish("q", [], [], 0)  # one that claims nothing has nothing to tell of the next
        before = proxy.requests
        for _ in range(3):
            held = broker.finish("q", held, [], 1)[2] if why == "limit" else broker.claim("q")
            assert len(held) == 1
        assert proxy.requests == before + 3


def test_a_short_script_that_sends_its_caller_the_long_way_has_changed_nothing(server: Server, broker: Broker) -> None:
    broker.enqueue_many("q", [b"x"] * 4)
    first, second, third = broker.claim("q", 3)
    broker.nack(first, delay=0.0)  # claimed before: what a short claim does not look into
    q = broker.settings.keys("q")
    before = server.cli("DUMP", q.owners), server.cli("LRANGE", q.ready[0], 0, -1), depths(broker)
    shorts: list[Command[Any]] = [
        commands.claim(q, 2, 60_000, "a", levels="0", acks=[Ack(second.id, second.token)]),
        commands.claim(q, 1, 60_000, "a", levels="9", acks=[Ack(second.id, second.token)]),
        commands.claim(q, 1, 60_000, "a", levels="0", acks=[Ack(second.id, second.token), Ack(third.id, "1:1:stale")]),
        commands.claim(q, 1, 60_000, "a", levels="0", acks=[Ack(third.id, "1:1:stale"), Ack(second.id, second.token)]),
        commands.claim_one(q, 60_000, "a", levels="9"),
        commands.ack_plain(q, [Ack(third.id, "1:1:stale")]),
        commands.ack_plain(q, [Ack(second.id, second.token), Ack(third.id, "1:1:stale")]),
        commands.ack_plain(q, [Ack(third.id, "1:1:stale"), Ack(second.id, second.token)]),
        commands.enqueue_one(q, JobSpec(b"y", id=third.id).stored(b"y")),
        commands.enqueue_one(q, JobSpec(b"y", priority=9).stored(b"y")),
    ]
    for short in shorts:
        assert isinstance(broker.store.run(short), LongWay)
        assert (server.cli("DUMP", q.owners), server.cli("LRANGE", q.ready[0], 0, -1), depths(broker)) == before
    verdicts, _nacked, jobs = broker.finish("q", [second, third], [], 2)
    assert verdicts == [Verdict.DONE] * 2
    assert [job.deliveries for job in jobs] == [1, 2]


def test_a_short_claim_takes_what_it_was_asked_for_from_all_levels_together(broker: Broker) -> None:
    broker.enqueue_many("q", [JobSpec(b"x", priority=9), *[JobSpec(b"x", priority=0)] * 4])
    q = broker.settings.keys("q")
    broker.store.raw("ZPOPMIN", q.marker)
    reply = broker.store.run(commands.claim(q, 2, 60_000, "a", levels="90"))
    assert isinstance(reply, commands.ClaimReply)
    assert (len(reply.grants), broker.stats("q").ready) == (2, 3)
    assert reply.hint_ms == 60_000, "its own leases are the first to run out"
    assert broker.store.raw("EXISTS", q.marker) == 0, "who took no wake-up has none to pass on"


@pytest.mark.parametrize("how", ["claimed before", "no record"])
def test_what_a_short_claim_puts_back_lies_in_its_own_list_as_before(server: Server, broker: Broker, how: str) -> None:
    broker.enqueue("q", b"x", id="odd")
    q = broker.settings.keys("q")
    if how == "no record":
        server.cli("HDEL", q.jobs, "odd")
    else:
        broker.nack(broker.claim("q")[0], delay=0.0)
    broker.enqueue_many("q", [JobSpec(b"x", priority=9), JobSpec(b"x", priority=0)])
    before = [server.cli("LRANGE", key, 0, -1) for key in q.ready]
    assert isinstance(broker.store.run(commands.claim(q, 3, 60_000, "a", levels="90")), LongWay)
    assert [server.cli("LRANGE", key, 0, -1) for key in q.ready] == before


def test_an_id_that_lies_twice_on_a_ready_list_has_one_lease_of_a_short_claim(server: Server, broker: Broker) -> None:
    first, second = (answer.id for answer in broker.enqueue_many("q", [b"1", b"2"]))
    q = broker.settings.keys("q")
    server.cli("LPUSH", q.ready[0], first)
    reply = broker.store.run(commands.claim(q, 3, 60_000, "a", levels="0"))
    assert isinstance(reply, commands.ClaimReply)
    assert [(grant.id, grant.record[-1:]) for grant in reply.grants] == [(first, b"1"), (second, b"2")]
    tokens = [server.cli("HGET", q.owners, grant.id).decode().split()[0] for grant in reply.grants]
    assert tokens == [grant.token for grant in reply.grants]
    assert server.cli("ZCARD", q.leases) == 2


def test_many_workers_at_once_get_each_job_once(server: Server, broker: Broker) -> None:
    ids = {answer.id for answer in broker.enqueue_many("q", [b"x"] * 1500)}
    done: list[str] = []

    def work() -> None:
        with Broker(server.url) as own:
            for turn in itertools.count(1):
                jobs = own.claim("q", 7)
                if not jobs:
                    return
                if turn % 3 == 0:
                    own.release(jobs)
                else:
                    assert set(own.ack_many(jobs)) == {Verdict.DONE}
                    done.extend(job.id for job in jobs)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    rest = broker.claim("q", 200)
    assert sorted([*done, *(job.id for job in rest)]) == sorted(ids)
    assert broker.audit("q").clean


# 3. Fencing

MOVES: dict[str, Callable[[Broker, Job], Any]] = {
    "ack": lambda broker, job: broker.ack(job),
    "nack": lambda broker, job: broker.nack(job, "late", delay=0.0),
    "extend": lambda broker, job: broker.extend(job),
    "release": lambda broker, job: broker.release(job),
    "finish": lambda broker, job: broker.finish("q", [job]),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_worker_that_slept_past_its_lease_cannot_touch_the_job_of_the_new_holder(
    server: Server, hasty: Broker, broker: Broker, move: str
) -> None:
    hasty.enqueue("q", b"x")
    slept = one(hasty)
    holder = one(broker)
    assert holder.id == slept.id
    assert holder.fence > slept.fence
    before = broker.show("q", holder.id)
    if move in ("ack", "nack"):
        with pytest.raises(LeaseLost, match=f"{slept.id}.*{move}"):
            MOVES[move](hasty, slept)
    elif move == "finish":
        assert MOVES[move](hasty, slept)[0] == [Verdict.LOST]
    else:
        assert MOVES[move](hasty, slept) == [Verdict.LOST]
    assert broker.show("q", holder.id) == before
    broker.ack(holder)


@pytest.mark.parametrize("move", MOVES)
def test_a_token_is_no_good_after_the_lease_was_reaped(hasty: Broker, move: str) -> None:
    hasty.enqueue("q", b"x")
    slept = one(hasty)
    eventually(lambda: hasty.reap("q"), "the end of the lease")
    before = hasty.show("q", slept.id)
    try:
        answer = MOVES[move](hasty, slept)
        assert (answer[0] if move == "finish" else answer) == [Verdict.LOST]
    except LeaseLost:
        assert move in ("ack", "nack")
    assert hasty.show("q", slept.id) == before


def test_the_fence_grows_with_every_claim_of_the_queue(broker: Broker) -> None:
    broker.enqueue_many("q", [b"x"] * 5)
    fences = []
    for _ in range(6):
        jobs = broker.claim("q", 3)
        fences += [job.fence for job in jobs]
        broker.nack(jobs[0], delay=0.0)
        broker.release(jobs[1:])
    broker.nack(one(broker), dead=True)
    assert broker.requeue("q") == 1
    fences += [job.fence for job in broker.claim("q", 5)]
    assert fences == sorted(set(fences))


# 4. Poison is bounded


def test_a_job_that_kills_its_workers_goes_to_dead_when_leases_are_reaped(hasty: Broker) -> None:
    hasty.enqueue("q", b"x", id="poison")
    for delivery in (1, 2):
        assert one(hasty).deliveries == delivery
        eventually(lambda: hasty.reap("q"), "the end of the lease")
    assert depths(hasty) == (0, 0, 0, 1)
    assert hasty.dead("q")[0].reason == "max_deliveries"


def test_a_job_that_kills_its_workers_goes_to_dead_when_others_claim(hasty: Broker) -> None:
    hasty.enqueue("q", b"x", id="poison")
    taken: list[Job] = []
    eventually(lambda: taken.extend(hasty.claim("q")) or hasty.stats("q").dead, "the burial")
    assert [job.deliveries for job in taken] == [1, 2]


def test_a_claim_buries_a_job_whose_deliveries_a_more_patient_broker_let_pass(server: Server, hasty: Broker) -> None:
    hasty.enqueue("q", b"x")
    with Broker(server.url, lease=0.1, max_deliveries=9) as patient:
        for _ in range(2):
            one(patient)
            eventually(lambda: patient.reap("q"), "the end of the lease")
        assert depths(patient) == (1, 0, 0, 0)
    assert hasty.claim("q") == []
    assert depths(hasty) == (0, 0, 0, 1)


def test_a_job_s_own_bound_wins(broker: Broker, hasty: Broker) -> None:
    broker.enqueue("q", b"x", max_deliveries=1)
    one(hasty)
    eventually(lambda: broker.reap("q"), "the end of the lease")
    assert depths(broker) == (0, 0, 0, 1)


def test_a_release_does_not_count_as_a_delivery_and_keeps_the_place(hasty: Broker) -> None:
    hasty.enqueue_many("q", [JobSpec(b"x", id=id) for id in "abc"])
    for _ in range(5):
        jobs = hasty.claim("q", 2)
        assert [(job.id, job.deliveries) for job in jobs] == [("a", 1), ("b", 1)]
        assert hasty.release(jobs) == [Verdict.DONE] * 2


def test_a_receipt_that_is_twice_in_a_batch_counts_once(broker: Broker) -> None:
    broker.enqueue_many("q", [b"x"] * 2)
    released, acked = broker.claim("q", 2)
    assert sorted(broker.release([released, released])) == [Verdict.DONE, Verdict.ALREADY]
    assert broker.ack_many([acked, acked]) == [Verdict.DONE, Verdict.ALREADY]
    assert depths(broker) == (1, 0, 0, 0)
    assert broker.stats("q").counters["processed"] == 1


def test_answered_failures_do_not_count_as_unanswered_deliveries(hasty: Broker) -> None:
    hasty.enqueue("q", b"x")
    for _ in range(6):
        assert hasty.nack(one(hasty), "failed", delay=0.0) is Verdict.DONE
    assert depths(hasty) == (1, 0, 0, 0)


# 5. Idempotent under a lost reply


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        yield proxy


@pytest.fixture
def unlucky(proxy: Proxy) -> Iterator[Broker]:
    """Connected through the proxy, and impatient. The server knows all scripts: what is cut is the reply to one."""
    with Broker(proxy.url, socket_timeout=0.5) as broker:
        for name in scripts.names():
            broker.store.raw("SCRIPT", "LOAD", scripts.load(name).text)
        broker.enqueue("other", b"x")
        yield broker


WAYS = [pytest.param({}, id="short"), pytest.param({"dedup_key": "k"}, id="long")]
"""Options of an enqueue that takes the short script, in a queue that has seen a job, and the long one."""


@pytest.fixture
def in_use(broker: Broker) -> None:
    broker.enqueue("q", b"x")
    broker.ack(one(broker))


@pytest.mark.usefixtures("in_use")
@pytest.mark.parametrize("options", WAYS)
def test_an_enqueue_whose_reply_is_lost_stores_one_job(proxy: Proxy, unlucky: Broker, options: dict[str, str]) -> None:
    proxy.cut_reply(b"EVALSHA")
    assert unlucky.enqueue("q", b"x", id="it", **options) == Enqueued("it")
    proxy.cut_reply(b"EVALSHA")
    assert [e.duplicate for e in unlucky.enqueue_many("q", [b"y"] * 3)] == [False] * 3
    assert proxy.pending == 0
    assert depths(unlucky) == (4, 0, 0, 0)
    assert unlucky.enqueue("q", b"x", id="it", **options) == Enqueued("it", duplicate=True)


@pytest.mark.usefixtures("in_use")
@pytest.mark.parametrize("options", WAYS)
def test_an_enqueue_that_is_sent_again_after_its_job_is_done_stores_nothing(
    proxy: Proxy, unlucky: Broker, broker: Broker, options: dict[str, str]
) -> None:
    proxy.swallow_reply(b"EVALSHA")
    answers: list[Enqueued] = []
    producer = threading.Thread(target=lambda: answers.append(unlucky.enqueue("q", b"x", id="it", **options)))
    producer.start()
    broker.ack(one(broker))
    assert not answers
    producer.join(30)
    assert answers == [Enqueued("it")]
    assert depths(broker) == (0, 0, 0, 0)
    assert broker.stats("q").counters["enqueued"] == 2  # with the one of before


@pytest.mark.usefixtures("in_use")
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("options", WAYS)
def test_an_enqueue_that_is_sent_again_is_not_taken_for_one_of_long_before(
    proxy: Proxy, unlucky: Broker, broker: Broker, options: dict[str, str], many: bool
) -> None:
    """Its id was used before, and its first send never came to the server."""

    def enqueue() -> Enqueued:
        if many:
            return unlucky.enqueue_many("q", [JobSpec(b"x", id="daily", **options)])[0]
        return unlucky.enqueue("q", b"x", id="daily", **options)

    assert enqueue() == Enqueued("daily")
    age_by(broker, "q", 120)
    proxy.cut_request(b"EVALSHA")
    assert enqueue() == Enqueued("daily", duplicate=True)  # that one still waits
    broker.ack(one(broker))
    age_by(broker, "q", 120)
    proxy.cut_request(b"EVALSHA")
    assert enqueue() == Enqueued("daily")
    assert proxy.pending == 0
    assert depths(broker) == (1, 0, 0, 0)


def test_a_claim_whose_reply_is_lost_gives_the_same_jobs_once(proxy: Proxy, unlucky: Broker) -> None:
    unlucky.enqueue_many("q", [b"x"] * 5)
    proxy.cut_reply(b"EVALSHA")
    jobs = unlucky.claim("q", 3)
    assert proxy.pending == 0
    assert [job.deliveries for job in jobs] == [1, 1, 1]
    assert depths(unlucky) == (2, 0, 3, 0)


def test_a_claim_whose_reply_is_lost_gives_the_same_jobs_in_the_same_order(proxy: Proxy, unlucky: Broker) -> None:
    def claimed(lose: bool) -> None:
        ids = [unlucky.enqueue("q", b"x", priority=priority).id for priority in (0, 0, 0, 9, 9)]
        if lose:
            proxy.cut_reply(b"EVALSHA")
        jobs = unlucky.claim("q", 5)
        assert [job.id for job in jobs] == [*ids[3:], *ids[:3]]
        assert unlucky.ack_many(jobs) == [Verdict.DONE] * 5

    claimed(False)  # from now on one command is all that a claim of this queue takes
    claimed(True)
    assert proxy.pending == 0


@pytest.mark.parametrize(
    ("move", "after"),
    [("ack", (0, 0, 0, 0)), ("nack", (1, 0, 0, 0)), ("extend", (0, 0, 1, 0)), ("release", (1, 0, 0, 0))],
)
def test_a_move_whose_reply_is_lost_happens_once_and_is_no_lost_lease(
    proxy: Proxy, unlucky: Broker, move: str, after: tuple[int, int, int, int]
) -> None:
    unlucky.enqueue("q", b"x")
    job = one(unlucky)
    proxy.cut_reply(b"EVALSHA")
    answer = MOVES[move](unlucky, job)
    assert proxy.pending == 0
    assert answer in (None, Verdict.ALREADY, [Verdict.ALREADY], [Verdict.DONE])
    assert depths(unlucky) == after
    counters = unlucky.stats("q").counters
    assert {counters.get(name, 0) for name in ("processed", "retried", "released")} <= {0, 1}


def test_a_finish_whose_reply_is_lost_acks_and_claims_once(proxy: Proxy, unlucky: Broker) -> None:
    unlucky.enqueue_many("q", [b"x"] * 4)
    done = unlucky.claim("q", 2)
    proxy.cut_reply(b"EVALSHA")
    acked, _nacked, claimed = unlucky.finish("q", done, [], 1)
    assert proxy.pending == 0
    assert acked == [Verdict.ALREADY] * 2
    assert len(claimed) == 1
    assert depths(unlucky) == (1, 0, 1, 0)


# 6. One clock


@pytest.mark.parametrize("move", ["nack", "finish"])
def test_a_job_that_a_nack_whose_reply_is_lost_took_to_dead_is_told_of_once(
    proxy: Proxy, unlucky: Broker, move: str
) -> None:
    told: list[str] = []

    class Mourner:
        @hookimpl
        def relay_job_dead(self, job: Job, reason: str) -> None:
            told.append(f"{job.id}: {reason}")

    unlucky.plugins.register(Mourner())
    unlucky.enqueue("q", b"x", id="it")
    job = one(unlucky)
    item = unlucky.operations.nack_of(job, "no", None, dead=True, reason="refused")

    def nack() -> Verdict:
        if move == "nack":
            return unlucky.nack(job, "no", dead=True, reason="refused")
        _acked, (verdict,), _claimed = unlucky.drive(unlucky.operations.finish("q", (), [(job, item)], 0))
        return verdict

    unlucky.store.raw("SCRIPT", "LOAD", scripts.load(move).text)
    proxy.cut_reply(b"EVALSHA")
    assert nack() is Verdict.DEAD
    assert proxy.pending == 0
    assert told == ["it: refused"]
    assert depths(unlucky) == (0, 0, 0, 1)
    assert nack() is Verdict.ALREADY  # a second one of the caller's own
    assert told == ["it: refused"]


@pytest.mark.parametrize("skew", [86_400.0, -86_400.0])
def test_a_client_whose_clock_is_a_day_off_changes_nothing(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + skew)
    broker.enqueue("q", b"later", delay=300.0)
    broker.enqueue("q", b"now")
    job = one(broker)
    assert job.payload == b"now"
    assert abs(job.created_at - right()) < 60
    assert job.age() < 60
    broker.nack(job, "again", delay=300.0)
    assert broker.claim("q") == []
    broker.enqueue("q", b"held")
    held = one(broker)
    assert broker.reap("q") == 0
    assert broker.extend(held) == [Verdict.DONE]
    for stored in (*broker.jobs("q", "delayed"), *broker.jobs("q", "inflight")):
        assert stored.due_at is not None
        assert 0 < stored.due_at - right() < 310
    assert depths(broker) == (0, 2, 1, 0)


def test_a_time_given_as_at_is_taken_by_the_server_s_clock(broker: Broker) -> None:
    now = broker.stats("q").now
    broker.enqueue("q", b"past", at=now - 5)
    broker.enqueue("q", b"future", at=now + 300)
    assert depths(broker) == (1, 1, 0, 0)


def test_a_worker_starts_no_job_whose_lease_is_over_by_its_own_monotonic_clock(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.enqueue_many("q", [b"x"] * 2)
    first, second = broker.claim("q", 2)
    held = Held()
    held.add(first)
    held.add(second)
    assert held.start(first)
    later = first.expires_at + 0.001
    monkeypatch.setattr("relay_core.worker.held.time.monotonic", lambda: later)
    assert not held.start(second)


# 10. Memory full is not work lost


def test_when_memory_is_full_only_enqueue_is_refused(server: Server) -> None:
    with Broker(server.url, retry_for=0.3, lease=0.2) as broker:
        broker.enqueue_many("q", [JobSpec(b"x", delay=0.01 if n == 9 else None) for n in range(10)])
        server.cli("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Unavailable, match="maxmemory"):
            broker.enqueue("q", b"x" * 100_000)
        with Broker(server.url, retry_for=0.0) as newcomer, pytest.raises(Unavailable, match="maxmemory"):
            newcomer.enqueue("q", b"x")
        jobs = broker.claim("q", 5)
        assert len(jobs) == 5
        assert broker.extend(jobs) == [Verdict.DONE] * 5
        broker.ack(jobs[0])
        assert broker.nack(jobs[1], "no", delay=60.0) is Verdict.DONE
        assert broker.nack(jobs[2], "no", dead=True) is Verdict.DEAD
        assert broker.release(jobs[3]) == [Verdict.DONE]
        eventually(lambda: broker.reap("q"), "the end of the last lease")
        eventually(lambda: broker.promote("q") or broker.stats("q").delayed == 1, "the due job")
        broker.finish("q", broker.claim("q", 2), [], 1)
        assert broker.audit("q").clean
        assert broker.cancel("q", jobs[1].id) == "delayed"
        assert broker.purge("q", ["dead"]) == 1
        server.cli("CONFIG", "SET", "maxmemory", "0")
        broker.enqueue("q", b"x")
        counters = broker.stats("q").counters
        assert (counters["enqueued"], counters["processed"], counters["reaped"]) == (11, 3, 1)


def test_a_server_that_may_evict_jobs_is_refused_by_the_setting_s_name(server: Server) -> None:
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with Broker(server.url) as broker, pytest.raises(UnsafeStore, match="maxmemory-policy"):
        broker.enqueue("q", b"x")
    assert server.cli("DBSIZE") == 0
