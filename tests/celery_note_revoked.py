"""For a worker's `--include`: notes whom Celery's signal says to be revoked, and how it came."""

from __future__ import annotations

import json
from typing import Any

from celery import signals

from tests.celery_app import note


@signals.task_revoked.connect
def revoked(request: Any, terminated: bool, signum: Any, expired: bool, **_: Any) -> None:
    note(request.id, "revoked")
    note(f"{request.id} {json.dumps(request.delivery_info, sort_keys=True)}", "revoked-of")
