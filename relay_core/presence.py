"""A worker process in the store's roster of live workers, kept there by a thread of its own.

It sends one `beat` every BEAT seconds and one at the end, beside what its jobs need. A worker that dies without
that is forgotten ALIVE seconds after its last beat, by the server's clock.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay_core import commands
from relay_core.broker import Broker
from relay_core.errors import RelayError
from relay_core.keys import worker_keys

logger = logging.getLogger("relay.presence")

BEAT = 5.0
"""Seconds between two beats."""

ALIVE = 16.0
"""Seconds after its last beat for which a worker counts as alive: three beats, and a little for the way."""

MAX_QUEUES = 100
"""Names of queues that a worker tells; a worker of more tells these."""


@dataclass(frozen=True)
class Load:
    """What a worker does now."""

    queues: Sequence[str]
    concurrency: int
    inflight: int


def worker_name() -> str:
    """`<host>:<pid>:<random>`: names this worker in this process, fit for logs."""
    return f"{socket.gethostname()}:{os.getpid()}:{os.urandom(3).hex()}"


class Presence:
    """`start` it when the worker begins, `stop` it when all its jobs have ended.

    A beat that fails is left to the next one: a worker does not depend on being seen.

    :param face: `worker`, `celery` or `dramatiq`
    :param load: asked at each beat, on the thread of this presence
    """

    def __init__(self, broker: Broker, face: str, load: Callable[[], Load], name: str | None = None) -> None:
        self.name = name or worker_name()
        self._broker = broker
        self._face = face
        self._load = load
        self._keys = worker_keys(broker.settings.prefix)
        self._began = time.monotonic()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Beat now, and then every BEAT seconds."""
        self._thread = threading.Thread(target=self._run, name="relay-presence", daemon=True)
        self._thread.start()

    def stop(self, within: float = 2.0) -> None:
        """Sign off, if the server is there. Waits for that for `within` seconds, default 2."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            # a beat that hangs at a server that is away must not hold up the end of the process
            thread.join(timeout=within)

    def _run(self) -> None:
        while True:
            self._beat(ALIVE)
            if self._stopping.wait(BEAT):
                self._beat(0.0)
                return

    def _beat(self, alive: float) -> None:
        try:
            self._broker.store.run(self._command(alive))
        except RelayError as error:
            logger.debug("worker %s is not seen in the roster until its next beat: %s", self.name, error)
        except Exception:  # a worker's own trouble in telling its load must not end this thread
            logger.exception("worker %s is not seen in the roster until its next beat", self.name)

    def _command(self, alive: float) -> commands.Command[int]:
        load = self._load()
        says = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "face": self._face,
            "queues": list(load.queues[:MAX_QUEUES]),
            "concurrency": load.concurrency,
            "inflight": load.inflight,
        }
        age_ms = round((time.monotonic() - self._began) * 1000)
        return commands.beat(self._keys, self.name, says, age_ms=age_ms, alive_ms=round(alive * 1000))
