"""What those who publish are told when a broker refuses. Where it is one of a list and did nothing, kombu turns to the
next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from relay_adapters.celery.errors import KINDS, BrokerRefused, RefusedHere, as_of_the_broker
from relay_adapters.celery.options import url_of, urls_of
from relay_adapters.celery.workerstate import is_beat, is_worker
from relay_core.errors import StoreError, Unavailable

F = TypeVar("F", bound=Callable[..., Any])

_JUST_NOW = 1.0
"""Seconds in which nobody turns to the same broker twice: kombu does not wait in between, and may go on for ever."""

_refused: WeakKeyDictionary[Any, dict[str, tuple[float, str]]] = WeakKeyDictionary()
"""By connections of kombu's: URL -> when it refused, and why."""


def client_of(channel: Any) -> Any:
    """The connection of kombu's that a channel is of; None where it is closed."""
    return getattr(channel.connection, "client", None)


def has_others(client: Any) -> bool:
    """Whether there are other brokers that a connection may turn to."""
    return len(urls_of(client)) > 1


def of_the_broker(client: Any, refusal: StoreError) -> BrokerRefused:
    """A refusal as an error of the broker that a connection has now.

    To turn to another one makes no second job: it is not done where this one may have stored it.

    :param client: kombu's Connection; None of a channel that is closed
    """
    if isinstance(refusal, BrokerRefused):
        return refusal
    did_nothing = type(refusal) in KINDS and not refusal.maybe_executed
    turns = did_nothing and client is not None and (only_publishes(client) or is_beat())
    return RefusedHere(*refusal.args) if turns and _has_next(client, refusal) else as_of_the_broker(refusal)


def only_publishes(client: Any) -> bool:
    """Whether no worker consumes by a connection, nor sends its events: such a one goes where its worker does. A pool
    takes back those that publish."""
    return not is_worker() or "release" in vars(client)


def _has_next(client: Any, error: Exception) -> bool:
    """Whether there is one in its list that has not refused, too, just now."""
    here, refused = url_of(client), _just_now(client)
    if here in refused or {here, *refused}.issuperset(urls_of(client)):
        _refused.pop(client, None)
        return False
    _refused[client] = {**refused, here: (time.monotonic(), str(error))}
    return True


def _just_now(client: Any) -> dict[str, tuple[float, str]]:
    now = time.monotonic()
    return {url: told for url, told in _refused.get(client, {}).items() if now - told[0] < _JUST_NOW}


def pass_over(client: Any) -> None:
    """Raises Unavailable, of which kombu turns to the next one, where a connection is at the broker that has refused
    just now. Older kombus connect to that one again first."""
    if told := _just_now(client).get(url_of(client)):
        raise Unavailable(told[1])


def for_publishers(method: F) -> F:
    """Around what a channel does for those who publish: refusals are of the broker."""

    @wraps(method)
    def told(channel: Any, *args: Any, **options: Any) -> Any:
        try:
            return method(channel, *args, **options)
        except StoreError as error:
            raise of_the_broker(client_of(channel), error) from error
        except Unavailable as error:
            if error.answered and (client := client_of(channel)) is not None:
                _has_next(client, error)  # kombu turns to it, see `pass_over`
            raise

    return cast(F, told)
