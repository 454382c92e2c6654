"""Messages of which a Celery worker can make no task: each goes to dead with what is wrong with it, and the rest run.

Celery's consumer trusts what it reads of a message: a header of another type than its own clients write ends the whole
worker, and with its redelivery the next one. A body that does not decode it acks, so that nobody can look at it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

logger = logging.getLogger("relay.celery")

_OF_A_WRONG_TYPE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading a value of a wrong type raises. A result backend that is away, or a lost connection, raises others."""


def check(name: Any, limits: Any) -> None:
    """Raises TypeError for a request whose name or time limits are none. Celery and its pools look at them only when
    the task has started, from where nobody knows any more whose trouble it is.

    :param limits: hard and soft, seconds
    """
    if not isinstance(name, str):
        raise TypeError(f"its name is a {type(name).__name__}")
    hard, soft = limits  # or else its error says that there are not two
    for limit in (hard, soft):
        if limit is not None and not isinstance(limit, (int, float)):
            raise TypeError(f"a time limit of it is a {type(limit).__name__}")


def bury(message: Any, error: BaseException) -> bool:
    """Send a message that a worker has just received to dead. False: it is none of relay's, or it ended already."""
    leases = getattr(message.channel, "leases", None)
    held = None if leases is None else leases.get(message.delivery_tag)
    if held is None or held.acked or held.started:
        return False
    held.spoiled = error
    message.reject()
    return True


def reading(stock: Callable[..., Callable[[Any], Any]]) -> Callable[..., Callable[[Any], Any]]:
    """Around the consumer's `create_task_handler`."""

    @wraps(stock)
    def create_task_handler(consumer: Any, *args: Any, **options: Any) -> Callable[[Any], Any]:
        handle = stock(consumer, *args, **options)
        expected = (*consumer.connection_errors, *consumer.channel_errors)

        def on_task_received(message: Any) -> Any:
            try:
                return handle(message)
            except _OF_A_WRONG_TYPE as error:
                if isinstance(error, expected) or not bury(message, error):
                    raise
                logger.error("message %s is no task, and goes to dead", message.delivery_tag, exc_info=True)

        return on_task_received

    return create_task_handler


def starting(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Around a request's `execute_using_pool`. A prefork pool calls it for a task that had to wait for a free process
    only then, from where nobody knows any more whose trouble it is."""

    @wraps(stock)
    def execute_using_pool(request: Any, *args: Any, **options: Any) -> Any:
        try:
            return stock(request, *args, **options)
        except _OF_A_WRONG_TYPE as error:
            if not bury(request.message, error):
                raise
            from celery.exceptions import TaskRevokedError
            from celery.worker.state import task_ready

            logger.error("task %s cannot be started, and goes to dead", request.id, exc_info=True)
            task_ready(request)
            # at which the worker frees the process that it had taken for it, and goes on
            raise TaskRevokedError(request.id) from error

    return execute_using_pool


def kept(stock: Callable[..., None]) -> Callable[..., None]:
    """Around the consumer's `on_decode_error`, which logs and acks."""

    @wraps(stock)
    def on_decode_error(consumer: Any, message: Any, error: BaseException) -> None:
        if bury(message, error):
            message.ack = lambda *_args, **_options: None
        stock(consumer, message, error)

    return on_decode_error
