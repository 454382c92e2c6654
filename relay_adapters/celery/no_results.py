"""What Celery finds for `result_backend="relay://…"`: an error that says what to do.

Programs that have one URL for the broker and the results come here when they change it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from celery.exceptions import ImproperlyConfigured


def refuse(app: Any = None, url: str | None = None, **options: Any) -> NoReturn:
    """Stands where Celery has the class of a result backend."""
    raise ImproperlyConfigured(
        "result_backend: relay keeps no results, only broker_url may begin with relay."
        " Set result_backend to one of Celery's, as redis://host:port/db (it may be the same server)"
    )
