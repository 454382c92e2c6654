"""What the settings say about repeating and confirming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from relay_core.commands.command import Arg
from relay_core.connection.steps import Address
from relay_core.errors import NotDurable
from relay_core.settings import Durability, StoreSettings, parse_durability

_WAIT = {True: "WAITAOF", False: "WAIT"}


class Policy:
    """What the settings say about repeating and confirming."""

    def __init__(self, settings: StoreSettings) -> None:
        """
        :ivar confirm: the command that asks for the confirmation of what was just written; None for none
        """
        self.retry_for = settings.retry_for
        self._until: Callable[[], float] = lambda: math.inf
        self.any_server = settings.any_server
        self.durability: Durability = parse_durability(settings.durability)
        self.timeout = settings.durability_timeout
        wait_ms = max(1, round(settings.durability_timeout * 1000))
        self.confirm: tuple[Arg, ...] | None = None
        if self.durability.aof:
            self.confirm = (_WAIT[True], 1, 0, wait_ms)
        elif self.durability.replicas:
            self.confirm = (_WAIT[False], self.durability.replicas, wait_ms)

    def at_most(self, seconds: float, until: Callable[[], float] | None = None) -> Policy:
        """The same, but that commands are repeated for so long at most, and until that monotonic time, which is asked
        for each time, for it may change."""
        other = copy.copy(self)
        other.retry_for = min(self.retry_for, seconds)
        other._until = until or self._until
        return other

    def left(self, started: float, now: float) -> float:
        """Seconds for which a command that was first sent then is still repeated."""
        return min(started + self.retry_for, self._until()) - now

    def unconfirmed(self, reply: Any, at: Address) -> NotDurable | None:
        """The error for an answer to `confirm` that falls short, else None."""
        if isinstance(reply, Exception):
            return NotDurable(f"{at}: stored, but {_WAIT[self.durability.aof]} was refused: {reply}")
        if self.durability.aof:
            if reply[0] >= 1:
                return None
            return NotDurable(f"{at}: stored, but not on the server's disk within {self.timeout:g} s")
        if reply >= self.durability.replicas:
            return None
        return NotDurable(
            f"{at}: stored, but only {reply} of {self.durability.replicas} replicas confirmed it "
            f"within {self.timeout:g} s"
        )
