"""What is declared - exchanges, bindings and queues - as it lies in the store: read and changed, nothing kept."""

from __future__ import annotations

import json
import os
import socket
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from relay_adapters.celery.errors import refused
from relay_adapters.celery.queues import moves
from relay_adapters.celery.queues.exchanges import PREDECLARED, Binding
from relay_adapters.celery.queues.places import Places
from relay_adapters.celery.queues.terms import Terms
from relay_core import Broker

SINCE, COUNT = "amq.", ""
"""Fields of the versions that are no exchanges: since when the store has declarations, and how often bindings have
changed. Names that begin with `amq.` are the broker's own."""


class Declarations:
    """Asks one broker's store, anew each time. Safe for threads."""

    def __init__(self, broker: Broker) -> None:
        self._broker = weakref.ref(broker)
        self.places = Places(broker.settings.prefix)

    @property
    def broker(self) -> Broker:
        found = self._broker()
        if found is None:
            raise RuntimeError("the broker of this topology is gone")
        return found

    def raw(self, *args: Any) -> Any:
        """A plain command on a key of the topology."""
        return self.broker.store.raw(*args)

    def now_ms(self) -> int:
        """Unix milliseconds by the server's clock."""
        seconds, micros = self.raw("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    # exchanges

    def make_exchange(self, name: str, properties: Mapping[str, Any]) -> moves.Bound:
        """Store an exchange unless it is there."""
        return self.broker.store.run(moves.bind(self.places, name, "", "", "", _properties(properties)))

    def exchange(self, name: str) -> dict[str, Any] | None:
        """The properties of an exchange, of a predeclared one too before its first use."""
        found = self.raw("HGET", self.places.exchanges, name)
        if found is None:
            return predeclared(name)
        properties: dict[str, Any] = json.loads(found)
        return properties

    def exchanges(self) -> list[str]:
        return sorted(name.decode() for name in self.raw("HKEYS", self.places.exchanges))

    def delete_exchange(self, name: str, if_unused: bool) -> None:
        """Delete an exchange and its bindings. Raises PreconditionFailed when it must be unused and is not."""
        done = 0
        while done != 1:
            bound = [(row.queue, _where(name, row)) for row in self.rows(name)]
            done = self.broker.store.run(moves.discard(self.places, name, if_unused, bound))
            if done == -1:
                raise refused(f"exchange {name!r} is in use: it has bindings", "Exchange.delete")

    # bindings

    def bind(self, exchange: str, binding: Binding, properties: Mapping[str, Any] | None) -> moves.Bound:
        """Store a binding.

        :param properties: of the exchange, which is made with them where it is missing; None: it is not made
        """
        where, made = _where(exchange, binding), _properties(properties) if properties else ""
        return self.broker.store.run(moves.bind(self.places, exchange, binding.queue, _row(binding), where, made))

    def unbind(self, exchange: str, binding: Binding) -> None:
        self.broker.store.run(
            moves.unbind(self.places, exchange, binding.queue, _row(binding), _where(exchange, binding))
        )

    def bindings(self) -> Iterator[tuple[str, Binding]]:
        """All bindings there are, as (exchange, binding)."""
        for exchange in self.exchanges():
            for row in self.rows(exchange):
                yield exchange, row

    def rows(self, exchange: str) -> list[Binding]:
        """The bindings of one exchange."""
        found = self.raw("SMEMBERS", self.places.bindings(exchange))
        return sorted((Binding(*json.loads(row)) for row in found), key=lambda row: (row.queue, row.routing_key))

    def bound(self, queue: str) -> list[tuple[str, Binding]]:
        """Where a queue is bound, as (exchange, binding)."""
        found = [json.loads(where) for where in self.raw("SMEMBERS", self.places.bound(queue))]
        return [(exchange, Binding(key, pattern, queue)) for exchange, key, pattern in found]

    # versions

    def version(self, exchange: str) -> tuple[str, bytes | None, int]:
        """An exchange's version, empty before it has one; then `state`, of the same moment."""
        found, since, count = self.raw("HMGET", self.places.versions, exchange, SINCE, COUNT)
        return found.decode() if found else "", since, int(count or 0)

    def state(self) -> tuple[bytes | None, int]:
        """Since when the store has declarations, and how often bindings have changed since."""
        since, count = self.raw("HMGET", self.places.versions, SINCE, COUNT)
        return since, int(count or 0)

    # queues

    def declare_queue(self, name: str, terms: Terms) -> tuple[Terms, moves.Declared]:
        """Store a queue, or add to what is known of it: its terms then.

        Raises Inequivalent when a term contradicts what is known.
        """
        wanted, known = terms, ""
        while True:
            answer = self._declare(name, wanted, known, wanted.to_json())
            if isinstance(answer, moves.Declared):
                return wanted, answer
            known = answer
            wanted = Terms.from_json(known).merged(name, terms)

    def _declare(self, name: str, terms: Terms, known: str, new: str) -> moves.Declared | str:
        return self.broker.store.run(
            moves.declare(
                self.places, name, new, known,
                idle_ms=terms.idle_ms, mailbox=terms.mailbox, process=process_name(), limited=terms.limited,
            )
        )  # fmt: skip

    def use(self, name: str, terms: Terms, **changes: Any) -> None:
        """A queue was used: where it expires, it lives on for its time. Not a plain ZADD, which a full server refuses.

        :param changes: of its terms, if it is there
        """
        known = terms.to_json()
        while known:
            wanted = replace(Terms.from_json(known), **changes) if changes else Terms.from_json(known)
            answer = self._declare(name, wanted, known, wanted.to_json() if changes else known)
            known = answer if isinstance(answer, str) else ""

    def terms(self, *names: str) -> dict[str, Terms]:
        """What queues are declared to be; those that are not are left out."""
        found = self.raw("HMGET", self.places.queues, *names) if names else []
        return {name: Terms.from_json(text) for name, text in zip(names, found, strict=True) if text}

    def limited(self) -> dict[str, Terms]:
        """The queues of jobs whose messages have a time limit."""
        return self.terms(*(name.decode() for name in self.raw("SMEMBERS", self.places.limited)))

    def delete_queue(self, name: str, condition: str) -> bool:
        """Delete a queue and its bindings, wherever they were made: False when the condition does not hold.

        :param condition: see lua/delete.lua
        """
        done = 0
        while not done:
            bound = [(exchange, _row(binding)) for exchange, binding in self.bound(name)]
            done = self.broker.store.run(moves.delete(self.places, name, condition, bound))
        return done != -1

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

    def has_ended(self, name: str) -> bool:
        """True for a queue that expires and was not used for its time, though whoever uses it could have said so."""
        at = self.raw("ZSCORE", self.places.ends, name)
        if at is None or float(at) > self.now_ms():
            return False
        may_end, *_ = self.broker.store.run(moves.touch(self.places, "", 0, ()))
        return may_end > 0

    def ended(self, limit: int = 50) -> list[str]:
        """Queues whose time is over, the longest over first."""
        found = self.raw("ZRANGE", self.places.ends, "-inf", self.now_ms(), "BYSCORE", "LIMIT", 0, limit)
        return [name.decode() for name in found]


def predeclared(name: str) -> dict[str, Any] | None:
    """The properties of an exchange that is there without a declaration; None for any other."""
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
