"""For a worker's `--include`: a task with a class of its own for its requests, which retries once."""

from __future__ import annotations

from typing import Any

from celery.worker.request import Request

from tests.celery_app import app, note


class Own(Request):  # type: ignore[misc]
    """Notes what begins."""

    def on_accepted(self, *args: Any, **options: Any) -> None:
        note(self.id, "accepted")
        super().on_accepted(*args, **options)


@app.task(bind=True, acks_late=True, Request=Own)
def task(self: Any, key: str) -> str:
    if not self.request.retries:
        raise self.retry(countdown=0.05)
    return key
