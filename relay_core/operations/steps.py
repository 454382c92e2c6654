"""The steps that a flow yields, and is sent the results of."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from relay_core.commands import Command

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wait:
    """Block until one of the markers is rung or `timeout` seconds passed; answered by True or False."""

    markers: tuple[bytes, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class Raw:
    """A plain server command."""

    args: tuple[Any, ...]


Step = Command[Any] | list[Command[Any]] | Raw | Wait
Flow = Generator[Step, Any, T]
