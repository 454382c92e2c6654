"""One delivery that this process holds."""

from __future__ import annotations

from dataclasses import dataclass

from relay_core import Job


@dataclass(slots=True)
class Held:
    """One delivery that this process holds."""

    tag: str
    job: Job
    until: float
    """Monotonic time at which the lease ends, as far as this process knows."""
    started: bool = False
    task: bool = False
    """True once a Celery worker made a task's request of it."""
    untold: bool = False
    """True where nobody tells when this task starts, for it has a strategy of its own, as celery-batches has."""
    acked: bool = False
    refused: bool = False
    """True where the server is still owed a refusal of it, and no ack: it counts as acked meanwhile."""
    lost: bool = False
    aside: bool = False
    """True once its lease could not be extended, and others were: its server is away alone, or its queue at fault."""
    moved: bool = False
    """True when the task that ran ended the delivery by itself, as its retry does: there is nothing left to ack."""
    expected: bool = False
    """True when it may have done so: that its ack finds it gone is no surprise."""
    cause: BaseException | None = None
    """Why the task failed, where Celery said so."""
    spoiled: str | None = None
    """What is wrong with the message, where nobody can make a task of it."""
