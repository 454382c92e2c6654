"""How a task is kept from starting, in a module of its own: the children of a pool need no more of a worker."""

from __future__ import annotations

from celery.exceptions import TaskRevokedError


class Forgotten(TaskRevokedError):
    """Ends the start of a task that was handed back, or whose lease is over. Celery takes it for a revoked one."""
