"""A consumer in a process of its own, to be stopped, continued and killed.

The processes are forked by multiprocessing's fork server, which has imported the frameworks once and runs no
threads: a new one costs milliseconds, and shares no connection and no lock with the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

from tests.faces.face import Face, Terms

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faces"])


def _serve(orders: Connection, face: type[Face], url: str, terms: Terms) -> None:
    taker = face(url, terms).taker()
    verbs: dict[str, Any] = {"take": lambda: taker.take(30.0), "ack": taker.ack}
    while True:
        try:
            verb = orders.recv()
        except EOFError:  # the tests are gone
            os._exit(0)
        orders.send(verbs[verb]())


class Elsewhere:
    """Another process's consumer of a face."""

    def __init__(self, face: Face) -> None:
        self._orders, theirs = _context.Pipe()
        self._process = _context.Process(
            target=_serve, args=(theirs, type(face), face.url, face.terms), daemon=True, name=f"{face.name} elsewhere"
        )
        self._process.start()
        theirs.close()

    def _ask(self, verb: str) -> Any:
        self._orders.send(verb)
        assert self._orders.poll(60), f"no answer to {verb!r}"
        return self._orders.recv()

    def take(self) -> str | None:
        """Take one job, waiting for it: its body."""
        body: str | None = self._ask("take")
        return body

    def ack(self) -> str:
        """Ack what was taken: what the face told of it."""
        told: str = self._ask("ack")
        return told

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def sleep(self) -> None:
        """Stop it, heartbeats and all, as a machine does that is suspended or swaps."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join(30)

    def close(self) -> None:
        if self._process.is_alive():
            self.kill()
        self._orders.close()
