"""Connections of redis-py, made as relay needs them: no retries of their own, no decoding, RESP2."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

import redis.asyncio.connection as aio
from redis import connection as blocking
from redis.asyncio.retry import Retry as AioRetry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from relay_core.commands.command import Arg, Same
from relay_core.connection import forks
from relay_core.connection.steps import Address
from relay_core.errors import InvalidArgument
from relay_core.settings import Credentials, StoreSettings, StoreUrl

Role = Literal["store", "sentinel", "bell"]

# Two more round trips at each connect, for a name that nobody asked for.
_NO_DRIVER_NAME: dict[str, None] = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(blocking.AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)
_BLOCK_BYTES = 1 << 18
SENTINEL_PATIENCE = 1.0
"""Seconds that a sentinel may take to let connect, and to answer from its memory. One that is silent is gone with its
machine, often the primary's too, and there are others to ask: what waits for the answer has leases to extend."""

# Asked after 30 s of silence, three times: so the system finds out that the network has forgotten a connection. Not
# every system has them all; TCP_KEEPALIVE is what macOS calls the first.
_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_KEEPALIVE = {getattr(socket, name): value for name, value in _ALIVE.items() if hasattr(socket, name)}


def _pack(args: tuple[Any, ...]) -> bytes:
    """One command as it goes over the wire. Raises TypeError for what is neither text, bytes nor number."""
    words = [b"*%d\r\n" % len(args)]
    for arg in args:
        if isinstance(arg, bytes):
            word = arg
        elif isinstance(arg, (str, int, float)):
            word = str(arg).encode()
        else:
            raise TypeError(f"a {type(arg).__name__}")
        words.append(b"$%d\r\n%b\r\n" % (len(word), word))
    return b"".join(words)


_NUMBERS = (int, float)

pack: Callable[[tuple[Any, ...]], bytes] = _pack
with suppress(ImportError):
    from hiredis import pack_command

    def _pack_fast(args: tuple[Any, ...]) -> bytes:
        # hiredis writes numbers by what runs handlers of signals, and crashes the process when one of them raises
        words: Any = tuple([str(arg) if type(arg) in _NUMBERS else arg for arg in args])
        packed: bytes = pack_command(words)
        return packed

    pack = _pack_fast


def pack_all(wires: Iterable[tuple[Arg, ...]]) -> list[bytes]:
    """Many commands, joined into blocks so that each send has work worth its timeout, and large ones alone."""
    blocks: list[bytes] = []
    small: list[bytes] = []
    size = 0
    for wire in wires:
        packed = _pack_once(wire) if type(wire) is Same else checked_pack(wire)
        small.append(packed)
        size += len(packed)
        if size >= _BLOCK_BYTES:
            blocks.append(b"".join(small))
            small, size = [], 0
    if small:
        blocks.append(b"".join(small))
    return blocks


@lru_cache(maxsize=1024)
def _pack_once(wire: Same) -> bytes:
    return pack(wire)


def checked_pack(wire: tuple[Arg, ...]) -> bytes:
    """One packed command. Raises InvalidArgument for an argument of a type that cannot be sent."""
    try:
        try:
            return pack(wire)
        except UnicodeEncodeError:
            # an id that somebody wrote into the store by hand goes back as the bytes that it was read from
            return pack(tuple(arg.encode(errors="surrogateescape") if isinstance(arg, str) else arg for arg in wire))
    except (TypeError, UnicodeEncodeError) as error:
        raise InvalidArgument(f"command {wire[0]!r} has an argument that cannot be sent: {error}") from error


class _Credentials(CredentialProvider):
    """Calls the user's function at each connect. What it raises may hold a secret, so only the type is told."""

    def __init__(self, provide: Callable[[], Credentials]) -> None:
        self._provide = provide

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            user, password = self._provide()
        except Exception as error:
            raise AuthenticationError(f"credential_provider raised {type(error).__name__}") from error
        return (user, password) if user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def check(url: StoreUrl, settings: StoreSettings) -> None:
    """Raise InvalidArgument for a store that cannot be opened, before anything is done."""
    if url.topology == "embedded":
        raise InvalidArgument(f"{url.safe()}: start the embedded server, then use the URL of its socket")
    if url.tls:
        connection(url, settings, Address(*url.hosts[0]), "store")


def connection(url: StoreUrl, settings: StoreSettings, address: Address, role: Role) -> Any:
    """A blocking connection, not yet open. Those of a bell read without limit once they are armed."""
    return _make(url, settings, address, role, blocking, Retry(NoBackoff(), 0))


def aio_connection(url: StoreUrl, settings: StoreSettings, address: Address, role: Role) -> Any:
    """The same for asyncio."""
    return _make(url, settings, address, role, aio, AioRetry(NoBackoff(), 0))


def socket_of(connection: Any) -> Any:
    """The socket of an open blocking connection. redis-py has no public name for it; kombu reads the same attribute."""
    return connection._sock


def transport_of(connection: Any) -> Any:
    """The transport of an open asyncio connection, for which redis-py has no public name either."""
    return connection._writer.transport


def let_go(connection: Any) -> None:
    """In a child of fork: release the child's copy of an asyncio connection's socket."""
    writer = getattr(connection, "_writer", None)  # redis-py has no public name for the socket
    descriptor = -1 if writer is None else writer.get_extra_info("socket").fileno()
    if descriptor >= 0:
        forks.let_go(descriptor)


def _make(url: StoreUrl, settings: StoreSettings, address: Address, role: Role, module: Any, retry: Any) -> Any:
    options: dict[str, Any] = {
        "socket_timeout": settings.socket_timeout,
        "socket_connect_timeout": settings.connect_timeout,
        "client_name": settings.client_name,
        "protocol": 2,
        "retry": retry,
        **_NO_DRIVER_NAME,
    }
    if role == "sentinel":
        # without the name, which no one is to see there and which takes a right of its own
        options |= {"username": url.sentinel_username, "password": url.sentinel_password, "client_name": None}
        for name in ("socket_timeout", "socket_connect_timeout"):
            options[name] = min(options[name], SENTINEL_PATIENCE)
    else:
        options["db"] = url.db
        if settings.credential_provider is not None:
            options["credential_provider"] = _Credentials(settings.credential_provider)
        else:
            options |= {"username": url.username, "password": url.password}
        if settings.durability != "none":
            options["socket_timeout"] += settings.durability_timeout
    if not address.port:
        return module.UnixDomainSocketConnection(path=address.host, **options)
    options |= {"host": address.host, "port": address.port}
    options |= {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    if not url.tls:
        return module.Connection(**options)
    tls = dict(url.ssl) | dict(settings.ssl)
    try:
        return module.SSLConnection(**options, **tls)
    except (TypeError, RedisError) as error:
        raise InvalidArgument(f"the ssl_ options {', '.join(tls)} cannot be used: {error}") from error
