"""Messages of which a Celery worker can make no task: each goes to dead with what is wrong with it, and the rest run.

Celery's consumer trusts what it reads of a message: a header of another type than its own clients write ends the whole
worker, and with its redelivery the next one. A body that does not decode it acks, so that nobody can look at it again.
What fails over a message that is sound is a fault of the worker's code, which is left as loud as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from numbers import Number
from typing import Any
from uuid import UUID

from relay_adapters.celery.holding.held import Held

logger = logging.getLogger("relay.celery")

_NONE = type(None)


def fault_of(message: Any) -> str:
    """What is wrong with a message whose types would end the worker; empty for others, also those that Celery itself
    refuses, such as one whose body does not decode."""
    try:
        body = message.payload
    except Exception:
        return ""  # Celery meets it again
    return next(filter(None, _faults(message.headers, body)), "")


def _faults(headers: Mapping[str, Any], body: Any) -> Iterator[str]:
    """One after the other, an empty text for each thing that is as it should be."""
    if "task" not in headers:  # protocol 1, or none of Celery's
        if isinstance(body, dict) and "task" in body:
            yield from _faults_of_call(body.get("args"), body.get("kwargs"))
            yield _wrong("id", body.get("id"), str, int, UUID, _NONE)
            yield from _faults_of_task({**body, **headers})
        return
    if isinstance(body, dict):  # protocol 1 with the headers of 2
        yield from _faults_of_call(body.get("args"), body.get("kwargs"))
    elif isinstance(body, (list, tuple)) and len(body) == 3:
        yield from _faults_of_call(body[0], body[1])
        yield _wrong("third part", body[2], dict, _NONE)
    else:
        yield "its body is no list of args, kwargs and callbacks"
    yield _wrong("id", headers.get("id"), str, int, UUID)
    yield from _faults_of_task(headers)
    if (stamped := headers.get("stamped_headers")) is not None:
        if not (isinstance(stamped, (list, tuple)) and all(isinstance(name, str) for name in stamped)):
            yield "its stamped_headers are no list of names"
        yield _wrong("stamps", headers.get("stamps"), dict, _NONE)


def _faults_of_task(told: Mapping[str, Any]) -> Iterator[str]:
    yield _wrong("task", told["task"], str)
    yield _wrong("shadow", told.get("shadow"), str, _NONE)
    for name in ("eta", "expires"):
        yield _wrong(name, told.get(name), str, datetime, _NONE) or _empty(name, told.get(name))
    yield from _faults_of_limits(told.get("timelimit"))


def _faults_of_call(args: Any, kwargs: Any) -> Iterator[str]:
    yield _wrong("args", args, list, tuple, _NONE)
    yield _wrong("kwargs", kwargs, dict, _NONE)


def _faults_of_limits(limits: Any) -> Iterator[str]:
    if limits is None:
        return
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        yield "its timelimit is no pair"
        return
    for limit in limits:
        yield _wrong("timelimit", limit, Number, _NONE)


def _wrong(name: str, value: Any, *kinds: type) -> str:
    return "" if isinstance(value, kinds) else f"its {name} is a {type(value).__name__}"


def _empty(name: str, value: Any) -> str:
    return f"its {name} is empty" if value == "" else ""


def reading(stock: Callable[..., Callable[[Any], Any]]) -> Callable[..., Callable[[Any], Any]]:
    """Around the consumer's `create_task_handler`."""

    @wraps(stock)
    def create_task_handler(consumer: Any, *args: Any, **options: Any) -> Callable[[Any], Any]:
        handle = stock(consumer, *args, **options)

        def on_task_received(message: Any) -> Any:
            held = _held(message)
            if held is None or not (fault := fault_of(message)):
                return handle(message)
            logger.error("message %s is no task, and goes to dead: %s", held.job.id, fault)
            held.spoiled = fault
            return message.reject()

        return on_task_received

    return create_task_handler


def kept(stock: Callable[..., None]) -> Callable[..., None]:
    """Around the consumer's `on_decode_error`, which logs and acks."""

    @wraps(stock)
    def on_decode_error(consumer: Any, message: Any, error: BaseException) -> None:
        if (held := _held(message)) is not None:
            held.spoiled = f"its body does not decode: {error!r}"
            message.ack = message.reject
        stock(consumer, message, error)

    return on_decode_error


def named(stock: Callable[..., None]) -> Callable[..., None]:
    """Around the consumer's `on_unknown_task`, which rejects what no code of this worker is for: its dead letter says
    so."""

    @wraps(stock)
    def on_unknown_task(consumer: Any, body: Any, message: Any, error: BaseException) -> None:
        if (held := _held(message)) is not None:
            from celery.exceptions import Reject  # not of those who use kombu alone

            held.cause = Reject(f"no task {error} is registered with its worker")
        stock(consumer, body, message, error)

    return on_unknown_task


def _held(message: Any) -> Held | None:
    """How relay holds it; None for a message of another transport, and for one that needs no ack."""
    leases = getattr(message.channel, "leases", None)
    held: Held | None = None if leases is None else leases.get(message.delivery_tag)
    return held
