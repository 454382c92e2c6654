"""The steps that a flow yields, and is sent the results of."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from relay_core.commands import Command

T = TypeVar("T")


class Waited(NamedTuple):
    """How a wait ended.

    :ivar rung: a marker was taken, or may have been
    :ivar away: markers whose servers are away, while others are there
    """

    rung: bool
    away: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Wait:
    """Block until one of the markers is rung or `timeout` seconds passed; answered by a Waited."""

    markers: tuple[bytes, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class Raw:
    """A plain server command."""

    args: tuple[Any, ...]


Step = Command[Any] | list[Command[Any]] | Raw | Wait
Flow = Generator[Step, Any, T]
