"""What a channel refuses, as RabbitMQ would say it: kombu's and Celery's handling of channel errors applies."""

from __future__ import annotations

from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed
from kombu.transport.virtual import NotEquivalentError

__all__ = [
    "AccessRefused",
    "Inequivalent",
    "NotFound",
    "PreconditionFailed",
    "inequivalent",
    "not_found",
    "refused",
    "reserved",
]


class Inequivalent(PreconditionFailed, NotEquivalentError):
    """406: declared before, and otherwise."""


def not_found(what: str, name: str, method: str) -> NotFound:
    """404: there is no such exchange or queue."""
    return NotFound(f"NOT_FOUND - no {what} {name!r}", (50, 10), method)


def reserved(text: str, method: str) -> AccessRefused:
    """403: the broker's own."""
    return AccessRefused(f"ACCESS_REFUSED - {text}", (40, 10), method)


def refused(text: str, method: str) -> PreconditionFailed:
    """406: what was asked cannot be done."""
    return PreconditionFailed(f"PRECONDITION_FAILED - {text}", (50, 10), method)


def inequivalent(text: str, method: str) -> Inequivalent:
    """406: an exchange or queue is known with other properties."""
    return Inequivalent(f"PRECONDITION_FAILED - {text}", (50, 10), method)
