"""Where to connect next, and when: kombu's failover lists, and a broker that was away."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from relay_adapters.celery.options import broker_at, is_relay, options_of, say_once, urls_of
from relay_adapters.celery.turning import only_publishes
from relay_core import Broker
from relay_core.connection import forks
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
    """Brokers that take a worker's connection and refuse what it does with it, such as a server whose user lacks a
    right that only claims need. Celery connects anew at once, and to the first of a list.

    One that refused is passed over while there is another of its list to turn to. When none is left, a worker waits
    before it begins anew.

    :ivar until: the monotonic time at which it may do so
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self._urls = frozenset(urls)
        self._refusing: dict[str, StoreError | Unavailable] = {}
        """URL -> what it said, of those that refused since the last wait."""
        self._waits_for: frozenset[str] = frozenset()
        self._rounds, self._connected_at = 0, 0.0
        self.until = 0.0
        forks.watch(self)

    @staticmethod
    def of(client: Any) -> Refusals:
        """What the brokers of a connection's list have refused to this process."""
        urls = tuple(urls_of(client))
        key = urls, repr(sorted(options_of(client).items()))
        return _refusals.get(key) or _refusals.setdefault(key, Refusals(urls))

    def after_fork(self) -> None:
        """A child of the pool consumes nothing: nobody would tell it that one may be right by now."""
        self._refusing.clear()

    def check(self, url: str) -> None:
        """Raises Unavailable, of which kombu turns to the next one, where a worker is better off with that."""
        if (refusal := self._refusing.get(url)) is not None:
            raise Unavailable(str(refusal))

    def connected(self) -> None:
        self._connected_at = time.monotonic()

    def ended(self, url: str, error: BaseException) -> None:
        """A connection ended of this. An ordinary outage asks for no wait: see `Pace`. Nor does a server that cannot
        serve just now, such as a replica: it is passed over alone."""
        if time.monotonic() - self._connected_at >= _LONGEST:  # it was right for a while, and others may be by now
            self._rounds = 0
            self._refusing.clear()
        if not isinstance(error, StoreError) and not (isinstance(error, Unavailable) and error.answered):
            return
        self._refusing[url] = error
        if self._urls - self._refusing.keys():
            logger.warning("the broker refuses what this worker needs, which turns to the next one: %s", error)
        else:
            self.wait()

    def wait(self) -> None:
        """Have the worker wait, if any refused for good: all of a list did, or those that did not are away."""
        refusals = {url: error for url, error in self._refusing.items() if isinstance(error, StoreError)}
        self._refusing.clear()
        if refusals:
            self._rounds += 1
            pause, why = min(_STEP * self._rounds, _LONGEST), list(refusals.values())[-1]
            logger.warning("the broker refuses what this worker needs, next try in %.0f s: %s", pause, why)
            self._waits_for, self.until = frozenset(refusals), time.monotonic() + pause

    def waits_for(self, url: str) -> bool:
        """Whether the worker waits now because that one refused."""
        return url in self._waits_for and time.monotonic() < self.until


_refusals: dict[tuple[tuple[str, ...], str], Refusals] = {}


class Pace:
    """The waits of a worker whose broker is away. kombu sleeps up to 30 s between tries; this looks five times a
    second in that time, so that a worker goes on within a second of its broker's return."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._completes_cycle = client.completes_cycle
        self._wait = 0.0

    @classmethod
    def give(cls, client: Any) -> None:
        """Of the connections that a worker consumes from. Those that publish keep to their retry policy."""
        if not only_publishes(client) and not isinstance(client.completes_cycle, cls):
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
            Refusals.of(self._client).wait()
        return False

    def wait(self) -> None:
        """Until a server of the list answers, at most for as long as kombu would have slept. One that answers, and has
        just refused what a worker needs, is left alone for that long."""
        refusals = Refusals.of(self._client)
        ends, self._wait = time.monotonic() + self._wait, 0.0
        while time.monotonic() < max(ends, refusals.until):
            for url in urls_of(self._client):
                if self._answers(url, refusals):
                    refusals.until = 0.0
                    return
            _rest()

    def _answers(self, url: str, refusals: Refusals) -> bool:
        """Whether there is one to turn to."""
        options = options_of(self._client)
        try:
            if not refusals.waits_for(url):
                return answers(broker_at(url, options))
            answers(broker_at(url, {**options, "plugins": (), "retry_for": 0.0}))
        except Unavailable:  # it may be set right when it is back, for which a worker waits as ever
            if refusals.waits_for(url):
                refusals.until = 0.0
        except RelayError:
            pass
        return False


def _rest() -> None:
    if state := sys.modules.get("celery.worker.state"):
        state.maybe_shutdown()
    time.sleep(_LOOK_EVERY)
