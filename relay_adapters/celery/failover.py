"""Where to connect next, and when: kombu's failover lists, and a broker that was away."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from relay_adapters.celery.options import broker_at, is_relay, options_of, say_once, shared_broker, url_of
from relay_adapters.celery.workerstate import is_worker
from relay_core import Broker
from relay_core.errors import RelayError, StoreError, Unavailable

logger = logging.getLogger("relay.celery")

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


class Refusals:
    """A broker that takes a worker's connection and refuses what it does with it, such as a server whose user lacks a
    right that only claims need. Celery connects anew at once, and would do so for as long as that lasts."""

    def __init__(self) -> None:
        self._count, self._connected_at = 0, 0.0
        self.until = 0.0
        """The monotonic time at which a worker may try again."""

    def connected(self) -> None:
        self._connected_at = time.monotonic()

    def ended(self, error: BaseException) -> None:
        """A connection ended of this. An ordinary outage asks for no wait: see `Pace`."""
        if not isinstance(error, StoreError):
            return
        now = time.monotonic()
        self._count = self._count + 1 if now - self._connected_at < _LONGEST else 1
        pause = min(_STEP * self._count, _LONGEST)
        self.until = now + pause
        logger.warning("the broker refuses what this worker needs, next try in %.0f s: %s", pause, error)

    @staticmethod
    def of(client: Any) -> Refusals:
        """What a connection's broker has refused to this process."""
        return _refusals.setdefault(shared_broker(client), Refusals())


_refusals: WeakKeyDictionary[Broker, Refusals] = WeakKeyDictionary()


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
        if not is_worker() or "release" in vars(client):
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
        """Until a server of the list answers, at most for as long as kombu would have slept. One that answers, and has
        just refused what a worker needs, is left alone for that long."""
        self._leave_alone(Refusals.of(self._client))
        ends, self._wait = time.monotonic() + self._wait, 0.0
        while time.monotonic() < ends:
            for broker in self._brokers():
                with suppress(RelayError):
                    if answers(broker):
                        return
            _rest()

    def _leave_alone(self, refusals: Refusals) -> None:
        if time.monotonic() >= refusals.until:
            return
        options = {name: value for name, value in options_of(self._client).items() if name != "plugins"}
        look = broker_at(url_of(self._client), {**options, "retry_for": 0.0})
        while time.monotonic() < refusals.until:
            try:
                answers(look)
            except Unavailable:  # it may be set right when it is back, for which a worker waits as ever
                refusals.until = 0.0
            except RelayError:
                pass
            _rest()

    def _brokers(self) -> Iterator[Broker]:
        options = options_of(self._client)
        urls: list[str] = [url for url in self._client.alt or () if type(url) is Whole] or [url_of(self._client)]
        for url in urls:
            yield broker_at(str(url), options)


def _rest() -> None:
    if state := sys.modules.get("celery.worker.state"):
        state.maybe_shutdown()
    time.sleep(_LOOK_EVERY)
