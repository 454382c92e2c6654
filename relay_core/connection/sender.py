"""The shell for who has other things to do meanwhile: a command is sent now, and its reply taken when it is there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from relay_core.clock import sent_now
from relay_core.commands.command import Command
from relay_core.connection import clients, forks
from relay_core.connection.bell import readable
from relay_core.connection.pool import Link
from relay_core.connection.steps import Address, Outcome

if TYPE_CHECKING:
    from relay_core.connection.sync import SyncStore

T = TypeVar("T")


class Sender:
    """Sends one command at a time, on connections of its own, one per server. Made by `SyncStore.sender`.

    One thread uses it at a time, which may be another one for the reply.
    """

    def __init__(self, store: SyncStore) -> None:
        self._store = store
        self._links: dict[Address, Link] = {}
        self._to: Address | None = None
        self._sent_at = 0.0
        self._failed: Outcome | None = None

    def send(self, command: Command[Any]) -> None:
        """Send it where that can be done at once; else `result` sends it."""
        forks.look()
        self._to, self._sent_at = self._store.ready(command, time.monotonic()), sent_now()
        if self._to is not None:
            link = self._links.get(self._to)
            if link is None:
                link = self._links[self._to] = self._store.link(self._to)
            self._failed = link.send([clients.checked_pack(("EVALSHA", *command.wire()))])

    def sockets(self) -> list[Any]:
        """What to select on for the reply: all that are open."""
        return [socket for link in self._links.values() if (socket := link.socket) is not None]

    def arrived(self) -> bool:
        """True when `result` does not have to wait for a first reply."""
        socket = self._links[self._to].socket if self._to is not None else None
        return self._failed is not None or socket is None or bool(readable([socket.fileno()], 0))

    def result(self, command: Command[T]) -> T:
        """What `parse` makes of the reply to the command that was sent. Waits for it, and repeats the command, as `run`
        would, and raises the same."""
        forks.look()
        outcome, started = None, time.monotonic()
        if self._to is not None:
            outcome = self._failed or self._links[self._to].receive(1)
            if outcome.failure is None and not isinstance(reply := outcome.replies[0], Exception):
                return command.parse(reply, False)
        return self._store.settle(command, started, self._sent_at, self._to, outcome)

    def rest(self) -> None:
        """Between two commands: close what the server has closed, which a loop would find readable again and again."""
        for link in self._links.values():
            link.rest()

    def close(self) -> None:
        """Close the connections, which open again when needed. A reply that is under way is lost with them, and the
        command counts as one that may have been executed."""
        for link in self._links.values():
            link.close()
