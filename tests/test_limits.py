"""Limits that all workers share, dedup, how long the dead are kept, and when a failed job runs again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from relay_core import commands, hookimpl
from relay_core.broker import Broker
from relay_core.clock import sent_now
from relay_core.commands import NewJob, Verdict
from relay_core.job import Arrival, Claimed, Enqueued, Job, Options, Record
from relay_core.keys import LAYOUT
from relay_core.retry import RetryPolicy
from relay_core.validation import JobSpec
from tests.servers import Server, eventually


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


@pytest.fixture
def other(server: Server) -> Iterator[Broker]:
    """Another process's broker, as far as the server can tell."""
    with Broker(server.url) as broker:
        yield broker


# rate and max_inflight


def test_two_brokers_keep_to_one_rate_and_are_told_when_to_ask_again(broker: Broker, other: Broker) -> None:
    broker.limit("q", rate=0.01, burst=3)
    broker.enqueue_many("q", [b"x"] * 10)
    assert (len(broker.claim("q", 2)), len(other.claim("q", 5))) == (2, 1)
    for one in (broker, other):
        refused = one.claim("q")
        assert (refused, refused.limited) == ([], "rate")
        assert refused.retry_after == pytest.approx(100, abs=20)
    broker.limit("q")
    assert len(other.claim("q", 10)) == 7


def test_a_rate_that_is_set_again_as_it_was_fills_no_bucket(broker: Broker) -> None:
    broker.enqueue_many("q", [b"x"] * 10)
    broker.limit("q", rate=0.01, burst=3)
    assert len(broker.claim("q", 10)) == 3
    broker.limit("q", rate=0.01, burst=3, max_inflight=100)
    assert broker.claim("q", 10).limited == "rate"
    broker.limit("q", rate=0.02, burst=3)
    assert len(broker.claim("q", 10)) == 3


def test_a_rate_refills_though_the_servers_clock_went_back(broker: Broker, server: Server) -> None:
    broker.limit("q", rate=1000.0, burst=1)
    broker.enqueue_many("q", [b"x"] * 2)
    assert len(broker.claim("q", 10)) == 1
    tomorrow = int(server.cli("TIME")[0]) * 1000 + 86_400_000
    server.cli("HSET", broker.settings.keys("q").config, "stamp", tomorrow)
    refused = broker.claim("q", 10)
    assert (refused, refused.limited, refused.retry_after) == ([], "rate", 0.001), "not tomorrow"
    eventually(lambda: broker.claim("q", 10), "a token")


def test_who_claims_when_a_rate_lets_it_wakes_those_who_were_not_told_when(broker: Broker) -> None:
    broker.limit("q", rate=1.0, burst=2)
    broker.enqueue_many("q", [b"x"] * 5)
    marker = broker.settings.keys("q").marker

    def claim(woken: bool) -> Claimed:
        return broker.drive(broker.operations.claim(("q",), 1, 0.0, woken))

    assert len(claim(False)) == len(claim(False)) == 1
    broker.store.raw("ZPOPMIN", marker)
    refused = claim(True)
    assert (refused.limited, broker.store.raw("EXISTS", marker)) == ("rate", 0)
    eventually(lambda: claim(False), "a token: it looks again when it was told to, and no wake-up has come")
    assert broker.store.raw("EXISTS", marker) == 1, "another one may claim, and sleeps"


def test_a_rate_refills_as_time_passes(broker: Broker) -> None:
    broker.limit("q", rate=10.0, burst=1)
    broker.enqueue_many("q", [b"x"] * 3)
    began = time.monotonic()
    for _ in range(3):
        assert len(broker.claim("q", wait=20.0)) == 1
    assert time.monotonic() - began >= 0.19


def test_max_inflight_holds_for_all_brokers_until_one_of_the_jobs_ends(broker: Broker, other: Broker) -> None:
    broker.limit("q", max_inflight=3)
    broker.enqueue_many("q", [b"x"] * 9)
    held = broker.claim("q", 2)
    assert len(other.claim("q", 5)) == 1
    refused = other.claim("q", 5)
    assert (refused, refused.limited) == ([], "max_inflight")
    assert refused.retry_after == 1.0, "not only when a lease ends"
    broker.ack(held[0])
    broker.nack(held[1], delay=60.0)
    assert len(other.claim("q", 5)) == 2
    broker.limit("q")
    assert len(other.claim("q", 9)) == 4


@pytest.mark.parametrize("how", ["ack", "ack_many", "finish", "ack_plain"])
def test_the_end_of_a_job_wakes_a_worker_that_max_inflight_held_back(broker: Broker, how: str) -> None:
    broker.limit("q", max_inflight=1)
    broker.enqueue_many("q", [b"x"] * 2)
    (held,) = broker.claim("q")
    marker = broker.settings.keys("q").marker
    broker.store.raw("ZPOPMIN", marker)
    if how == "finish":
        broker.finish("q", [held])
    elif how == "ack_plain":
        short = commands.ack_plain(broker.settings.keys("q"), [commands.Ack(held.id, held.token)])
        assert broker.store.run(short) == commands.LongWay(resent=False)
        broker.ack(held)
    else:
        broker.ack(held) if how == "ack" else broker.ack_many([held])
    assert broker.store.raw("ZCARD", marker) == 1


def test_a_queue_that_has_settings_alone_says_which_relay_wrote_them(broker: Broker) -> None:
    broker.pause("q")
    assert broker.store.raw("HGET", broker.settings.keys("q").config, "v") == str(LAYOUT).encode()


def test_a_pause_stops_claims_of_all_brokers_and_no_enqueue(broker: Broker, other: Broker) -> None:
    broker.enqueue("q", b"x")
    broker.pause("q")
    other.enqueue("q", b"y")
    refused = other.claim("q", 5)
    assert (refused, refused.limited) == ([], "paused")
    assert other.stats("q").paused
    marker = broker.settings.keys("q").marker
    broker.store.raw("DEL", marker)
    broker.resume("q")
    assert broker.store.raw("ZCARD", marker) == 1, "a worker is woken"
    assert len(other.claim("q", 5)) == 2


def test_the_most_urgent_is_claimed_first_and_the_oldest_among_equals(broker: Broker) -> None:
    levels = [0, 9, 5, 9, 0, 1]
    broker.enqueue_many("q", [JobSpec(str(n).encode(), priority=level) for n, level in enumerate(levels)])
    assert [job.payload for job in broker.claim("q", 6)] == [b"1", b"3", b"2", b"5", b"0", b"4"]


# dedup

KEYS = ["k", 'quote"d', "two words", "ключ 🔑", "line\nbreak", "a\\b"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("end", ["ack", "cancel", "purge", "dead", "finish"])
def test_a_dedup_key_is_taken_until_its_job_is_over(broker: Broker, key: str, end: str) -> None:
    first = broker.enqueue("q", b"x", dedup_key=key, headers={"note": '"dedup_key":"wrong"'})
    assert broker.enqueue("q", b"x", dedup_key=key) == Enqueued(first.id, duplicate=True)
    assert not broker.enqueue("q", b"x", dedup_key=key + "!").duplicate
    if end == "cancel":
        assert broker.cancel("q", first.id) == "ready"
    elif end == "purge":
        assert broker.purge("q") == 2
    else:
        (job,) = broker.claim("q")
        broker.nack(job, delay=0.0)
        assert broker.enqueue("q", b"x", dedup_key=key).duplicate
        _skipped, job = broker.claim("q", 2)
        if end == "ack":
            broker.ack(job)
        elif end == "finish":
            broker.finish("q", [job])
        else:
            broker.nack(job, dead=True)
    assert not broker.enqueue("q", b"x", dedup_key=key).duplicate


@pytest.mark.parametrize("key", [*KEYS, ',"headers":{'])
@pytest.mark.parametrize("end", ["cancel", "purge", "dead"])
def test_a_header_that_is_no_valid_text_keeps_no_dedup_key(broker: Broker, key: str, end: str) -> None:
    first = broker.enqueue("q", b"x", dedup_key=key, headers={"file": "caf\udce9.txt", "dedup_key": "wrong"})
    if end == "cancel":
        assert broker.cancel("q", first.id) == "ready"
    elif end == "purge":
        assert broker.purge("q") == 1
    else:
        broker.nack(broker.claim("q")[0], dead=True)
    assert not broker.enqueue("q", b"x", dedup_key=key).duplicate


@pytest.mark.parametrize("key", KEYS)
def test_a_job_that_is_requeued_takes_its_dedup_key_again_where_that_is_free(broker: Broker, key: str) -> None:
    first = broker.enqueue("q", b"x", dedup_key=key)
    broker.nack(broker.claim("q")[0], dead=True)
    assert broker.requeue("q") == 1
    assert broker.enqueue("q", b"x", dedup_key=key) == Enqueued(first.id, duplicate=True)
    broker.nack(broker.claim("q")[0], dead=True)
    second = broker.enqueue("q", b"x", dedup_key=key)
    assert not second.duplicate
    assert broker.requeue("q") == 1
    assert broker.enqueue("q", b"x", dedup_key=key) == Enqueued(second.id, duplicate=True)


def test_a_timed_dedup_key_is_taken_for_its_time_whether_the_job_is_done_or_not(broker: Broker) -> None:
    first = broker.enqueue("q", b"x", dedup_key="k", dedup_for=0.6)
    broker.ack(broker.claim("q")[0])
    assert broker.enqueue("q", b"x", dedup_key="k", dedup_for=0.6) == Enqueued(first.id, duplicate=True)
    eventually(lambda: not broker.enqueue("q", b"x", dedup_key="k", dedup_for=60.0).duplicate, "the key's end")
    assert broker.stats("q").ready == 1


def test_a_requeued_job_holds_its_dedup_key_until_it_is_done_though_another_s_time_for_it_is_over(
    broker: Broker,
) -> None:
    first = broker.enqueue("q", b"x", dedup_key="k")
    broker.nack(broker.claim("q")[0], dead=True)
    broker.enqueue("q", b"x", dedup_key="k", dedup_for=0.001)
    broker.ack(broker.claim("q")[0])
    q = broker.settings.keys("q")
    broker.store.raw("ZADD", q.dedup_expiry, 1, "k")
    assert broker.requeue("q") == 1
    assert broker.enqueue("q", b"x", dedup_key="k") == Enqueued(first.id, duplicate=True)


def test_of_two_jobs_of_one_id_that_are_sent_again_the_first_is_the_one_that_was_stored(broker: Broker) -> None:
    keys, job = broker.settings.keys("q"), NewJob("a", "", "", Record.pack(0, Options(), b"x"))
    for since in (None, sent_now() - 1):
        answer = broker.store.run(commands.enqueue(keys, [job, job], since=since))
        assert list(answer) == [Enqueued("a"), Enqueued("a", duplicate=True)]


def test_a_purge_that_leaves_some_drops_no_more_than_it_was_asked_to(broker: Broker) -> None:
    keys = broker.settings.keys("q")
    broker.enqueue_many("q", [b"x"] * 5)
    answers = [broker.store.run(commands.purge(keys, "ready", 2, keep=1)) for _ in range(3)]
    assert answers == [2, 2, 0]


def test_of_two_jobs_with_one_dedup_key_in_a_batch_the_first_is_stored(broker: Broker) -> None:
    first, second = broker.enqueue_many("q", [JobSpec(b"1", dedup_key="k"), JobSpec(b"2", dedup_key="k")])
    assert second == Enqueued(first.id, duplicate=True)
    assert [job.payload for job in broker.claim("q", 5)] == [b"1"]


def test_an_id_that_is_stored_answers_for_itself_whoever_holds_its_dedup_key(broker: Broker) -> None:
    broker.enqueue("q", b"x", id="mine", dedup_key="k", dedup_for=0.001)
    eventually(lambda: not broker.enqueue("q", b"x", id="next", dedup_key="k").duplicate, "the key's end")
    assert broker.enqueue("q", b"x", id="mine", dedup_key="k") == Enqueued("mine", duplicate=True)
    assert broker.enqueue("q", b"x", id="third", dedup_key="k") == Enqueued("next", duplicate=True)


# the dead


def test_dead_jobs_are_dropped_after_the_time_for_which_they_are_kept(server: Server, broker: Broker) -> None:
    broker.enqueue_many("q", [b"x"] * 3)
    for job in broker.claim("q", 3):
        broker.nack(job, "no", dead=True)
    assert broker.reap("q") == 0
    assert broker.stats("q").dead == 3
    with Broker(server.url, keep_dead=1.0) as forgetful:
        eventually(lambda: forgetful.reap("q") == 0 and forgetful.stats("q").dead == 0, "the end of the dead")
    assert [server.cli("HLEN", key) for q in (broker.settings.keys("q"),) for key in (q.jobs, q.owners, q.errors)] == [
        0,
        0,
        0,
    ]
    assert broker.stats("q").counters["forgotten"] == 3


def test_a_requeued_job_begins_anew(broker: Broker) -> None:
    broker.enqueue("q", b"x", id="it", max_retries=1)
    broker.nack(broker.claim("q")[0], "one", delay=0.0)
    assert broker.nack(broker.claim("q")[0], ValueError("two"), delay=0.0) is Verdict.DEAD
    (dead,) = broker.dead("q")
    assert (dead.reason, dead.error, dead.retries, dead.deliveries) == ("max_retries", "ValueError('two')", 1, 2)
    assert broker.requeue("q", ["it", "unknown"]) == 1
    (job,) = broker.claim("q")
    assert (job.retries, job.deliveries) == (0, 1)
    assert broker.show("q", "it").error is None  # type: ignore[union-attr]
    assert broker.nack(job, delay=0.0) is Verdict.DONE


# when a failed job runs again


def waits(broker: Broker, queue: str, **options: object) -> float:
    """Seconds for which a job of this queue waits after its first failure."""
    broker.enqueue(queue, b"x", **options)
    broker.nack(broker.claim(queue)[0], "failed")
    (stored,) = broker.jobs(queue, "delayed")
    assert stored.due_at is not None
    return stored.due_at - broker.stats(queue).now


def fixed(seconds: float, max_retries: int = 20) -> RetryPolicy:
    return RetryPolicy(base=seconds, ceiling=seconds, jitter=False, max_retries=max_retries)


class Patience:
    def __init__(self, answer: object) -> None:
        self.answer, self.asked = answer, 0.0

    @hookimpl
    def relay_retry_delay(self, job: Job, error: object, delay: float) -> object:
        self.asked = delay
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_job_s_own_policy_wins_over_its_queue_s_and_that_over_the_broker_s(server: Server) -> None:
    with Broker(server.url, retry=fixed(1000), queue_retry={"slow": fixed(2000)}) as broker:
        assert waits(broker, "plain") == pytest.approx(1000, abs=20)
        assert waits(broker, "slow") == pytest.approx(2000, abs=20)
    with Broker(server.url, retry=fixed(1000), queue_retry={"own": fixed(2000)}) as broker:
        assert waits(broker, "own", retry=fixed(3000)) == pytest.approx(3000, abs=20)


@pytest.mark.parametrize(
    ("answer", "seconds"), [(500, 500), (None, 1000), (ValueError("its own trouble"), 1000), ("soon", 1000), (-1, 1000)]
)
def test_a_hook_decides_the_delay_unless_it_has_no_answer_or_a_useless_one(
    server: Server, answer: object, seconds: float
) -> None:
    patience = Patience(answer)
    with Broker(server.url, retry=fixed(1000), plugins=[patience]) as broker:
        assert waits(broker, "q") == pytest.approx(seconds, abs=20)
    assert patience.asked == 1000


def test_a_delay_given_to_nack_is_not_asked_of_anyone(server: Server) -> None:
    patience = Patience(500)
    with Broker(server.url, plugins=[patience]) as broker:
        broker.enqueue("q", b"x")
        broker.nack(broker.claim("q")[0], delay=50.0)
        assert broker.stats("q").delayed == 1
    assert patience.asked == 0.0


def test_a_job_that_fails_with_a_new_body_is_as_old_as_before(broker: Broker) -> None:
    broker.adopt([Arrival("q", "a", b"x", created_at=1_600_000_000.0)])
    broker.nack(broker.claim("q")[0], "failed", delay=0.0, payload=b"y")
    (job,) = broker.claim("q")
    assert (job.payload, job.created_at) == (b"y", 1_600_000_000.0)


@pytest.mark.parametrize("own", [None, 1])
def test_after_the_last_retry_a_job_goes_to_dead(server: Server, own: int | None) -> None:
    with Broker(server.url, retry=fixed(0, max_retries=3)) as broker:
        broker.enqueue("q", b"x", max_retries=own)
        verdicts = []
        while jobs := broker.claim("q"):
            verdicts.append(broker.nack(jobs[0], "failed"))
        assert verdicts == [Verdict.DONE] * (3 if own is None else own) + [Verdict.DEAD]
        assert [job.reason for job in broker.dead("q")] == ["max_retries"]
