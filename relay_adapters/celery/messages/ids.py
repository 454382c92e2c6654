"""Job ids of tasks: the task's own, so that its job is found by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relay_core.job import new_id

TAKEN = 9
"""How many further tasks of the same id a queue may hold at a time so that each is found by it: Celery lets an id be
used again."""

REPLACED = 20
"""How often a task may replace itself, so that its revoke still finds it in the store."""

RETRIES, RETRIES_OF_REPLACED = 100, 10
"""How often a task may be tried again, and what replaced one, so that its revoke still finds it in the store."""


def job_id_of(told: Mapping[str, Any]) -> str:
    """The task's id; of a retry, and of what replaces a task, which are new messages of the same id, one more. Of other
    messages a fresh id.

    :param told: see `told_of`
    """
    task_id, retries, replaced = told.get("id"), told.get("retries"), told.get("replaced_task_nesting")
    if "task" not in told or not isinstance(task_id, str) or not (task_id.isascii() and task_id.isprintable()):
        return new_id()
    if not 0 < len(task_id) <= 100 or " " in task_id:
        return new_id()
    name = f"{task_id}^{replaced}" if _is_count(replaced) else task_id
    return f"{name}.{retries}" if _is_count(retries) else name


def _is_count(number: Any) -> bool:
    """Whether it is one that Celery writes, and not whatever else there may be: an id has no room for more."""
    return isinstance(number, int) and 0 < number < 1_000_000


def ids_of(task_id: str) -> list[str]:
    """All ids that the jobs of a task may have: of its first send, what replaced it, their retries, and tasks of the
    same id."""
    replaced = [f"{task_id}^{n}" for n in range(1, REPLACED + 1)]
    again = [f"{task_id}.{n}" for n in range(1, RETRIES + 1)]
    again += [f"{id}.{n}" for id in replaced for n in range(1, RETRIES_OF_REPLACED + 1)]
    return [task_id, *replaced, *again, *(f"{task_id}~{n}" for n in range(1, TAKEN + 1))]
