"""Every key of the core, with its type. Nothing else in it builds a key name.

All keys of one queue partition carry the same hash tag, so a script touches one Cluster slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from urllib.parse import unquote

from relay_core.errors import InvalidArgument

LAYOUT = 1
"""Version of this layout, stored in each queue's settings."""

LEVELS = 10
"""Priorities 0 to 9, 9 first."""

MAX_QUEUE_BYTES = 255


def encode_queue(name: str) -> str:
    """Percent-encode what could leave the hash tag: braces, the percent sign and control bytes.

    Raises InvalidArgument for an empty name, one that is not text, or one over 255 bytes of UTF-8.
    """
    if not isinstance(name, str):
        raise InvalidArgument(f"queue name must be a str, got {type(name).__name__}: {name!r}")
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"queue name {name!r} is not valid text: {error.reason}") from error
    if not raw:
        raise InvalidArgument("queue name must not be empty")
    if len(raw) > MAX_QUEUE_BYTES:
        raise InvalidArgument(
            f"queue name {name[:40]!r}... has {len(raw)} bytes, at most {MAX_QUEUE_BYTES} are allowed"
        )
    return "".join(f"%{ord(c):02X}" if c in "{}%" or ord(c) < 32 or ord(c) == 127 else c for c in name)


@dataclass(frozen=True)
class QueueKeys:
    """The keys of one partition of one queue."""

    prefix: str
    queue: str
    partition: int = 0

    def __post_init__(self) -> None:
        encode_queue(self.queue)

    def _key(self, part: str) -> bytes:
        return f"{self.prefix}:{{{encode_queue(self.queue)}:{self.partition}}}:{part}".encode()

    @cached_property
    def jobs(self) -> bytes:
        """HASH id -> record (immutable but for a nack that rewrites the payload)."""
        return self._key("j")

    @cached_property
    def payloads(self) -> bytes:
        """HASH id -> payload, of jobs whose record says that it lies apart, as large ones do."""
        return self._key("y")

    @cached_property
    def ready(self) -> tuple[bytes, ...]:
        """One LIST of ids per priority level; only levels in use exist."""
        return tuple(self._key(f"r{level}") for level in range(LEVELS))

    @cached_property
    def delayed(self) -> bytes:
        """ZSET id, score = due time, unix ms."""
        return self._key("d")

    @cached_property
    def leases(self) -> bytes:
        """ZSET id, score = lease deadline, unix ms."""
        return self._key("l")

    @cached_property
    def dead(self) -> bytes:
        """ZSET id, score = time of death, unix ms."""
        return self._key("x")

    @cached_property
    def owners(self) -> bytes:
        """HASH id -> `<deliveries>:<fence>:<nonce> <retries> <h|n|r>`; absent before the first claim."""
        return self._key("o")

    @cached_property
    def errors(self) -> bytes:
        """HASH id -> `<unix ms> <reason>\\n<error>` of the last failure; absent for jobs that never failed."""
        return self._key("e")

    @cached_property
    def dedup(self) -> bytes:
        """HASH dedup key -> job id."""
        return self._key("u")

    @cached_property
    def dedup_expiry(self) -> bytes:
        """ZSET dedup key, score = unix ms at which a timed dedup key is free again."""
        return self._key("t")

    @cached_property
    def marker(self) -> bytes:
        """ZSET with at most one member: present when a blocked worker should look."""
        return self._key("m")

    @cached_property
    def config(self) -> bytes:
        """HASH of settings: v (layout), levels, due, gate, paused, rate, burst, max_inflight, tokens, stamp."""
        return self._key("c")

    @cached_property
    def counters(self) -> bytes:
        """HASH of lifetime counters: enqueued, claimed, processed, retried, dead, reaped, ..."""
        return self._key("s")

    @cached_property
    def finished(self) -> bytes:
        """LIST of the ids that were acked last, so that a re-sent enqueue or ack is recognised."""
        return self._key("f")

    @cached_property
    def bulk(self) -> bytes:
        """HASH what a bulk command does -> how far it came; only while one runs, or after one was killed."""
        return self._key("b")

    @cached_property
    def ticks(self) -> bytes:
        """ZSET schedule, score = its last tick that came to this queue, unix ms."""
        return self._key("k")

    @cached_property
    def untold(self) -> bytes:
        """ZSET id, score = unix ms from which on anybody may tell of its burial; a half: some were told before."""
        return self._key("g")


@lru_cache(maxsize=4096)
def queue_keys(prefix: str, queue: str, partition: int = 0) -> QueueKeys:
    """The keys of a queue, built once per process. Raises InvalidArgument for a bad name."""
    return QueueKeys(prefix, queue, partition)


@dataclass(frozen=True)
class WorkerKeys:
    """The two keys of the live workers of a prefix. Their hash tag is no queue's: those have a colon."""

    prefix: str

    @cached_property
    def alive(self) -> bytes:
        """ZSET worker, score = unix ms until which it counts as alive."""
        return f"{self.prefix}:{{workers}}:w".encode()

    @cached_property
    def about(self) -> bytes:
        """HASH worker -> `<started, unix ms> <last beat, unix ms> <JSON>`."""
        return f"{self.prefix}:{{workers}}:i".encode()


@lru_cache(maxsize=64)
def worker_keys(prefix: str) -> WorkerKeys:
    """The keys of the live workers, built once per process."""
    return WorkerKeys(prefix)


@dataclass(frozen=True)
class ScheduleKeys:
    """The keys of the recurring jobs of a prefix, in one slot. Their hash tag is no queue's: those have a colon."""

    prefix: str

    @cached_property
    def plans(self) -> bytes:
        """HASH schedule -> JSON of what it enqueues, and when."""
        return f"{self.prefix}:{{schedules}}:p".encode()

    @cached_property
    def next_ticks(self) -> bytes:
        """ZSET schedule, score = its next tick, unix ms."""
        return f"{self.prefix}:{{schedules}}:n".encode()

    @cached_property
    def alarm(self) -> bytes:
        """ZSET with at most one member: present when those who run schedules should look."""
        return f"{self.prefix}:{{schedules}}:a".encode()


def registry(prefix: str) -> bytes:
    """SET of the encoded names of the queues ever enqueued to, but for deleted ones."""
    return f"{prefix}:queues".encode()


def decode_queue(encoded: str) -> str:
    """The name that `encode_queue` encoded."""
    return unquote(encoded)
