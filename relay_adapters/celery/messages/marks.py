"""What relay keeps in a message while that is on its way to the store, which never sees it."""

from __future__ import annotations

from typing import NamedTuple

ID = "relay_id"
"""The id of its job."""

SENT = "relay_sent"
"""True once it was sent to a queue or mailbox, whatever came of that."""

STORED = "relay_stored"
"""True once one of the queues that it reaches has it, or its batch."""

BATCH = "relay_batch"
"""What collects it."""

TOLD = "relay_told"
"""What it tells of its task, where that had to be looked for in its body."""

TRIED = "relay_again"
"""`sent_now()` of its first try, where that may have stored it. Between two tries a Tried lies in its headers or
properties."""


class Tried(NamedTuple):
    """Of a publish that may have stored its message, for when it is repeated."""

    job_id: str
    at: float
    """`sent_now()` of the first try."""
    task_id: str | None
