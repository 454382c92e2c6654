"""`relay job show`: the decoded payload, and all that the store knows of a job's past."""

from __future__ import annotations

import json
import pickle
import re
import zlib

import pytest

from relay_core import Broker, commands, hookimpl
from relay_core.keys import worker_keys
from relay_core.plugins import Plugins
from tests.command_line import Cli


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: the scripts have tests of their own on both."""
    return str(request.param)


def events(cli: Cli, id: str) -> list[str]:
    return [event["event"] for event in cli.json("job", "show", id, "-q", "mail")["history"]]


def test_the_history_follows_a_job_through_its_life(cli: Cli, broker: Broker) -> None:
    id = broker.enqueue("mail", b"x", id="j1").id
    assert events(cli, id) == ["enqueued"]
    (job,) = broker.claim("mail")
    assert events(cli, id) == ["enqueued", "claimed", "held"]
    held = cli.json("job", "show", id, "-q", "mail")["history"][-1]
    assert (held["token"], held["fence"]) == (job.token, job.fence)
    assert 0 < held["lease_ends_at"] - job.claimed_at <= 15
    broker.nack(job, "smtp is down", delay=3600)
    assert events(cli, id) == ["enqueued", "claimed", "retried", "failed", "due"]
    told = cli.json("job", "show", id, "-q", "mail")
    assert [told["history"][at].get("times") for at in (1, 2)] == [1, 1]
    assert told["history"][3]["error"] == "smtp is down"
    assert told["history"][4]["at"] == told["due_at"]


def test_a_held_job_names_the_live_workers_of_its_queue_that_hold_something(cli: Cli, broker: Broker) -> None:
    says = {"host": "web1", "face": "celery", "concurrency": 4}
    for pid, queue, inflight in ((12, "mail", 3), (13, "mail", 0), (14, "other", 3)):
        told = says | {"pid": pid, "queues": [queue], "inflight": inflight}
        broker.store.run(commands.beat(worker_keys("relay"), f"web1:{pid}:a", told, age_ms=0, alive_ms=16_000))
    broker.enqueue("mail", b"x", id="j1")
    assert cli.json("job", "show", "j1", "-q", "mail")["may_be_held_by"] == []
    broker.claim("mail")
    assert cli.json("job", "show", "j1", "-q", "mail")["may_be_held_by"] == ["web1:12:a"]
    assert "web1:12 (celery)" in cli.run("job", "show", "j1", "-q", "mail").stdout


def test_people_read_what_failed_when_it_is_due_and_what_is_not_kept(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b"x", id="j1")
    shown = cli.run("job", "show", "j1", "-q", "mail").stdout
    assert "delivered  never" in shown
    broker.nack(broker.claim("mail")[0], "smtp is down", delay=3600)
    shown = cli.run("job", "show", "j1", "-q", "mail").stdout
    assert "delivered  once, 1 ended in a retry" in shown
    assert "retry: smtp is down" in shown
    assert "in 59m 59s" in shown or "in 1h" in shown
    assert "not kept" in shown
    broker.enqueue("mail", b"x", id="j2")
    (job,) = broker.claim("mail")
    assert f"fence {job.fence}, the lease ends in" in cli.run("job", "show", "j2", "-q", "mail").stdout
    broker.nack(job, "no\nTraceback:\n  File \x1b[31m", dead=True, reason="rejected")
    shown = cli.run("dlq", "show", "j2", "-q", "mail").stdout
    assert re.search(r"died .* ago: rejected: no\n {13}Traceback:\n {13}  File \\x1b\[31m\n", shown)


def test_json_is_laid_out_and_other_text_is_not_touched(cli: Cli, broker: Broker) -> None:
    body = {"to": ["ann", "bob"], "text": "héllo\x1b[31m"}
    broker.enqueue("mail", json.dumps(body).encode(), id="j1")
    shown = cli.run("job", "show", "j1", "-q", "mail").stdout
    assert '  "to": [\n    "ann",\n    "bob"\n  ]' in shown
    assert "héllo" in shown
    assert "\x1b" not in shown
    for payload in (b'{"to": ', b"17", b"[" * 100_000):
        id = broker.enqueue("mail", payload).id
        assert payload.decode()[:80] in cli.run("job", "show", id, "-q", "mail").stdout


def test_a_head_and_a_body_are_laid_out_each_and_a_pickle_is_never_loaded(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b'{"task": "send"}\n[["ann"], {}]', id="celery")
    shown = cli.run("job", "show", "celery", "-q", "mail").stdout
    assert '{\n  "task": "send"\n}\n[\n  [\n    "ann"\n  ],\n  {}\n]' in shown
    body = pickle.dumps(Trap())
    broker.enqueue("mail", b'{"task": "send"}\n' + body, id="pickled")
    shown = cli.run("job", "show", "pickled", "-q", "mail").stdout
    assert '{\n  "task": "send"\n}\n' + body.hex(" ") in shown
    broker.enqueue("mail", body, id="bare")
    assert body.hex(" ") in cli.run("job", "show", "bare", "-q", "mail").stdout


class Trap:
    """Whoever loads its pickle is caught."""

    def __reduce__(self) -> tuple[type[SystemExit], tuple[str]]:
        return SystemExit, ("unpickled",)


class Packing:
    """Compression, and a payload that it did not make."""

    @hookimpl
    def relay_decode_payload(self, payload: bytes) -> bytes:
        return zlib.decompress(payload)


def test_a_payload_is_decoded_by_plugins_and_one_that_does_not_decode_is_shown_as_it_is(
    cli: Cli, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.enqueue("mail", zlib.compress(b'{"a": 1}'), id="packed")
    broker.enqueue("mail", b"plain", id="plain")
    monkeypatch.setattr("relay_core.broker_base.Plugins", lambda plugins: Plugins([Packing()], installed=False))
    told = cli.json("job", "show", "packed", "-q", "mail")
    assert (told["payload"], told["payload_error"]) == ('{"a": 1}', None)
    told = cli.json("job", "show", "plain", "-q", "mail")
    assert told["payload"] == "plain"
    assert "zlib.error" in told["payload_error"] or "Error -3" in told["payload_error"]
    assert "could not decode" in cli.run("job", "show", "plain", "-q", "mail").stderr
