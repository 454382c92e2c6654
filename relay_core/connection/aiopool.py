"""asyncio connections to one server, kept for reuse within one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from redis.exceptions import RedisError

from relay_core.connection import clients, forks
from relay_core.connection.pool import LOOK_AFTER
from relay_core.connection.replies import is_reply
from relay_core.connection.steps import Outcome
from relay_core.errors import Unavailable

SMALL = 1 << 15
"""Bytes that asyncio takes off our hands at once, so that sending them needs no timeout of its own."""


class AsyncLink:
    """One connection, opened when needed. Used by one task at a time."""

    __slots__ = ("__weakref__", "_connection", "_open", "_used")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._open = False
        self._used = 0.0
        forks.watch(self)

    def after_fork(self) -> None:
        clients.let_go(self._connection)

    async def exchange(self, blocks: list[bytes], count: int) -> Outcome:
        """Send packed commands and read `count` replies. Never raises for a server or a network."""
        connection = self._connection
        if self._open and monotonic() - self._used > LOOK_AFTER:
            await self._look()
        if not self._open:
            try:
                await connection.connect()
            except Exception as error:
                await self.close()
                return Outcome([], error, sent=False)
            except BaseException:
                await self.close()
                raise
            self._open = True
        replies: list[Any] = []
        try:
            await self._send(blocks)
            for _ in range(count):
                try:
                    replies.append(await connection.read_response(disconnect_on_error=False))
                except RedisError as error:
                    if not is_reply(error):
                        raise
                    replies.append(error.with_traceback(None))
        except Exception as error:
            await self.close()
            return Outcome(replies, error)
        except BaseException:
            await self.close()  # a reply may still come, and must not be taken for that to the next command
            raise
        self._used = monotonic()
        return Outcome(replies)

    async def _send(self, blocks: list[bytes]) -> None:
        connection = self._connection
        if len(blocks) > 1 or len(blocks[0]) > SMALL:
            await connection.send_packed_command(blocks, check_health=False)
            return
        # With a timeout, redis-py makes a task for each send, which costs more than the send.
        timeout, connection.socket_timeout = connection.socket_timeout, None
        try:
            await connection.send_packed_command(blocks, check_health=False)
        finally:
            connection.socket_timeout = timeout

    async def _look(self) -> None:
        connection = self._connection
        # Its name before redis-py 8.
        look = getattr(connection, "can_read", None) or connection.can_read_destructive
        try:
            if not await look():
                return
        except (RedisError, OSError):
            pass
        await self.close()

    async def close(self) -> None:
        self._open = False
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
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> AsyncLink | None:
        """A link, or None when all were in use for too long. Give it back with `give`."""
        if not self._idle and self._made >= self._limit and not await self._wait():
            return None
        if self._closed:
            raise Unavailable("the connection to the store was closed by this process")
        if self._idle:
            return self._idle.pop()
        self._made += 1
        return self._make()

    async def _wait(self) -> bool:
        deadline = monotonic() + self._patience
        while not self._idle and not self._closed:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await asyncio.wait_for(turn, deadline - monotonic())
            except asyncio.TimeoutError:
                return bool(self._idle)
            except BaseException:
                self._next()  # the turn may have come at the same moment
                raise
            finally:
                if turn in self._waiting:
                    self._waiting.remove(turn)
        return True

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def give(self, link: AsyncLink) -> None:
        if self._closed:
            await link.close()
            return
        self._idle.append(link)
        if self._waiting:
            self._next()

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
