"""What a queue is declared to be: its `queue_arguments`, each of them honoured or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from relay_adapters.celery.errors import inequivalent, refused

METHOD = "Queue.declare"

AUTO_DELETE_AFTER_MS = 60_000
"""How long an auto_delete queue without x-expires is kept after its last consumer fell silent."""

MAILBOX_LENGTH = 10_000
"""Most messages in a mailbox that names no x-max-length."""

IGNORED = frozenset(
    {
        "x-queue-mode", "x-queue-version", "x-queue-master-locator", "x-queue-leader-locator", "x-ha-policy",
        "x-quorum-initial-group-size", "x-quorum-target-group-size", "x-initial-cluster-size", "x-dead-letter-strategy",
        "x-cancel-on-ha-failover", "x-consumer-timeout",
    }
)  # fmt: skip
"""Where and how RabbitMQ keeps a queue, and for how long it waits for an ack: without meaning here, and harmless."""

OFF: Mapping[str, Any] = {"x-single-active-consumer": False, "x-delivery-limit": -1}
"""Values that ask for what is so without the argument."""


@dataclass(frozen=True)
class Terms:
    """What holds for one queue. Times are milliseconds.

    :ivar expires: x-expires: without consumers for so long, the queue ends
    :ivar ttl: x-message-ttl: so long after its publish a message expires
    :ivar length: x-max-length: beyond so many waiting messages the oldest are dropped, or dead-lettered
    :ivar max_priority: x-max-priority: 0 to this is mapped onto relay's levels 0 to 9
    :ivar dead_exchange: x-dead-letter-exchange: where rejected, expired and dropped messages go
    :ivar dead_key: x-dead-letter-routing-key; None: that of the message
    :ivar delivery_limit: x-delivery-limit: a message that comes back more often goes to dead
    :ivar auto_delete: the queue ends with its last consumer
    :ivar durable: whether its owner called it durable
    :ivar exclusive: what it holds was meant for who declared it, and ends with it
    :ivar quorum: its messages tell how often they were delivered before
    :ivar expiring: whether messages with time limits of their own were published, which go to the dead_exchange
    """

    expires: int | None = None
    ttl: int | None = None
    length: int | None = None
    max_priority: int | None = None
    dead_exchange: str | None = None
    dead_key: str | None = None
    delivery_limit: int | None = None
    auto_delete: bool = False
    durable: bool = True
    exclusive: bool = False
    quorum: bool = False
    expiring: bool = False

    @property
    def mailbox(self) -> bool:
        """True for a queue whose messages and which itself are declared to vanish: control, replies, events.

        It is a bounded stream in the store instead of a queue of jobs.
        """
        perishable = self.auto_delete and not self.durable and self.expires is not None and self.ttl is not None
        return perishable and self.dead_exchange is None and self.max_priority is None and not self.delivery_limit

    @property
    def limited(self) -> bool:
        """True for a queue of jobs from whose head expired messages have to be taken, consumed or not."""
        return (self.ttl is not None or self.expiring) and not self.mailbox

    @property
    def idle_ms(self) -> int:
        """Milliseconds without use after which the queue ends; 0 never."""
        return self.expires or (AUTO_DELETE_AFTER_MS if self.auto_delete else 0)

    @property
    def most(self) -> int:
        """Most messages that a mailbox keeps."""
        return MAILBOX_LENGTH if self.length is None else self.length

    def level(self, priority: int) -> int:
        """relay's level 0 to 9 for a message's priority of 0 to 255; higher is sooner."""
        if self.max_priority is None or self.max_priority <= 9:
            return max(0, min(priority, 9 if self.max_priority is None else self.max_priority))
        return max(0, min(priority, self.max_priority)) * 9 // self.max_priority

    def to_json(self) -> str:
        """Only what differs from the default, always in the same order."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(kept, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Terms:
        """What a newer release added is ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    def merged(self, queue: str, other: Terms) -> Terms:
        """These terms, as known, with what a new declaration adds to them.

        A declaration that leaves an argument out says nothing about it. One that names another value is refused.
        """
        if self.mailbox and other.mailbox:
            return other  # its owner came back with other settings
        changes: dict[str, Any] = {}
        for name, argument in _NAMES.items():
            new, old = getattr(other, name), getattr(self, name)
            if new is None or new == old:
                continue
            if old is not None:
                raise inequivalent(
                    f"inequivalent arg {argument!r} for queue {queue!r}: received {new!r} but current is {old!r}; "
                    "delete the queue or declare it alike everywhere",
                    METHOD,
                )
            changes[name] = new
        changes |= {name: True for name in ("quorum", "expiring") if getattr(other, name)}
        if other.exclusive and self.auto_delete:  # of one that stays, nobody else's messages may end by it
            changes["exclusive"] = True
        merged = replace(self, **changes)
        if merged.mailbox != self.mailbox:
            raise inequivalent(f"queue {queue!r} exists as another kind of queue; delete it first", METHOD)
        return merged


def limits_of(terms: Terms | None) -> dict[str, Any]:
    """What a queue's x-delivery-limit means for its jobs: so many times it may come back, for whatever reason."""
    if terms is None or terms.delivery_limit is None:
        return {}
    return {"max_retries": terms.delivery_limit, "max_deliveries": terms.delivery_limit + 1}


def parse(
    queue: str, arguments: Mapping[str, Any] | None, *, auto_delete: bool, durable: bool, exclusive: bool = False
) -> Terms:
    """Terms from a declaration. Raises PreconditionFailed for an argument that cannot be honoured."""
    found: dict[str, Any] = {}
    for name, value in (arguments or {}).items():
        if value is None or not name.startswith("x-") or name in IGNORED or (name in OFF and value == OFF[name]):
            continue
        if name in _REFUSED:
            raise refused(f"queue {queue!r}: {name} is not supported by relay; {_REFUSED[name]}", METHOD)
        if name in _ONLY:
            if value not in _ONLY[name]:
                only = " or ".join(_ONLY[name])
                raise refused(f"queue {queue!r}: {name}={value!r} is not supported by relay, only {only}", METHOD)
            if value == "quorum":
                found["quorum"] = True
            continue
        if name not in _HONOURED:
            known = ", ".join(sorted(_HONOURED))
            raise refused(f"queue {queue!r}: {name} is not supported by relay, these are: {known}", METHOD)
        field, check = _HONOURED[name]
        found[field] = check(queue, name, value)
    if "dead_key" in found and "dead_exchange" not in found:
        raise refused(f"queue {queue!r}: x-dead-letter-routing-key needs x-dead-letter-exchange", METHOD)
    ends = bool(auto_delete or exclusive)
    return Terms(**found, auto_delete=ends, durable=bool(durable), exclusive=bool(exclusive))


def _whole(least: int, most: int) -> Callable[[str, str, Any], int]:
    def check(queue: str, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise refused(
                f"queue {queue!r}: {name} must be a whole number from {least} to {most}, got {value!r}", METHOD
            )
        return value

    return check


def _text(queue: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refused(f"queue {queue!r}: {name} must be a text, got {value!r}", METHOD)
    return value


_LONGEST_MS = 2**32
_HONOURED: Mapping[str, tuple[str, Callable[[str, str, Any], Any]]] = {
    "x-expires": ("expires", _whole(1, _LONGEST_MS)),
    "x-message-ttl": ("ttl", _whole(0, _LONGEST_MS)),
    "x-max-length": ("length", _whole(0, 2**31)),
    "x-max-priority": ("max_priority", _whole(1, 255)),
    "x-dead-letter-exchange": ("dead_exchange", _text),
    "x-dead-letter-routing-key": ("dead_key", _text),
    "x-delivery-limit": ("delivery_limit", _whole(1, 10**6 - 1)),
}
_NAMES = {field: argument for argument, (field, _check) in _HONOURED.items()}
_ONLY: Mapping[str, tuple[str, ...]] = {"x-overflow": ("drop-head",), "x-queue-type": ("classic", "quorum")}
_REFUSED: Mapping[str, str] = {
    "x-max-length-bytes": "bound the queue with x-max-length",
    "x-single-active-consumer": "limit a queue to one job at a time with relay limit --max-inflight 1",
}
