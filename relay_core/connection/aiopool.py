"""asyncio connections to one server, kept for reuse within one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from relay_core.connection import clients, forks
from relay_core.connection.aiostreams import AsyncStream, stream_of
from relay_core.connection.pool import CLOSED, LOOK_AFTER
from relay_core.connection.replies import LOST, NOT_OPENED
from relay_core.connection.steps import Outcome
from relay_core.errors import Unavailable


class AsyncLink:
    """One connection, opened when needed. Used by one task at a time.

    :param on_closed: see Link
    """

    __slots__ = ("__weakref__", "_connection", "_on_closed", "_stream", "_used")

    def __init__(self, connection: Any, on_closed: Callable[[], None] = lambda: None) -> None:
        self._connection = connection
        self._on_closed = on_closed
        self._stream: AsyncStream | None = None
        self._used = 0.0
        forks.watch(self)

    def after_fork(self) -> None:
        clients.let_go(self._connection)

    async def exchange(self, blocks: list[bytes], count: int) -> Outcome:
        """Send packed commands and read `count` replies. Never raises for a server or a network, see LOST."""
        stream = self._stream
        if stream is not None and monotonic() - self._used > LOOK_AFTER and await stream.closed():
            await self.close()
            stream = None
            self._on_closed()
        if stream is None:
            try:
                await self._connection.connect()
            except NOT_OPENED as error:
                await self.close()
                return Outcome([], error, sent=False)
            except BaseException:
                await self.close()
                raise
            stream = self._stream = stream_of(self._connection)
        replies: list[Any] = []
        try:
            await stream.exchange(blocks, count, replies)
        except LOST as error:
            await self.close()
            return Outcome(replies, error)
        except BaseException:
            await self.close()  # a reply may still come, and must not be taken for that to the next command
            raise
        self._used = monotonic()
        return Outcome(replies)

    async def close(self) -> None:
        self._stream = None
        with suppress(Exception):
            await self._connection.disconnect(nowait=True)


class AsyncPool:
    """The links to one server, handed out last in, first out, to the tasks of one event loop.

    :param limit: how many there may be at once
    :param patience: seconds that `take` waits for one when all are in use
    """

    def __init__(self, make: Callable[[], AsyncLink], limit: int, patience: float) -> None:
        self._make, self._limit, self._patience = make, limit, patience
        self._idle: list[AsyncLink] = []
        self._made = 0
        self._closed = False
        self._waiting: deque[asyncio.Future[AsyncLink | None]] = deque()

    async def take(self) -> AsyncLink | None:
        """A link, or None when all were in use for too long. Give it back with `give`."""
        if self._closed:
            raise Unavailable(CLOSED)
        if self._idle:
            return self._idle.pop()
        if self._made >= self._limit:
            return await self._wait()
        self._made += 1
        return self._make()

    async def _wait(self) -> AsyncLink | None:
        """A link is handed over, so that nobody who comes later takes it first."""
        turn: asyncio.Future[AsyncLink | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait_for(turn, self._patience)
            if self._closed:
                raise Unavailable(CLOSED)
        except BaseException as error:
            if turn.done() and not turn.cancelled() and (link := turn.result()) is not None:
                await self.give(link)  # it came at the same moment
            if isinstance(error, asyncio.TimeoutError):
                return None
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)
        return turn.result()

    async def give(self, link: AsyncLink) -> None:
        if self._closed:
            await link.close()
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(link)
                return
        self._idle.append(link)

    async def drop(self) -> None:
        """Close the idle links; they open again when needed."""
        for link in list(self._idle):
            await link.close()

    async def close(self) -> None:
        """Close the idle links now, and those in use when they are given back."""
        self._closed = True
        idle, self._idle = self._idle, []
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)
        for link in idle:
            await link.close()
