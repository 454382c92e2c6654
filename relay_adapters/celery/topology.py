"""Exchanges, bindings and queues, kept in the store: every process sees them, and they outlive restarts.

What a process has read of an exchange is believed for as long as the exchange's version in the store is the same,
and the version is asked with each publish: a binding that was made before a publish is never missed. What a process
has read of a queue is believed for a second.

kombu declares once, and then believes for ever that it has. So a process keeps what it declared, and declares it again
where the store was emptied in between, or came back in an older state: otherwise what it publishes would reach no
queue. It learns that with the versions. What others delete on purpose stays deleted.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from relay_adapters.celery import moves
from relay_adapters.celery.errors import PreconditionFailed, inequivalent, not_found, refused
from relay_adapters.celery.exchanges import PREDECLARED, TYPES, Binding
from relay_adapters.celery.places import Places
from relay_adapters.celery.terms import Terms
from relay_core import Broker
from relay_core.connection import forks

logger = logging.getLogger("relay.celery")

FRESH = 1.0
"""Seconds for which the terms of a queue are believed."""

MANY = 100
"""Declared queues that end by themselves from which on those that must have ended are looked for: a process that lives
for long may declare one per client, or per connection."""

SINCE, COUNT = "amq.", ""
"""Fields of the versions that are no exchanges: since when the store has declarations, and how often bindings have
changed. Names that begin with `amq.` are the broker's own."""

GRACE_MS = 10_000
"""How long an auto_delete queue outlives its last consumer, which may be on its way back after a lost connection."""


class Table:
    """What one process knows of one exchange: its properties, its bindings and the terms of the bound queues."""

    def __init__(
        self, exchange: str, version: str, properties: Mapping[str, Any], rows: list[Binding], terms: dict[str, Terms]
    ) -> None:
        self.exchange, self.version, self.properties, self.rows, self.terms = exchange, version, properties, rows, terms
        self.type: str = properties["type"]
        self._routes: dict[str, list[str]] = {}

    def route(self, routing_key: str) -> list[str]:
        """The queues that a routing key reaches, each once, in the same order each time."""
        found = self._routes.get(routing_key)
        if found is None:
            kind = TYPES[self.type](None)
            found = sorted(kind.lookup(self.rows, self.exchange, routing_key, None))
            if len(self._routes) >= 1000:
                self._routes.clear()
            self._routes[routing_key] = found
        return found


class Topology:
    """Reads and changes what is declared, for all channels over one broker. Safe for threads."""

    def __init__(self, broker: Broker) -> None:
        self._broker = weakref.ref(broker)
        self.places = Places(broker.settings.prefix)
        self._tables: dict[str, Table] = {}
        self._terms: dict[str, tuple[float, Terms]] = {}
        self.declared: dict[str, Terms] = {}
        """The queues that this process has declared, and below the bindings and exchanges: see `revive`."""
        self._consumed: set[str] = set()
        """The queues that this process consumes from."""
        self._used_at: dict[str, float] = {}
        """Of the declared queues that end by themselves: monotonic time at which this process used them last."""
        self._many = MANY
        self._bound: dict[str, dict[tuple[str, Binding], None]] = {}
        self._exchanges: dict[str, dict[str, Any]] = {}
        self._owed: dict[str, None] = {}
        """Queues that have to be declared and bound again, and below the exchanges."""
        self._owed_exchanges: dict[str, None] = {}
        self._owed_at = 0.0
        """Monotonic time before which that is not tried again: what it needs is declared by another process."""
        self._since: bytes | None = None
        self._count = 0
        self._looked_at = 0.0
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._reviving = threading.RLock()
        self._consumed.clear()

    @property
    def broker(self) -> Broker:
        found = self._broker()
        if found is None:
            raise RuntimeError("the broker of this topology is gone")
        return found

    def raw(self, *args: Any) -> Any:
        """A plain command on a key of the topology."""
        return self.broker.store.raw(*args)

    # exchanges

    def declare_exchange(self, name: str, properties: dict[str, Any]) -> None:
        """Store an exchange unless it is there. Raises Inequivalent when it is there with other properties."""
        if properties["type"] == PREDECLARED.get(name):
            properties = _predeclared(name) or properties
        held = self._make(name, properties)
        for what, value in properties.items():
            if (held.get(what) or None) != (value or None):
                raise inequivalent(
                    f"inequivalent arg {what!r} for exchange {name!r}: received {value!r} but current is "
                    f"{held.get(what)!r}; delete the exchange or declare it alike everywhere",
                    "Exchange.declare",
                )
        self._exchanges[name] = properties

    def _make(self, name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
        """Store an exchange unless it is there: its properties as they are."""
        command = moves.bind(self.places, name, "", "", "", _properties(properties))
        bound = self.broker.store.run(command)
        self._learn(bound.since)
        held: dict[str, Any] = json.loads(bound.properties)
        return held

    def exchange(self, name: str) -> dict[str, Any] | None:
        """The properties of an exchange as they are now."""
        found = self.raw("HGET", self.places.exchanges, name)
        if found is None and name in self._exchanges and self._was_lost():
            found = self.raw("HGET", self.places.exchanges, name)
        if found is None:
            return _predeclared(name)
        properties: dict[str, Any] = json.loads(found)
        return properties

    def exchanges(self) -> list[str]:
        return sorted(name.decode() for name in self.raw("HKEYS", self.places.exchanges))

    def delete_exchange(self, name: str, if_unused: bool = False) -> None:
        """Forget an exchange and its bindings. Raises PreconditionFailed when it must be unused and is not."""
        while True:
            rows = self._rows(name)
            bound = [(row.queue, _where(name, row)) for row in rows]
            done = self.broker.store.run(moves.discard(self.places, name, if_unused, bound))
            if done == -1:
                raise refused(f"exchange {name!r} is in use: it has bindings", "Exchange.delete")
            if done == 1:
                break
        self._tables.pop(name, None)
        self._exchanges.pop(name, None)
        for places in list(self._bound.values()):
            for exchange, row in list(places):
                if exchange == name:
                    places.pop((exchange, row), None)

    # bindings

    def bind(self, exchange: str, binding: Binding) -> None:
        """Raises NotFound when there is no such exchange or queue."""
        done = self._bind(exchange, binding, _predeclared(exchange))
        if done == -1 and self._was_lost():
            done = self._bind(exchange, binding, _predeclared(exchange))
        if done == 0:
            raise not_found("exchange", exchange, "Queue.bind")
        if done == -1:
            raise not_found("queue", binding.queue, "Queue.bind")
        self._bound.setdefault(binding.queue, {})[exchange, binding] = None

    def _bind(self, exchange: str, binding: Binding, properties: Mapping[str, Any] | None) -> int:
        """1; 0 when there is no such exchange and no properties to make it with, -1 when there is no such queue."""
        where, made = _where(exchange, binding), _properties(properties) if properties else ""
        bound = self.broker.store.run(moves.bind(self.places, exchange, binding.queue, _row(binding), where, made))
        if bound.done == 1:
            self._learn(bound.since)
        return bound.done

    def unbind(self, exchange: str, binding: Binding) -> None:
        self.broker.store.run(
            moves.unbind(self.places, exchange, binding.queue, _row(binding), _where(exchange, binding))
        )
        self._bound.get(binding.queue, {}).pop((exchange, binding), None)

    def bindings(self) -> Iterator[tuple[str, Binding]]:
        """All bindings there are, as (exchange, binding)."""
        for exchange in self.exchanges():
            for row in self._rows(exchange):
                yield exchange, row

    def _rows(self, exchange: str) -> list[Binding]:
        found = self.raw("SMEMBERS", self.places.bindings(exchange))
        return sorted((Binding(*json.loads(row)) for row in found), key=lambda row: (row.queue, row.routing_key))

    def bound(self, queue: str) -> list[tuple[str, Binding]]:
        """Where a queue is bound, as (exchange, binding)."""
        found = [json.loads(where) for where in self.raw("SMEMBERS", self.places.bound(queue))]
        return [(exchange, Binding(key, pattern, queue)) for exchange, key, pattern in found]

    def table(self, exchange: str, *, believe: bool = False) -> Table:
        """What is known of an exchange, checked against its version in the store. Raises NotFound.

        :param believe: skip the check: the caller's script makes it
        """
        held = self._tables.get(exchange)
        if held is not None and (believe or self._version(exchange) == held.version):
            return held
        return self.reload(exchange)

    def _version(self, exchange: str) -> str:
        """The version of an exchange, in a store that has what this process declared."""
        found, since, count = self.raw("HMGET", self.places.versions, exchange, SINCE, COUNT)
        if not self._is_known(since, count or b"0") or self.owing:
            self._look()
            if self.owing:
                self.revive()
            found = self.raw("HGET", self.places.versions, exchange)
        return found.decode() if found else ""

    def reload(self, exchange: str) -> Table:
        """Read an exchange anew. Raises NotFound."""
        # the version first: what changes while the rest is read makes the table old, never wrong for long
        version = self._version(exchange)
        properties = self.exchange(exchange)
        if properties is None:
            self._tables.pop(exchange, None)
            raise not_found("exchange", exchange, "Basic.publish")
        rows = self._rows(exchange)
        queues = sorted({row.queue for row in rows})
        found = self.raw("HMGET", self.places.queues, *queues) if queues else []
        terms = {queue: Terms.from_json(text) for queue, text in zip(queues, found, strict=True) if text}
        table = self._tables[exchange] = Table(exchange, version, properties, rows, terms)
        return table

    # queues

    def declare_queue(self, name: str, terms: Terms) -> int:
        """Make a queue known, or add to what is known of it: how many consumers other processes have.

        Raises Inequivalent when a term contradicts what is known.
        """
        known, wanted = "", terms
        while True:
            answer = self._declare(name, wanted, known)
            if isinstance(answer, moves.Declared):
                self.declared[name] = wanted
                self._used(name)
                self._terms[name] = (time.monotonic(), wanted)
                self._learn(answer.since)
                return answer.consumers
            known = answer
            wanted = Terms.from_json(known).merged(name, terms)

    def _declare(self, name: str, terms: Terms, known: str, new: str | None = None) -> moves.Declared | str:
        return self.broker.store.run(
            moves.declare(
                self.places, name, terms.to_json() if new is None else new, known,
                idle_ms=terms.idle_ms, mailbox=terms.mailbox, process=process_name(), limited=terms.limited,
            )
        )  # fmt: skip

    def terms(self, name: str, *, fresh: bool = False) -> Terms | None:
        """What a queue is declared to be; None for one that is not, which is asked anew each time."""
        read_at, terms = self._terms.get(name, (0.0, None))
        if terms is not None and not fresh and time.monotonic() - read_at < FRESH:
            return terms
        found = self.raw("HGET", self.places.queues, name)
        if found is None and name in self.declared and self._was_lost():
            found = self.raw("HGET", self.places.queues, name)
        if found is None:
            self._terms.pop(name, None)
            return None
        terms = Terms.from_json(found)
        if len(self._terms) >= 10_000:
            self._terms.clear()
        self._terms[name] = (time.monotonic(), terms)
        return terms

    def limited(self) -> dict[str, Terms]:
        """The queues of jobs whose messages have a time limit."""
        names = [name.decode() for name in self.raw("SMEMBERS", self.places.limited)]
        found = self.raw("HMGET", self.places.queues, *names) if names else []
        return {name: Terms.from_json(text) for name, text in zip(names, found, strict=True) if text}

    def delete_queue(self, name: str, condition: str = "") -> bool:
        """Forget a queue and its bindings, wherever they were made: False when the condition does not hold.

        :param condition: see lua/delete.lua
        """
        while True:
            bound = [(exchange, _row(binding)) for exchange, binding in self.bound(name)]
            done = self.broker.store.run(moves.delete(self.places, name, condition, bound))
            if done:
                break
        if done == -1:
            return False
        self._terms.pop(name, None)
        if condition in ("", "unused"):
            self._forget(name)
        return True

    def consume(self, name: str) -> None:
        """This process consumes from a queue, until `leave`."""
        self._consumed.add(name)

    def leave(self, name: str) -> None:
        self._consumed.discard(name)
        self._used(name)

    def _used(self, name: str) -> None:
        """This process has just used a queue."""
        if name not in self.declared:
            return
        if not self.declared[name].idle_ms:
            self._used_at.pop(name, None)
            return
        self._used_at[name] = time.monotonic()
        if len(self._used_at) >= self._many:
            self._forget_ended()
            self._many = max(MANY, 2 * len(self._used_at))

    def _forget(self, name: str) -> None:
        for known in (self.declared, self._bound, self._used_at, self._terms):
            known.pop(name, None)

    def _forget_ended(self) -> None:
        """Declared queues that have ended, or live on only because others use them, who will have declared them."""
        now = time.monotonic()
        for name, used_at in list(self._used_at.items()):
            terms = self.declared.get(name)
            if name not in self._consumed and (terms is None or now - used_at > terms.idle_ms / 1000):
                self._forget(name)

    # what this process declared, and the store has lost

    @property
    def owing(self) -> bool:
        """True when `revive` has something to do."""
        return bool(self._owed or self._owed_exchanges) and time.monotonic() >= self._owed_at

    def revive(self, queues: Iterable[str] = ()) -> None:
        """Declare and bind queues again as this process did before: they were deleted, or the store was emptied.

        What a lost connection keeps from being done stays owed, and is done first thing by the next call.
        """
        with self._reviving:
            self._owe(queues)
            for name in list(self._owed_exchanges):
                if name in self._exchanges:
                    self._make(name, self._exchanges[name])
                self._owed_exchanges.pop(name, None)
            waiting = [name for name in list(self._owed) if not self._revive(name)]
            self._owed_at = time.monotonic() + FRESH if waiting else 0.0

    def _revive(self, name: str) -> bool:
        """False where an exchange or the queue is another process's, which has not declared it again yet."""
        if name in self.declared:
            try:
                self.declare_queue(name, self.declared[name])
            except PreconditionFailed as error:
                logger.warning("queue %r was declared otherwise in the meantime: %s", name, error)
        for exchange, row in list(self._bound.get(name, {})):
            if self._bind(exchange, row, self._exchanges.get(exchange) or _predeclared(exchange)) != 1:
                return False
        self._owed.pop(name, None)
        return True

    def _owe(self, queues: Iterable[str]) -> None:
        owed = dict.fromkeys(queues)
        if owed:
            self._owed |= owed
            self._owed_at = 0.0

    def _learn(self, since: bytes) -> None:
        """A declaration was made in a store that has some since then."""
        if not self._is_known(since, None):
            self._look()

    def _is_known(self, since: bytes | None, count: bytes | None) -> bool:
        """False when this is not the store, or not the state of it, that this process knew."""
        if self._since is None:
            self._since = since
        if since != self._since or (count is not None and int(count) < self._count):
            return False
        self._count = self._count if count is None else int(count)
        return True

    def _look(self) -> None:
        """See whether the store has lost what this process declared: then all of it is owed.

        One thread looks at a time: another one's answer may be older than what is known by now.
        """
        with self._reviving:
            since, count = self.raw("HMGET", self.places.versions, SINCE, COUNT)
            if since == self._since and int(count or 0) >= self._count:
                return
            self._forget_ended()
            self._owed_exchanges |= dict.fromkeys(self._exchanges)
            self._owe([*self.declared, *self._bound])
            if self.owing:
                logger.warning("the store was emptied, or is in an older state: its queues are declared again")
            self._terms.clear()
            # last: from now on other threads take this state for known
            self._since, self._count = since, int(count or 0)

    def _was_lost(self) -> bool:
        """Whether what this process declared was gone with the whole store: then it is there again."""
        now = time.monotonic()
        if now - self._looked_at >= FRESH:
            self._looked_at = now
            self._look()
        lost = self.owing
        if lost:
            self.revive()
        return lost

    def consumers(self, name: str) -> int:
        """How many processes consume from a queue."""
        return int(self.raw("ZCOUNT", self.places.consumers(name), self.now_ms(), "+inf"))

    def waiting(self, name: str) -> int:
        """How many messages wait in a mailbox."""
        box = self.places.box(name)
        first = self.raw("XRANGE", box, "-", "+", "COUNT", 1)
        if not first:
            return 0
        # given and not yet acknowledged ones leave with their consumer: asked first, so none of them is counted. Nor
        # are those that have left already, as too many or too old, of which the group knows until the next touch
        given = len(self.raw("XPENDING", box, "q", first[0][0], "+", 1_000_000))
        return max(0, int(self.raw("XLEN", box)) - given)

    def use(self, name: str, terms: Terms) -> None:
        """A queue that expires was used: it lives on for its time. Not a plain ZADD, which a full server refuses."""
        self._used(name)
        known = terms.to_json()
        while known:
            answer = self._declare(name, Terms.from_json(known), known, known)
            known = answer if isinstance(answer, str) else ""

    def has_ended(self, name: str) -> bool:
        """True for a queue that expires and was not used for its time."""
        at = self.raw("ZSCORE", self.places.ends, name)
        return at is not None and float(at) <= self.now_ms()

    def ended(self, limit: int = 50) -> list[str]:
        """Queues whose time is over, the longest over first."""
        found = self.raw("ZRANGE", self.places.ends, "-inf", self.now_ms(), "BYSCORE", "LIMIT", 0, limit)
        return [name.decode() for name in found]

    def now_ms(self) -> int:
        """Unix milliseconds by the server's clock."""
        seconds, micros = self.raw("TIME")
        return int(seconds) * 1000 + int(micros) // 1000


def _predeclared(name: str) -> dict[str, Any] | None:
    if name not in PREDECLARED:
        return None
    return {"type": PREDECLARED[name], "durable": True, "auto_delete": False, "arguments": {}}


def _properties(properties: Mapping[str, Any]) -> str:
    return json.dumps(properties, sort_keys=True)


def _row(binding: Binding) -> str:
    return json.dumps(binding)


def _where(exchange: str, binding: Binding) -> str:
    return json.dumps((exchange, binding.routing_key, binding.pattern))


def process_name() -> str:
    """`<host>:<pid>:<random>`, the same for the life of a process."""
    global _process
    if _process[0] != os.getpid():
        _process = (os.getpid(), f"{socket.gethostname()}:{os.getpid()}:{os.urandom(3).hex()}")
    return _process[1]


_process = (0, "")
