"""The bytes of an open connection: commands go out as they are packed, replies come in one by one.

redis-py opens and closes the connection. What lies between is hiredis on its socket where hiredis is installed, since
the layers of redis-py cost a short command as much as all the rest of its way.
"""

from __future__ import annotations

import _socket
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from redis.connection import DefaultParser
from redis.exceptions import ConnectionError, InvalidResponse, RedisError
from redis.utils import HIREDIS_AVAILABLE

from relay_core.connection.clients import socket_of
from relay_core.connection.replies import is_reply

_Reader: Any = None
if HIREDIS_AVAILABLE:  # and new enough
    from hiredis import Reader

    _Reader = Reader

MORE = object()
"""What a reader answers while a reply is not there, or not all of it."""

_READ_BYTES = 1 << 16


def new_reader() -> Any:
    """hiredis, which is fed bytes and gives replies, those that are errors as exceptions; None where it is missing."""
    if _Reader is None:
        return None
    return _Reader(replyError=DefaultParser.parse_error, protocolError=InvalidResponse, notEnoughData=MORE)


class Stream(Protocol):
    """Both ways of an open connection. What they raise means that it is out of step, and must be closed."""

    send: Callable[[bytes], Any]

    def receive(self) -> Any:
        """The next reply; an error reply of the server as the exception."""

    def closed(self) -> bool:
        """Whether the server has closed it, or has said something unasked."""


# A socket with a timeout asks the system whether it is ready before it does anything, and mostly it is. These two do it
# first, and leave what has to wait to the socket.

_SYSTEM: Any = (os.write, getattr(os, "readv", None))
"""As they are at import, and where nobody finds them: who puts others in their place, such as a fake file system in a
test, means files."""


def direct_send(socket: Any) -> Callable[[bytes], None]:
    """Sends all of a block on a connected socket, as its `sendall` does, and raises the same."""
    fileno, sendall, (write, _) = socket.fileno, socket.sendall, _SYSTEM

    def send(block: bytes) -> None:
        try:
            sent = write(fileno(), block)
        except BlockingIOError:
            sent = 0
        if sent < len(block):
            sendall(memoryview(block)[sent:])

    return send if _is_plain(socket) else sendall


def direct_read(socket: Any, buffer: bytearray) -> Callable[[], int]:
    """Reads what has come on a connected socket into a buffer, as its `recv_into` does, and raises the same."""
    fileno, recv_into, (_, readv), buffers = socket.fileno, socket.recv_into, _SYSTEM, [buffer]

    def read() -> int:
        size: int
        try:
            size = readv(fileno(), buffers)
        except BlockingIOError:
            size = recv_into(buffer)
        return size

    return read if _is_plain(socket) else partial(recv_into, buffer)


def _is_plain(socket: Any) -> bool:
    """Whether its reads are the system's own: not those of TLS, nor gevent's, which switch to other greenlets."""
    return getattr(type(socket), "recv_into", None) is _socket.socket.recv_into and None not in _SYSTEM


class FastStream:
    """hiredis, fed from the socket. The socket's own timeout bounds each call."""

    __slots__ = ("_buffer", "_connection", "_feed", "_next", "_read", "_said", "send")

    def __init__(self, connection: Any, reader: Any) -> None:
        socket = socket_of(connection)
        self._connection = connection
        self._buffer = bytearray(_READ_BYTES)
        self.send = direct_send(socket)
        self._read = direct_read(socket, self._buffer)
        self._feed, self._next, self._said = reader.feed, reader.gets, reader.has_data

    def receive(self) -> Any:
        reply = self._next()
        while reply is MORE:
            size = self._read()
            if not size:
                raise ConnectionError("Connection closed by server.")
            self._feed(self._buffer, 0, size)
            reply = self._next()
        if isinstance(reply, RedisError) and not is_reply(reply):
            raise reply
        return reply

    def closed(self) -> bool:
        return self._said() or _can_read(self._connection)


class PlainStream:
    """redis-py's own parser."""

    __slots__ = ("_connection", "send")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.send = socket_of(connection).sendall

    def receive(self) -> Any:
        try:
            return self._connection.read_response(disconnect_on_error=False)
        except RedisError as error:
            if is_reply(error):
                return error.with_traceback(None)
            raise

    def closed(self) -> bool:
        return _can_read(self._connection)


def _can_read(connection: Any) -> bool:
    try:
        return bool(connection.can_read(timeout=0))
    except (RedisError, OSError):
        return True


def stream_of(connection: Any) -> Stream:
    """The stream of a connection of redis-py that was just opened, and is used in no other way from now on."""
    reader = new_reader()
    return PlainStream(connection) if reader is None else FastStream(connection, reader)
