"""Exchanges, bindings and queues, kept in the store: every process sees them, and they outlive restarts.

What a process has read of an exchange is believed for as long as the exchange's version in the store is the same,
and the version is asked with each publish: a binding that was made before a publish is never missed. What a process
has read of a queue is believed for a second.
"""

from __future__ import annotations

import json
import os
import socket
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from relay_adapters.celery import moves
from relay_adapters.celery.errors import inequivalent, not_found, refused
from relay_adapters.celery.exchanges import PREDECLARED, TYPES, Binding
from relay_adapters.celery.places import Places
from relay_adapters.celery.terms import Terms
from relay_core import Broker

FRESH = 1.0
"""Seconds for which the terms of a queue are believed."""

GRACE_MS = 10_000
"""How long an auto_delete queue outlives its last consumer, which may be on its way back after a lost connection."""


class Table:
    """What one process knows of one exchange: its properties, its bindings and the terms of the bound queues."""

    def __init__(
        self, exchange: str, version: str, properties: Mapping[str, Any], rows: list[Binding], terms: dict[str, Terms]
    ) -> None:
        self.exchange, self.version, self.properties, self.rows, self.terms = exchange, version, properties, rows, terms
        self.type: str = properties["type"]
        self.read_at = time.monotonic()
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
        self._bound: dict[str, dict[tuple[str, Binding], None]] = {}
        self._exchanges: dict[str, dict[str, Any]] = {}

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
        if name in PREDECLARED and properties["type"] == PREDECLARED[name]:
            self.exchange(name)
            return
        if not self.raw("HSETNX", self.places.exchanges, name, json.dumps(properties, sort_keys=True)):
            held = self.exchange(name) or properties
            for what, value in properties.items():
                if (held.get(what) or None) != (value or None):
                    raise inequivalent(
                        f"inequivalent arg {what!r} for exchange {name!r}: received {value!r} but current is "
                        f"{held.get(what)!r}; delete the exchange or declare it alike everywhere",
                        "Exchange.declare",
                    )
        self._exchanges[name] = properties

    def exchange(self, name: str) -> dict[str, Any] | None:
        """The properties of an exchange as they are now."""
        found = self.raw("HGET", self.places.exchanges, name)
        if found is None:
            if name not in PREDECLARED:
                return None
            made = {"type": PREDECLARED[name], "durable": True, "auto_delete": False, "arguments": {}}
            self.raw("HSETNX", self.places.exchanges, name, json.dumps(made, sort_keys=True))
            return made
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

    # bindings

    def bind(self, exchange: str, binding: Binding) -> None:
        """Raises NotFound when there is no such exchange or queue."""
        done = self._bind(exchange, binding)
        if done == 0 and exchange in PREDECLARED:
            self.exchange(exchange)
            done = self._bind(exchange, binding)
        if done == 0:
            raise not_found("exchange", exchange, "Queue.bind")
        if done == -1:
            raise not_found("queue", binding.queue, "Queue.bind")
        self._bound.setdefault(binding.queue, {})[exchange, binding] = None

    def _bind(self, exchange: str, binding: Binding) -> int:
        command = moves.bind(self.places, exchange, binding.queue, _row(binding), _where(exchange, binding))
        return self.broker.store.run(command)

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
            answer = self.broker.store.run(
                moves.declare(
                    self.places, name, wanted.to_json(), known,
                    idle_ms=wanted.idle_ms, mailbox=wanted.mailbox, process=process_name(), limited=wanted.limited,
                )
            )  # fmt: skip
            if isinstance(answer, int):
                self.declared[name] = wanted
                self._terms[name] = (time.monotonic(), wanted)
                return answer
            known = answer
            wanted = Terms.from_json(known).merged(name, terms)

    def terms(self, name: str, *, fresh: bool = False) -> Terms | None:
        """What a queue is declared to be; None for one that is not, which is asked anew each time."""
        read_at, terms = self._terms.get(name, (0.0, None))
        if terms is not None and not fresh and time.monotonic() - read_at < FRESH:
            return terms
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
            self.declared.pop(name, None)
            self._bound.pop(name, None)
        return True

    def revive(self, name: str) -> None:
        """Declare and bind a queue again as this process did before: it was deleted, or the store was emptied."""
        terms = self.declared.get(name)
        if terms is None:
            return
        self.declare_queue(name, terms)
        for exchange, binding in list(self._bound.get(name, {})):
            if exchange in self._exchanges:
                self.declare_exchange(exchange, self._exchanges[exchange])
            self.bind(exchange, binding)

    def consumers(self, name: str) -> int:
        """How many processes consume from a queue."""
        return int(self.raw("ZCOUNT", self.places.consumers(name), self._now(), "+inf"))

    def waiting(self, name: str) -> int:
        """How many messages wait in a mailbox."""
        box = self.places.box(name)
        if not self.raw("XLEN", box):
            return 0
        # given and not yet acknowledged ones leave with their consumer: asked first, so none of them is counted
        given = int(self.raw("XPENDING", box, "q")[0])
        return max(0, int(self.raw("XLEN", box)) - given)

    def use(self, name: str, terms: Terms) -> None:
        """A queue that expires was used: it lives on for its time."""
        self.raw("ZADD", self.places.ends, "XX", "GT", self._now() + terms.idle_ms, name)

    def has_ended(self, name: str) -> bool:
        """True for a queue that expires and was not used for its time."""
        at = self.raw("ZSCORE", self.places.ends, name)
        return at is not None and float(at) <= self._now()

    def ended(self, limit: int = 50) -> list[str]:
        """Queues whose time is over, the longest over first."""
        found = self.raw("ZRANGE", self.places.ends, "-inf", self._now(), "BYSCORE", "LIMIT", 0, limit)
        return [name.decode() for name in found]

    def _now(self) -> int:
        """Unix milliseconds by the server's clock."""
        seconds, micros = self.raw("TIME")
        return int(seconds) * 1000 + int(micros) // 1000


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
