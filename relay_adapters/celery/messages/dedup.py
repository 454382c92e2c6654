"""Dedup at publish: `relay_dedup_key`, as an option of `apply_async` or as a header of the message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import MutableMapping
from typing import Any

from relay_adapters.celery.messages.protocol import arguments_of, told_of
from relay_core.errors import InvalidArgument

KEY, FOR = "relay_dedup_key", "relay_dedup_for"


def dedup_of(message: MutableMapping[str, Any]) -> dict[str, Any]:
    """`dedup_key` and `dedup_for` of an enqueue, taken out of the message; empty where it names no key.

    `relay_dedup_key=True` makes the key of the task's name and arguments.
    """
    headers, properties = message.get("headers") or {}, message["properties"]
    if KEY not in headers and KEY not in properties:
        return {}
    key = properties.get(KEY, headers.get(KEY))
    seconds = properties.get(FOR, headers.get(FOR))
    if key is None or key is False:
        return {}
    if key is True:
        key = _of_arguments(message)
    return {"dedup_key": key} if seconds is None else {"dedup_key": key, "dedup_for": seconds}


def _of_arguments(message: MutableMapping[str, Any]) -> str:
    name, arguments = told_of(message).get("task"), arguments_of(message)
    if name is None or arguments is None:
        raise InvalidArgument(
            f"{KEY}=True makes the key of a task's name and arguments as JSON, but task {name!r} is sent as "
            f"{message.get('content-type')!r}; use task_serializer='json', or give a key of your own"
        )
    text = json.dumps(arguments, sort_keys=True, separators=(",", ":"))
    return f"{name[:400]}:{hashlib.sha256(text.encode()).hexdigest()[:40]}"
