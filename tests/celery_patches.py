"""For a worker's `--include`: replaces Celery's tracer to note what runs, as agents do when a worker begins and pools
do when they are made."""

from __future__ import annotations

from typing import Any

from celery import signals
from celery.app import trace
from celery.concurrency.solo import TaskPool

from tests.celery_app import note


def replace(name: str) -> None:
    stock = trace.build_tracer

    def build_tracer(*args: Any, **options: Any) -> Any:
        traced = stock(*args, **options)

        def tracer(uuid: str, *rest: Any, **kwargs: Any) -> Any:
            note(uuid, name)
            return traced(uuid, *rest, **kwargs)

        return tracer

    trace.build_tracer = build_tracer


@signals.worker_init.connect
def worker_begins(**_: Any) -> None:
    replace("traced-by-agent")


class Pool(TaskPool):  # type: ignore[misc]
    """The solo pool, and a tracer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        replace("traced-by-pool")
        super().__init__(*args, **options)
