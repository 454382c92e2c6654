"""Messages that no Celery has written end alone: the worker lives, and the tasks beside them run once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from relay_adapters.celery.messages.envelope import head_of
from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_core import Broker
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines
from tests.command_line import Cli
from tests.hostile import SPOILED, put
from tests.servers import Server, eventually

QUEUE = "celery"


def payload(
    body: bytes = b'[["odd"], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]', **changed: Any
) -> bytes:
    """A task's message with other headers, properties and parts; a value of `...` is left out."""
    headers = {
        "lang": "py", "task": "tests.celery_app.run", "id": "odd", "root_id": "odd", "parent_id": None, "group": None,
        "argsrepr": "('odd',)", "kwargsrepr": "{}", "retries": 0, "eta": None, "expires": None, "origin": "here",
        "timelimit": [None, None], "ignore_result": False,
    }  # fmt: skip
    info = {"exchange": "", "routing_key": QUEUE}
    properties = {"correlation_id": "odd", "reply_to": "r", "delivery_mode": 2, "delivery_info": info, "priority": 0}
    head: dict[str, Any] = {"content-type": "application/json", "content-encoding": "utf-8", "headers": headers}
    head["properties"] = properties
    for name, value in changed.items():
        part, _, field = name.partition("__")
        target, key = (head[part], field) if field else (head, part.replace("_", "-"))
        target[key] = value
    for one in (headers, properties, head):
        for name in [name for name, value in one.items() if value is ...]:
            del one[name]
    return json.dumps(head).encode() + b"\n" + body


def body_of_protocol_1(**changed: Any) -> bytes:
    """The body of a task, with other fields; a value of `...` is left out."""
    body = {
        "task": "tests.celery_app.run", "id": "odd", "args": ["odd"], "kwargs": {}, "retries": 0, "eta": None,
        "expires": None, "utc": True, "callbacks": None, "errbacks": None, "timelimit": [None, None], "taskset": None,
        "chord": None, **changed,
    }  # fmt: skip
    return json.dumps({name: value for name, value in body.items() if value is not ...}).encode()


def of_protocol_1(**changed: Any) -> bytes:
    """A task's message without headers."""
    return payload(body_of_protocol_1(**changed), headers={})


DEEP = b"[" * 100_000
NO_MESSAGE: Mapping[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{broken",
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "deep": DEEP,
    "properties missing": b'{"headers":{}}',
    "a task in short that is a list": b'{"task":[],"properties":{}}',
    "properties a list": payload(properties=[1]),
    "headers a list": payload(headers=[1]),
    "headers a text": payload(headers="task"),
    "delivery_info a text": payload(properties__delivery_info="celery"),
    "delivery_info a list": payload(properties__delivery_info=[1]),
    "content type a dict": payload(content_type={}),
    "content encoding a number": payload(content_encoding=7),
    "relay_delivered a text": payload(properties__relay_delivered="x"),
    "a marked value of no such type": payload(headers__eta={"__type__": "datetime", "__value__": 5}),
    "a marked value of an unknown type": payload(headers__eta={"__type__": "mine", "__value__": 5}),
}
"""Refused by relay itself, before Celery sees them."""

NO_TASK: Mapping[str, bytes] = {
    "task a list": payload(headers__task=[1]),
    "task a dict": payload(headers__task={}),
    "task unknown": payload(headers__task="nobody"),
    "task unknown, without id": payload(b"[]", headers__task="nobody", headers__id=...),
    "id missing": payload(headers__id=...),
    "id a list": payload(headers__id=[1]),
    "eta a number": payload(headers__eta=5),
    "eta a list": payload(headers__eta=[1]),
    "eta empty": payload(headers__eta=""),
    "expires empty": payload(headers__expires=""),
    "eta no time": payload(headers__eta="soon"),
    "expires a dict": payload(headers__expires={}),
    "expires no time": payload(headers__expires="soon"),
    "timelimit a number": payload(headers__timelimit=5),
    "timelimit of texts": payload(headers__timelimit=["x", None]),
    "shadow a dict": payload(headers__shadow={"a": 1}),
    "timelimit of three": payload(headers__timelimit=[1, 2, 3]),
    "body no JSON": payload(b"{broken"),
    "body a text": payload(b'"x"'),
    "body a number": payload(b"7"),
    "body of two": payload(b"[[],{}]"),
    "args a number": payload(b"[5, {}, null]"),
    "kwargs a list": payload(b"[[], [1], null]"),
    "callbacks a list": payload(b'[["odd"], {}, [1]]'),
    "body deep": payload(DEEP),
    "body no UTF-8": payload(b"\xff\xfe"),
    "body empty": payload(b""),
    "headers empty": payload(headers={}),
    "headers missing": payload(headers=...),
    "headers empty, body a number": payload(b"7", headers={}),
    "headers empty, body a list": payload(b'["task"]', headers={}),
    "headers empty, body no task": payload(b"{}", headers={}),
    "content type unknown": payload(content_type="application/x-mine"),
    "content type of a pickle": payload(content_type="application/x-python-serialize"),
    "compression a list": payload(headers__compression=[1]),
    "stamped_headers of lists": payload(headers__stamped_headers=[[]], headers__stamps={}),
    "stamped_headers a number": payload(headers__stamped_headers=5, headers__stamps={}),
    "stamps a list": payload(headers__stamped_headers=["a"], headers__stamps=[]),
    "compression unknown": payload(headers__compression="x-mine"),
    "protocol 1, task a list": of_protocol_1(task=[1]),
    "protocol 1, id a list": of_protocol_1(id=[1]),
    "protocol 1, eta a number": of_protocol_1(eta=5),
    "protocol 1, eta empty": of_protocol_1(eta=""),
    "protocol 1, expires a dict": of_protocol_1(expires={}),
    "protocol 1, timelimit of texts": of_protocol_1(timelimit=["x", None]),
    "protocol 1, timelimit a number": of_protocol_1(timelimit=5),
    "protocol 1, shadow a dict": of_protocol_1(shadow={"a": 1}),
    "protocol 1, kwargs a list": of_protocol_1(kwargs=[1]),
    "protocol 1, args a number": of_protocol_1(args=5),
    "protocol 1 with headers of 2, args a number": payload(body_of_protocol_1(args=5)),
    "protocol 1 with headers of 2, kwargs a list": payload(body_of_protocol_1(kwargs=[1])),
}
"""Delivered to Celery, which can make no task of them."""

LENIENT: Mapping[str, bytes] = {
    "id a UUID": payload(headers__id={"__type__": "uuid", "__value__": {"hex": "0" * 32}}),
    "id a number": payload(headers__id=7),
    "timelimit a decimal": payload(headers__timelimit=[{"__type__": "decimal", "__value__": "60"}, None]),
    "times of their types": payload(
        headers__eta={"__type__": "datetime", "__value__": "2020-01-01T00:00:00+00:00"},
        headers__expires={"__type__": "datetime", "__value__": "2999-01-01T00:00:00+00:00"},
    ),
    "callbacks null": payload(b'[["odd"], {}, null]'),
    "content encoding unknown": payload(content_encoding="x-mine"),
    "compression empty": payload(headers__compression={}),
    "retries a text": payload(headers__retries="x"),
    "priority a dict": payload(properties__priority={}),
    "priority a text": payload(properties__priority="high"),
    "priority 42": payload(properties__priority=42),
    "correlation_id missing": payload(properties__correlation_id=...),
    "correlation_id a list": payload(properties__correlation_id=[1]),
    "reply_to missing": payload(properties__reply_to=...),
    "delivery_info missing": payload(properties__delivery_info=...),
    "delivery_info null": payload(properties__delivery_info=None),
    "delivery_info empty": payload(properties__delivery_info={}),
    "delivery_tag of its own": payload(properties__delivery_tag=[1]),
    "properties empty": payload(properties={}),
    "expiration a list": payload(properties__expiration=[1]),
    "expiration of strange digits": payload(properties__expiration="²"),
    "expiration huge": payload(properties__expiration="9" * 6000),
    "relay_since huge": payload(properties__relay_since=10**400, properties__expiration="99999999999999"),
    "relay_since a list": payload(properties__relay_since=[1]),
    "argsrepr a dict": payload(headers__argsrepr={}),
    "origin a list": payload(headers__origin=[1]),
    "x-death a text": payload(**{"headers__x-death": "x"}),
    "stamped": payload(headers__stamped_headers=["a"], headers__stamps={"a": ["x"]}),
    "protocol 1": of_protocol_1(),
    "protocol 1 with headers of 2": payload(body_of_protocol_1()),
    "protocol 1, retries a text": of_protocol_1(retries="x"),
    "protocol 1, without all that may be missing": of_protocol_1(
        retries=..., eta=..., expires=..., utc=..., callbacks=..., errbacks=..., timelimit=..., taskset=..., chord=...
    ),
}
"""Run as any other task."""


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry_for=2.0) as broker:
        yield broker


@pytest.mark.parametrize("name", NO_MESSAGE)
def test_what_is_no_message_is_refused_where_it_is_read(name: str) -> None:
    with pytest.raises(ValueError, match=r"^(its|'utf-8')"):
        head_of(NO_MESSAGE[name])


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize("kind", POOLS)
def test_a_celery_worker_outlives_them_all(kind: str, server: Server, broker: Broker, tmp_path: Path) -> None:
    client = client_of(server.url, tmp_path)
    bad = {**NO_MESSAGE, **NO_TASK}
    ids: dict[str, str] = {}
    good = []
    for name, raw in {**bad, **LENIENT}.items():
        good.append(f"good-{len(good)}")
        client.send_task("tests.celery_app.run", [good[-1]])
        ids[broker.enqueue(QUEUE, raw, headers={HEADER: ADAPTER}).id] = name
    records = put(broker, QUEUE, {name: raw for name, raw in SPOILED.items() if name.startswith(("retry", "max"))})
    client.send_task("tests.celery_app.run", ["last"])
    expected = len(bad) + len(records) + len(records) + 1  # `put` has jobs between that are no messages
    with CeleryWorker(server.url, tmp_path, *POOLS[kind]) as worker:
        eventually(
            lambda: (
                worker.process.poll() is not None
                or (not broker.stats(QUEUE).pending and len(lines(tmp_path)) >= len(good) + 1 + len(LENIENT))
            ),
            "the end of all of them",
            60,
        )
        assert worker.process.poll() is None, worker.text[-3000:]
        dead = broker.dead(QUEUE, limit=1000)
        assert worker.stop() == 0
    ran = Counter(line.split()[0] for line in lines(tmp_path))
    assert {name: ran[name] for name in good} == dict.fromkeys(good, 1)
    reasons = {ids[job.id]: job.reason for job in dead if job.id in ids}
    assert set(reasons) == set(bad), (set(bad) - set(reasons), set(reasons) - set(bad))
    assert set(reasons.values()) <= {"undecodable", "rejected"}
    assert {reasons[name] for name in NO_MESSAGE} == {"undecodable"}
    assert all(job.error for job in dead)
    assert [job.error for job in dead if ids.get(job.id) == "task unknown"] == [
        "no task 'nobody' is registered with its worker"
    ]
    assert ran["odd"] == len(LENIENT)
    assert len(dead) == expected
    assert broker.audit(QUEUE).clean


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_views_show_them_all(server: Server, broker: Broker) -> None:
    cli = Cli(server.url)
    for raw in {**NO_MESSAGE, **NO_TASK, **LENIENT}.values():
        broker.enqueue(QUEUE, raw, headers={HEADER: ADAPTER})
    cli.run("job", "ls", "--queue", QUEUE, "--limit", "1000")
    cli.json("job", "ls", "--queue", QUEUE, "--limit", "1000")
    cli.run("job", "ls", "--queue", QUEUE, "--task", "x")
    for job in broker.jobs(QUEUE, "ready", limit=1000):
        said = cli.run("job", "show", job.id, "--queue", QUEUE)
        assert "raised" not in said.stderr
        cli.json("job", "show", job.id, "--queue", QUEUE)
