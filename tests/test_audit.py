"""Promise 9: the auditor finds each kind of damage, mends it and counts what it mended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from relay_core.broker import Broker
from relay_core.commands import Verdict
from relay_core.errors import LeaseLost
from relay_core.keys import QueueKeys
from relay_core.validation import JobSpec
from tests.servers import Server

Q = QueueKeys("relay", "q")


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    """A queue with jobs in every state: r ready, d delayed, i inflight, x dead, n ready after a failure."""
    with Broker(server.url) as broker:
        for id in ("i", "x", "n"):
            broker.enqueue("q", b"x", id=id, priority=5)
        inflight, dead, failed = broker.claim("q", 3)
        assert inflight.id == "i"
        broker.nack(dead, "no", dead=True)
        broker.nack(failed, "again", delay=0.0)
        broker.enqueue_many("q", [JobSpec(b"x", id="r", priority=5), JobSpec(b"x", id="d", delay=3600.0)])
        assert broker.audit("q").clean
        yield broker


DAMAGE: dict[str, tuple[list[tuple[object, ...]], dict[str, str], str | None]] = {
    # what is done to the store, what the audit finds, and the state of the last id found after the repair
    "taken off a ready list": ([("LREM", Q.ready[5], 0, "r")], {"r": "no_state"}, "ready"),
    "taken out of the delayed": ([("ZREM", Q.delayed, "d")], {"d": "no_state"}, "ready"),
    "taken out of the dead": ([("ZREM", Q.dead, "x")], {"x": "no_state"}, "ready"),
    "a lease dropped": ([("ZREM", Q.leases, "i")], {"i": "no_state"}, "ready"),
    "twice on a ready list": ([("RPUSH", Q.ready[5], "r")], {"r": "two_states"}, "ready"),
    "on two ready lists": ([("RPUSH", Q.ready[0], "r")], {"r": "two_states"}, "ready"),
    "ready and delayed": ([("ZADD", Q.delayed, 9e15, "r")], {"r": "two_states"}, "delayed"),
    "ready and dead": ([("RPUSH", Q.ready[5], "x")], {"x": "two_states"}, "dead"),
    "inflight and ready": ([("RPUSH", Q.ready[5], "i")], {"i": "two_states"}, "inflight"),
    "inflight, delayed and dead": (
        [("ZADD", Q.delayed, 9e15, "i"), ("ZADD", Q.dead, 1, "i")],
        {"i": "two_states"},
        "inflight",
    ),
    "on the list of another level": (
        [("LREM", Q.ready[5], 0, "r"), ("RPUSH", Q.ready[2], "r")],
        {"r": "wrong_list"},
        "ready",
    ),
    "a ready job's record dropped": ([("HDEL", Q.jobs, "r")], {"r": "no_record"}, None),
    "a delayed job's record dropped": ([("HDEL", Q.jobs, "d")], {"d": "no_record"}, None),
    "a dead job's record dropped": ([("HDEL", Q.jobs, "x")], {"x": "no_record"}, None),
    "an inflight job's record dropped": ([("HDEL", Q.jobs, "i")], {"i": "no_record"}, None),
    "a lease without a holder": ([("HDEL", Q.owners, "i")], {"i": "no_lease"}, "ready"),
    "a lease of a job that failed": (
        [("LREM", Q.ready[5], 0, "n"), ("ZADD", Q.leases, 9e15, "n")],
        {"n": "no_lease"},
        "ready",
    ),
    "held, but on a ready list": (
        [("ZREM", Q.leases, "i"), ("RPUSH", Q.ready[5], "i")],
        {"i": "no_lease"},
        "ready",
    ),
    "held, but delayed": (
        [("ZREM", Q.leases, "i"), ("ZADD", Q.delayed, 9e15, "i")],
        {"i": "no_lease"},
        "delayed",
    ),
    "held, but dead": ([("ZREM", Q.leases, "i"), ("ZADD", Q.dead, 9e15, "i")], {"i": "no_lease"}, "dead"),
    "a left-over delivery state": ([("HSET", Q.owners, "gone", "1:1:a 0 r")], {"gone": "leftover"}, None),
    "a left-over burial to tell of": ([("ZADD", Q.untold, 1, "gone")], {"gone": "leftover"}, None),
    "a burial to tell of, of a job that is ready": ([("ZADD", Q.untold, 1, "r")], {"r": "leftover"}, "ready"),
    "a burial to tell of, of a job that is inflight and dead": (
        [("ZADD", Q.untold, 1, "i"), ("ZADD", Q.dead, 1, "i")],
        {"i": "two_states"},
        "inflight",
    ),
    "a left-over error": ([("HSET", Q.errors, "gone", "1 retry\nno")], {"gone": "leftover"}, None),
    "held, but delayed and dead": (
        [("ZREM", Q.leases, "i"), ("ZADD", Q.delayed, 9e15, "i"), ("ZADD", Q.dead, 9e15, "i")],
        {"i": "two_states"},
        "dead",
    ),
    "several at once": (
        [("HDEL", Q.jobs, "x"), ("ZREM", Q.delayed, "d")],
        {"d": "no_state", "x": "no_record"},
        None,
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_mended_and_counted(server: Server, broker: Broker, kind: str) -> None:
    done, findings, state = DAMAGE[kind]
    for command in done:
        server.cli(*command)
    seen = broker.audit("q", repair=False)
    assert (dict(seen.findings), seen.repaired) == (findings, False)
    assert dict(broker.audit("q", repair=False).findings) == findings, "looking changed something"
    assert broker.audit("q").findings == findings
    assert broker.stats("q").counters["repaired"] == len(findings)
    assert broker.audit("q").clean
    stored = broker.show("q", max(findings))
    assert (stored and stored.state) == state


def test_every_job_that_was_mended_runs(server: Server, broker: Broker) -> None:
    for kind in ("taken off a ready list", "a lease dropped", "taken out of the delayed"):
        for command in DAMAGE[kind][0]:
            server.cli(*command)
    server.cli("DEL", Q.marker)
    broker.audit("q")
    assert server.cli("ZCARD", Q.marker) == 1, "a worker is woken"
    jobs = broker.claim("q", 10, wait=5.0)
    assert sorted(job.id for job in jobs) == ["d", "i", "n", "r"]
    assert len(broker.ack_many(jobs)) == 4
    assert broker.audit("q").clean


def test_an_audit_finds_levels_that_claims_have_forgotten(server: Server, broker: Broker) -> None:
    server.cli("HSET", Q.config, "levels", "")
    broker.audit("q")
    assert sorted(job.id for job in broker.claim("q", 10)) == ["n", "r"]


def test_an_audit_finds_a_due_time_that_was_lost(server: Server, broker: Broker) -> None:
    server.cli("ZADD", Q.delayed, 1, "d")
    server.cli("HDEL", Q.config, "due")
    assert broker.claim("q", 10)
    broker.audit("q")
    assert [job.id for job in broker.claim("q", 10)] == ["d"]


@pytest.mark.parametrize("end", ["nack", "release"])
def test_a_job_whose_record_was_lost_while_it_was_held_is_nobody_s(broker: Broker, end: str) -> None:
    broker.enqueue("own", b"x")
    (job,) = broker.claim("own")
    broker.store.raw("HDEL", broker.settings.keys("own").jobs, job.id)
    if end == "nack":
        with pytest.raises(LeaseLost):
            broker.nack(job, "failed", delay=0.0)
    else:
        assert broker.release(job) == [Verdict.LOST]
    assert set(broker.audit("own").findings.values()) == {"no_record"}


@pytest.mark.parametrize("count", [1, 2])
def test_a_claim_passes_over_an_id_without_a_record(broker: Broker, count: int) -> None:
    broker.enqueue_many("own", [b"first", b"x"])
    assert len(broker.claim("own")) == 1  # it knows the levels from now on, and goes the short way
    broker.store.raw("LPUSH", broker.settings.keys("own").ready[0], "lost")
    assert [job.payload for _ in range(2) for job in broker.claim("own", count)] == [b"x"]


def test_an_audit_of_a_queue_at_work_finds_nothing(broker: Broker) -> None:
    """Jobs move between the reads of an audit; the script has the last word."""
    flow_of: list[Callable[[], object]] = [
        lambda: broker.enqueue_many("q", [b"x"] * 3),
        lambda: [broker.nack(job, delay=0.0) for job in broker.claim("q", 2)],
        lambda: broker.ack_many(broker.claim("q", 2)),
        lambda: broker.release(broker.claim("q", 2)),
    ]
    reads = 0
    perform = broker._perform

    def busy(step: object) -> object:
        nonlocal reads
        if not moving:
            moving.append(True)
            flow_of[reads % 4]()
            moving.pop()
            reads += 1
        return perform(step)

    moving: list[bool] = []
    broker._perform = busy  # type: ignore[method-assign]
    for _ in range(5):
        assert broker.audit("q").findings == {}
    assert reads > 50
