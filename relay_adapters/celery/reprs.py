"""Writes the arguments of a task as Celery does, without its care for what is deep, recursive or long.

A message has a text of its task's arguments, which Celery makes token by token, each through several generators. Most
tasks take a few numbers and short texts: here these are joined, to the same text. All else is Celery's.
"""

from __future__ import annotations

import sys
from typing import Any

_AS_THEY_ARE = frozenset((int, float, bool, type(None)))


def install() -> None:
    """For all apps of this process, where Celery is in use. Repeating it is harmless."""
    for name in ("celery.app.amqp", "celery.app.trace"):
        module: Any = sys.modules.get(name)
        if module is not None and not hasattr(module.saferepr, "relay_stock"):
            module.saferepr = _joining(module.saferepr)


def _joining(stock: Any) -> Any:
    def saferepr(o: Any, maxlen: Any = None, maxlevels: Any = 3, seen: Any = None) -> Any:
        text = _joined(o)
        # one that is shorter was not cut anywhere; fewer levels than none are for Celery to make sense of
        if text is not None and (maxlen is None or len(text) < maxlen) and (not maxlevels or maxlevels > 0):
            return text
        return stock(o, maxlen, maxlevels, seen)

    saferepr.relay_stock = stock  # type: ignore[attr-defined]
    return saferepr


def _joined(o: Any) -> str | None:
    """The text of a value, or of a tuple, list or dict of values; None where one of them is of another kind."""
    kind = type(o)
    if kind is tuple or kind is list:
        texts = [_text(value) for value in o]
        if None in texts:
            return None
        inner = ", ".join(texts)  # type: ignore[arg-type]
        return f"[{inner}]" if kind is list else f"({inner},)" if len(o) == 1 else f"({inner})"
    if kind is dict:
        pairs = [(_text(key), _text(value)) for key, value in o.items()]
        if any(None in pair for pair in pairs):
            return None
        return f"{{{', '.join([f'{key}: {value}' for key, value in pairs])}}}"
    return _text(o)


def _text(value: Any) -> str | None:
    kind = type(value)
    if kind is str:
        text: str = value
        return "'" + text.replace("'", "\\'") + "'"
    return str(value) if kind in _AS_THEY_ARE else None
