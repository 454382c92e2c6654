"""Where to connect next, and when: kombu's failover lists, and a broker that was away."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from relay_adapters.celery.options import broker_at, is_relay, options_of, say_once, url_of
from relay_core import Broker
from relay_core.errors import RelayError

_KEYS = [b"%d" % n for n in range(64)]
"""By which the servers of a cluster are found: of so many keys one lies with each of them, or nearly each."""

_LOOK_EVERY = 0.2
_STEP, _LONGEST = 2.0, 30.0
"""Seconds, as Celery waits before it tries again: 2, 4, 6 ... 30."""


class Whole(str):
    """A URL that kombu does not take apart, which it can do with one host only, when it switches to it."""

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return part != "://" and super().__contains__(part)  # type: ignore[operator]


def keep_whole(client: Any) -> None:
    """Have a connection switch to relay's URLs of its failover list as they are."""
    alternates = client.alt
    if not alternates or any(type(url) is Whole for url in alternates):
        return
    others = sorted({str(url).partition("://")[0] for url in alternates if not is_relay(str(url))})
    if others:
        say_once(
            f"the list of brokers has {', '.join(others)}:// beside relay's: producers turn to it, but a worker that "
            "does so ends when it loses that one, for Celery knows the errors of the first only; list relay's alone"
        )
    client.alt = [Whole(url) if is_relay(str(url)) else url for url in alternates]
    client.cycle = client.failover_strategy(client.alt)
    next(client.cycle)  # kombu has taken the first one


def answers(broker: Broker) -> bool:
    """True when its server, or one of a cluster's, takes commands right now; each is asked once. Raises AuthError and
    the like."""
    store, keys = broker.store, _KEYS if broker.url.several else _KEYS[:1]
    for address in {store.where(key) for key in keys}:
        if address is not None:
            store.doubt(address)
    found = list(store.find(keys).values())
    errors = [error for error in found if isinstance(error, RelayError)]
    if len(errors) == len(found):
        raise errors[0]
    return True


class Pace:
    """The waits of a worker whose broker is away. kombu sleeps up to 30 s between tries; this looks five times a
    second in that time, so that a worker goes on within a second of its broker's return."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._completes_cycle = client.completes_cycle
        self._wait = 0.0

    @classmethod
    def give(cls, client: Any) -> None:
        """Of the connections that a worker consumes from. Those that a pool takes back publish, and keep to their retry
        policy."""
        if "celery.worker.consumer.consumer" not in sys.modules or "release" in vars(client):
            return
        if not isinstance(client.completes_cycle, cls):
            client.completes_cycle = cls(client)

    @classmethod
    def of(cls, client: Any) -> Pace | None:
        found = client.completes_cycle
        return found if isinstance(found, cls) else None

    def __call__(self, retries: int) -> bool:
        """kombu asks whether to sleep before its next try. No: that try waits, and looks meanwhile."""
        if self._completes_cycle(retries):
            rounds = (retries + 1) // max(1, len(self._client.alt or ()))
            self._wait = min(_STEP * rounds, _LONGEST)
        return False

    def wait(self) -> None:
        """Until a server of the list answers, at most for as long as kombu would have slept."""
        ends, self._wait = time.monotonic() + self._wait, 0.0
        while time.monotonic() < ends:
            for broker in self._brokers():
                with suppress(RelayError):
                    if answers(broker):
                        return
            if state := sys.modules.get("celery.worker.state"):
                state.maybe_shutdown()
            time.sleep(_LOOK_EVERY)

    def _brokers(self) -> Iterator[Broker]:
        options = options_of(self._client)
        urls: list[str] = [url for url in self._client.alt or () if type(url) is Whole] or [url_of(self._client)]
        for url in urls:
            yield broker_at(str(url), options)
