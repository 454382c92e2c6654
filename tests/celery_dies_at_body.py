"""For a worker's `--include`: SIGKILL for it and its children, once, as one of them sends a chord's body."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import signals

from tests.celery_app import note


@signals.before_task_publish.connect
def die(sender: Any = None, **_: Any) -> None:
    if sender == "tests.celery_app.count":
        note("body", "died")
        os.killpg(0, signal.SIGKILL)
