"""Whatever is wrong is refused by name before anything is stored, or costs only the one job that it spoils."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay_core import AsyncBroker, Broker, JobSpec, RetryPolicy, hookimpl
from relay_core.errors import AuthError, InvalidArgument, InvalidUrl, LayoutError, LeaseLost, Unavailable
from relay_core.job import new_id
from relay_core.schedule import ScheduleRunner
from relay_core.testing import drain
from relay_core.worker import Worker
from tests.servers import AclServer, Server, free_port

HUGE = 10**400
"""An int that no float can hold."""

ENDLESS = 10**5000
"""An int that Python refuses to write in digits."""


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr for you")


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry_for=1.0) as broker:
        yield broker


def stored(server: Server) -> list[bytes]:
    """The keys that hold something."""
    found: list[bytes] = sorted(server.cli("KEYS", "*"))
    return found


def refused(server: Server, said: str, act: Callable[[], object]) -> str:
    """`act` is refused with an error that says so, and nothing is stored; the message."""
    before = stored(server)
    with pytest.raises(InvalidArgument, match=said) as caught:
        act()
    assert stored(server) == before
    return str(caught.value)


# --- queue names

SAFE_NAMES = [
    "mail",
    "x" * 255,
    "ü" * 127,
    "почта",
    "邮件",
    "🐇",
    "a b",
    "{",
    "}",
    "{}",
    "a{b}c",
    "}:0}:j{",
    "%",
    "%41",
    "100%{x}%7B",
    "a\nb",
    "\x00",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "*",
    "a:b",
    ":",
    "..",
    "'\"\\",
    " ",
]


@pytest.mark.parametrize("name", SAFE_NAMES, ids=[ascii(name)[:20] for name in SAFE_NAMES])
def test_a_queue_name_of_any_text_works_from_enqueue_to_ack(name: str, broker: Broker, server: Server) -> None:
    sent = broker.enqueue(name, b"body")
    assert broker.queues() == [name]
    assert broker.stats(name).ready == 1
    (job,) = broker.claim(name)
    assert (job.id, job.queue, job.payload) == (sent.id, name, b"body")
    broker.ack(job)
    assert broker.stats(name).counters["processed"] == 1
    for key in stored(server):  # nothing leaves the prefix, and each key has one hash tag and no control bytes
        assert key.startswith(b"relay:")
        assert key.count(b"{") == key.count(b"}") == (key != b"relay:queues")
        assert key.decode().replace("\x85", "").isprintable()


def test_names_that_look_alike_in_their_encoded_form_are_apart(broker: Broker) -> None:
    for name in ("{", "%7B", "%257B"):
        broker.enqueue(name, name.encode())
    assert broker.queues() == sorted(["{", "%7B", "%257B"])
    for name in ("{", "%7B", "%257B"):
        assert [job.payload for job in broker.claim(name, count=10)] == [name.encode()]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "queue name must not be empty"),
        ("x" * 256, r"queue name 'x{40}'\.\.\. has 256 bytes, at most 255"),
        ("x" * 300, "has 300 bytes"),
        ("ü" * 128, "has 256 bytes"),
        ("a\ud800", "is not valid text"),
        (None, "queue name must be a str, got NoneType"),
        (b"mail", "queue name must be a str, got bytes"),
        (7, "queue name must be a str, got int: 7"),
        (["mail"], "queue name must be a str, got list"),
    ],
    ids=["empty", "256", "300", "256-utf8", "surrogate", "none", "bytes", "int", "list"],
)
def test_a_queue_name_that_cannot_be_is_refused_by_every_call(
    name: Any, said: str, broker: Broker, server: Server
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: broker.enqueue(name, b""),
        lambda: broker.enqueue_many(name, [b""]),
        lambda: broker.claim([name]),
        lambda: broker.claim(["good", name], wait=5.0),
        lambda: broker.finish(name, count=1),
        lambda: broker.reap(name),
        lambda: broker.promote(name),
        lambda: broker.cancel(name, "id"),
        lambda: broker.dead(name),
        lambda: broker.jobs(name, "ready"),
        lambda: broker.show(name, "id"),
        lambda: broker.requeue(name),
        lambda: broker.purge(name),
        lambda: broker.delete_queue(name),
        lambda: broker.pause(name),
        lambda: broker.resume(name),
        lambda: broker.limit(name, rate=1),
        lambda: broker.stats(name),
        lambda: broker.audit(name),
    ]
    for call in calls:
        refused(server, said, call)


# --- options of a job

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"delay": -1}, r"delay must be between 0 and 3.1536e\+08 seconds, got -1"),
    ({"delay": -0.001}, "delay must be between 0 .* got -0.001"),
    ({"delay": math.nan}, "delay must be a finite number of seconds, got nan"),
    ({"delay": math.inf}, "delay must be a finite number of seconds, got inf"),
    ({"delay": 10 * 366 * 86400}, "delay must be between 0 .* got 316224000"),
    ({"delay": HUGE}, "delay must be between 0 and"),
    ({"delay": ENDLESS}, "delay must be between 0 .* got a int that cannot be shown"),
    ({"delay": True}, "delay must be a finite number of seconds, got True"),
    ({"delay": "5"}, "delay must be a finite number of seconds, got '5'"),
    ({"delay": [5]}, "delay must be a finite number"),
    ({"at": -1}, "at must be unix seconds .* got -1"),
    ({"at": math.nan}, "at must be unix seconds .* got nan"),
    ({"at": math.inf}, "at must be unix seconds .* got inf"),
    ({"at": HUGE}, "at must be unix seconds"),
    ({"at": True}, "at must be unix seconds .* got True"),
    ({"at": "tomorrow"}, "at must be unix seconds .* got 'tomorrow'"),
    ({"at": time.time() * 1000}, "at must be unix seconds"),
    ({"at": 2e9, "delay": 1}, r"give delay \(1\) or at \(2000000000.0\), not both"),
    ({"priority": -1}, "priority must be a whole number from 0 to 9, got -1"),
    ({"priority": 10}, "priority must be a whole number from 0 to 9, got 10"),
    ({"priority": 1.5}, "priority must be a whole number from 0 to 9, got 1.5"),
    ({"priority": True}, "priority must be a whole number from 0 to 9, got True"),
    ({"priority": "high"}, "priority must be a whole number from 0 to 9, got 'high'"),
    ({"priority": None}, "priority must be a whole number from 0 to 9, got None"),
    ({"id": ""}, "id must be 1 to 128 printable ASCII characters without spaces, got ''"),
    ({"id": "x" * 129}, "id must be 1 to 128"),
    ({"id": "a b"}, "id must be 1 to 128 .* got 'a b'"),
    ({"id": "a\nb"}, "id must be 1 to 128"),
    ({"id": "a\n"}, "id must be 1 to 128"),
    ({"id": "ü"}, "id must be 1 to 128 .* got 'ü'"),
    ({"id": b"a"}, "id must be 1 to 128 .* got b'a'"),
    ({"id": 7}, "id must be 1 to 128 .* got 7"),
    ({"max_retries": -1}, "max_retries must be a whole number from 0 to 1000000, got -1"),
    ({"max_retries": 1.0}, "max_retries must be a whole number"),
    ({"max_deliveries": 0}, "max_deliveries must be a whole number from 1 to 1000000, got 0"),
    ({"max_deliveries": True}, "max_deliveries must be a whole number"),
    ({"dedup_key": ""}, "dedup_key must be a text of 1 to 512 bytes, got ''"),
    ({"dedup_key": "x" * 513}, "dedup_key must be a text of 1 to 512 bytes"),
    ({"dedup_key": "ü" * 257}, "dedup_key must be a text of 1 to 512 bytes"),
    ({"dedup_key": "\ud800"}, "dedup_key must be a text"),
    ({"dedup_key": 7}, "dedup_key must be a text .* got 7"),
    ({"dedup_for": 5}, r"dedup_for \(5\) needs a dedup_key"),
    ({"dedup_key": "k", "dedup_for": 0}, "dedup_for must be between 0.001 and .* got 0"),
    ({"dedup_key": "k", "dedup_for": -1}, "dedup_for must be between"),
    ({"dedup_key": "k", "dedup_for": math.nan}, "dedup_for must be a finite number"),
    ({"headers": {"a": 1}}, "headers must map str to str, got 'a': 1"),
    ({"headers": {1: "a"}}, "headers must map str to str, got 1: 'a'"),
    ({"headers": {"a": Unshowable()}}, "headers must map str to str, got 'a': a Unshowable that cannot be shown"),
    ({"headers": ["a"]}, r"headers must map str to str, got \['a'\]"),
    ({"retry": {"base": 1}}, r"retry must be a RetryPolicy, got {'base': 1}"),
    ({"retry": 3}, "retry must be a RetryPolicy, got 3"),
]


@pytest.mark.parametrize(
    ("options", "said"), BAD_OPTIONS, ids=[f"{i}-{'-'.join(o)}" for i, (o, _) in enumerate(BAD_OPTIONS)]
)
def test_a_bad_option_is_refused_by_name_and_value_and_nothing_is_stored(
    options: dict[str, Any], said: str, broker: Broker, server: Server
) -> None:
    refused(server, said, lambda: broker.enqueue("mail", b"body", **options))
    # in a batch it is found before the first job is sent
    refused(server, said, lambda: broker.enqueue_many("mail", [b"good", JobSpec(b"body", **options)]))


def test_options_at_the_edge_of_what_is_allowed_work(broker: Broker) -> None:
    broker.enqueue("mail", b"1", id="x" * 128, priority=9, max_retries=0, max_deliveries=1, delay=0)
    broker.enqueue("mail", b"2", id="!", dedup_key="ü" * 256, dedup_for=0.001, at=0)
    broker.enqueue("mail", b"3", id="~", headers={"": "", "ü\n\0": "\ud800 {} %"}, delay=3650 * 86400)
    assert [job.payload for job in broker.claim("mail", count=9)] == [b"1", b"2"]
    (waiting,) = broker.jobs("mail", "delayed")
    assert waiting.options.headers == {"": "", "ü\n\0": "\ud800 {} %"}


def test_an_unknown_option_is_refused_by_name(broker: Broker, server: Server) -> None:
    with pytest.raises(TypeError, match="dely"):
        broker.enqueue("mail", b"", dely=5)
    assert stored(server) == []


# --- payloads


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ("text", "payload must be bytes, got str: 'text'; encode it first"),
        (None, "payload must be bytes, got NoneType: None; encode it first"),
        ({"a": 1}, r"payload must be bytes, got dict: {'a': 1}; encode it first"),
        (7, "payload must be bytes, got int: 7; encode it first"),
        (Unshowable(), "payload must be bytes, got Unshowable: a Unshowable that cannot be shown"),
    ],
    ids=["str", "none", "dict", "int", "unshowable"],
)
def test_a_payload_that_is_no_bytes_is_refused(payload: Any, said: str, broker: Broker, server: Server) -> None:
    refused(server, said, lambda: broker.enqueue("mail", payload))
    refused(server, said, lambda: broker.enqueue_many("mail", [b"good", payload]))


def test_bytes_of_every_kind_and_value_come_back_as_they_were(broker: Broker) -> None:
    bodies = [b"", b"\n", b"1 0 0 \n", bytes(range(256)), bytearray(b"array"), memoryview(b"view")]
    broker.enqueue_many("mail", bodies)  # type: ignore[arg-type]
    assert [job.payload for job in broker.claim("mail", count=9)] == [bytes(body) for body in bodies]


def test_a_payload_over_the_limit_is_refused_with_size_limit_and_setting(server: Server) -> None:
    with Broker(server.url, max_payload=100) as broker:
        said = "payload has 101 bytes, at most 100 are allowed; .* raise max_payload"
        refused(server, said, lambda: broker.enqueue("mail", b"x" * 101))
        broker.enqueue("mail", b"x" * 100)
        (job,) = broker.claim("mail")
        refused(server, said, lambda: broker.nack(job, "failed", payload=b"x" * 101))
        broker.ack(job)  # the refused nack left the job as it was


def test_the_default_limit_is_16_mebibytes_and_a_payload_of_that_size_works(broker: Broker, server: Server) -> None:
    most = 16 * 2**20
    refused(server, "at most 16777216 are allowed", lambda: broker.enqueue("mail", bytes(most + 1)))
    broker.enqueue("mail", bytes(most))
    (job,) = broker.claim("mail")
    assert len(job.payload) == most


# --- settings and arguments


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lease": 0}, "lease must be between 0.1 and 86400 seconds, got 0"),
        ({"lease": "15"}, "lease must be a finite number of seconds, got '15'"),
        ({"lease": math.nan}, "lease must be a finite number of seconds, got nan"),
        ({"keep_dead": 0}, "keep_dead must be between 1 and"),
        ({"max_deliveries": 0}, "max_deliveries must be a whole number from 1"),
        ({"max_payload": 0}, "max_payload must be a whole number from 1"),
        ({"max_payload": 2**40}, "max_payload must be a whole number"),
        ({"prefix": ""}, "prefix must be a text without braces or spaces, got ''"),
        ({"prefix": "a{b"}, r"prefix must be a text without braces or spaces, got 'a\{b'"),
        ({"prefix": "a\n"}, "prefix must be"),
        ({"prefix": b"a"}, "prefix must be"),
        ({"retry": {"base": 1}}, "retry must be a RetryPolicy, got {'base': 1}"),
        ({"retry": 0}, "retry must be a RetryPolicy, got 0"),
        ({"queue_retry": {"mail": 5}}, r"queue_retry\['mail'\] must be a RetryPolicy, got 5"),
        ({"queue_retry": 5}, "queue_retry must map queues to RetryPolicies, got 5"),
        ({"client_name": 7}, "client_name must be 1 to 255 printable ASCII characters without spaces, got 7"),
        ({"socket_timeout": 10**400}, "socket_timeout must be a number of seconds from 0.001 to 86400, got 1000"),
        ({"durability": "always"}, "durability must be .*, got 'always'"),
        ({"retry_for": -1}, "retry_for must be a number of seconds from 0 to 86400, got -1"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else "",
)
def test_a_bad_setting_of_a_broker_is_refused_before_it_connects(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Broker("relay://127.0.0.1:1/0", **settings)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base": -1}, "retry base must be a number of at least 0.0, got '-1'"),
        ({"base": math.nan}, "retry base must be a number"),
        ({"base": HUGE}, "retry base must be a number"),
        ({"base": "1"}, "retry base must be a number .* got '1'"),
        ({"base": True}, "retry base must be a number .* got 'True'"),
        ({"factor": 0.5}, "retry factor must be a number of at least 1.0, got '0.5'"),
        ({"factor": math.inf}, "retry factor must be a number"),
        ({"ceiling": -1}, "retry ceiling must be a number"),
        ({"ceiling": 400_000_000}, "retry ceiling must be at most 315360000 seconds, got 400000000"),
        ({"max_retries": -1}, "retry max_retries must be a whole number of at least 0, got '-1'"),
        ({"max_retries": 1.5}, "retry max_retries must be a whole number .* got '1.5'"),
        ({"jitter": "no"}, "retry jitter must be True or False, got 'no'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_in_a_retry_policy_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        RetryPolicy(**fields)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"rate": 0}, "rate must be between 0.0001 and 1000000 jobs per second, got 0"),
        ({"rate": -1}, "rate must be between"),
        ({"rate": math.nan}, "rate must be between .* got nan"),
        ({"rate": math.inf}, "rate must be between .* got inf"),
        ({"rate": True}, "rate must be between .* got True"),
        ({"rate": "5"}, "rate must be between .* got '5'"),
        ({"burst": 5}, r"burst \(5\) needs a rate"),
        ({"rate": 1, "burst": 0}, "burst must be a whole number from 1 to 1000000, got 0"),
        ({"rate": 1, "burst": 1.5}, "burst must be a whole number"),
        ({"max_inflight": 0}, "max_inflight must be a whole number from 1 to 1000000, got 0"),
        ({"max_inflight": "all"}, "max_inflight must be a whole number .* got 'all'"),
    ],
    ids=str,
)
def test_a_bad_limit_is_refused_and_the_old_one_stays(
    limits: dict[str, Any], said: str, broker: Broker, server: Server
) -> None:
    broker.limit("mail", rate=7, max_inflight=3)
    refused(server, said, lambda: broker.limit("mail", **limits))
    assert broker.stats("mail").settings == {"rate": 7.0, "burst": 7.0, "max_inflight": 3.0}


def test_bad_arguments_of_a_claim_are_refused_and_take_no_job(broker: Broker, server: Server) -> None:
    broker.enqueue("mail", b"")
    refused(server, "claim needs at least one queue", lambda: broker.claim([]))
    for count in (0, -1, 201, 1.5, True, "1"):
        refused(server, "count must be a whole number from 1 to 200", lambda: broker.claim("mail", count=count))  # type: ignore[arg-type]  # noqa: B023
    for wait in (-1, math.nan, math.inf, True, "1", HUGE):
        refused(server, "wait must be", lambda: broker.claim("mail", wait=wait))  # type: ignore[arg-type]  # noqa: B023
    assert broker.stats("mail").ready == 1


def test_bad_arguments_of_bulk_and_time_calls_are_refused(broker: Broker, server: Server) -> None:
    broker.enqueue("mail", b"")
    refused(server, "limit must be a whole number from 1 to 200, got 0", lambda: broker.reap("mail", 0))
    refused(server, "limit must be a whole number from 1 to 200, got 100000", lambda: broker.reap("mail", 100_000))
    refused(server, "limit must be a whole number from 1 to 200, got -1", lambda: broker.promote("mail", -1))
    refused(server, "purge takes ready, delayed and dead, got 'inflight'", lambda: broker.purge("mail", ["inflight"]))
    refused(server, "purge takes .* got 'old'", lambda: broker.purge("mail", ["ready", "old"]))  # type: ignore[list-item]
    refused(server, "state must be one of .* got 'old'", lambda: broker.jobs("mail", "old"))  # type: ignore[arg-type]
    refused(server, "limit must be a whole number", lambda: broker.dead("mail", 0))
    refused(server, "skip must be a whole number", lambda: broker.dead("mail", 1, -1))
    assert broker.stats("mail").ready == 1


def test_a_nack_or_extend_of_a_bad_time_is_refused_and_the_job_is_kept(broker: Broker, server: Server) -> None:
    broker.enqueue("mail", b"")
    (job,) = broker.claim("mail")
    for delay in (-1, math.nan, math.inf, True, "5", HUGE):
        refused(server, "delay must be", lambda: broker.nack(job, "failed", delay))  # type: ignore[arg-type]  # noqa: B023
    for lease in (0, -1, math.nan, "5", 86401):
        refused(server, "lease must be", lambda: broker.extend(job, lease))  # type: ignore[arg-type]  # noqa: B023
    broker.ack(job)


def test_an_error_of_any_length_and_any_text_is_kept_cut_and_readable(broker: Broker) -> None:
    broker.enqueue("mail", b"")
    (job,) = broker.claim("mail")
    broker.nack(job, "ü\ud800\n" * 5000, dead=True, reason="two words\nand a line \ud800")
    (dead,) = broker.dead("mail")
    assert dead.reason == "two_words_and_a_line_?"
    assert dead.error is not None
    assert dead.error.startswith("ü?\nü?\n")
    assert 4090 <= len(dead.error.encode()) <= 4096


# --- what lies in the store and does not decode

GARBAGE = [
    b"",
    b"garbage",
    b"\x00\xff\xfe\x80",
    b"\n",
    b"1 2",
    b"x 0 0 \nbody",
    b"1700000000000 0 0 {broken\nbody",
    b"1700000000000 0 0 [1,2]\nbody",
    b'1700000000000 0 0 {"headers":5}\nbody',
    b'1700000000000 0 0 {"retry":"soon"}\nbody',
    b'1700000000000 0 0 {"max_retries":"many"}\nbody',
    b"1700000000000 0 0 \xff\nbody",
    b"{" * 100_000,
    b"1700000000000 0 0 " + b'{"headers":' * 50_000 + b"\nbody",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=[repr(raw[:30])[2:-1] for raw in GARBAGE])
def test_a_record_that_does_not_decode_goes_to_dead_and_its_neighbours_run(
    garbage: bytes, broker: Broker, server: Server
) -> None:
    ids = [broker.enqueue("mail", b"%d" % i).id for i in range(3)]
    server.cli("HSET", broker.settings.keys("mail").jobs, ids[1], garbage)
    jobs = broker.claim("mail", count=10)
    assert [(job.id, job.payload) for job in jobs] == [(ids[0], b"0"), (ids[2], b"2")]
    assert broker.ack_many(jobs) == [1, 1]
    (dead,) = broker.dead("mail")
    assert (dead.id, dead.reason, dead.payload) == (
        ids[1],
        "undecodable",
        garbage if dead.priority is None else b"body",
    )
    assert "does not decode" in str(dead.error)
    assert broker.claim("mail") == []
    assert broker.audit("mail").clean


def test_a_record_that_does_not_decode_is_named_by_show_and_can_be_purged(broker: Broker, server: Server) -> None:
    id = broker.enqueue("mail", b"body").id
    server.cli("HSET", broker.settings.keys("mail").jobs, id, b"garbage")
    shown = broker.show("mail", id)
    assert shown is not None
    assert (shown.state, shown.payload, shown.created_at, shown.priority) == ("ready", b"garbage", None, None)
    assert broker.claim("mail") == []
    assert broker.purge("mail", ["dead"]) == 1
    assert broker.audit("mail").clean


def test_a_record_that_spoils_after_a_failure_goes_to_dead_too(broker: Broker, server: Server) -> None:
    id = broker.enqueue("mail", b"body").id
    (job,) = broker.claim("mail")
    broker.nack(job, "failed", delay=0)
    server.cli("HSET", broker.settings.keys("mail").jobs, id, b"garbage")
    assert broker.claim("mail") == []
    assert [(dead.id, dead.reason) for dead in broker.dead("mail")] == [(id, "undecodable")]


def test_a_record_that_spoils_while_its_job_runs_costs_nothing(broker: Broker, server: Server) -> None:
    id = broker.enqueue("mail", b"body").id
    (job,) = broker.claim("mail")
    server.cli("HSET", broker.settings.keys("mail").jobs, id, b"garbage")
    broker.ack(job)
    assert broker.stats("mail").pending == 0
    assert broker.audit("mail").clean


class PickyDecoder:
    """Fails on payloads that begin with `bad`."""

    @hookimpl
    def relay_decode_payload(self, payload: bytes) -> bytes:
        if payload.startswith(b"bad"):
            raise KeyError("no key for this one")
        return payload.upper()


def test_a_payload_that_a_plugin_cannot_decode_goes_to_dead_as_it_is_stored(server: Server) -> None:
    with Broker(server.url, plugins=[PickyDecoder()]) as broker:
        broker.enqueue_many("mail", [b"one", b"bad", b"two"])
        jobs = broker.claim("mail", count=10)
        assert [job.payload for job in jobs] == [b"ONE", b"TWO"]
        (dead,) = broker.dead("mail")
        assert (dead.reason, dead.payload) == ("undecodable", b"bad")
        assert "no key for this one" in str(dead.error)
    # with the plugin mended, the job runs: no byte of it was lost
    with Broker(server.url) as mended:
        assert mended.requeue("mail") == 1
        assert [job.payload for job in mended.claim("mail")] == [b"bad"]


def test_a_spoiled_job_that_cannot_be_ended_takes_no_others_with_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(server.url, plugins=[PickyDecoder()]) as broker:

        def refused(*_: object, **__: object) -> None:
            raise Unavailable("gone")

        monkeypatch.setattr(broker.operations, "nack", refused)
        broker.enqueue_many("mail", [b"one", b"bad"])
        jobs = broker.claim("mail", count=10)
        assert [job.payload for job in jobs] == [b"ONE"]
        broker.enqueue("mail", b"bad")
        with pytest.raises(Unavailable):
            broker.claim("mail")


def test_a_decoder_that_returns_no_bytes_spoils_only_its_job(server: Server) -> None:
    class Wrong:
        @hookimpl
        def relay_decode_payload(self, payload: bytes) -> Any:
            return payload.decode() if payload == b"bad" else payload

    with Broker(server.url, plugins=[Wrong()]) as broker:
        broker.enqueue_many("mail", [b"one", b"bad", b"two"])
        assert [job.payload for job in broker.claim("mail", count=10)] == [b"one", b"two"]
        (dead,) = broker.dead("mail")
        assert "relay_decode_payload must return bytes, got str" in str(dead.error)


def test_an_id_without_a_record_is_passed_over_and_mended_by_the_audit(broker: Broker, server: Server) -> None:
    ids = [broker.enqueue("mail", b"%d" % i).id for i in range(3)]
    server.cli("HDEL", broker.settings.keys("mail").jobs, ids[1])
    jobs = broker.claim("mail", count=10)
    assert [job.payload for job in jobs] == [b"0", b"2"]
    assert broker.ack_many(jobs) == [1, 1]
    broker.audit("mail")
    assert broker.audit("mail").clean


# --- where the store is


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://localhost", "unknown scheme 'http'; use"),
        ("amqp://guest:secret@localhost//", "unknown scheme 'amqp'; use"),
        ("localhost:6379", "no '://'; use"),
        ("", "no '://'; use"),
        ("relay://localhost:0/0", "port 0"),
        ("relay://localhost:99999/0", "port 99999"),
        ("relay://localhost:secret/0", "port"),
        ("relay://localhost/zero", "database 'zero'"),
    ],
)
def test_a_url_that_names_no_store_is_refused_with_advice_and_without_secrets(url: str, said: str) -> None:
    with pytest.raises(InvalidUrl, match=said) as caught:
        Broker(url)
    assert "secret" not in str(caught.value)


async def _awaits(url: str, broken: Callable[[AsyncBroker], Any]) -> None:
    async with AsyncBroker(url) as broker:
        await broken(broker)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda broker: broker.enqueue("q", b"", prio=5), "enqueue has no option 'prio'; did you mean 'priority'?"),
        (lambda broker: broker.nack(None, reasn="x"), "nack has no option 'reasn'; did you mean 'reason'?"),
        (
            lambda broker: broker.schedule("a", "q", corn="* * * * *"),
            "schedule has no option 'corn'; did you mean 'cron'?",
        ),
        (
            lambda broker: broker.nack(None, xyz=1),
            "nack has no option 'xyz'; it has dead, delay, error, payload, reason",
        ),
    ],
)
def test_an_option_that_nobody_knows_is_refused_in_the_words_of_the_call(
    call: Callable[[Any], Any], said: str, server: Server
) -> None:
    with Broker(server.url) as broker, pytest.raises(TypeError, match=re.escape(said)):
        call(broker)
    with pytest.raises(TypeError, match=re.escape(said)):
        asyncio.run(_awaits(server.url, call))
    assert stored(server) == []


@pytest.mark.parametrize("kind", [Broker, AsyncBroker])
def test_a_setting_that_nobody_knows_is_refused_in_the_words_of_the_broker(kind: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{kind.__name__} has no option 'leese'; did you mean 'lease'\?$"):
        kind(leese=1)
    with pytest.raises(TypeError, match=r"plugins must be a list of .*, got <.*Unhooked.*>; write plugins=\[...\]"):
        kind(plugins=Unhooked())


class Unhooked:
    """A plugin that was given by itself."""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda broker: broker.requeue("q", limit=-3), "limit must be a whole number from 0 to"),
        (lambda broker: broker.requeue("q", "abc"), "ids must be a list of job ids, got 'abc'; write [id] for one"),
        (lambda broker: broker.claim(7), "queues must be a name or a list of names, got 7"),
        (lambda broker: broker.purge("q", "ready"), "states must be a list of states, got 'ready'; write [state]"),
        (lambda broker: broker.schedule("s", "q", every=5, headers="x"), "headers must map str to str, got 'x'"),
        (lambda broker: broker.cancel_many("q", "abc"), "ids must be a list of job ids, got 'abc'"),
        (lambda broker: broker.cancel_many("q", 7), "ids must be a list of job ids, got 7"),
        (lambda broker: broker.cancel("q", None), "a job's id is a text, got None"),
        (lambda broker: broker.show("q", None), "a job's id is a text, got None"),
        (lambda broker: broker.unschedule(None), "a schedule's name is a text, got None"),
        (lambda broker: broker.ack(None), "ack takes the Job that claim gave, got None"),
        (lambda broker: broker.ack("abc"), "ack takes the Job that claim gave, got 'abc'"),
        (lambda broker: broker.ack_many("abc"), "ack_many takes the Jobs that claim gave, got 'abc'"),
        (lambda broker: broker.nack("abc"), "nack takes the Job that claim gave, got 'abc'"),
        (lambda broker: broker.extend(None), "extend takes the Jobs that claim gave, got None"),
        (lambda broker: broker.release(["abc"]), "release takes the Job that claim gave, got 'abc'"),
    ],
)
def test_what_is_no_job_and_no_list_of_ids_is_refused(
    call: Callable[[Any], Any], said: str, broker: Broker, server: Server
) -> None:
    broker.enqueue("q", b"", id="a")
    with pytest.raises(InvalidArgument, match=re.escape(said)):
        call(broker)
    with pytest.raises(InvalidArgument, match=re.escape(said)):
        asyncio.run(_awaits(server.url, call))
    assert broker.stats("q").ready == 1


@pytest.mark.parametrize("given", ["relay://", AsyncBroker("relay://127.0.0.1:1/0")])
def test_what_is_no_blocking_broker_is_refused_where_one_is_needed(given: Any) -> None:
    for owner, make in (
        ("Worker", lambda: Worker(given, print, ["q"])),
        ("drain", lambda: drain(given, print, "q")),
        ("ScheduleRunner", lambda: ScheduleRunner(given)),
    ):
        with pytest.raises(InvalidArgument, match=rf"^{owner} needs a Broker, .*got {re.escape(repr(given))}"):
            make()


@pytest.mark.parametrize("url", [None, 7, b"relay://localhost"])
def test_a_url_that_is_no_text_is_refused(url: Any) -> None:
    with pytest.raises(InvalidUrl, match="must be a str"):
        Broker(url)


def test_a_port_where_nobody_listens_is_named_once_the_time_is_up() -> None:
    port = free_port()
    with (
        Broker(f"relay://127.0.0.1:{port}/0", retry_for=0.2) as broker,
        pytest.raises(Unavailable, match=f"127.0.0.1:{port}") as caught,
    ):
        broker.enqueue("mail", b"")
    assert not caught.value.maybe_executed


def test_a_wrong_password_is_an_auth_error_that_shows_no_password(acl_server: AclServer) -> None:
    with Broker(acl_server.url) as good:
        kept = good.enqueue("mail", b"kept").id
        for url in (
            f"relay://worker:wrong-secret@127.0.0.1:{acl_server.port}/0",
            f"relay://nobody:wrong-secret@127.0.0.1:{acl_server.port}/0",
            f"relay://127.0.0.1:{acl_server.port}/0",
        ):
            with Broker(url) as broker:
                for act in (lambda: broker.enqueue("mail", b""), lambda: broker.claim("mail"), broker.queues):
                    with pytest.raises(AuthError, match=f"127.0.0.1:{acl_server.port}: wrong or missing") as caught:
                        act()
                    assert "wrong-secret" not in "".join(map(str, (caught.value, repr(caught.value), broker)))
        assert [job.id for job in good.claim("mail")] == [kept]


# --- a store of a newer relay


def test_a_newer_layout_is_refused_by_every_move_and_nothing_is_lost(broker: Broker, server: Server) -> None:
    ids = [broker.enqueue("mail", b"%d" % i).id for i in range(3)]
    broker.enqueue("mail", b"later", delay=3600)
    (held,) = broker.claim("mail")
    config = broker.settings.keys("mail").config
    server.cli("HSET", config, "v", 99)
    before = {key: server.cli("DUMP", key) for key in stored(server)}
    refusals: list[Callable[[], object]] = [
        lambda: broker.enqueue("mail", b""),
        lambda: broker.enqueue_many("mail", [b"", b""]),
        lambda: broker.claim("mail"),
        lambda: broker.claim("mail", wait=5.0),
        lambda: broker.finish("mail", acks=[held], count=1),
        lambda: broker.finish("mail", nacks=[(held, broker.operations.nack_of(held, "failed"))]),
        lambda: broker.reap("mail"),
        lambda: broker.promote("mail"),
        lambda: broker.stats("mail"),
        lambda: broker.jobs("mail", "ready"),
        lambda: broker.dead("mail"),
        lambda: broker.show("mail", ids[0]),
        lambda: broker.cancel("mail", ids[2]),
        lambda: broker.requeue("mail"),
        lambda: broker.purge("mail"),
        lambda: broker.delete_queue("mail"),
        lambda: broker.pause("mail"),
        lambda: broker.limit("mail", rate=1),
    ]
    for i, act in enumerate(refusals):
        with pytest.raises(LayoutError, match="layout 99, this relay speaks up to 1; upgrade relay here"):
            act()
        assert {key: server.cli("DUMP", key) for key in stored(server)} == before, f"refusal {i} changed something"
    server.cli("HSET", config, "v", 1)
    broker.ack(held)
    jobs = broker.claim("mail", count=10)
    assert [job.id for job in jobs] == ids[1:]
    assert broker.ack_many(jobs) == [1, 1]
    assert (broker.stats("mail").delayed, broker.audit("mail").clean) == (1, True)


def test_a_job_that_is_held_can_end_although_the_layout_is_newer(broker: Broker, server: Server) -> None:
    broker.enqueue_many("mail", [b"1", b"2", b"3"])
    acked, nacked, released = broker.claim("mail", count=3)
    server.cli("HSET", broker.settings.keys("mail").config, "v", 99)
    broker.extend([acked, nacked, released])
    broker.ack(acked)
    broker.nack(nacked, "failed", delay=60)
    assert broker.release(released) == [1]
    server.cli("HSET", broker.settings.keys("mail").config, "v", 1)
    stats = broker.stats("mail")
    assert (stats.ready, stats.delayed, stats.inflight, stats.dead) == (1, 1, 0, 0)


def test_a_blocked_claim_learns_of_a_newer_layout_when_it_is_woken(broker: Broker, server: Server) -> None:
    keys = broker.settings.keys("mail")
    server.cli("HSET", keys.config, "v", 99)
    server.cli("ZADD", keys.marker, 0, "w")
    with pytest.raises(LayoutError):
        broker.claim("mail", wait=30.0)


def test_a_queue_that_refuses_a_claim_takes_no_jobs_of_another_with_it(broker: Broker, server: Server) -> None:
    ids = [broker.enqueue(queue, b"").id for queue in ("mail", "newer")]
    server.cli("HSET", broker.settings.keys("newer").config, "v", 99)
    jobs = broker.claim(["mail", "newer"], count=2)
    assert [job.id for job in jobs] == ids[:1]
    broker.ack(jobs[0])
    with pytest.raises(LayoutError):
        broker.claim(["mail", "newer"], count=2)


# --- receipts that are not, or no longer, good


def test_a_receipt_of_a_job_that_is_unknown_is_a_lost_lease_with_the_facts(broker: Broker) -> None:
    broker.enqueue("mail", b"")
    (job,) = broker.claim("mail")
    broker.purge("mail")
    stranger = type(job)(**{name: getattr(job, name) for name in type(job).__slots__} | {"id": new_id()})
    for act, move in ((broker.ack, "ack"), (broker.nack, "nack")):
        with pytest.raises(
            LeaseLost, match=f"{stranger.id} in queue 'mail': its lease was lost before the {move}"
        ) as e:
            act(stranger)
        assert (e.value.queue, e.value.job_id, e.value.move) == ("mail", stranger.id, move)
    assert broker.extend(stranger) == broker.release(stranger) == [0]
    assert broker.cancel("mail", stranger.id) is None
    assert broker.show("mail", stranger.id) is None
    assert broker.requeue("mail", [stranger.id]) == 0
    broker.ack(job)
