"""Writes the arguments of a task as Celery does, without its care for what is deep, recursive or long.

A message has a text of its task's arguments, which Celery makes token by token, each through several generators. Most
tasks take a few numbers and short texts: here these are joined, to the same text. All else is Celery's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import chain
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
    if kind is not tuple and kind is not list and kind is not dict:
        return _text(o)
    texts = _texts(chain.from_iterable(o.items()) if kind is dict else o)
    if texts is None:
        return None
    if kind is dict:
        return "{" + ", ".join([f"{key}: {value}" for key, value in zip(texts[::2], texts[1::2], strict=True)]) + "}"
    inner = ", ".join(texts)
    return f"[{inner}]" if kind is list else f"({inner},)" if len(texts) == 1 else f"({inner})"


def _texts(values: Iterable[Any]) -> list[str] | None:
    texts = []
    for value in values:
        if (text := _text(value)) is None:
            return None
        texts.append(text)
    return texts


def _text(value: Any) -> str | None:
    kind = type(value)
    if kind is str:
        text: str = value
        return "'" + text.replace("'", "\\'") + "'"
    return str(value) if kind in _AS_THEY_ARE else None
