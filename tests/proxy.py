"""A proxy between a client and a server, on loopback or a unix socket, that misbehaves as a test tells it to.

It serves one connection per pair of threads and is told on which of its connections' requests to act:
`cut_reply()` lets the next request through and closes the client's side in place of the reply.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

Connect = Callable[[], socket.socket]


def to_port(port: int) -> Connect:
    return lambda: socket.create_connection(("127.0.0.1", port), 5)


def to_socket(path: str | Path) -> Connect:
    def connect() -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(path))
        return made

    return connect


class Proxy:
    """`with Proxy(to_port(server.port)) as proxy:` and connect to `proxy.url`.

    :param unix: listen on a unix socket in a temporary folder instead of on a loopback port
    :ivar connections: how many clients have connected so far
    :ivar requests: how many chunks clients have sent so far; a pipeline of some KiB is one
    :ivar kept: how many replies were swallowed so far
    :ivar delay: seconds by which each reply is held back
    """

    def __init__(self, connect: Connect, *, unix: bool = False) -> None:
        self._connect = connect
        self.connections = self.requests = self.kept = 0
        self.delay = 0.0
        self._plans: list[tuple[bytes, str, int]] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="relay-proxy-") if unix else None
        self._refusing = self._closed = False
        if self._folder is not None:
            self._path = str(Path(self._folder.name) / "s")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self._path)
            self._listener.listen()
            self.url = f"relay+unix://{self._path}?db=0"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port: int = self._listener.getsockname()[1]
            self.url = f"relay://127.0.0.1:{self.port}/0"

    def cut_reply(self, to: bytes = b"", *, after: int = 0, times: int = 1) -> None:
        """Close in place of the reply to the next requests that hold these bytes, `after` bytes of it got through."""
        with self._lock:
            self._plans += [(to, "cut", after)] * times

    def cut_request(self, to: bytes = b"", *, times: int = 1) -> None:
        """Close on such a request; the server never sees it, which the client cannot know."""
        with self._lock:
            self._plans += [(to, "lose", 0)] * times

    def swallow_reply(self, to: bytes = b"", *, after: int = 0, times: int = 1) -> None:
        """Let such a request through and keep its reply but the first bytes, with the connection left open."""
        with self._lock:
            self._plans += [(to, "swallow", after)] * times

    @property
    def pending(self) -> int:
        """How many of the planned faults have not happened yet."""
        with self._lock:
            return len(self._plans)

    def cut_all(self) -> None:
        """Close every connection now."""
        for one in self._sockets():
            _close(one)

    def forget(self, to: bytes = b"", *, times: int = 1) -> None:
        """Let such a request through, swallow all that either side says after it, be it the end, and tell neither."""
        with self._lock:
            self._plans += [(to, "forget", 0)] * times

    def refuse(self, refusing: bool = True) -> None:
        """Close new connections as soon as they are made."""
        self._refusing = refusing

    def _sockets(self) -> list[socket.socket]:
        with self._lock:
            return list(self._open)

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        _close(self._listener)
        self.cut_all()
        if self._folder is not None:
            self._folder.cleanup()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self._refusing:
                _close(client)
                continue
            try:
                server = self._connect()
            except OSError:
                _close(client)
                continue
            pair = _Pair(client, server)
            with self._lock:
                self._open |= {client, server}
            for pump in (self._pump_requests, self._pump_replies):
                threading.Thread(target=self._until_closed, args=(pump, pair), daemon=True).start()

    def _until_closed(self, pump: Callable[[_Pair], None], pair: _Pair) -> None:
        try:
            pump(pair)
        except OSError:
            pass
        finally:
            for one in () if pair.forgotten and not self._closed else (pair.client, pair.server):
                _close(one)
                with self._lock:
                    self._open.discard(one)

    def _pump_requests(self, pair: _Pair) -> None:
        while data := pair.client.recv(1 << 20):
            if pair.forgotten:
                continue
            self.requests += 1
            fault, after = self._fault_for(data)
            if fault == "lose":
                return
            pair.forgotten = fault == "forget"
            if fault:
                pair.fault, pair.after = fault, after
            pair.server.sendall(data)

    def _pump_replies(self, pair: _Pair) -> None:
        while data := pair.server.recv(1 << 20):
            if self.delay:
                time.sleep(self.delay)
            if pair.fault == "cut":
                pair.client.sendall(data[: pair.after])
                return
            if pair.forgotten:
                continue
            swallowed = pair.fault == "swallow"
            if swallowed:
                data, pair.after = data[: pair.after], 0
            pair.client.sendall(data)
            self.kept += swallowed

    def _fault_for(self, data: bytes) -> tuple[str, int]:
        with self._lock:
            for i, (to, fault, after) in enumerate(self._plans):
                if to in data:
                    del self._plans[i]
                    return fault, after
        return "", 0


class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.fault, self.after = "", 0
        self.forgotten = False


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
