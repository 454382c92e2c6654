"""What the children of a prefork pool were given stays known to it when its worker loses its connection.

Celery's pool then forgets what no child has been heard to begin, for a broker would deliver it again, and before Celery
5.6 what runs as well. But a child's word may be on its way, and relay's leases outlive a connection: what is forgotten
would run to its end unheard, keep its lease for as long as its worker lives, and run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def remembering(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """`AsynPool.flush`, which Celery calls then, for tasks that came over relay."""

    def flush(pool: Any) -> None:
        given = {number: job for number, job in pool._cache.items() if _is_given(job)}
        stock(pool)
        for number, job in given.items():
            if not job.ready():
                pool._cache.setdefault(number, job)
                if job._write_to._is_alive():
                    pool._busy_workers.add(job._write_to.inqW_fd)

    return flush


def _is_given(job: Any) -> bool:
    """Whether a child has begun to be sent this task; what has not waits in the main process, and is handed back."""
    request = getattr(job._accept_callback, "__self__", None)
    return job._write_to is not None and getattr(request, "_leases", None) is not None
