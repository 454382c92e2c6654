"""The one shape that every operation on the store takes before it is sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

from relay_core.clock import sent_now
from relay_core.scripts import Script

T = TypeVar("T")
Arg = bytes | str | int


def id_of(raw: bytes) -> str:
    """A job's id as the store has it. No client stores one that is not ASCII; one that was written into a list by hand
    must not end the worker that claims it, and goes back as the bytes that it was."""
    return raw.decode(errors="surrogateescape")


class Same(tuple[Arg, ...]):
    """What goes over the wire the same way again and again, so that it is worth while to remember how."""

    __slots__ = ()


_MULTI, _EXEC = Same(("MULTI",)), Same(("EXEC",))


class Apart(NamedTuple):
    """The same command with large arguments kept out of its script, which would have to hash them: sent in one
    transaction with what stores them.

    :ivar args: in place of the command's own
    :ivar after: plain commands that follow the script
    """

    args: tuple[Arg, ...]
    after: tuple[tuple[Arg, ...], ...]


class Transacted(list[Any]):
    """The replies to all that one transaction did, where another way to send the command has one reply."""

    __slots__ = ()


@dataclass(slots=True)
class Command(Generic[T]):
    """One script call: what to send, and how to read the reply. Building one does no I/O.

    :ivar parse: `(reply, resent) -> T`; the reply is a Transacted where a `transaction` was sent; `resent` is True when
        an earlier send of this same command may have run without its reply arriving, so "already done" means success
    :ivar resent_at: index in `args` of what tells the script of a re-send: 0, or milliseconds since the first send; or
        None
    :ivar since: `sent_now()` at which an earlier command was sent that may have done the same, or None
    :ivar durable: True when the shells must confirm it as the broker's `durability` asks
    :ivar apart: the better way to send it where that is possible, or None
    :ivar plain: what does the same in one transaction without a script, for a first send; or None
    """

    script: Final[Script]
    keys: Final[tuple[bytes, ...]]
    args: Final[tuple[Arg, ...]]
    parse: Callable[[Any, bool], T]
    resent_at: Final[int | None] = None
    durable: Final[bool] = False
    since: Final[float | None] = None
    apart: Final[Apart | None] = None
    plain: Final[tuple[tuple[Arg, ...], ...] | None] = None

    def wire(self, since: float | None = None, args: tuple[Arg, ...] | None = None) -> tuple[Arg, ...]:
        """`sha numkeys keys... args...`, what follows EVALSHA on the wire.

        :param since: `sent_now()` of its first send, where that may have run
        :param args: other ones than its own
        """
        args = self.args if args is None else args
        if self.since is not None:
            since = self.since
        if since is not None and self.resent_at is not None:
            age = max(1, math.ceil((sent_now() - since) * 1000))
            args = (*args[: self.resent_at], age, *args[self.resent_at + 1 :])
        return (self.script.sha, len(self.keys), *self.keys, *args)

    def transaction(self, since: float | None = None, again: bool = False) -> list[tuple[Arg, ...]] | None:
        """All of its wires, where it is better sent that way. The reply to the script is the first in that of the last.

        :param since: as of `wire`
        :param again: True of any send but the first, whatever became of that: what is plain is good for a moment only
        """
        if self.plain is not None and not again:
            return [_MULTI, *self.plain, _EXEC]
        if self.apart is None:
            return None
        script = ("EVALSHA", *self.wire(since, self.apart.args))
        return [_MULTI, script, *self.apart.after, _EXEC]
