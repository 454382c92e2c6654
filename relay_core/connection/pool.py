"""Blocking connections to one server, kept for reuse."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from relay_core.connection import forks
from relay_core.connection.busypoll import busy_poll, no_poll
from relay_core.connection.clients import socket_of
from relay_core.connection.replies import LOST, NOT_OPENED
from relay_core.connection.steps import Outcome
from relay_core.connection.streams import Stream, stream_of
from relay_core.errors import Unavailable

LOOK_AFTER = 1.0
"""Seconds of rest after which a connection is looked at before it is used: the server may have closed it."""

CLOSED = "the connection to the store was closed by this process"


class Link:
    """One connection, opened when needed. Used by one thread at a time.

    :param on_closed: called when the server is found to have closed it while it was idle, as one that restarts does
    """

    __slots__ = ("__weakref__", "_busy_poll", "_connection", "_on_closed", "_owed", "_stream", "_used")

    def __init__(self, connection: Any, on_closed: Callable[[], None] = lambda: None) -> None:
        self._connection = connection
        self._on_closed = on_closed
        self._stream: Stream | None = None
        self._busy_poll: Callable[[], None] = no_poll
        self._used = 0.0
        self._owed = False  # whether a reply may still come, which must not be taken for that to the next command
        forks.watch(self)

    def after_fork(self) -> None:
        self.close()  # redis-py closes the child's copy only

    def exchange(self, blocks: list[bytes], count: int) -> Outcome:
        """Send packed commands and read `count` replies. Never raises for a server or a network, see LOST."""
        return self.send(blocks) or self.receive(count)

    def send(self, blocks: list[bytes]) -> Outcome | None:
        """The first half of an exchange. None when all is sent; how it failed, else."""
        stream = self._stream
        if stream is not None:
            if self._owed:
                stream = None
            elif monotonic() - self._used > LOOK_AFTER and stream.closed():
                stream = None
                self._on_closed()
        if stream is None:
            try:
                stream = self._open()
            except NOT_OPENED as error:
                self.close()
                return Outcome([], error, sent=False)
            except BaseException:
                self.close()
                raise
        self._owed = True
        try:
            for block in blocks:
                stream.send(block)
        except LOST as error:
            self.close()
            return Outcome([], error)
        except BaseException:
            self.close()
            raise
        return None

    def _open(self) -> Stream:
        self.close()  # an earlier one may have been interrupted
        self._connection.connect()
        self._busy_poll = busy_poll(socket_of(self._connection))
        self._owed = False
        self._stream = stream_of(self._connection)
        return self._stream

    def receive(self, count: int) -> Outcome:
        """The second half: wait for `count` replies."""
        stream = self._stream
        if stream is None:
            return Outcome([], ConnectionError("the connection was closed while a reply was awaited"))
        replies: list[Any] = []
        try:
            self._busy_poll()
            while len(replies) < count:
                replies.append(stream.receive())
        except LOST as error:
            self.close()
            return Outcome(replies, error)
        except BaseException:
            self.close()
            raise
        self._owed = False
        self._used = monotonic()
        return Outcome(replies)

    @property
    def socket(self) -> Any:
        """The open socket, to select on; None while it is closed. Another one after each connect."""
        return None if self._stream is None else socket_of(self._connection)

    def rest(self) -> None:
        """While no reply is awaited: close it if the server has. It opens again when needed."""
        if self._stream is not None and self._stream.closed():
            self.close()

    def close(self) -> None:
        self._stream = None
        with suppress(*LOST):
            self._connection.disconnect()


class _Turn:
    """Of a thread that waits: a link is handed to it, so that nobody who comes later takes it first."""

    def __init__(self, lock: threading.RLock) -> None:
        self.changed = threading.Condition(lock)
        self.link: Link | None = None


class Pool:
    """The links to one server, handed out last in, first out. Safe for threads.

    :param limit: how many there may be at once
    :param patience: seconds that `take` waits for one when all are in use
    """

    def __init__(self, make: Callable[[], Link], limit: int, patience: float) -> None:
        self._make, self._limit, self._patience = make, limit, patience
        self._idle: list[Link] = []
        # one whose user was interrupted before it could give it back is gone from here, too
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._closed = False
        self._lock = threading.RLock()  # a signal's handler may run commands, too
        self._waiting: deque[_Turn] = deque()

    def take(self) -> Link | None:
        """A link, or None when all were in use for too long. Give it back with `give`."""
        with self._lock:
            if self._closed:
                raise Unavailable(CLOSED)
            if self._idle:
                return self._idle.pop()
            # one that was lost while this thread waited may be made anew
            return self._new() or self._wait() or self._new()

    def _new(self) -> Link | None:
        if len(self._links) >= self._limit:
            return None
        link = self._make()
        self._links.add(link)
        return link

    def _wait(self) -> Link | None:
        turn = _Turn(self._lock)
        self._waiting.append(turn)
        try:
            turn.changed.wait_for(lambda: self._closed or turn.link is not None, self._patience)
            if self._closed:
                raise Unavailable(CLOSED)
        except BaseException:
            if turn.link is not None:  # it came at the same moment
                self._give(turn.link)
            raise
        finally:
            with suppress(ValueError):  # it came, or was lost on its way
                self._waiting.remove(turn)
        return turn.link

    def give(self, link: Link) -> None:
        with self._lock:
            self._give(link)

    def _give(self, link: Link) -> None:
        if self._closed:
            link.close()
        elif self._waiting:
            turn = self._waiting.popleft()
            turn.link = link
            turn.changed.notify()
        else:
            self._idle.append(link)

    def drop(self) -> None:
        """Close the idle links; they open again when needed."""
        with self._lock:
            for link in self._idle:
                link.close()

    def close(self) -> None:
        """Close the idle links now, and those in use when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for turn in self._waiting:
                turn.changed.notify()
        for link in idle:
            link.close()
