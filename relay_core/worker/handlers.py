"""Which functions can be handlers, and what of theirs would be left undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from relay_core.errors import InvalidArgument
from relay_core.job import Job

Handler = Callable[[Job], Any]


def is_async(handler: Handler) -> bool:
    """True for an async function, and for an object whose call is one."""
    return _is(inspect.iscoroutinefunction, handler)


def checked_handler(handler: Handler) -> Handler:
    """It, as it can be called. Raises InvalidArgument for what is no function, and for one whose body would not run."""
    if not callable(handler):
        raise InvalidArgument(f"handler must be a function that takes a Job, got {handler!r}")
    if _is(inspect.isgeneratorfunction, handler) or _is(inspect.isasyncgenfunction, handler):
        raise InvalidArgument(
            f"handler {_name(handler)} is a generator function: calling it runs nothing of it; take out its yield"
        )
    return handler


def check_result(handler: Handler, result: object) -> None:
    """Raises TypeError for a result that is work which nobody would do, as the job would be acked without it."""
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()  # it is not begun: nothing of it runs, and Python does not warn of it
    elif not inspect.isasyncgen(result) and not inspect.isawaitable(result):
        return
    advice = (
        "take out its yield"
        if inspect.isgenerator(result) or inspect.isasyncgen(result)
        else "make it an async function, and so every decorator around it, that awaits this"
    )
    raise TypeError(f"handler {_name(handler)} returned {_a(type(result).__name__)}, which has not run; {advice}")


def _is(kind: Callable[[Any], bool], handler: Handler) -> bool:
    return kind(handler) or kind(type(handler).__call__)


def _name(handler: Handler) -> str:
    return str(getattr(handler, "__qualname__", None) or repr(handler))


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiouAEIOU" else f"a {noun}"
