"""Tells ids that Celery has just made from those that somebody chose, or has used before.

Celery lets an id be used again, and then the store has to be asked what it holds of that name. An id that this process
made a moment ago, and has not sent yet, no job of any store can have: it is taken in without a look, see
`relay_core.commands.enqueue_one`. Most tasks have such a one, from kombu's `uuid`.
"""

from __future__ import annotations

import os
from typing import Any
from uuid import uuid4

from kombu.utils.uuid import uuid

from relay_core.job import FreshId

MOST = 1000
"""Ids that are remembered. What is sent is forgotten, so more than a few are those of other things than tasks."""

_made: dict[str, int] = {}
"""Those that were not sent yet -> the process that made it: after a fork, both have it."""


def install() -> None:
    """Have kombu's `uuid` remember what it makes, unless somebody else has it make something else. Repeating it is
    harmless."""
    stock: Any = uuid
    if stock.__defaults__ == (uuid4,):
        stock.__defaults__ = (_remembered,)


def _remembered() -> str:
    id = str(uuid4())
    if len(_made) >= MOST:
        _made.clear()
    _made[id] = os.getpid()
    return id


def fresh(id: str) -> str:
    """The id, as a FreshId where it is one. The next time it is none any more."""
    return FreshId(id) if _made.pop(id, None) == os.getpid() else id
