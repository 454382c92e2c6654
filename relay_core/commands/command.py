"""The one shape that every operation on the store takes before it is sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from relay_core.clock import sent_now
from relay_core.scripts import Script

T = TypeVar("T")
Arg = bytes | str | int


def id_of(raw: bytes) -> str:
    """A job's id as the store has it. No client stores one that is not ASCII; one that was written into a list by hand
    must not end the worker that claims it, and goes back as the bytes that it was."""
    return raw.decode(errors="surrogateescape")


@dataclass(slots=True)
class Command(Generic[T]):
    """One script call: what to send, and how to read the reply. Building one does no I/O.

    :ivar parse: `(reply, resent) -> T`; `resent` is True when an earlier send of this same command may
        have run without its reply arriving, so "already done" means success
    :ivar resent_at: index in `args` of what tells the script of a re-send: 0, or milliseconds since the first send; or
        None
    :ivar since: `sent_now()` at which an earlier command was sent that may have done the same, or None
    :ivar durable: True when the shells must confirm it as the broker's `durability` asks
    """

    script: Final[Script]
    keys: Final[tuple[bytes, ...]]
    args: Final[tuple[Arg, ...]]
    parse: Callable[[Any, bool], T]
    resent_at: Final[int | None] = None
    durable: Final[bool] = False
    since: Final[float | None] = None

    def wire(self, since: float | None = None) -> tuple[Arg, ...]:
        """`sha numkeys keys... args...`, what follows EVALSHA on the wire.

        :param since: `sent_now()` of its first send, where that may have run
        """
        args = self.args
        if self.since is not None:
            since = self.since
        if since is not None and self.resent_at is not None:
            age = max(1, math.ceil((sent_now() - since) * 1000))
            args = (*args[: self.resent_at], age, *args[self.resent_at + 1 :])
        return (self.script.sha, len(self.keys), *self.keys, *args)
