"""The adapter's scripts as commands: what to send, and how to read the reply. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from relay_adapters.celery.queues.places import Places
from relay_core import scripts
from relay_core.commands import Command
from relay_core.commands.command import Arg

PACKAGE = "relay_adapters.celery"


class Touched(NamedTuple):
    """A queue of `touch`. `keep_ms`: -1 for a queue that is no mailbox. `last`: id received last by `reader`, or ''."""

    queue: str
    idle_ms: int
    keep_ms: int
    reader: str
    last: str


class Declared(NamedTuple):
    """How many consumers other processes have of a queue, and since when the store has declarations."""

    consumers: int
    since: bytes


class Bound(NamedTuple):
    """`done`: 1; 0 when there is no such exchange, -1 when there is no such queue. The rest holds when it is done.

    :ivar since: from when the store has declarations
    :ivar properties: the exchange's, as they are now, JSON
    """

    done: int
    since: bytes = b""
    properties: bytes = b""


def _script(name: str) -> scripts.Script:
    return scripts.load(name, PACKAGE)


def _number(reply: Any, _resent: bool) -> int:
    return int(reply)


def declare(
    p: Places, queue: str, new: str, known: str, *, idle_ms: int, mailbox: bool, process: str, limited: bool
) -> Command[Declared | str]:
    """Make a queue known, or answer the JSON by which it is known otherwise."""

    def parse(reply: Sequence[Any], _resent: bool) -> Declared | str:
        return Declared(int(reply[1]), reply[2]) if reply[0] == 1 else reply[1].decode()

    keys = (p.queues, p.ends, p.consumers(queue), p.box(queue), p.limited, p.versions)
    args = (queue, new, known, idle_ms, int(mailbox), process, int(limited))
    return Command(_script("declare"), keys, args, parse)


def bind(p: Places, exchange: str, queue: str, binding: str, where: str, properties: str = "") -> Command[Bound]:
    """Let an exchange's messages reach a queue.

    :param queue: '' for none: the exchange alone is made known
    :param properties: JSON, of an exchange that is made if it is not there. Default: it must be there
    """

    def parse(reply: Sequence[Any], _resent: bool) -> Bound:
        return Bound(*reply)

    keys = (p.exchanges, p.queues, p.bindings(exchange), p.bound(queue), p.versions)
    return Command(_script("bind"), keys, (exchange, queue, binding, where, properties), parse)


def unbind(p: Places, exchange: str, queue: str, binding: str, where: str) -> Command[int]:
    """1 when it was bound, 0 when not."""
    keys = (p.bindings(exchange), p.bound(queue), p.versions)
    return Command(_script("unbind"), keys, (exchange, binding, where), _number)


def delete(p: Places, queue: str, condition: str, places: Sequence[tuple[str, str]]) -> Command[int]:
    """1; 0 when it is bound elsewhere than at `places` (exchange, binding), -1 when the condition does not hold."""
    keys = (
        p.queues, p.ends, p.versions, p.bound(queue), p.consumers(queue), p.box(queue), p.limited,
        *(p.bindings(exchange) for exchange, _binding in places),
    )  # fmt: skip
    args = (queue, condition, *(arg for place in places for arg in place))
    return Command(_script("delete"), keys, args, _number)


def discard(p: Places, exchange: str, unused: bool, places: Sequence[tuple[str, str]]) -> Command[int]:
    """1; 0 when it has other bindings than `places` (queue, where), -1 when it has some and must not."""
    keys = (p.exchanges, p.versions, p.bindings(exchange), *(p.bound(queue) for queue, _where in places))
    return Command(_script("discard"), keys, (exchange, int(unused), *(where for _queue, where in places)), _number)


def publish(
    p: Places,
    exchange: str,
    version: str,
    id: str,
    message: bytes,
    boxes: Sequence[tuple[str, int, int]],
    again: bool = False,
) -> Command[list[int]]:
    """Put a message into mailboxes (queue, keep ms, most). [] when the bindings have another version."""
    keys = (p.versions, *(p.box(queue) for queue, _keep, _most in boxes))
    args: list[Arg] = [int(again), exchange, version, id, message]
    for _queue, keep_ms, most in boxes:
        args += (keep_ms, most)

    def parse(reply: Sequence[int], _resent: bool) -> list[int]:
        return list(reply)

    return Command(_script("publish"), keys, tuple(args), parse, resent_at=0)


def touch(
    p: Places, consumer: str, alive_ms: int, queues: Sequence[Touched], *, away: bool = False
) -> Command[list[int]]:
    """How many queues end as their time is over, how many have to be looked after; per row: 1 it is there, 0 it is not.

    :param away: whether the store could not be told before: it spares the queues whose time is over for a while
    """
    keys = [p.queues, p.ends, p.limited, p.versions]
    args: list[Any] = [consumer, alive_ms, int(away)]
    for touched in queues:
        keys += (p.consumers(touched.queue), p.box(touched.queue))
        args += touched

    def parse(reply: Sequence[int], _resent: bool) -> list[int]:
        return list(reply)

    return Command(_script("touch"), tuple(keys), tuple(args), parse)


def leave(p: Places, queue: str, consumer: str, grace_ms: int) -> Command[int]:
    """How many consumers the queue has without this one.

    :param grace_ms: after which it ends when it has none; 0 for a queue that stays
    """
    keys = (p.consumers(queue), p.ends, p.box(queue))
    return Command(_script("leave"), keys, (queue, consumer, grace_ms), _number)


def take(p: Places, queue: str, keep_ms: int) -> Command[bytes | None]:
    """One message out of a mailbox, or None."""

    def parse(reply: Sequence[bytes], _resent: bool) -> bytes | None:
        return reply[0] if reply else None

    return Command(_script("take"), (p.box(queue),), (keep_ms,), parse)
