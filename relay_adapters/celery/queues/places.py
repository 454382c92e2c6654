"""Every key that the Celery adapter writes beside its queues, with its type. All lie in one Cluster slot.

The hash tag is `{celery}`: exchanges, bindings and mailboxes are changed together, by one script each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Places:
    """The keys of one prefix."""

    prefix: str

    def _key(self, part: str, name: str = "") -> bytes:
        return f"{self.prefix}:{{celery}}:{part}{name}".encode()

    @cached_property
    def exchanges(self) -> bytes:
        """HASH exchange -> its properties, JSON."""
        return self._key("x")

    @cached_property
    def queues(self) -> bytes:
        """HASH queue -> what it is, JSON; see terms.Terms."""
        return self._key("q")

    @cached_property
    def ends(self) -> bytes:
        """ZSET queue, score = unix ms at which it ends unless it is used before; only of queues that end."""
        return self._key("e")

    @cached_property
    def limited(self) -> bytes:
        """SET of the queues of jobs with a time limit for their messages, which have to be looked after."""
        return self._key("s")

    @cached_property
    def versions(self) -> bytes:
        """HASH exchange -> version of its properties and bindings; '' -> how many there were; 'amq.' -> since when
        there are declarations, which another store, or one that was emptied, answers otherwise; 'amq.told' and
        'amq.spared': see lua/touch.lua."""
        return self._key("v")

    def bindings(self, exchange: str) -> bytes:
        """SET of one exchange's bindings, JSON."""
        return self._key("t:", exchange)

    def bound(self, queue: str) -> bytes:
        """SET of where a queue is bound, JSON."""
        return self._key("w:", queue)

    def consumers(self, queue: str) -> bytes:
        """ZSET consumer of a queue, score = unix ms until which it counts as alive."""
        return self._key("c:", queue)

    def box(self, queue: str) -> bytes:
        """STREAM of the messages of a mailbox, with one group `q`; its end is the mailbox's."""
        return self._key("b:", queue)
