"""A message as it lies in a job's payload: one line of JSON, and the body's bytes behind it as they are.

kombu's virtual transports put the body into the JSON, in base64. Here it is neither encoded nor parsed on its way,
and what relay's tools read of a task, its headers, is the first line.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, MutableMapping
from typing import Any

from kombu.utils.json import JSONEncoder, object_hook

from relay_adapters.celery.messages.plain import lengthened, shortened

_encode = JSONEncoder(separators=(",", ":"), check_circular=False).encode
_decode = json.JSONDecoder().decode
DELIVERED = "relay_delivered"
"""The property of a task's next try with the deliveries of the tries before it: they were not left by a dead worker."""

SINCE = "relay_since"
"""The property of a task's next try with the unix seconds, by the server's clock, from which its time limits count: its
job is older."""

_PRIVATE = ("delivery_tag", "body_encoding")
"""Properties of one delivery, which are not true of the next: who publishes anew what it consumed passes them on."""

_AMQP = frozenset(
    {
        "delivery_mode", "priority", "correlation_id", "reply_to", "expiration", "message_id", "timestamp", "type",
        "user_id", "app_id", "cluster_id", "delivery_info",
    }
)  # fmt: skip


def pack(message: Mapping[str, Any]) -> bytes:
    """The payload of a message as kombu's virtual channels prepare it."""
    body, properties = message.get("body") or b"", message["properties"]
    if "body_encoding" in properties or "delivery_tag" in properties:
        properties = {name: value for name, value in properties.items() if name not in _PRIVATE}
    parts = {
        "content-type": message.get("content-type"),
        "content-encoding": message.get("content-encoding"),
        "headers": message.get("headers"),
        "properties": properties,
    }
    try:
        head = _encode(shortened(parts))
    except TypeError:
        # something that no JSON holds: AMQP sends the properties that it knows, and no other
        parts["properties"] = {name: value for name, value in properties.items() if name in _AMQP}
        head = _encode(shortened(parts))
    return head.encode() + b"\n" + (body.encode() if isinstance(body, str) else bytes(body))


def pack_stored(message: Mapping[str, Any]) -> bytes:
    """The payload of a message from the store of one of kombu's virtual transports: its body may be in base64."""
    if message["properties"].get("body_encoding") == "base64":
        message = {**message, "body": base64.b64decode(message.get("body") or b"")}
    return pack(message)


def head_of(payload: bytes) -> dict[str, Any]:
    """All but the body, of the types that it is read by here and in kombu. Raises ValueError for what is no message."""
    line = payload.partition(b"\n")[0].decode()
    try:
        # values of Python types that JSON lacks are marked, and rare
        head = json.loads(line, object_hook=object_hook) if '"__type__"' in line else _decode(line)
    except (ValueError, RecursionError):
        raise ValueError("its first line is not JSON") from None
    except Exception as error:  # of a marked value that its type cannot be made of
        raise ValueError(f"its first line has a value of no such type: {error!r}") from error
    if not isinstance(head, dict) or not isinstance(head.get("properties"), dict):
        raise ValueError("its first line is not the JSON of a message's headers and properties")
    head = lengthened(head)
    _check(head, head["properties"])
    return head


def _check(head: Mapping[str, Any], properties: Mapping[str, Any]) -> None:
    """Raises ValueError for a part of a type that would end whoever reads it next, here or in kombu."""
    headers, info = head.get("headers"), properties.get("delivery_info")
    if headers is not None and not isinstance(headers, dict):
        raise ValueError(f"its headers are a {type(headers).__name__}")
    if info is not None and not isinstance(info, dict):
        raise ValueError(f"its delivery_info is a {type(info).__name__}")
    for name in ("content-type", "content-encoding"):
        value = head.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"its {name} is a {type(value).__name__}")
    if not isinstance(properties.get(DELIVERED, 0), int):
        raise ValueError(f"its {DELIVERED} is no number")


def unpack(payload: bytes) -> MutableMapping[str, Any]:
    """The message, with its body as bytes. Raises ValueError for what is no message."""
    head = head_of(payload)
    head["body"] = payload[payload.find(b"\n") + 1 :] if b"\n" in payload else b""
    return head
