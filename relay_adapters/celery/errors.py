"""What is refused, in the words of kombu and Celery: by a channel as RabbitMQ would say it, by a server as an error of
the broker, which those who publish look out for."""

from __future__ import annotations

from amqp.exceptions import AccessRefused, ChannelError, NotFound, PreconditionFailed
from kombu.exceptions import OperationalError
from kombu.transport.virtual import NotEquivalentError

from relay_core.errors import (
    AuthError,
    LayoutError,
    PermissionDenied,
    RelayError,
    ServerTooOld,
    StoreError,
    Unavailable,
    UnsafeStore,
)

__all__ = [
    "KINDS",
    "REFUSALS",
    "AccessRefused",
    "BrokerRefused",
    "Inequivalent",
    "MailboxesAway",
    "NotFound",
    "PreconditionFailed",
    "RefusedHere",
    "as_of_the_broker",
    "inequivalent",
    "no_route",
    "not_found",
    "refused",
    "reserved",
]


class Inequivalent(PreconditionFailed, NotEquivalentError):
    """406: declared before, and otherwise."""


def not_found(what: str, name: str, method: str) -> NotFound:
    """404: there is no such exchange or queue."""
    return NotFound(f"NOT_FOUND - no {what} {name!r}", (50, 10), method)


def no_route(exchange: str, routing_key: str) -> ChannelError:
    """312: no queue takes a mandatory message."""
    text = f"NO_ROUTE - exchange {exchange!r} has no queue for {routing_key!r}"
    return ChannelError(text, (60, 50), "Basic.return", reply_code=312)


def reserved(text: str, method: str) -> AccessRefused:
    """403: the broker's own."""
    return AccessRefused(f"ACCESS_REFUSED - {text}", (40, 10), method)


def refused(text: str, method: str) -> PreconditionFailed:
    """406: what was asked cannot be done."""
    return PreconditionFailed(f"PRECONDITION_FAILED - {text}", (50, 10), method)


def inequivalent(text: str, method: str) -> Inequivalent:
    """406: an exchange or queue is known with other properties."""
    return Inequivalent(f"PRECONDITION_FAILED - {text}", (50, 10), method)


class MailboxesAway(RelayError, OperationalError):
    """The server of the mailboxes is away, alone. No error of the connection, for which kombu would connect anew until
    it is back: a worker goes on then."""


REFUSALS = (AuthError, PermissionDenied, UnsafeStore)
"""What a server says until somebody sets it right, such as a replica that was promoted and is configured otherwise."""


class BrokerRefused(StoreError, OperationalError):
    """A StoreError that `except OperationalError` catches, which apps have around `delay()`."""


class RefusedHere(BrokerRefused, Unavailable):
    """Such a StoreError of one broker of a list, which did nothing: kombu turns to the next one, as where a connection
    was lost."""


class LoginRefused(BrokerRefused, AuthError):
    """Such an AuthError."""


class NotPermitted(BrokerRefused, PermissionDenied):
    """Such a PermissionDenied."""


class EvictingServer(BrokerRefused, UnsafeStore):
    """Such an UnsafeStore."""


class OldServer(BrokerRefused, ServerTooOld):
    """Such a ServerTooOld."""


class NewerLayout(BrokerRefused, LayoutError):
    """Such a LayoutError."""


KINDS = {
    AuthError: LoginRefused,
    PermissionDenied: NotPermitted,
    UnsafeStore: EvictingServer,
    ServerTooOld: OldServer,
    LayoutError: NewerLayout,
}


def as_of_the_broker(refusal: StoreError) -> BrokerRefused:
    """The same as an error of the broker. It is raised at once, where kombu repeats what a lost connection took."""
    if isinstance(refusal, BrokerRefused):
        return refusal
    return KINDS.get(type(refusal), BrokerRefused)(*refusal.args)
