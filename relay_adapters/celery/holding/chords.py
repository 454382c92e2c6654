"""How long one task of a chord's header has the sending of the body to itself, where Celery's Redis backend says that.

Who finds a chord complete claims it, and keeps that claim for as long as all tries of a publish may take: 21 s by
default. If its worker is killed meanwhile, its task runs again when its lease is over, finds the claim still held, and
sends nothing; nobody else would. Before that no other run of that task comes near the chord, so the claim need not
outlast the lease.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from relay_adapters.celery.options import shared_broker

_LEFT = 0.6
"""Of a lease, when it may be next to be extended, and that a little late: two thirds are left just before."""


def install() -> None:
    """In a process that runs tasks. Repeating it is harmless, and before Celery 5.7 there are no such claims."""
    backend: Any = importlib.import_module("celery.backends.redis").RedisBackend
    stock = getattr(backend, "_chord_publish_claim_expires", None)
    if stock is not None and not hasattr(stock, "relay_stock"):
        backend._chord_publish_claim_expires = _within_the_lease(stock)


def _within_the_lease(stock: Callable[..., int]) -> Callable[..., int]:
    def _chord_publish_claim_expires(backend: Any, *args: Any) -> int:
        seconds = stock(backend, *args)
        with backend.app.connection_for_read() as connection:
            if not getattr(connection.get_transport_cls(), "keeps_mail", False):
                return seconds  # another app of this process, over another broker
            return min(seconds, max(1, int(shared_broker(connection).settings.lease * _LEFT)))

    _chord_publish_claim_expires.relay_stock = stock  # type: ignore[attr-defined]
    return _chord_publish_claim_expires
