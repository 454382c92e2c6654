"""The servers that benchmarks run on, without the test suite: a private one on a unix socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from tests.servers import Flavour, Server

FLAVOURS: tuple[Flavour, ...] = ("redis", "valkey")


@contextmanager
def private(flavour: Flavour) -> Iterator[Server]:
    """A server of its own, gone afterwards; nothing is written to disk."""
    with Server(flavour) as server:
        yield server


def cpu_seconds(client: redis.Redis) -> float:
    """Processor time that the server used so far, its system calls included."""
    info = client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])
