"""Commands about jobs that a claim or reap buried, of which somebody has to tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relay_core import scripts
from relay_core.commands.command import Arg, Command
from relay_core.commands.moves import Grant, grants_of
from relay_core.keys import LAYOUT, QueueKeys

MOST_RETOLD = 100
"""Burials in one reply: their payloads are in it, and who gets them has half a minute to tell of them."""


def retell(q: QueueKeys, limit: int = MOST_RETOLD) -> Command[list[Grant]]:
    """Burials that nobody has told of in time: the caller is who tells of them now, and then sends `told`."""

    def parse(reply: Sequence[Any], _resent: bool) -> list[Grant]:
        return grants_of(reply)

    return Command(scripts.load("retell"), (q.config, q.untold, q.dead, q.jobs, q.owners), (LAYOUT, limit), parse)


def told(q: QueueKeys, burials: Sequence[tuple[str, str]]) -> Command[int]:
    """At most 200 burials, by (id, token), have been told of: how many nobody had said so of before."""
    args: tuple[Arg, ...] = tuple(arg for pair in burials for arg in pair)
    return Command(scripts.load("told"), (q.untold, q.owners), args, lambda reply, _resent: int(reply))
