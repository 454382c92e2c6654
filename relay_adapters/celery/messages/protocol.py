"""What a message tells of its task: by protocol 2 its headers, by protocol 1, Celery 3's, its body.

A body is read where it is JSON, compressed or not. One that is pickled or in another format says nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

from relay_adapters.celery.messages import marks


def told_of(message: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """The headers of a task, be they in the body, which is read once; of another message, its headers.

    In the body of protocol 1 there are the arguments and callbacks, too. Headers that the message has beside it count
    more, as they do to Celery's workers.
    """
    headers: Mapping[str, Any] = message.get("headers") or {}
    if "task" in headers:
        return headers
    told: Mapping[str, Any] | None = message.get(marks.TOLD)
    if told is None:
        task = protocol_1(message)
        told = message[marks.TOLD] = headers if task is None else {**task, **headers}
    return told


def protocol_1(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """What protocol 1 has in the body, for want of headers, of a task that is sent as JSON; None for other messages."""
    if message.get("content-type") != "application/json" or "task" in (message.get("headers") or {}):
        return None
    try:
        body = body_of(message)
        # all of Celery's have these, and most that are no tasks lack one, which need not be parsed then
        if not (body and _has(body, '"eta"') and _has(body, '"task"')):
            return None
        task = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return task if isinstance(task, dict) and isinstance(task.get("task"), str) and "id" in task else None


def change_protocol_1(message: MutableMapping[str, Any], task: Mapping[str, Any], **changes: Any) -> None:
    """Put other values into the body that `protocol_1` has read."""
    message["body"] = json.dumps({**task, **changes})
    (message.get("headers") or {}).pop("compression", None)


def body_of(message: Mapping[str, Any]) -> Any:
    """The body as it was serialized. Raises ValueError for one that is not compressed as its header says."""
    compression = (message.get("headers") or {}).get("compression")
    if not compression:
        return message.get("body")
    try:
        # every relay Broker loads the plugin, and so this module, also where kombu is not installed
        from kombu.compression import decompress

        return decompress(message["body"], compression)
    except Exception as error:
        raise ValueError(f"its body is not compressed as {compression!r}: {error!r}") from error


def arguments_of(message: MutableMapping[str, Any]) -> tuple[Any, Any] | None:
    """args and kwargs of a task that is sent as JSON; None for others. Raises ValueError and the like for no task."""
    if message.get("content-type") != "application/json":
        return None
    if "task" in (message.get("headers") or {}):
        args, kwargs, _embedded = json.loads(body_of(message))
        return args, kwargs
    told = told_of(message)
    return told.get("args"), told.get("kwargs")


def _has(body: Any, text: str) -> bool:
    return text in body if isinstance(body, str) else text.encode() in bytes(body)
