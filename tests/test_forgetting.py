"""What is kept for a time leaves the store when that is over, however much of it there is."""

from __future__ import annotations

import pytest

from relay_core import Broker, JobSpec, commands
from relay_core.keys import QueueKeys
from relay_core.operations import burials, enqueueing

Q = QueueKeys("relay", "q")
MANY = 1000
DAY = 86_400_000


def pass_a_month(broker: Broker) -> None:
    broker.store.run(commands.shift(Q, 30 * DAY, leases=True))


def claim_until_all_is_done(broker: Broker) -> None:
    """As a worker does: it comes again at once where a claim says so."""
    while broker.claim("q").retry_after == 0.0:
        pass


def test_timed_dedup_keys_do_not_pile_up(broker: Broker) -> None:
    """One claim drops a bounded number, and the next one that has to look may be a lease's time away."""
    broker.enqueue_many("q", [JobSpec(b"x", dedup_key=f"k{i}", dedup_for=60.0) for i in range(MANY)])
    while jobs := broker.claim("q", 200):
        broker.ack_many(jobs)
    pass_a_month(broker)
    claim_until_all_is_done(broker)
    assert broker.store.raw("HLEN", Q.dedup) == broker.store.raw("ZCARD", Q.dedup_expiry) == 0


def test_old_dead_jobs_do_not_pile_up(broker: Broker) -> None:
    broker.enqueue_many("q", [b"x"] * MANY)
    while jobs := broker.claim("q", 200):
        for job in jobs:
            broker.nack(job, dead=True)
    pass_a_month(broker)
    claim_until_all_is_done(broker)
    assert broker.stats("q").dead == 0
    assert broker.stats("q").counters["forgotten"] == MANY
    assert broker.audit("q").clean


def test_a_reap_leaves_the_rest_to_the_next_claims(broker: Broker) -> None:
    broker.enqueue_many("q", [JobSpec(b"x", dedup_key=f"k{i}", dedup_for=60.0) for i in range(MANY)])
    broker.purge("q")
    pass_a_month(broker)
    broker.reap("q")
    assert broker.store.raw("HLEN", Q.dedup) == MANY - 200
    claim_until_all_is_done(broker)
    assert broker.store.raw("HLEN", Q.dedup) == 0


def test_a_process_remembers_a_bounded_number_of_the_queues_that_it_used(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lives for long may use one per client; of a queue that it has forgotten, it learns anew."""
    for module in (burials, enqueueing):
        monkeypatch.setattr(module, "MOST", 5)
    names = [f"q{n}" for n in range(23)]
    for _ in range(2):
        for name in names:
            broker.enqueue(name, b"x")
            broker.ack(broker.claim(name)[0])
    assert 0 < len(broker.operations._seen) <= 5
    assert 0 < len(broker.operations._registered) <= 5
    assert sorted(broker.queues()) == sorted(names)
