"""What nearly all tasks say alike is not stored with each of them.

Of the headers and properties that Celery gives a task by its protocol 2, most are at their defaults, and three repeat
its id. Stored are those that differ, so that a task that waits takes half the memory, and the server half the bytes to
copy and to hash. A message that lacks one of them, such as another client's, is stored as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_Head = dict[str, Any]


# These values are part of the store's layout: another one would change the tasks that wait.


def _headers(task_id: object) -> _Head:
    """In the order of Celery's `as_task_v2`; anew for each task, since who reads a message may change it."""
    return {
        "lang": "py", "task": None, "id": task_id, "shadow": None, "eta": None, "expires": None, "group": None,
        "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": task_id, "parent_id": None,
        "argsrepr": "()", "kwargsrepr": "{}", "origin": None, "ignore_result": False, "replaced_task_nesting": 0,
        "stamped_headers": None, "stamps": {},
    }  # fmt: skip


def _properties(task_id: object) -> _Head:
    return {"correlation_id": task_id, "delivery_mode": 2, "priority": 0}


_BODY = {"content-type": "application/json", "content-encoding": "utf-8"}

_ABSENT = object()

_HEADERS, _PROPERTIES = _headers(None).keys(), _properties(None).keys()


def shortened(head: _Head) -> _Head:
    """All of a message but its body: without what is plain, and with `task` for `headers`; or as it came in."""
    headers, properties = head["headers"], head["properties"]
    if not headers or not (headers.keys() >= _HEADERS and properties.keys() >= _PROPERTIES):
        return head
    task_id = headers["id"]
    short = {
        "task": {"id": task_id} | _other(headers, _headers(task_id)),
        "properties": _other(properties, _properties(task_id)),
    }
    if head["content-type"] != _BODY["content-type"] or head["content-encoding"] != _BODY["content-encoding"]:
        short |= {name: head[name] for name in _BODY}
    return short


def _other(own: Mapping[str, Any], plain: Mapping[str, Any]) -> _Head:
    # 0 and False are one to this, as they are to Celery
    return {name: value for name, value in own.items() if plain.get(name, _ABSENT) != value}


def lengthened(head: _Head) -> _Head:
    """What `shortened` was given. Raises ValueError for what it cannot have made."""
    if "headers" in head or "task" not in head:
        return head
    task = head["task"]
    if not isinstance(task, dict):
        raise ValueError(f"its task is a {type(task).__name__}")
    task_id = task.get("id")
    return {
        "content-type": head.get("content-type", _BODY["content-type"]),
        "content-encoding": head.get("content-encoding", _BODY["content-encoding"]),
        "headers": _headers(task_id) | task,
        "properties": _properties(task_id) | head["properties"],
    }
