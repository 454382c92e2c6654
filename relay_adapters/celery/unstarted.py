"""A task that no worker will start: what of it its result backend, its callbacks and its chord have to be told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("relay.celery")


def context_of(app: Any, message: Any) -> Any:
    """The request of the task, as its callbacks and its chord need it."""
    from celery.app.task import Context
    from kombu.serialization import loads, prepare_accept_content

    headers, properties = message["headers"], message["properties"]
    request: dict[str, Any] = {**headers, "reply_to": properties.get("reply_to"), "errbacks": None}
    request |= {"correlation_id": properties.get("correlation_id"), "delivery_info": properties.get("delivery_info")}
    accept = prepare_accept_content(app.conf.accept_content)
    try:
        body = loads(message["body"], message["content-type"], message["content-encoding"], accept=accept)
        request["args"], request["kwargs"], embedded = body
        request |= embedded or {}
    except Exception as error:  # a body that does not decode has no callbacks that could be read
        logger.warning("task %s: its callbacks cannot be read: %r", headers["id"], error)
    return Context(request, called_directly=False)


def stores_errors(task: Any, headers: Mapping[str, Any]) -> bool:
    """Whether its result is to say how it ended.

    :param task: None where this process does not know it
    """
    return not headers.get("ignore_result") or bool(getattr(task, "store_errors_even_if_ignored", False))
