"""Commands about jobs that a claim or reap buried, of which somebody has to tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relay_core import scripts
from relay_core.commands.command import Arg, Command, id_of
from relay_core.commands.moves import Grant
from relay_core.keys import LAYOUT, QueueKeys

MOST_RETOLD = 100
"""Burials in one reply: their payloads are in it, and who gets them has half a minute to tell of them."""


def retell(q: QueueKeys, limit: int = MOST_RETOLD) -> Command[list[Grant]]:
    """Burials that nobody has told of in time: the caller is who tells of them now, and then sends `told`."""

    def parse(reply: Sequence[Any], _resent: bool) -> list[Grant]:
        rows = zip(*(reply[column::5] for column in range(5)), strict=True)
        return [
            Grant(id_of(id), token.decode(), int(retries), record, bool(again))
            for id, token, retries, record, again in rows
        ]

    return Command(
        scripts.load("retell"), (q.config, q.untold, q.dead, q.jobs, q.owners, q.payloads), (LAYOUT, limit), parse
    )


def told(q: QueueKeys, burials: Sequence[tuple[str, str]], *, by_all: bool = True) -> Command[int]:
    """At most 200 burials, by (id, token), have been told of: of how many nobody had said so before.

    :param by_all: False: some could not do their part yet, and are told again
    """
    args: tuple[Arg, ...] = (int(by_all), *(arg for pair in burials for arg in pair))
    return Command(scripts.load("told"), (q.untold, q.owners), args, lambda reply, _resent: int(reply))
