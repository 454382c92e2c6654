"""The messages of Dramatiq's RedisBroker, read and taken out for `relay migrate dramatiq-redis`.

Its keys, all under a namespace N, queue Q being `name` or `name.DQ` (delayed):

    N:Q             LIST of message ids          N:Q.msgs          HASH id -> message
    N:name.XQ       ZSET id, time of death, ms   N:name.XQ.msgs    HASH id -> message
    N:__acks__.W.Q  SET of ids that worker W holds
    N:__heartbeats__ ZSET W, last seen, ms
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dramatiq.common import q_name
from dramatiq.message import Message

from relay_adapters.dramatiq.message import JOB_ID, encoded
from relay_adapters.dramatiq.plugin import ADAPTER, HEADER
from relay_core.errors import InvalidArgument
from relay_core.job import Arrival, ArrivalState
from relay_core.keys import LEVELS
from relay_core.migration import BATCH, Found, SourceStore, why_not

_TAKE_OUT = """
local gone = 0
for i = 2, #ARGV do
  if ARGV[1] == 'list' then gone = gone + redis.call('LREM', KEYS[1], 1, ARGV[i])
  elseif ARGV[1] == 'set' then gone = gone + redis.call('SREM', KEYS[1], ARGV[i])
  else gone = gone + redis.call('ZREM', KEYS[1], ARGV[i]) end
  redis.call('HDEL', KEYS[2], ARGV[i])
end
return gone
"""
_SCAN = 1000
_MAX_TRACE = 3000
_LATEST = 250_000_000_000
"""Unix seconds of the last moment for which a job is stored here, in the year 9892: what is due later is due then."""


class RedisSource:
    """See relay_core.migration.Source.

    :param heartbeat_timeout: milliseconds of silence after which a worker is gone
    :param app: a module to import first, for the encoder that it sets
    """

    def __init__(
        self,
        store: SourceStore,
        *,
        namespace: str = "dramatiq",
        heartbeat_timeout: int = 60_000,
        app: str | None = None,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._heartbeat_timeout = heartbeat_timeout
        self._unreadable: Counter[str] = Counter()
        if app is not None:
            _load(app)

    def found(self) -> list[Found]:
        return [found for found in self._all() if not why_not(found.queue)]

    def _all(self) -> list[Found]:
        """As `found`, with the queues that relay can have none of the name of."""
        gone, _held = self._holders()
        counts: Counter[tuple[str, ArrivalState]] = Counter()
        for queue in self._queues():
            counts[queue, "ready"] += self._store.raw("LLEN", self._key(queue))
            counts[queue, "delayed"] += self._store.raw("LLEN", self._key(f"{queue}.DQ"))
            counts[queue, "dead"] += self._store.raw("ZCARD", self._key(f"{queue}.XQ"))
        for key, queue in gone:
            counts[q_name(queue), "delayed" if queue.endswith(".DQ") else "ready"] += self._store.raw("SCARD", key)
        return [Found(queue, state, count) for (queue, state), count in sorted(counts.items())]

    def batches(self) -> Iterator[Sequence[Arrival]]:
        gone, _held = self._holders()
        # what a worker held was at the head of its queue
        for key, queue in gone:
            if why_not(q_name(queue)):
                continue
            ids = sorted(self._store.raw("SMEMBERS", key))  # few: as many as a worker prefetches
            for at in range(0, len(ids), BATCH):
                yield from self._batch("set", key, queue, [(id, 0.0) for id in ids[at : at + BATCH]])
        for queue in self._queues():
            if why_not(queue):
                continue
            for name in (queue, f"{queue}.DQ"):
                key, kept = self._key(name), 0
                while ids := self._store.raw("LRANGE", key, kept, kept + BATCH - 1):
                    before = self._unreadable[queue]
                    yield from self._batch("list", key, name, [(id, 0.0) for id in ids])
                    kept += self._unreadable[queue] - before
            key = self._key(f"{queue}.XQ")
            while flat := self._store.raw("ZRANGE", key, 0, BATCH - 1, "WITHSCORES"):
                yield from self._batch("zset", key, f"{queue}.XQ", _scored(flat))

    def left(self) -> list[Found]:
        _gone, held = self._holders()
        counts = Counter({q_name(queue): 0 for _key, queue in held})
        for key, queue in held:
            counts[q_name(queue)] += self._store.raw("SCARD", key)
        seconds = self._heartbeat_timeout / 1000
        busy = f"held by workers that were seen in the last {seconds:g} s; when they have stopped, migrate again"
        dark = "delayed, and they do not decode, so that nothing tells until when; name your module with --app"
        unfit = [replace(one, note=why) for one in self._all() if (why := why_not(one.queue))]
        return [
            *unfit,
            *(Found(queue, "ready", count, busy) for queue, count in sorted(counts.items())),
            *(Found(queue, "delayed", count, dark) for queue, count in sorted(self._unreadable.items()) if count),
        ]

    # reading

    def _key(self, name: str) -> str:
        return f"{self._namespace}:{name}"

    def _names(self, pattern: str) -> list[str]:
        """Keys of the namespace that match, without it. SCAN gives some of them twice."""
        escaped = re.sub(r"([\[\]*?\\])", r"\\\1", self._namespace)
        names: set[str] = set()
        cursor: Any = 0
        while True:
            cursor, page = self._store.raw("SCAN", cursor, "MATCH", f"{escaped}:{pattern}", "COUNT", _SCAN)
            names.update(key.decode(errors="surrogateescape")[len(self._namespace) + 1 :] for key in page)
            if int(cursor) == 0:
                return sorted(names)

    def _queues(self) -> list[str]:
        return sorted({re.sub(r"\.[DX]Q$", "", name[: -len(".msgs")]) for name in self._names("*.msgs")})

    def _holders(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Sets of messages that workers hold, as (key, queue): of those that are gone, and of those that are not."""
        seconds, micros = self._store.raw("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        gone: list[tuple[str, str]] = []
        alive: list[tuple[str, str]] = []
        for name in self._names("__acks__.*"):
            worker, _dot, queue = name[len("__acks__.") :].partition(".")
            seen = self._store.raw("ZSCORE", self._key("__heartbeats__"), worker)
            silent = seen is None or now - float(seen) > self._heartbeat_timeout
            (gone if silent else alive).append((self._key(name), queue))
        return gone, alive

    def _batch(self, kind: str, key: str, name: str, ids: list[tuple[bytes, float]]) -> Iterator[Sequence[Arrival]]:
        """Give the messages of these ids, and take them out when relay has them."""
        bodies = f"{self._key(name)}.msgs"
        found = self._store.raw("HMGET", bodies, *(id for id, _score in ids))
        arrivals: list[Arrival] = []
        done: list[bytes] = []
        for (id, died), body in zip(ids, found, strict=True):
            arrival = None if body is None else _arrival(id.decode(), name, body, died)
            if body is not None and arrival is None:
                self._unreadable[q_name(name)] += 1
                continue
            done.append(id)  # an id without a body has nothing to run: its worker acked it meanwhile
            if arrival is not None:
                arrivals.append(arrival)
        if arrivals:
            yield arrivals
        if done:
            self._store.raw("EVAL", _TAKE_OUT, 2, key, bodies, kind, *done)


def _arrival(id: str, name: str, body: bytes, died: float) -> Arrival | None:
    """The job that relay's own broker would have made of it; None for a delayed one that does not decode."""
    queue = q_name(name) if not name.endswith(".XQ") else name[: -len(".XQ")]
    headers = {HEADER: ADAPTER}
    dead = name.endswith(".XQ")
    try:
        message: Message[Any] = Message.decode(body)
        message = message.copy(queue_name=queue, options={JOB_ID: id})
        message.options.pop("redis_message_id", None)
        payload = encoded(message)
        options = message.options
    except Exception:  # an encoder may fail in any way
        if name.endswith(".DQ"):
            return None
        # the worker may know better than we do; if it does not, the message ends there among the dead
        state: ArrivalState = "dead" if dead else "ready"
        return Arrival(queue, id, body, state, at=died, headers=headers, error="it does not decode here")
    trace, eta, priority = options.get("traceback"), options.get("eta"), options.get("broker_priority")
    due = None if dead else _seconds(eta)
    return Arrival(
        queue,
        id,
        payload,
        "dead" if dead else "ready" if due is None else "delayed",
        at=died if dead else due or 0.0,
        created_at=_seconds(message.message_timestamp),
        priority=min(priority, LEVELS - 1) if isinstance(priority, int) and priority > 0 else 0,
        headers=headers,
        error=trace[-_MAX_TRACE:] if isinstance(trace, str) else "",
    )


def _seconds(ms: Any) -> float | None:
    """Unix seconds, at most _LATEST, of what a message has as milliseconds; None for what is no time."""
    if not isinstance(ms, (int, float)) or ms != ms:  # JSON may have NaN
        return None
    return max(0, min(ms, _LATEST * 1000)) / 1000


def _scored(flat: Any) -> list[tuple[bytes, float]]:
    """(id, unix seconds) of a reply with scores, in whichever shape the client library gives it."""
    rows = flat if isinstance(flat[0], (tuple, list)) else zip(flat[::2], flat[1::2], strict=True)
    return [(id, float(score) / 1000) for id, score in rows]


def _load(app: str) -> None:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(app)
    except Exception as error:
        raise InvalidArgument(f"--app {app}: it cannot be imported: {error!r}") from error
