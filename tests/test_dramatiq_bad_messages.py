"""Messages that no Dramatiq has written end alone: the worker lives, and the messages beside them run once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import dramatiq
import pytest

from relay_adapters.dramatiq import RelayBroker
from relay_adapters.dramatiq.plugin import ADAPTER, HEADER
from tests.command_line import Cli
from tests.dramatiq_workers import running
from tests.hostile import ODD, SPOILED, put
from tests.servers import Server, eventually


def payload(**changed: Any) -> bytes:
    """A message with other fields; a value of `...` is left out."""
    fields: dict[str, Any] = {
        "queue_name": "default", "actor_name": "work", "args": ["odd"], "kwargs": {}, "options": {},
        "message_id": "m", "message_timestamp": 1_700_000_000_000,
    }  # fmt: skip
    fields.update(changed)
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


NO_MESSAGE: Mapping[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{broken",
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "a text": b'"x"',
    "deep": b"[" * 100_000,
    "a field too many": payload(more=1),
    "actor missing": payload(actor_name=...),
    "actor a list": payload(actor_name=[1]),
    "actor a dict": payload(actor_name={}),
    "actor unknown": payload(actor_name="nobody"),
    "args missing": payload(args=...),
    "args a number": payload(args=5),
    "args null": payload(args=None),
    "kwargs missing": payload(kwargs=...),
    "kwargs a list": payload(kwargs=[1]),
    "kwargs a text": payload(kwargs="x"),
    "kwargs null": payload(kwargs=None),
    "options missing": payload(options=...),
    "options a list": payload(options=[1]),
    "options a text": payload(options="x"),
    "options null": payload(options=None),
    "retries a text": payload(args=["fail"], options={"retries": "x"}),
    "retries a list": payload(args=["fail"], options={"retries": [1]}),
    "max_retries a text": payload(args=["fail"], options={"max_retries": "x"}),
    "max_retries below zero": payload(args=["fail"], options={"max_retries": -5}),
    "min_backoff a text": payload(args=["fail"], options={"min_backoff": "x"}),
    "throws a text": payload(args=["fail"], options={"throws": "x", "max_retries": 0}),
}
LENIENT: Mapping[str, bytes] = {
    "queue another": payload(queue_name="nowhere"),
    "queue a list": payload(queue_name=[1]),
    "eta a text": payload(options={"eta": "x"}),
    "eta huge": payload(options={"eta": 10**400}),
    "eta a list": payload(options={"eta": [1]}),
    "message_id a list": payload(message_id=[1]),
    "message_id missing": payload(message_id=...),
    "timestamp a text": payload(message_timestamp="x", options={"max_age": None}),
    "priority a dict": payload(options={"broker_priority": {}}),
    "unknown options": payload(options={"later": [1]}),
}


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_dramatiq_worker_outlives_them_all(threads: int, server: Server) -> None:
    broker = RelayBroker(url=server.url, max_deliveries=2)
    ran: Counter[str] = Counter()

    def work(key: str) -> None:
        ran[key] += 1
        if key == "fail":
            raise ValueError("failed")

    dramatiq.actor(work, broker=broker, actor_name="work", max_retries=0, min_backoff=1, max_backoff=1)
    core, ids = broker.core, {}
    good = []
    actor = broker.get_actor("work")
    for name, raw in {**NO_MESSAGE, **LENIENT}.items():
        good.append(f"good-{len(good)}")
        actor.send(good[-1])
        ids[core.enqueue("default", raw, headers={HEADER: ADAPTER}).id] = name
    records = put(core, "default", SPOILED)
    actor.send("last")
    with running(broker, threads=threads):
        eventually(lambda: not core.stats("default").pending, "the end of all of them", 30)
        dead = core.dead("default", limit=1000)
    assert {name: ran[name] for name in (*good, "last")} == dict.fromkeys((*good, "last"), 1)
    reasons = {ids[job.id]: job.reason for job in dead if job.id in ids}
    assert set(reasons) == set(NO_MESSAGE), (set(NO_MESSAGE) - set(reasons), set(reasons) - set(NO_MESSAGE))
    assert set(reasons.values()) <= {"undecodable", "rejected", "failed"}
    assert {job.reason for job in dead if job.id in records} == {"undecodable"}
    assert len(dead) == len(NO_MESSAGE) + len(records) + len(records) + 1  # what `put` has between are no messages
    assert all(job.error for job in dead)
    assert ran["odd"] == len(LENIENT)
    assert core.audit("default").clean
    broker.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_views_show_them_all(server: Server) -> None:
    broker = RelayBroker(url=server.url)
    for raw in {**NO_MESSAGE, **LENIENT, **ODD}.values():
        broker.core.enqueue("default", raw, headers={HEADER: ADAPTER})
    cli = Cli(server.url)
    cli.run("job", "ls", "--queue", "default", "--limit", "1000")
    cli.run("job", "ls", "--queue", "default", "--task", "x")
    for job in broker.core.jobs("default", "ready", limit=1000):
        assert "raised" not in cli.run("job", "show", job.id, "--queue", "default").stderr
        cli.json("job", "show", job.id, "--queue", "default")
    broker.close()
