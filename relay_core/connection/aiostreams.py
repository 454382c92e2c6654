"""The bytes of an open asyncio connection: what streams.py is for blocking ones, and for the same reason.

redis-py opens and closes the connection. In between the event loop hands what it reads straight to hiredis.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from redis.exceptions import ConnectionError, InvalidResponse, RedisError

from relay_core.connection.clients import transport_of
from relay_core.connection.replies import is_reply
from relay_core.connection.streams import MORE, new_reader

_SMALL = 1 << 15
"""Bytes that asyncio takes off our hands at once, so that sending them needs no timeout of its own."""


class AsyncStream(Protocol):
    """Both ways of an open connection. What they raise means that it is out of step, and must be closed."""

    async def exchange(self, blocks: Sequence[bytes], count: int, replies: list[Any]) -> None:
        """Send packed commands and append `count` replies; an error reply of the server as the exception."""

    async def closed(self) -> bool:
        """Whether the server has closed it, or has said something unasked."""


class FastStream(asyncio.Protocol):
    """hiredis, fed by the event loop. An exchange fails when nothing moves for `socket_timeout` seconds."""

    def __init__(self, connection: Any, reader: Any) -> None:
        self._timeout: float = connection.socket_timeout
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._moved = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._failure: BaseException | None = None
        self._full = False
        self._waiter: asyncio.Future[None] | None = None
        self._replies: list[Any] = []
        self._count = 0
        self._transport = transport_of(connection)
        self._before: Any = self._transport.get_protocol()
        self._transport.set_protocol(self)

    async def exchange(self, blocks: Sequence[bytes], count: int, replies: list[Any]) -> None:
        if self._failure is not None:
            raise self._failure
        self._replies, self._count = replies, count
        self._moved = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._check)
        for block in blocks:
            self._transport.write(block)
            if self._full:
                await self._wait()
        if len(replies) < count:
            await self._wait()
        self._count = 0

    async def _wait(self) -> None:
        if self._failure is not None:  # while this task was woken, and had not run yet: nothing would wake it again
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def closed(self) -> bool:
        await _let_the_loop_read()
        return self._failure is not None

    # what the event loop calls

    def data_received(self, data: bytes) -> None:
        self._moved = self._loop.time()
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not MORE:
                if isinstance(reply, RedisError) and not is_reply(reply):
                    raise reply
                if len(self._replies) >= self._count:
                    raise InvalidResponse("the server said something that was not asked")
                self._replies.append(reply)
        except Exception as error:
            self._fail(error)
            return
        if not self._full and len(self._replies) >= self._count:
            self._wake()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._moved = self._loop.time()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or ConnectionError("Connection closed by server."))
        if self._timer is not None:
            self._timer.cancel()
        with suppress(Exception):
            self._before.connection_lost(error)  # somebody may wait for the end of redis-py's own writer

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._failure)

    def _check(self) -> None:
        """One timer for many exchanges: it looks when the last thing moved."""
        self._timer = None
        if self._waiter is None:
            return
        left = self._moved + self._timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        else:
            self._fail(TimeoutError(f"no answer within {self._timeout:g} s"))


class PlainStream:
    """redis-py's own parser."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def exchange(self, blocks: Sequence[bytes], count: int, replies: list[Any]) -> None:
        await self._send(blocks)
        for _ in range(count):
            try:
                replies.append(await self._connection.read_response(disconnect_on_error=False))
            except RedisError as error:
                if not is_reply(error):
                    raise
                replies.append(error.with_traceback(None))

    async def _send(self, blocks: Sequence[bytes]) -> None:
        connection = self._connection
        if len(blocks) > 1 or len(blocks[0]) > _SMALL:
            await connection.send_packed_command(blocks, check_health=False)
            return
        # With a timeout, redis-py makes a task for each send, which costs more than the send.
        timeout, connection.socket_timeout = connection.socket_timeout, None
        try:
            await connection.send_packed_command(blocks, check_health=False)
        finally:
            connection.socket_timeout = timeout

    async def closed(self) -> bool:
        await _let_the_loop_read()
        # Its name before redis-py 8.
        look = getattr(self._connection, "can_read", None) or self._connection.can_read_destructive
        try:
            return bool(await look())
        except (RedisError, OSError):
            return True


async def _let_the_loop_read() -> None:
    for _ in range(2):  # it looks at its sockets between the two
        await asyncio.sleep(0)


def stream_of(connection: Any) -> AsyncStream:
    """The stream of a connection of redis-py that was just opened, and is used in no other way from now on."""
    reader = new_reader()
    return PlainStream(connection) if reader is None else FastStream(connection, reader)
