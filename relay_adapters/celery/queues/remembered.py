"""What one process declared, kept in case the store loses it.

kombu declares once, and then believes for ever that it has. So what a process declared is declared again where the
store was emptied in between, or came back in an older state: otherwise what it publishes would reach no queue. It
learns that with the versions. What others delete on purpose stays deleted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, MutableMapping
from typing import Any

from relay_adapters.celery.errors import PreconditionFailed
from relay_adapters.celery.queues.declarations import Declarations, predeclared
from relay_adapters.celery.queues.exchanges import Binding
from relay_adapters.celery.queues.terms import Terms
from relay_core.connection import forks

logger = logging.getLogger("relay.celery")

PAUSE = 1.0
"""Seconds between two looks at whether the store has lost something, and between two tries to declare it again."""

MANY = 100
"""Declared queues that end by themselves from which on those that must have ended are looked for: a process that lives
for long may declare one per client, or per connection."""


class Remembered:
    """The queues, bindings and exchanges that this process declared, and what of them is owed to the store.

    Safe for threads.

    :param read: by queue, what was read of it: to be read anew once the queue is forgotten, or the store is another
    """

    def __init__(self, stored: Declarations, read: MutableMapping[str, Any]) -> None:
        self._stored, self._read = stored, read
        self.queues: dict[str, Terms] = {}
        self.bindings: dict[str, dict[tuple[str, Binding], None]] = {}
        """By queue: (exchange, binding)."""
        self.exchanges: dict[str, dict[str, Any]] = {}
        self._consumed: set[str] = set()
        """The queues that this process consumes from."""
        self._used_at: dict[str, float] = {}
        """Of the queues that end by themselves: monotonic time at which this process used them last."""
        self._many = MANY
        self._owed: dict[str, None] = {}
        """Queues that have to be declared and bound again, and below the exchanges."""
        self._owed_exchanges: dict[str, None] = {}
        self._owed_at = 0.0
        """Monotonic time before which that is not tried again: what it needs is declared by another process."""
        self._since: bytes | None = None
        self._count = 0
        """The state of the store that is known, see `Declarations.state`."""
        self._looked_at = 0.0
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._reviving = threading.RLock()
        self._consumed.clear()

    # what was declared

    def declared_queue(self, name: str, terms: Terms, since: bytes) -> None:
        self.queues[name] = terms
        self.used(name)
        self.learn(since)

    def bound(self, exchange: str, binding: Binding) -> None:
        self.bindings.setdefault(binding.queue, {})[exchange, binding] = None

    def unbound(self, exchange: str, binding: Binding) -> None:
        self.bindings.get(binding.queue, {}).pop((exchange, binding), None)

    def forget_exchange(self, name: str) -> None:
        self.exchanges.pop(name, None)
        for places in list(self.bindings.values()):
            for exchange, binding in list(places):
                if exchange == name:
                    places.pop((exchange, binding), None)

    def forget_queue(self, name: str) -> None:
        for known in (self.queues, self.bindings, self._used_at, self._read):
            known.pop(name, None)

    # which queues are in use, so that those that have ended are forgotten

    def consume(self, name: str) -> None:
        """This process consumes from a queue, until `leave`."""
        self._consumed.add(name)

    def leave(self, name: str) -> None:
        self._consumed.discard(name)
        self.used(name)

    def used(self, name: str) -> None:
        """This process has just used a queue."""
        if name not in self.queues:
            return
        if not self.queues[name].idle_ms:
            self._used_at.pop(name, None)
            return
        self._used_at[name] = time.monotonic()
        if len(self._used_at) >= self._many:
            self._forget_ended()
            self._many = max(MANY, 2 * len(self._used_at))

    def _forget_ended(self) -> None:
        """Queues that have ended, or live on only because others use them, who will have declared them."""
        now = time.monotonic()
        for name, used_at in list(self._used_at.items()):
            terms = self.queues.get(name)
            if name not in self._consumed and (terms is None or now - used_at > terms.idle_ms / 1000):
                self.forget_queue(name)

    # what the store has lost

    @property
    def owing(self) -> bool:
        """True when `revive` has something to do."""
        return bool(self._owed or self._owed_exchanges) and time.monotonic() >= self._owed_at

    def revive(self, queues: Iterable[str] = ()) -> None:
        """Declare and bind queues again as this process did before: they were deleted, or the store was emptied.

        What a lost connection keeps from being done stays owed, and is done first thing by the next call.
        """
        with self._reviving:
            self._owe(queues)
            for name in list(self._owed_exchanges):
                if name in self.exchanges:
                    self.learn(self._stored.make_exchange(name, self.exchanges[name]).since)
                self._owed_exchanges.pop(name, None)
            waiting = [name for name in list(self._owed) if not self._revive(name)]
            self._owed_at = time.monotonic() + PAUSE if waiting else 0.0

    def owe(self, name: str, terms: Terms) -> None:
        """A queue that cannot be declared now: it is by `revive`, with the bindings that it has by then."""
        with self._reviving:
            self.queues[name] = terms
            self.used(name)
            self._owe([name])

    def owes(self, name: str) -> bool:
        return name in self._owed

    def _revive(self, name: str) -> bool:
        """False where an exchange or the queue is another process's, which has not declared it again yet."""
        if name in self.queues:
            try:
                terms, made = self._stored.declare_queue(name, self.queues[name])
                self.declared_queue(name, terms, made.since)
            except PreconditionFailed as error:
                logger.warning("queue %r was declared otherwise in the meantime: %s", name, error)
        for exchange, binding in list(self.bindings.get(name, {})):
            bound = self._stored.bind(exchange, binding, self.exchanges.get(exchange) or predeclared(exchange))
            if bound.done != 1:
                return False
            self.learn(bound.since)
        self._owed.pop(name, None)
        return True

    def _owe(self, queues: Iterable[str]) -> None:
        owed = dict.fromkeys(queues)
        if owed:
            self._owed |= owed
            self._owed_at = 0.0

    def learn(self, since: bytes) -> None:
        """A declaration was made in a store that has some since then."""
        if not self.is_known(since):
            self.look()

    def is_known(self, since: bytes | None, count: int | None = None) -> bool:
        """False when this is not the store, or not the state of it, that this process knew."""
        if self._since is None:
            self._since = since
        if since != self._since or (count is not None and count < self._count):
            return False
        self._count = self._count if count is None else count
        return True

    def look(self) -> None:
        """See whether the store has lost what this process declared: then all of it is owed.

        One thread looks at a time: another one's answer may be older than what is known by now.
        """
        with self._reviving:
            since, count = self._stored.state()
            if since == self._since and count >= self._count:
                return
            self._forget_ended()
            self._owed_exchanges |= dict.fromkeys(self.exchanges)
            self._owe([*self.queues, *self.bindings])
            if self.owing:
                logger.warning("the store was emptied, or is in an older state: its queues are declared again")
            self._read.clear()
            # last: from now on other threads take this state for known
            self._since, self._count = since, count

    def was_lost(self) -> bool:
        """Whether what this process declared was gone with the whole store: then it is there again."""
        now = time.monotonic()
        if now - self._looked_at >= PAUSE:
            self._looked_at = now
            self.look()
        lost = self.owing
        if lost:
            self.revive()
        return lost
