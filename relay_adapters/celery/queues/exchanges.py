"""The types of exchanges: which of its bindings a routing key matches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from kombu.transport.virtual import exchange


class Binding(NamedTuple):
    """One row of an exchange's table, in kombu's order. `pattern` is kept for those who read the table."""

    routing_key: str
    pattern: str | None
    queue: str


class Direct(exchange.DirectExchange):
    """The binding key is the routing key."""


class Topic(exchange.TopicExchange):
    """Words between dots; `*` is one word and `#` none or more, as on RabbitMQ."""

    def key_to_pattern(self, rkey: str) -> str:
        return topic_pattern(rkey)

    def _match(self, pattern: str, string: str) -> Any:
        return _matches(pattern, string)


class Fanout(exchange.FanoutExchange):
    """Every bound queue, but for bindings whose key is a pattern: those see what matches it.

    Celery declares its event exchange as fanout where the driver type is `redis`, and binds `#` and `worker.#`:
    without the pattern each worker's gossip would receive every event of every task.
    """

    def prepare_bind(self, queue: str, exchange: str, routing_key: str, arguments: Any) -> tuple[str, Any, str]:
        wild = bool({"*", "#"} & set((routing_key or "").split(".")))
        return routing_key, topic_pattern(routing_key) if wild else None, queue

    def lookup(self, table: Iterable[Any], exchange: str, routing_key: str, default: Any) -> set[str]:
        return {queue for _key, pattern, queue in table if pattern is None or _matches(pattern, routing_key or "")}


TYPES: dict[str, Any] = {"direct": Direct, "topic": Topic, "fanout": Fanout}

PREDECLARED = {f"amq.{kind}": kind for kind in TYPES}
"""Exchanges that are always there."""


def topic_pattern(key: str) -> str:
    """A regular expression for a dot and the routing keys that a topic's binding key matches."""
    pieces = {"*": r"\.[^.]*", "#": r"(?:\.[^.]*)*"}
    return "^" + "".join(pieces.get(word, r"\." + re.escape(word)) for word in (key or "").split(".")) + "$"


def _matches(pattern: str, routing_key: str) -> bool:
    """Whether a routing key matches a pattern of `topic_pattern`. An empty one has no word, rather than an empty one;
    what stores hold of the empty binding key, which it matches, says otherwise."""
    if not routing_key:
        return pattern == r"^\.$" or _compiled(pattern).match("") is not None
    return _compiled(pattern).match("." + routing_key) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
