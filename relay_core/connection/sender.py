"""The shell for who has other things to do meanwhile: a command is sent now, and its reply taken when it is there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from relay_core.commands.command import Command
from relay_core.connection import clients
from relay_core.connection.bell import readable
from relay_core.connection.pool import Link
from relay_core.connection.steps import Address, Outcome

if TYPE_CHECKING:
    from relay_core.connection.sync import SyncStore

T = TypeVar("T")


class Sender:
    """Sends one command at a time, on a connection of its own. Made by `SyncStore.sender`; used by one thread at a
    time, which may be another one for the reply."""

    def __init__(self, store: SyncStore) -> None:
        self._store = store
        self._link: Link | None = None
        self._address: Address | None = None
        self._sent = False
        self._failed: Outcome | None = None

    def send(self, command: Command[Any]) -> None:
        """Send it where that can be done at once; else `result` sends it."""
        address = self._store.ready(command, time.monotonic())
        if address != self._address:
            self.close()
        self._sent = address is not None
        if address is not None:
            if self._link is None:
                self._link, self._address = self._store.link(address), address
            self._failed = self._link.send([clients.checked_pack(("EVALSHA", *command.wire()))])

    @property
    def socket(self) -> Any:
        """What to select on for the reply; None where there is nothing to wait for, or nothing open."""
        return None if self._link is None else self._link.socket

    def arrived(self) -> bool:
        """True when `result` does not have to wait for a first reply."""
        socket = self.socket
        return not self._sent or self._failed is not None or socket is None or bool(readable([socket.fileno()], 0))

    def result(self, command: Command[T]) -> T:
        """What `parse` makes of the reply to the command that was sent. Waits for it, and repeats the command, as `run`
        would, and raises the same."""
        outcome = None
        if self._sent and self._link is not None:
            outcome = self._failed or self._link.receive(1)
            if outcome.failure is None and not isinstance(reply := outcome.replies[0], Exception):
                return command.parse(reply, False)
        return self._store.settle(command, time.monotonic(), self._address, outcome)

    def close(self) -> None:
        """Close the connection, which opens again when needed. A reply that is under way is lost with it."""
        if self._link is not None:
            self._link.close()
        self._link = self._address = None
