"""What the shells can be asked to do. All decisions are made elsewhere, without I/O."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from relay_core.commands.command import Arg

R = TypeVar("R")


class Address(NamedTuple):
    """Where a server listens. Port 0 means that `host` is the path of a unix socket."""

    host: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return f"unix:{self.host}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(slots=True)
class Outcome:
    """How an exchange ended.

    :ivar replies: in the order of the commands; an error reply of the server is the exception
    :ivar failure: what broke the connection, after which replies are missing; None if all came
    :ivar sent: False when not a byte was sent
    """

    replies: list[Any]
    failure: BaseException | None = None
    sent: bool = True


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send commands to one server in one go and read their replies. Answered with an Outcome.

    :ivar sentinel: True to use the credentials and a passing connection of a sentinel
    """

    address: Address
    wires: list[tuple[Arg, ...]]
    sentinel: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the idle connections to these servers: they are gone, or no longer the ones to ask."""

    addresses: Iterable[Address]


Step = Exchange | Pause | Drop
Flow = Generator[Step, Any, R]
