"""While the server of a cluster that has the exchanges and queues is away alone, what was read of them is believed.

They lie on one server, and tasks on all: those of the others are published and consumed meanwhile. Nobody changes what
is declared then, except where the server is away for this process alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from relay_adapters.celery.errors import MailboxesAway
from relay_core import Broker
from relay_core.connection import forks
from relay_core.errors import Unavailable

logger = logging.getLogger("relay.celery")


class Outage:
    """Of one server, the one of `key`. Safe for threads, and in a child of fork."""

    def __init__(self, broker: Broker, key: bytes) -> None:
        self._broker, self._key = broker, key
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        self._error: Unavailable | None = None

    def ask(self, question: Callable[[], Any], believed: Any) -> Any:
        """What the store says or, while its server is away, what is believed. Raises Unavailable where that is None."""
        if believed is None:
            return question()
        if self._error is None:
            try:
                return question()
            except Unavailable as error:
                self.begin(error)
        return believed

    def begin(self, error: Unavailable) -> None:
        """That server could not serve. Raises the error where there is no other to turn to."""
        if not self._broker.url.several:
            raise error
        if self._error is None:
            logger.warning("what is known of exchanges and queues is believed until their server is back: %s", error)
            self._error = error  # at first: the lookout may find it back before this thread goes on
            try:
                self._broker.store.lookout.miss(self._key, self)
            except BaseException:
                self._error = None  # no thread can be had to look out: the server is asked anew each time
                raise

    @property
    def on(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Before a message is put into mailboxes, which lie on that server, too. Raises MailboxesAway."""
        if (error := self._error) is not None:
            raise MailboxesAway(str(error))

    def is_back(self, key: bytes) -> None:
        """Called by the lookout, on its thread."""
        self._error = None
