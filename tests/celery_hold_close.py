"""For a worker's `--include`: what it does about a lost connection waits until the test makes the file `see-to-it`."""

from __future__ import annotations

from typing import Any

from celery.worker.consumer import Consumer

from tests.celery_app import note, wait_for

_on_close = Consumer.on_close


def on_close(self: Any) -> None:
    note("lost", "connection")
    wait_for("see-to-it")
    _on_close(self)


Consumer.on_close = on_close
