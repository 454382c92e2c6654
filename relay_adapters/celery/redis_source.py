"""The messages of kombu's Redis transport, read and taken out for `relay migrate celery-redis`.

Its keys, all after the `global_keyprefix`; SEP is two control bytes, or the transport's option `sep`:

    Q, Q SEP 3, Q SEP 6, Q SEP 9  LIST of messages of queue Q, one per priority step; the next one is at the right end
    unacked                       HASH delivery tag -> [message, exchange, routing key]: what workers hold, ETAs too
    unacked_index                 ZSET delivery tag, time of delivery
    _kombu.binding.<exchange>     SET of <routing key> SEP <pattern> SEP <queue>

A list is first renamed, to `relay-migrate <the two bytes> <its name>`, so that no worker takes from it what relay has
already.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kombu.utils.json import object_hook

from relay_adapters.celery.messages.due import wait_of
from relay_adapters.celery.messages.envelope import pack_stored, unpack
from relay_adapters.celery.messages.ids import job_id_of
from relay_adapters.celery.messages.protocol import told_of
from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_core.errors import InvalidArgument, RelayError
from relay_core.job import Arrival, ArrivalState, new_id
from relay_core.keys import LEVELS
from relay_core.migration import BATCH, Found, SourceStore, why_not

SEP = "\x06\x16"
_HOLDING = f"relay-migrate{SEP}"
_REFUSED = f"relay-refused{SEP}"
_BINDING = "_kombu.binding."
_OTHER_EXCHANGES = re.compile(r"celeryev|.*\.?celery\.pidbox|.*\.pidbox")
"""Exchanges of events and remote control: what lies there is of no use to another fleet."""

_TOO_FAR = "due in more than 10 years"
"""Why a message that is readable cannot be moved, see relay_core.retry.MAX_DELAY."""

CLIENT_NAME = "relay-migrate"
"""How `relay migrate` calls its connection to the source."""

_SCAN = 1000
_MAX_BYTES = 8 * 2**20
"""Bytes of one batch, roughly."""

_TAKE_OUT = """
for i = 1, #ARGV do redis.call('LREM', KEYS[1], -1, ARGV[i]) end
return redis.call('LLEN', KEYS[1])
"""


class Binding(NamedTuple):
    """One row of an exchange's table."""

    routing_key: str
    pattern: str
    queue: str

    def takes(self, routing_key: str) -> bool:
        if self.pattern:
            return re.match(self.pattern, routing_key) is not None
        return self.routing_key == routing_key


class RedisSource:
    """See relay_core.migration.Source.

    :param key_prefix: the transport's `global_keyprefix`
    :param sep: the transport's `sep`; None: kombu's own, and bindings that it does not divide are an error
    :param queues: only these; empty for all that are bound
    :param unacked: `auto` moves what workers hold when none is connected, `all` also when some are (what they run or
        hold until its ETA runs twice then), `none` leaves it
    :param priority_order: `redis`, 0 first, as the transport has it; `amqp` for apps that had it the other way round
    """

    def __init__(
        self,
        store: SourceStore,
        *,
        key_prefix: str = "",
        sep: str | None = None,
        queues: Sequence[str] = (),
        unacked: str = "auto",
        priority_order: str = "redis",
    ) -> None:
        self._store = store
        self._prefix = key_prefix
        self._sep, self._sep_given = sep or SEP, bool(sep)
        self._only = set(queues)
        self._unacked = unacked
        self._zero_first = priority_order == "redis"
        self._unreadable: Counter[str] = Counter()
        self._tables: dict[str, list[Binding]] = {}

    def found(self) -> list[Found]:
        counts: Counter[tuple[str, ArrivalState]] = Counter()
        for queue, count in self._listed().items():
            if not why_not(queue):
                counts[queue, "ready"] += count
        if not self._why_unacked_stay():
            for _tag, queues, message in self._held():
                state: ArrivalState = "delayed" if message.wait else "ready"
                for queue in queues:
                    counts[queue, state] += 1
        return [Found(queue, state, count) for (queue, state), count in sorted(counts.items())]

    def batches(self) -> Iterator[Sequence[Arrival]]:
        for key, queue, step in self._lists():
            if not why_not(queue):
                yield from self._list(key, queue, step)
        if not self._why_unacked_stay():
            yield from self._all_held()

    def left(self) -> list[Found]:
        dark = f"not readable as messages of kombu, or {_TOO_FAR}; they wait in the set {{!r}} of the old server"
        listed = sorted(self._listed().items())
        rows = [Found(queue, "ready", count, why) for queue, count in listed if (why := why_not(queue))]
        rows += [] if self._only else self._of_other_apps()
        for name in self._names(f"{_REFUSED}*", "set"):
            queue = re.sub(f"{re.escape(self._sep)}[0-9]+$", "", name.removeprefix(_REFUSED))
            if not self._only or queue in self._only:
                count = self._store.raw("SCARD", self._prefix + name)
                rows.append(Found(queue, "ready", count, dark.format(self._prefix + name)))
        if why := self._why_unacked_stay():
            counts: Counter[tuple[str, ArrivalState]] = Counter()
            for _tag, queues, message in self._held():
                counts[next(iter(queues), "?"), "delayed" if message.wait else "ready"] += 1
            rows += [Found(queue, state, count, why) for (queue, state), count in sorted(counts.items())]
        elif lost := self._unreadable["unacked"]:
            rows.append(
                Found(
                    "?",
                    "ready",
                    lost,
                    "unacked, and not readable, without a queue, of a queue whose name relay cannot have, or "
                    f"{_TOO_FAR}; they stay in 'unacked'",
                )
            )
        return rows

    # lists

    def _lists(self) -> list[tuple[str, str, int]]:
        """All lists of messages as (key without the prefix, queue, priority step), the first step first."""
        exchanges, prefixes = self._exchanges()
        bound = {binding.queue for exchange in exchanges for binding in self._table(exchange)}
        found = set()
        for name in self._names("*", "list"):
            key = name.removeprefix(_HOLDING)
            queue, step = (key, 0) if key in bound else self._queue_and_step(key)
            if self._only:
                ours = queue in self._only
            else:
                # a queue whose binding is gone is known by what lies in it
                ours = queue in bound or name != key or (not name.startswith(prefixes) and self._holds_tasks(name))
            if ours:
                found.add((key, queue, step))
        return sorted(found, key=lambda row: (row[1], row[2]))

    def _queue_and_step(self, key: str) -> tuple[str, int]:
        queue, _, step = key.rpartition(self._sep)
        return (queue, int(step)) if queue and step.isdecimal() else (key, 0)

    def _of_other_apps(self) -> Iterator[Found]:
        """What lies in the lists of apps on this database whose `global_keyprefix` is another one."""
        _exchanges, prefixes = self._exchanges()
        if not prefixes:
            return
        ours = {key for key, _queue, _step in self._lists()}
        counts: Counter[tuple[str, str]] = Counter()
        for name in self._names("*", "list"):
            # of two prefixes that fit, the longer one is the app's
            prefix = max((one for one in prefixes if name.startswith(one)), key=len, default="")
            if prefix and name not in ours and self._holds_tasks(name):
                queue, _step = self._queue_and_step(name)
                counts[queue, self._prefix + prefix] += self._store.raw("LLEN", self._prefix + name)
        for (queue, prefix), count in sorted(counts.items()):
            note = f"of an app with a key prefix of its own; --key-prefix {shlex.quote(prefix)} moves it"
            yield Found(queue, "ready", count, note)

    def _listed(self) -> Counter[str]:
        """How many messages there are in the lists of each queue."""
        counts: Counter[str] = Counter()
        for key, queue, _step in self._lists():
            for name in (key, _HOLDING + key):
                counts[queue] += self._store.raw("LLEN", self._prefix + name)
        return counts

    def _holds_tasks(self, name: str) -> bool:
        try:
            text = self._store.raw("LINDEX", self._prefix + name, -1)
        except RelayError:  # it was a list a moment ago
            return False
        message = None if text is None else _message(text)
        return message is not None and "task" in message.told

    def _list(self, key: str, queue: str, step: int) -> Iterator[Sequence[Arrival]]:
        holding = self._prefix + _HOLDING + key
        while True:
            # what an earlier run was killed at comes first; a list that is not there raises
            if not self._store.raw("EXISTS", holding):
                if not self._store.raw("EXISTS", self._prefix + key):
                    return
                try:
                    self._store.raw("RENAMENX", self._prefix + key, holding)
                except RelayError:
                    if self._store.raw("EXISTS", self._prefix + key):
                        raise
                    return
                self._store.raw("PERSIST", holding)  # of queues with x-expires
            while texts := self._tail(holding):
                arrivals = []
                for text in texts:
                    message = _message(text)
                    if message is None:
                        self._store.raw("SADD", self._prefix + _REFUSED + key, text)
                    else:
                        arrivals.append(self._arrival(queue, message, step))
                if arrivals:
                    yield arrivals
                self._store.raw("EVAL", _TAKE_OUT, 1, holding, *texts)

    def _tail(self, holding: str) -> list[bytes]:
        """The next messages, in the order in which workers would take them."""
        texts: list[bytes] = self._store.raw("LRANGE", holding, -BATCH, -1)
        size = 0
        for at, text in enumerate(reversed(texts)):
            size += len(text)
            if size > _MAX_BYTES and at:
                return texts[-at:][::-1]
        return texts[::-1]

    # what workers hold

    def _held(self) -> Iterator[tuple[bytes, list[str], Message]]:
        """(delivery tag, queues, message) of what is unacked; more than one queue where nothing tells from which."""
        self._unreadable["unacked"] = 0
        seen: set[bytes] = set()  # HSCAN gives some of them twice
        cursor: Any = 0
        while True:
            cursor, flat = self._store.raw("HSCAN", self._prefix + "unacked", cursor, "COUNT", BATCH)
            for tag, text in flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True):
                if tag in seen:
                    continue
                seen.add(tag)
                try:
                    envelope, exchange, routing_key = json.loads(text, object_hook=object_hook)
                    message, queues = _message(envelope), self._queues_of(exchange or "", routing_key or "")
                except (ValueError, TypeError):
                    message, queues = None, []
                if message is None or not queues or any(map(why_not, queues)):
                    self._unreadable["unacked"] += 1
                elif not self._only or self._only & set(queues):
                    yield tag, queues, message
            if int(cursor) == 0:
                return

    def _all_held(self) -> Iterator[Sequence[Arrival]]:
        tags: list[bytes] = []
        arrivals: list[Arrival] = []
        for tag, queues, message in self._held():
            tags.append(tag)
            arrivals += [self._arrival(queue, message, 0) for queue in queues]
            if len(arrivals) >= BATCH:
                yield arrivals
                self._forget(tags)
                tags, arrivals = [], []
        if arrivals:
            yield arrivals
            self._forget(tags)

    def _forget(self, tags: Sequence[bytes]) -> None:
        self._store.raw("HDEL", self._prefix + "unacked", *tags)
        self._store.raw("ZREM", self._prefix + "unacked_index", *tags)

    def _queues_of(self, exchange: str, routing_key: str) -> list[str]:
        """Where kombu would put the message back: all queues that its exchange and routing key lead to."""
        queues = (
            {binding.queue for binding in self._table(exchange) if binding.takes(routing_key)} if exchange else set()
        )
        return sorted(queues) or ([routing_key] if routing_key else [])

    def _why_unacked_stay(self) -> str:
        """Empty when what workers hold is to be moved."""
        if self._unacked == "all":
            return ""
        if self._unacked == "none":
            return "unacked; --unacked none leaves it"
        try:
            clients = self._store.raw("CLIENT", "LIST")
        except RelayError as error:
            return (
                f"held by workers, perhaps: who is connected cannot be asked ({error}). "
                "When all workers have stopped, migrate again with --unacked all"
            )
        workers = _workers(clients if isinstance(clients, bytes) else str(clients).encode())
        if not workers:
            return ""
        return (
            f"held by workers: {workers} connections wait for tasks or control messages; "
            "migrate again when they have stopped"
        )

    # bindings

    def _exchanges(self) -> tuple[list[str], tuple[str, ...]]:
        """The app's exchanges for tasks, and what the keys of other apps on this database begin with."""
        parts = [name.partition(_BINDING) for name in self._names(f"*{_BINDING}*", "set")]
        exchanges = [name for prefix, _, name in parts if not prefix and not _OTHER_EXCHANGES.fullmatch(name)]
        return exchanges, tuple({prefix for prefix, _, _name in parts if prefix})

    def _table(self, exchange: str) -> list[Binding]:
        if exchange not in self._tables:
            rows = self._store.raw("SMEMBERS", f"{self._prefix}{_BINDING}{exchange}")
            parts = [row.decode(errors="surrogateescape").split(self._sep) for row in rows]
            if not self._sep_given and (odd := [part for part in parts if len(part) != 3]):
                # else the lists of its priorities would pass for queues, which nobody serves
                raise InvalidArgument(
                    f"exchange {exchange!r} has the binding {self._sep.join(odd[0])!r}, which kombu's separator does "
                    "not divide in three; name the 'sep' of the app's broker_transport_options with --sep"
                )
            self._tables[exchange] = [Binding(*part) for part in parts if len(part) == 3]
        return self._tables[exchange]

    def _names(self, pattern: str, kind: str) -> list[str]:
        """Keys of a kind after the prefix that match, without it. SCAN gives some of them twice."""
        escaped = re.sub(r"([\[\]*?\\])", r"\\\1", self._prefix)
        names: set[str] = set()
        cursor: Any = 0
        while True:
            cursor, page = self._store.raw("SCAN", cursor, "MATCH", f"{escaped}{pattern}", "COUNT", _SCAN, "TYPE", kind)
            names.update(key.decode(errors="surrogateescape")[len(self._prefix) :] for key in page)
            if int(cursor) == 0:
                return sorted(names)

    # messages

    def _arrival(self, queue: str, message: Message, step: int) -> Arrival:
        """The job that relay's transport would have made of it."""
        wait, priority = message.wait, message.envelope["properties"].get("priority")
        if not isinstance(priority, int) or isinstance(priority, bool):
            priority = step
        level = max(0, min(priority, LEVELS - 1))
        id, own = _ids_of(message)
        return Arrival(
            queue,
            id,
            message.payload,
            "delayed" if wait else "ready",
            at=time.time() + wait if wait else 0.0,
            priority=LEVELS - 1 - level if self._zero_first else level,
            headers={HEADER: ADAPTER, "celery_redis": own},
            other_id=own if id != own else "",
        )


class Message(NamedTuple):
    """One message: in kombu's envelope, and as relay's transport keeps it.

    :ivar wait: seconds until its ETA, 0 without one
    :ivar told: what it tells of its task
    """

    envelope: dict[str, Any]
    payload: bytes
    wait: float
    told: Mapping[str, Any]


def _message(envelope: Any) -> Message | None:
    """A message from its envelope or the JSON of that; None for what is none, or has an ETA beyond relay's limit."""
    try:
        if isinstance(envelope, bytes):
            envelope = json.loads(envelope, object_hook=object_hook)
        if not isinstance(envelope.get("headers"), dict) or "body" not in envelope:
            return None
        payload = pack_stored(envelope)
        message = unpack(payload)
        return Message(envelope, payload, wait_of(message), told_of(message))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InvalidArgument):
        return None


def _ids_of(message: Message) -> tuple[str, str]:
    """The id that relay's transport would have chosen, and one that is this very message's alone.

    Both are the same however often it is read; without a delivery tag nothing tells two alike apart.
    """
    envelope = message.envelope
    tag = envelope["properties"].get("delivery_tag")
    if not tag:
        own = new_id()
        return own, own
    own = hashlib.blake2b(json.dumps([tag, envelope["body"]], default=str).encode(), digest_size=13).hexdigest()
    id, task_id = job_id_of(message.told), message.told.get("id")
    return (id, own) if task_id and id.startswith(str(task_id)) else (own, own)


def _workers(clients: bytes) -> int:
    """Connections to our database that wait as Celery's workers do: for tasks, or for control messages."""
    rows = [
        dict(word.partition("=")[::2] for word in line.split())
        for line in clients.decode(errors="replace").splitlines()
    ]
    ours = {row.get("db") for row in rows if row.get("name") == CLIENT_NAME}
    return sum(
        row.get("cmd", "").lower() == "brpop" or row.get("psub", "0") != "0"
        for row in rows
        if not ours or row.get("db") in ours
    )
