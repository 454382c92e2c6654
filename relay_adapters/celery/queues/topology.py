"""Exchanges, bindings and queues, kept in the store: every process sees them, and they outlive restarts.

What a process has read of an exchange is believed for as long as the exchange's version in the store is the same,
and the version is asked with each publish: a binding that was made before a publish is never missed. What a process
has read of a queue is believed for a second.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from relay_adapters.celery.errors import PreconditionFailed, inequivalent, not_found
from relay_adapters.celery.queues.declarations import Declarations, predeclared
from relay_adapters.celery.queues.exchanges import TYPES, Binding
from relay_adapters.celery.queues.outage import Outage
from relay_adapters.celery.queues.remembered import Remembered
from relay_adapters.celery.queues.terms import Terms
from relay_core import Broker

FRESH = 1.0
"""Seconds for which the terms of a queue are believed."""

AS_BEFORE: Any = object()
"""The answer to a declaration that cannot be made now, and that this process has made before, or owes to the store."""

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
        self.stored = Declarations(broker)
        self.places = self.stored.places
        self.outage = Outage(broker, self.places.exchanges)
        self._tables: dict[str, Table] = {}
        self._terms: dict[str, tuple[float, Terms]] = {}
        self.own = Remembered(self.stored, self._terms)

    @property
    def broker(self) -> Broker:
        return self.stored.broker

    # exchanges

    def declare_exchange(self, name: str, properties: dict[str, Any]) -> None:
        """Store an exchange unless it is there. Raises Inequivalent when it is there with other properties."""
        fixed = predeclared(name)
        if fixed and properties["type"] == fixed["type"]:
            properties = fixed
        declared = self.own.exchanges.get(name) == properties
        made = self.outage.ask(
            lambda: self.stored.make_exchange(name, fixed or properties), AS_BEFORE if declared else None
        )
        if made is AS_BEFORE:
            return
        self.own.learn(made.since)
        held: dict[str, Any] = json.loads(made.properties)
        for what, value in properties.items():
            if (held.get(what) or None) != (value or None):
                raise inequivalent(
                    f"inequivalent arg {what!r} for exchange {name!r}: received {value!r} but current is "
                    f"{held.get(what)!r}; delete the exchange or declare it alike everywhere",
                    "Exchange.declare",
                )
        self.own.exchanges[name] = properties

    def exchange(self, name: str) -> dict[str, Any] | None:
        """The properties of an exchange as they are now."""
        found: dict[str, Any] | None = self.outage.ask(lambda: self.stored.exchange(name), self.own.exchanges.get(name))
        if found is None and name in self.own.exchanges and self.own.was_lost():
            found = self.stored.exchange(name)
        return found

    def delete_exchange(self, name: str, if_unused: bool = False) -> None:
        """Forget an exchange and its bindings. Raises PreconditionFailed when it must be unused and is not."""
        self.stored.delete_exchange(name, if_unused)
        self._tables.pop(name, None)
        self.own.forget_exchange(name)

    # bindings

    def bind(self, exchange: str, binding: Binding) -> None:
        """Raises NotFound when there is no such exchange or queue."""
        bound = (exchange, binding) in self.own.bindings.get(binding.queue, {}) or self.own.owes(binding.queue)
        made = self.outage.ask(
            lambda: self.stored.bind(exchange, binding, predeclared(exchange)), AS_BEFORE if bound else None
        )
        if made is AS_BEFORE:
            self.own.bound(exchange, binding)
            return
        if made.done != 1 and self.own.was_lost():
            made = self.stored.bind(exchange, binding, predeclared(exchange))
        if made.done == 0:
            raise not_found("exchange", exchange, "Queue.bind")
        if made.done == -1:
            raise not_found("queue", binding.queue, "Queue.bind")
        self.own.learn(made.since)
        self.own.bound(exchange, binding)

    def unbind(self, exchange: str, binding: Binding) -> None:
        self.stored.unbind(exchange, binding)
        self.own.unbound(exchange, binding)

    def table(self, exchange: str, *, believe: bool = False) -> Table:
        """What is known of an exchange, checked against its version in the store. Raises NotFound.

        :param believe: skip the check: the caller's script makes it
        """
        held = self._tables.get(exchange)
        if held is not None and (believe or self._is_current(held)):
            return held
        return self.reload(exchange)

    def _is_current(self, held: Table) -> bool:
        return bool(self.outage.ask(lambda: self._version(held.exchange), held.version) == held.version)

    def _version(self, exchange: str) -> str:
        """The version of an exchange, in a store that has what this process declared."""
        version, since, count = self.stored.version(exchange)
        if not self.own.is_known(since, count) or self.own.owing:
            self.own.look()
            if self.own.owing:
                self.own.revive()
            version, *_state = self.stored.version(exchange)
        return version

    def reload(self, exchange: str) -> Table:
        """Read an exchange anew. Raises NotFound."""
        # the version first: what changes while the rest is read makes the table old, never wrong for long
        version = self._version(exchange)
        properties = self.exchange(exchange)
        if properties is None:
            self._tables.pop(exchange, None)
            raise not_found("exchange", exchange, "Basic.publish")
        rows = self.stored.rows(exchange)
        terms = self.stored.terms(*sorted({row.queue for row in rows}))
        table = self._tables[exchange] = Table(exchange, version, properties, rows, terms)
        return table

    # queues

    def declare_queue(self, name: str, terms: Terms, later: bool = False) -> int:
        """Make a queue known, or add to what is known of it: how many consumers other processes have.

        Raises Inequivalent when a term contradicts what is known.

        :param later: whether that may be done when the server is back, if it is away
        """
        declared = self._adds_nothing(name, terms)
        believed = AS_BEFORE if declared or later else None
        answer = self.outage.ask(lambda: self.stored.declare_queue(name, terms), believed)
        if answer is AS_BEFORE:
            if not declared:
                self.own.owe(name, terms)
            return 0
        wanted, made = answer
        self._terms[name] = (time.monotonic(), wanted)
        self.own.declared_queue(name, wanted, made.since)
        return int(made.consumers)

    def _adds_nothing(self, name: str, terms: Terms) -> bool:
        """Whether this process has declared a queue so, or with what others had said of it."""
        known = self.own.queues.get(name)
        try:
            return known is not None and known.merged(name, terms) == known
        except PreconditionFailed:
            return False

    def terms(self, name: str, *, fresh: bool = False) -> Terms | None:
        """What a queue is declared to be; None for one that is not, which is asked anew each time."""
        read_at, terms = self._terms.get(name, (0.0, None))
        if terms is not None and not fresh and time.monotonic() - read_at < FRESH:
            return terms
        terms = self.outage.ask(lambda: self.stored.terms(name).get(name), terms or self.own.queues.get(name))
        if terms is None and name in self.own.queues and self.own.was_lost():
            terms = self.stored.terms(name).get(name)
        if terms is None:
            self._terms.pop(name, None)
            return None
        if len(self._terms) >= 10_000:
            self._terms.clear()
        self._terms[name] = (time.monotonic(), terms)
        return terms

    def use(self, name: str, terms: Terms) -> bool:
        """A queue that expires was used: it lives on for its time. False where the store cannot be told so now."""
        self.own.used(name)
        return self.outage.ask(lambda: self.stored.use(name, terms), AS_BEFORE) is not AS_BEFORE

    def has_ended(self, name: str) -> bool:
        """True for a queue that expires and was not used for its time, though whoever uses it could have said so."""
        return bool(self.outage.ask(lambda: self.stored.has_ended(name), False))

    def waiting(self, name: str) -> int:
        """How many messages wait in a mailbox, as far as can be told."""
        return int(self.outage.ask(lambda: self.stored.waiting(name), 0))

    def expect_expired(self, name: str, terms: Terms) -> None:
        """A message with a time limit of its own is about to be published to a queue: it is looked after from now on,
        as one with x-message-ttl."""
        self.outage.ask(lambda: self.stored.use(name, terms, expiring=True), AS_BEFORE)
        self._terms[name] = (-math.inf, terms)  # to be read anew, and believed until that can be

    def delete_queue(self, name: str, condition: str = "") -> bool:
        """Forget a queue and its bindings, wherever they were made: False when the condition does not hold.

        :param condition: see lua/delete.lua
        """
        if not self.stored.delete_queue(name, condition):
            return False
        self._terms.pop(name, None)
        if condition in ("", "unused"):
            self.own.forget_queue(name)
        return True
