"""Records that no relay has written: what a hand, another program or a broken one may leave in the store.

A worker of any kind must outlive them all. `SPOILED` cannot be read, `ODD` mean what they say, however strange.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay_core import Broker

NOW = b"1700000000000"


def _of(options: bytes, payload: bytes = b"odd") -> bytes:
    return NOW + b" 0 0 " + options + b"\n" + payload


SPOILED: Mapping[str, bytes] = {
    "empty": b"",
    "one line break": b"\n",
    "no line break": NOW + b" 0 0 ",
    "not UTF-8": b"\xff\xfe\x00",
    "not UTF-8 in the options": _of(b'{"dedup_key":"\xff"}'),
    "created no number": b"soon 0 0 \nodd",
    "created below zero": b"-1 0 0 \nodd",
    "created with a line": b"1_000 0 0 \nodd",
    "created beyond any float": b"9" * 400 + b" 0 0 \nodd",
    "created beyond any int": b"9" * 5000 + b" 0 0 \nodd",
    "priority 42": NOW + b" 42 0 \nodd",
    "priority -1": NOW + b" -1 0 \nodd",
    "priority x": NOW + b" x 0 \nodd",
    "priority missing": NOW + b"  0 \nodd",
    "max deliveries x": NOW + b" 0 x \nodd",
    "max deliveries -1": NOW + b" 0 -1 \nodd",
    "max deliveries without end": NOW + b" 0 99999999999999999999 \nodd",
    "max deliveries over the bound": NOW + b" 0 1000001 \nodd",
    "options no JSON": _of(b"{broken"),
    "options a list": _of(b"[1]"),
    "options null": _of(b"null"),
    "options a text": _of(b'"dedup_key"'),
    "options deep": _of(b'{"x":' * 50_000),
    "retry a text": _of(b'{"retry":"soon"}'),
    "retry a list": _of(b'{"retry":[1]}'),
    "retry base a text": _of(b'{"retry":{"base":"x"}}'),
    "retry base below zero": _of(b'{"retry":{"base":-1}}'),
    "retry base NaN": _of(b'{"retry":{"base":NaN}}'),
    "retry base infinite": _of(b'{"retry":{"base":1e999}}'),
    "retry base a bool": _of(b'{"retry":{"base":true}}'),
    "retry base null": _of(b'{"retry":{"base":null}}'),
    "retry factor a dict": _of(b'{"retry":{"factor":{}}}'),
    "retry ceiling of centuries": _of(b'{"retry":{"ceiling":1e15}}'),
    "retry jitter a number": _of(b'{"retry":{"jitter":1}}'),
    "retry max_retries a fraction": _of(b'{"retry":{"max_retries":1.5}}'),
    "retry max_retries huge": _of(b'{"retry":{"max_retries":1' + b"0" * 400 + b"}}"),
    "max_retries -5": _of(b'{"max_retries":-5}'),
    "max_retries true": _of(b'{"max_retries":true}'),
    "max_retries huge": _of(b'{"max_retries":1' + b"0" * 400 + b"}"),
    "max_retries beyond any int": _of(b'{"max_retries":1' + b"0" * 5000 + b"}"),
    "max_deliveries -1": _of(b'{"max_deliveries":-1}'),
    "max_deliveries 1.5": _of(b'{"max_deliveries":1.5}'),
    "dedup_key a number": _of(b'{"dedup_key":7}'),
    "dedup_key a dict": _of(b'{"dedup_key":{}}'),
    "dedup_key true": _of(b'{"dedup_key":true}'),
    "dedup_key null": _of(b'{"dedup_key":null}'),
    "dedup_key half a pair": _of(b'{"dedup_key":"\\ud800"}'),
    "dedup_ms a text": _of(b'{"dedup_key":"k","dedup_ms":"x"}'),
    "headers a list": _of(b'{"headers":["a"]}'),
    "headers of numbers": _of(b'{"headers":{"relay_adapter":7}}'),
    "headers of dicts": _of(b'{"headers":{"a":{}}}'),
    "headers of null": _of(b'{"headers":{"a":null}}'),
    "delay_ms a text": _of(b'{"delay_ms":"x"}'),
    "delay_ms huge": _of(b'{"delay_ms":1' + b"0" * 400 + b"}"),
    "delay_ms below zero": _of(b'{"delay_ms":-1}'),
    "at_ms huge": _of(b'{"at_ms":1' + b"0" * 400 + b"}"),
    "at_ms false": _of(b'{"at_ms":false}'),
}

ODD: Mapping[str, bytes] = {
    "unknown options": _of(b'{"later":[1,{"x":null}],"retry_also":-1}'),
    "unknown options, deep": _of(b'{"later":' + b"[" * 200 + b"]" * 200 + b"}"),
    "unknown in retry": _of(b'{"retry":{"base":0,"shape":"square","jitter":false}}'),
    "retry empty": _of(b'{"retry":{}}'),
    "created at 0": b"0 0 0 \nodd",
    "created in the year 9999": b"253402300799000 0 0 \nodd",
    "created long after it": b"9007199254740991 0 0 \nodd",
    "due long after it": _of(b'{"at_ms":9007199254740992}'),
    "max_retries 0": _of(b'{"max_retries":0}'),
    "max deliveries 0 in the options": _of(b'{"max_deliveries":0}'),
    "dedup_key of strange letters": _of(b'{"dedup_key":"\\u0000\\n{} %\\u00fc \\u001b[31m"}'),
    "dedup_key empty": _of(b'{"dedup_key":""}'),
    "dedup_key very long": _of(b'{"dedup_key":"' + b"k" * 5000 + b'"}'),
    "headers of strange letters": _of(b'{"headers":{"":"","\\ud800":"\\u0000"}}'),
    "a field twice": _of(b'{"max_retries":-5,"max_retries":3}'),
    "spaces between": _of(b' { "max_retries" : 3 } '),
}


def put(broker: Broker, queue: str, records: Mapping[str, bytes]) -> dict[str, str]:
    """Write records into a queue's hash and ready list as a hand does, good jobs between them: id -> its name.

    Good jobs have the payload `good-<n>`, one in front of each record and one behind the last.
    """
    q, named = broker.settings.keys(queue), {}
    for n, (name, raw) in enumerate(records.items()):
        broker.enqueue(queue, b"good-%d" % n)
        id = f"{n:02}-{name.translate(str.maketrans(' ,', '_-'))}"
        named[id] = name
        broker.store.raw("HSET", q.jobs, id, raw)
        broker.store.raw("RPUSH", q.ready[0], id)
    broker.enqueue(queue, b"good-%d" % len(records))
    return named


def put_strays(broker: Broker, queue: str) -> None:
    """What is no job at all, and one whose id is no text; its payload is `stray`."""
    q = broker.settings.keys(queue)
    broker.store.raw("HSET", q.jobs, b"\xff\x00 id", NOW + b" 0 0 \nstray")
    broker.store.raw("RPUSH", q.ready[0], "no-record", b"\xffno-record", b"\xff\x00 id", "")
    broker.store.raw("ZADD", q.delayed, 1, "no-record-either")
    broker.store.raw("ZADD", q.dead, 1, b"\xffnor this one")
    broker.store.raw("ZADD", q.leases, 1, "nor-that")
