"""When a failed job runs again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from relay_core.errors import InvalidArgument

MAX_DELAY = 3650 * 86400.0
"""Seconds. A delay beyond ten years is taken for a mistake in units and refused."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter: a random time up to `min(ceiling, base * factor ** retries)`.

    Full jitter spreads the retries of jobs that failed together; see "Exponential Backoff And Jitter",
    AWS Architecture Blog, 2015.

    :ivar base: seconds, the longest first wait. Default 1
    :ivar factor: growth per retry. Default 2
    :ivar ceiling: seconds, the longest wait of all. Default 600
    :ivar max_retries: failures after which a job goes to dead. Default 20, about an hour and a half
    :ivar jitter: False waits the full time. Default True
    """

    base: float = 1.0
    factor: float = 2.0
    ceiling: float = 600.0
    max_retries: int = 20
    jitter: bool = True

    def __post_init__(self) -> None:
        for name, least in (("base", 0.0), ("factor", 1.0), ("ceiling", 0.0), ("max_retries", 0)):
            value = getattr(self, name)
            kinds = int if name == "max_retries" else (int, float)
            # compared, not converted: an int of any size is told apart from infinity without an overflow
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < 2**53:
                wanted = "a whole number" if kinds is int else "a number"
                raise InvalidArgument(f"retry {name} must be {wanted} of at least {least}, got {str(value)[:40]!r}")
        if not isinstance(self.jitter, bool):
            raise InvalidArgument(f"retry jitter must be True or False, got {self.jitter!r}")
        if self.ceiling > MAX_DELAY:
            raise InvalidArgument(f"retry ceiling must be at most {MAX_DELAY:.0f} seconds, got {self.ceiling!r}")

    def delay(self, retries: int) -> float:
        """Seconds to wait before the next try of a job that has been retried `retries` times so far."""
        try:
            longest = min(self.ceiling, self.base * self.factor**retries)
        except OverflowError:
            longest = self.ceiling
        return random.uniform(0, longest) if self.jitter else longest

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, as a job carries them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, float]) -> RetryPolicy:
        """Unknown fields, written by a newer relay, are ignored."""
        return cls(**{name: value for name, value in fields.items() if name in cls.__slots__})  # type: ignore[arg-type]
