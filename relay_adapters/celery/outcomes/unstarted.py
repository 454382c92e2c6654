"""A task that no worker will start: what of it its result backend, its callbacks and its chord have to be told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from relay_adapters.celery.messages.protocol import body_of, told_of

logger = logging.getLogger("relay.celery")

_IN_BODY = ("args", "kwargs", "callbacks", "errbacks", "chord")


def context_of(app: Any, message: Any, redelivered: bool = False) -> Any:
    """The request of the task, as its callbacks, its chord and what is connected to signals need it."""
    from celery.app.task import Context
    from kombu.serialization import loads, prepare_accept_content

    told, properties = told_of(message), message["properties"]
    request: dict[str, Any] = {**told, "reply_to": properties.get("reply_to"), "errbacks": None}
    info = properties.get("delivery_info") or {}
    request |= {
        "correlation_id": properties.get("correlation_id"),
        "properties": properties,
        "delivery_info": {
            "exchange": info.get("exchange"),
            "routing_key": info.get("routing_key"),
            "priority": properties.get("priority"),
            "redelivered": redelivered,
        },
    }
    accept = prepare_accept_content(app.conf.accept_content)
    try:
        body = loads(body_of(message), message["content-type"], message["content-encoding"], accept=accept)
        if isinstance(body, dict):  # protocol 1: its types are those that Celery reads, and its custom headers count
            request |= {name: body.get(name) for name in _IN_BODY}
        else:
            request["args"], request["kwargs"], embedded = body
            request |= embedded or {}
    except Exception as error:  # a body that does not decode has no callbacks that could be read
        logger.warning("task %s: its callbacks cannot be read: %r", told["id"], error)
    return Context(request, called_directly=False)


def stores_errors(task: Any, told: Mapping[str, Any]) -> bool:
    """Whether its result is to say how it ended.

    :param task: None where this process does not know it
    """
    ignored = told.get("ignore_result")
    if ignored is None:  # its client left that to who runs it
        ignored = getattr(task, "ignore_result", False)
    return not ignored or bool(getattr(task, "store_errors_even_if_ignored", False))
