"""What a prefork pool was given stays known to it when its worker loses its connection.

Celery's pool then forgets what no child has been heard to begin, for a broker would deliver it again, and before Celery
5.6 what runs as well. But a child's word may be on its way, and relay's leases outlive a connection: what is forgotten
would run to its end unheard, keep its lease for as long as its worker lives, and run again.

Of tasks with a strategy of their own, as celery-batches', nobody tells when they start: they are not handed back, and
so what no child was sent yet is kept for one, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relay_adapters.celery.holding.leases import any_untold


def remembering(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """`AsynPool.flush`, which Celery calls then, for tasks that came over relay."""

    def flush(pool: Any) -> None:
        kept = {number: job for number, job in pool._cache.items() if _is_kept(job)}
        waiting = [job for job in kept.values() if job._write_to is None]
        stock(pool)
        for number, job in kept.items():
            if not job.ready():
                pool._cache.setdefault(number, job)
                if job._write_to is not None and job._write_to._is_alive():
                    pool._busy_workers.add(job._write_to.inqW_fd)
        pool.outbound_buffer.extend(waiting)

    return flush


def _is_kept(job: Any) -> bool:
    """What a child has begun to be sent; of what has not, a task that waits in the main process is handed back."""
    request = getattr(job._accept_callback, "__self__", None)
    if request is None:
        return any_untold()
    return job._write_to is not None and getattr(request, "_leases", None) is not None
