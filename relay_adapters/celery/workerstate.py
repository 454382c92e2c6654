"""What this process's Celery worker is doing, if it is one: read from Celery's own state, without importing it."""

from __future__ import annotations

import sys
from contextlib import suppress


def running_tags() -> set[str]:
    """Delivery tags of the tasks that have started."""
    state = sys.modules.get("celery.worker.state")
    while state is not None:
        with suppress(RuntimeError):  # another thread started or ended one meanwhile, which a WeakSet does not bear
            return {request.message.delivery_tag for request in list(state.active_requests)}
    return set()


def is_worker() -> bool:
    """Celery loads `celery.worker` with every app, what consumes in workers only."""
    return "celery.worker.consumer" in sys.modules


def is_beat() -> bool:
    """Whether this is the process of the beat that a worker runs beside its own work (`-B`)."""
    beat = sys.modules.get("celery.beat")
    if beat is None or beat._Process is None:
        return False
    from billiard.process import current_process

    return isinstance(current_process(), beat._Process)


def shutting_down() -> bool:
    """True when the worker was told to stop. Celery's flags hold an exit code then, which may be 0."""
    state = sys.modules.get("celery.worker.state")
    if state is None:
        return False
    return any(flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate))


def waiting_in_pool() -> int:
    """Tasks that were given to the pool and have not started; 0 where there is no worker."""
    state = sys.modules.get("celery.worker.state")
    return max(0, len(state.reserved_requests) - len(state.active_requests)) if state else 0
