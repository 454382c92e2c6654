"""Exchanges, bindings and queues, kept in the store: every process sees them, and they outlive restarts.

Keys: `<prefix>:celery:exchanges` HASH name -> JSON, `<prefix>:celery:exchange:<name>` SET of bindings,
`<prefix>:celery:queues` HASH name -> JSON arguments, `<prefix>:celery:alive` ZSET of the queues that expire.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

from relay_core import Broker

FRESH = 1.0
"""Seconds for which a table of bindings is believed. A routing key that is not in it is looked up anew at once."""


class Binding(NamedTuple):
    """One row of an exchange's table, as kombu's exchange types take it."""

    routing_key: str
    pattern: str | None
    queue: str


class Topology:
    """Reads and writes them for one broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        base = f"{broker.settings.prefix}:celery"
        self._exchanges, self._queues, self._alive = f"{base}:exchanges", f"{base}:queues", f"{base}:alive"
        self._table_prefix = f"{base}:exchange:"
        self._tables: dict[str, tuple[float, list[Binding]]] = {}
        self._types: dict[str, str] = {}
        self._expiring: dict[str, float] = {}

    def _raw(self, *args: Any) -> Any:
        return self._broker.store.raw(*args)

    # exchanges

    def declare_exchange(self, name: str, properties: dict[str, Any]) -> dict[str, Any]:
        """Store an exchange unless it is there: the properties that hold."""
        self._raw("HSETNX", self._exchanges, name, json.dumps(properties))
        return self.exchange(name) or properties

    def exchange(self, name: str) -> dict[str, Any] | None:
        found = self._raw("HGET", self._exchanges, name)
        if found is None:
            return None
        properties: dict[str, Any] = json.loads(found)
        self._types[name] = properties["type"]
        return properties

    def exchange_type(self, name: str) -> str | None:
        if name not in self._types and self.exchange(name) is None:
            return None
        return self._types[name]

    def exchanges(self) -> list[str]:
        return sorted(name.decode() for name in self._raw("HKEYS", self._exchanges))

    def delete_exchange(self, name: str) -> None:
        self._raw("HDEL", self._exchanges, name)
        self._raw("DEL", self._table_prefix + name)
        self._tables.pop(name, None)
        self._types.pop(name, None)

    # bindings

    def bind(self, exchange: str, binding: Binding) -> None:
        self._raw("SADD", self._table_prefix + exchange, json.dumps(binding))
        self._tables.pop(exchange, None)

    def unbind(self, exchange: str, binding: Binding) -> None:
        self._raw("SREM", self._table_prefix + exchange, json.dumps(binding))
        self._tables.pop(exchange, None)

    def table(self, exchange: str, *, fresh: bool = False) -> list[Binding]:
        """All bindings of an exchange, at most FRESH seconds old."""
        read_at, table = self._tables.get(exchange, (0.0, []))
        if fresh or time.monotonic() - read_at > FRESH:
            found = self._raw("SMEMBERS", self._table_prefix + exchange)
            table = sorted(Binding(*json.loads(row)) for row in found)
            self._tables[exchange] = (time.monotonic(), table)
        return table

    # queues

    def declare_queue(self, name: str, arguments: dict[str, Any]) -> None:
        self._raw("HSET", self._queues, name, json.dumps(arguments))
        if expires := arguments.get("x-expires"):
            self._expiring[name] = expires / 1000
            self.touch(name)

    def has_queue(self, name: str) -> bool:
        return bool(self._raw("HEXISTS", self._queues, name))

    def touch(self, name: str) -> None:
        """A queue that expires is in use: it lives on for its time."""
        if seconds := self._expiring.get(name):
            self._raw("ZADD", self._alive, self._now() + seconds, name)

    def expired(self, queues: list[str]) -> list[str]:
        """Those whose time is over since nobody used them; ones that never expire are not among them."""
        if not queues:
            return []
        scores = [self._raw("ZSCORE", self._alive, queue) for queue in queues]
        now = self._now() if any(score is not None for score in scores) else 0.0
        return [queue for queue, score in zip(queues, scores, strict=True) if score is not None and float(score) < now]

    def _now(self) -> float:
        seconds, micros = self._raw("TIME")
        return int(seconds) + int(micros) / 1e6

    def delete_queue(self, name: str) -> None:
        """Forget a queue and its bindings, wherever they were made."""
        for exchange in self.exchanges():
            for binding in self.table(exchange, fresh=True):
                if binding.queue == name:
                    self.unbind(exchange, binding)
        self._raw("HDEL", self._queues, name)
        self._raw("ZREM", self._alive, name)
        self._expiring.pop(name, None)
