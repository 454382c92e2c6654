"""Who works: what worker processes tell the store of themselves, and who reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay_core import scripts
from relay_core.commands.command import Command
from relay_core.keys import WorkerKeys

MAX_WORKERS = 10_000
"""Most workers that the store keeps; beyond them the longest silent are forgotten."""

PAGE = 500


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A live worker process as it told of itself at its last beat. Times are unix seconds of the server.

    :ivar name: `<host>:<pid>:<random>`, the same as in the hooks
    :ivar face: `worker` (direct use), `celery` or `dramatiq`
    :ivar concurrency: handlers that may run at a time; 0 when that is not known
    :ivar inflight: leases that it held, prefetched jobs included
    :ivar now: when this was asked
    """

    name: str
    host: str
    pid: int
    face: str
    queues: tuple[str, ...]
    concurrency: int
    inflight: int
    started_at: float
    beat_at: float
    now: float

    @property
    def silence(self) -> float:
        """Seconds since the last beat."""
        return max(0.0, self.now - self.beat_at)


def beat(w: WorkerKeys, name: str, says: Mapping[str, Any], *, age_ms: int, alive_ms: int) -> Command[int]:
    """A worker lives: how many are kept.

    :param says: host, pid, face, queues, concurrency, inflight
    :param age_ms: since its start
    :param alive_ms: for which it counts as alive from now; 0 signs it off
    """
    args = (name, alive_ms, age_ms, json.dumps(says, separators=(",", ":")), MAX_WORKERS)
    return Command(scripts.load("beat"), (w.alive, w.about), args, lambda reply, _resent: int(reply))


def roster(
    w: WorkerKeys, after_ms: int = 0, limit: int = PAGE
) -> Command[tuple[list[tuple[str, WorkerInfo | None]], int]]:
    """A page of (name, what it said; None where that cannot be read, being of a newer release perhaps), the
    longest silent first, and where the next page begins: with the last of this one, once more.
    """

    def parse(reply: Sequence[Any], _resent: bool) -> tuple[list[tuple[str, WorkerInfo | None]], int]:
        names = [name.decode() for name in reply[2::2]]
        return [(name, _read(name, said, reply[0])) for name, said in zip(names, reply[3::2], strict=True)], reply[1]

    return Command(scripts.load("roster"), (w.alive, w.about), (after_ms, limit), parse)


def _read(name: str, said: bytes, now_ms: int) -> WorkerInfo | None:
    try:
        started, beat, text = said.decode().split(" ", 2)
        says = json.loads(text)
        return WorkerInfo(
            name=name,
            host=str(says["host"]),
            pid=int(says["pid"]),
            face=str(says["face"]),
            queues=tuple(str(queue) for queue in says["queues"]),
            concurrency=int(says["concurrency"]),
            inflight=int(says["inflight"]),
            started_at=int(started) / 1000,
            beat_at=int(beat) / 1000,
            now=now_ms / 1000,
        )
    except (ValueError, KeyError, TypeError):
        return None
