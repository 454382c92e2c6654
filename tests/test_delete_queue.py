"""A queue that holds no job can be deleted, and nothing is hidden or lost where somebody still uses it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress

import pytest

from relay_core import Broker, JobSpec, maintenance, scripts
from relay_core.operations import Raw
from tests.command_line import Cli
from tests.proxy import Proxy, to_port
from tests.servers import Server


def use_all_of(broker: Broker) -> None:
    """Everything that a queue may leave behind."""
    broker.enqueue("q", b"1", dedup_key="a", dedup_for=600)
    broker.enqueue("q", b"2", dedup_key="b", delay=0.001)
    broker.limit("q", rate=1000, max_inflight=100)
    broker.schedule("s", "q", b"3", every=3600, missed="all")
    for job in broker.claim("q", 2, wait=5.0) + broker.claim("q", 2, wait=5.0):
        broker.nack(job, "why", 0)
    while jobs := broker.claim("q", 2, wait=0.05):
        broker.ack_many(jobs)


def test_an_empty_queue_leaves_nothing(broker: Broker) -> None:
    use_all_of(broker)
    broker.unschedule("s")
    assert broker.queues() == ["q"]
    assert broker.stats("q").counters["processed"] == 2
    for level in broker.settings.keys("q").ready:  # of a store that lost a write: an id that names no job
        broker.store.raw("RPUSH", level, "lost")
    assert broker.delete_queue("q") is True
    assert broker.queues() == []
    assert broker.store.raw("KEYS", "*{q:*") == []
    assert broker.stats("q").counters == {}


@pytest.mark.parametrize("state", ["ready", "delayed", "inflight", "dead"])
def test_a_queue_with_a_job_in_any_state_stays_as_it_is(broker: Broker, state: str) -> None:
    broker.enqueue("q", b"1", delay=60 if state == "delayed" else None)
    held = broker.claim("q") if state in ("inflight", "dead") else []
    if state == "dead":
        broker.nack(held[0], "why", dead=True)
    before = broker.store.raw("KEYS", "*")
    assert broker.delete_queue("q") is False
    assert broker.queues() == ["q"]
    assert getattr(broker.stats("q"), state) == 1
    assert set(broker.store.raw("KEYS", "*")) == set(before)
    assert broker.audit("q").clean


def test_a_queue_that_never_was_is_gone_too(broker: Broker) -> None:
    assert broker.delete_queue("q") is True
    assert broker.queues() == []


@pytest.mark.parametrize(
    "enqueue",
    [
        lambda broker: broker.enqueue("q", b"x"),
        lambda broker: broker.enqueue("q", b"x", delay=60),
        lambda broker: broker.enqueue_many("q", [JobSpec(b"x"), JobSpec(b"y", dedup_key="k")]),
    ],
    ids=["straight", "delayed", "many"],
)
def test_who_has_enqueued_before_and_does_so_again_makes_a_new_queue_that_is_shown(
    server: Server, broker: Broker, enqueue: Callable[[Broker], object]
) -> None:
    broker.enqueue("q", b"first")
    with Broker(server.url) as operator:
        broker.ack(broker.claim("q")[0])
        assert operator.delete_queue("q")
        enqueue(broker)
        assert operator.queues() == ["q"]
        assert operator.stats("q").pending > 0
        assert operator.audit("q").clean


@pytest.mark.parametrize("options", [{}, {"delay": 60.0}], ids=["straight", "delayed"])
def test_settings_that_were_made_meanwhile_do_not_hide_the_new_queue(
    server: Server, broker: Broker, options: dict[str, float]
) -> None:
    broker.enqueue("q", b"first")
    with Broker(server.url) as operator:
        broker.ack(broker.claim("q")[0])
        assert operator.delete_queue("q")
        operator.pause("q")
        broker.enqueue("q", b"x", **options)
        assert operator.queues() == ["q"]


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_a_lost_reply_does_not_hide_the_new_queue(redis_server: Server, many: bool) -> None:
    """The first send makes the queue, and the second one finds it."""
    with Proxy(to_port(redis_server.port)) as proxy, Broker(redis_server.url) as operator, Broker(proxy.url) as broker:
        broker.enqueue("q", b"first")
        operator.ack(operator.claim("q")[0])
        assert operator.delete_queue("q")
        proxy.cut_reply(scripts.load("enqueue").sha.encode())
        if many:
            broker.enqueue_many("q", [b"x", b"y"])
        else:
            broker.enqueue("q", b"x", delay=60.0)
        assert proxy.pending == 0
        assert operator.queues() == ["q"]


def test_one_that_was_paused_or_limited_is_neither_any_more(broker: Broker) -> None:
    broker.enqueue("q", b"1")
    broker.ack(broker.claim("q")[0])
    broker.limit("q", max_inflight=1)
    broker.pause("q")
    assert broker.delete_queue("q")
    broker.enqueue_many("q", [b"1", b"2"])
    assert [job.payload for job in broker.claim("q", 2)] == [b"1", b"2"]


def test_a_worker_that_waits_on_it_gets_what_comes_later(server: Server, broker: Broker) -> None:
    broker.enqueue("q", b"1")
    broker.ack(broker.claim("q")[0])
    assert broker.claim("q") == []
    with Broker(server.url) as operator:
        assert operator.delete_queue("q")
        operator.enqueue("q", b"2")
    assert [job.payload for job in broker.claim("q", wait=10.0)] == [b"2"]


def test_a_job_that_comes_while_its_queue_is_deleted_is_not_hidden(server: Server, broker: Broker) -> None:
    """Whoever enqueues puts the name back before it is taken out: then who deletes sees the queue, and puts it back."""
    broker.enqueue("q", b"first")
    broker.ack(broker.claim("q")[0])
    with Broker(server.url) as operator:
        flow = maintenance.delete_queue(operator.operations, "q")
        answer = operator.store.run(next(flow))
        broker.enqueue("q", b"meanwhile")
        steps = []
        with suppress(StopIteration):
            while True:
                step = flow.send(answer)
                assert isinstance(step, Raw)
                steps.append(step.args[0])
                answer = operator.store.raw(*step.args)
    assert steps == ["SREM", "EXISTS", "SADD"]
    assert broker.queues() == ["q"]
    assert broker.claim("q")[0].payload == b"meanwhile"


def test_the_command_forgets_a_name_and_says_what_keeps_another(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mistyped", b"1")
    broker.ack(broker.claim("mistyped")[0])
    assert "queue 'mistyped' removed" in cli.run("queue", "rm", "mistyped").stdout
    assert "'mistyped'" in cli.run("queue", "rm", "mistyped", code=1).stderr
    name = "it's in use"
    broker.enqueue(name, b"1")
    broker.nack(broker.claim(name)[0], "why", dead=True)
    broker.enqueue(name, b"2")
    told = cli.run("queue", "rm", name, code=1).stderr
    assert "holds jobs: 1 ready, 1 dead" in told
    assert f"relay queue purge {shlex.quote(name)} --state ready --state dead" in told
    cli.run("queue", "purge", name, "--state", "ready", "--state", "dead", "--yes")
    assert cli.json("queue", "rm", name) == {"queue": name, "removed": True}
    assert broker.queues() == []
