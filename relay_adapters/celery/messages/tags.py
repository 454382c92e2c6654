"""Delivery tags: by them Celery acks and rejects, and the leases of its messages are found."""

from __future__ import annotations

from itertools import count

from relay_core import Job

_numbers = count(1)


def new_tag(job: Job) -> str:
    """A tag of this very delivery."""
    return f"{next(_numbers)}.{job.id}"


def number_of(tag: str) -> int:
    """How many tags this process had made with it: earlier deliveries have lower ones."""
    return int(tag.partition(".")[0])
