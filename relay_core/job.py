"""What a job is, seen from Python: plain frozen values, no behaviour that touches the store."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from relay_core.errors import InvalidRecord
from relay_core.retry import RetryPolicy

State = Literal["ready", "delayed", "inflight", "dead"]
STATES: tuple[State, ...] = ("ready", "delayed", "inflight", "dead")
ArrivalState = Literal["ready", "delayed", "dead"]

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: sorts as it counts
_DIGIT_OF_BYTE = bytes(ord(_ALPHABET[byte & 31]) for byte in range(256))
_SHIFTS = range(45, -1, -5)


class FreshId(str):
    """An id that was made for one job alone: no other enqueue can have named it before, so none looks whether it is
    taken. Where it is all the same, the enqueue answers as a duplicate, and a delayed job of that id may run early."""

    __slots__ = ()


def new_id() -> str:
    """A fresh job id: 22 characters, ordered by the millisecond in which it was made.

    50 bits of time and 60 random bits from the operating system, so children of a fork never share one.
    """
    return _time_digits(time.time_ns() // 1_000_000) + os.urandom(12).translate(_DIGIT_OF_BYTE).decode()


@lru_cache(maxsize=1)
def _time_digits(ms: int) -> str:
    return "".join([_ALPHABET[ms >> shift & 31] for shift in _SHIFTS])


class Receipt(NamedTuple):
    """What a worker shows to move a job that it holds."""

    queue: str
    id: str
    token: str


class Enqueued(NamedTuple):
    """The answer to an enqueue.

    :ivar id: id of the stored job; for a duplicate, the id of the job that is already there
    :ivar duplicate: True when nothing was stored because that id or dedup key was taken
    """

    id: str
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What travels with a job beside its payload. Unset fields cost no bytes in the store.

    :ivar apart: True of a job whose payload lies beside its record, as a large one does; the store's own business
    :ivar delay_ms: what the enqueue asked for, so that waiting for its time is told from waiting for a worker
    :ivar at_ms: the same for a job that is due at a unix time
    """

    apart: bool | None = None
    max_retries: int | None = None
    max_deliveries: int | None = None
    dedup_key: str | None = None
    dedup_ms: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    retry: Mapping[str, float] | None = None
    delay_ms: int | None = None
    at_ms: int | None = None

    def to_json(self) -> str:
        """Compact JSON of the set fields, or an empty string when none is set."""
        if self is NO_OPTIONS:
            return ""
        others = (
            self.apart, self.max_retries, self.max_deliveries, self.dedup_key, self.dedup_ms, self.retry, self.delay_ms,
            self.at_ms,
        )  # fmt: skip
        if others == _UNSET and len(self.headers) == 1:
            return _one_header(*self.headers.items())  # as an adapter's jobs, with their mark
        pairs = {name: getattr(self, name) for name in self.__slots__}
        kept = {k: dict(v) if isinstance(v, Mapping) else v for k, v in pairs.items() if v not in (None, {})}
        return _to_json(kept) if kept else ""

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Raises ValueError for a field that does not mean anything, so that whoever reads one later need not look.

        Unknown fields are ignored, so that a job written by a newer minor release still runs.
        """
        if not text:
            return NO_OPTIONS
        own: dict[str, Any] = {k: dict(v) if type(v) is dict else v for k, v in _fields(text).items()}
        return cls(**own)


_to_json = json.JSONEncoder(separators=(",", ":")).encode  # made once: json.dumps would make one per call
_UNSET = (None,) * 8


@lru_cache(maxsize=64)
def _one_header(header: tuple[str, str]) -> str:
    return _to_json({"headers": dict([header])})


MAX_COUNT = 10**6
"""The most retries, and the most deliveries, that a job may ask for."""

MAX_MS = 2**53
"""What a script can still count in milliseconds: its numbers are doubles."""


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_text(value: Any) -> bool:
    """A str that goes over the wire: one with half a surrogate pair does not, and no enqueue stores it."""
    try:
        return type(value) is str and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_headers(value: Any) -> bool:
    return type(value) is dict and all(type(text) is str for text in value.values())


def _is_policy(value: Any) -> bool:
    if type(value) is not dict:
        return False
    RetryPolicy.from_dict(value)  # says itself what is wrong
    return True


_OPTION_CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "apart": ("true", lambda value: value is True),
    "max_retries": (f"a whole number from 0 to {MAX_COUNT}", lambda value: _whole(value, 0, MAX_COUNT)),
    "max_deliveries": (f"a whole number from 0 to {MAX_COUNT}", lambda value: _whole(value, 0, MAX_COUNT)),
    "dedup_key": ("a text", _is_text),
    "dedup_ms": ("milliseconds", lambda value: _whole(value, 0, MAX_MS)),
    "headers": ("texts by their names", _is_headers),
    "retry": ("a retry policy", _is_policy),
    "delay_ms": ("milliseconds", lambda value: _whole(value, 0, MAX_MS)),
    "at_ms": ("milliseconds", lambda value: _whole(value, 0, MAX_MS)),
}

NO_OPTIONS = Options()


@lru_cache(maxsize=256)
def _fields(text: str) -> dict[str, Any]:
    """Those of most jobs are the same few: an adapter's mark, and nothing else. So they are checked once."""
    found = json.loads(text)
    if type(found) is not dict:
        raise ValueError(f"options are a {type(found).__name__}")
    known = {name: value for name, value in found.items() if name in _OPTION_CHECKS}
    for name, value in known.items():
        wanted, is_fine = _OPTION_CHECKS[name]
        if not is_fine(value):
            raise ValueError(f"option {name} must be {wanted}, got {_to_json(value)[:80]}")
    return known


_APART = b'{"apart":true'
"""How the options of a record begin whose payload lies apart from it. First there, so that no header reads like it."""

_LIES_APART = re.compile(rb"[0-9]+ [0-9] [0-9]+ " + re.escape(_APART)).match
"""As the scripts tell it. A payload alone, behind no options, may begin like them."""

_HEAD = re.compile(r"([0-9]) ([0-9]{1,7}) (.*)", re.DOTALL)
"""As the scripts read it, which know one digit for the level."""


@lru_cache(maxsize=256)
def _head(raw: bytes) -> tuple[int, str]:
    """Level and options of a record's first line without its time: those of most jobs are the same few, too."""
    found = _HEAD.fullmatch(raw.decode("ascii"))
    if found is None:
        raise ValueError("its first line is not `<created ms> <priority 0..9> <max deliveries> <options>`")
    level, max_deliveries, options = found.groups()
    if int(max_deliveries) > MAX_COUNT:
        raise ValueError(f"max deliveries must be at most {MAX_COUNT}, got {max_deliveries}")
    return int(level), options


@dataclass(frozen=True, slots=True)
class Record:
    """One decoded value of the `j` hash: `<created ms> <priority> <max deliveries> <options>\\n<payload>`."""

    created_ms: int
    priority: int
    options: Options
    payload: bytes

    @staticmethod
    def pack(priority: int, options: Options, payload: bytes) -> bytes:
        """The client's part of a record; the enqueue script puts the server's time in front."""
        head = f"{priority} {options.max_deliveries or 0} {options.to_json()}\n"
        return head.encode("ascii") + payload

    @staticmethod
    def split(packed: bytes) -> tuple[bytes, bytes]:
        """What `pack` made, as a record that says that its payload lies apart, and the payload."""
        head, _, payload = packed.partition(b"\n")
        level, max_deliveries, options = head.split(b" ", 2)
        return b"%b %b %b%b\n" % (level, max_deliveries, _APART, b"," + options[1:] if options else b"}"), payload

    @staticmethod
    def lies_apart(record: bytes) -> bool:
        """Whether the payload of a record is not in it, by its first bytes, as the scripts tell it."""
        return _LIES_APART(record) is not None

    @classmethod
    def unpack(cls, raw: bytes) -> Record:
        """Raises InvalidRecord, naming what does not decode."""
        try:
            head, newline, payload = raw.partition(b"\n")
            if not newline:
                raise ValueError("no line break after the header")
            created, _, rest = head.partition(b" ")
            if not created.isdigit() or len(created) > 16:
                raise ValueError(f"created at {created[:40]!r}, which are no milliseconds")
            level, text = _head(rest)
            options = Options.from_json(text)
            if options.apart and not payload:
                raise ValueError("its payload, which lay apart from it, is gone")
            return cls(int(created), level, options, payload)
        except (ValueError, RecursionError) as error:
            raise InvalidRecord(f"record of {len(raw)} bytes does not decode: {error}") from error


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed job. Hand it back with `ack`, `nack`, `extend` or `release`.

    :ivar id: chosen by the client that enqueued it
    :ivar payload: the bytes that were enqueued, after the plugins' decoding
    :ivar created_at: server time of the enqueue, unix seconds
    :ivar claimed_at: server time of this claim, unix seconds
    :ivar deliveries: how often the job was claimed, this claim included; a release does not count
    :ivar retries: how often it failed and was retried
    :ivar token: proof of this claim, `<delivery>:<fence>:<nonce>`
    :ivar fence: grows with every claim of the queue; pass it to what the job writes to, to fence out late writers
    :ivar expires_at: this process's monotonic clock at which the lease ends unless it is extended
    """

    id: str
    queue: str
    payload: bytes
    created_at: float
    claimed_at: float
    priority: int
    deliveries: int
    retries: int
    token: str
    expires_at: float
    claimed_monotonic: float
    options: Options = NO_OPTIONS

    @property
    def receipt(self) -> Receipt:
        return Receipt(self.queue, self.id, self.token)

    @property
    def headers(self) -> Mapping[str, str]:
        return self.options.headers

    @property
    def fence(self) -> int:
        return int(self.token.split(":", 2)[1])

    @property
    def ready_at(self) -> float:
        """When it was first ready to be claimed: its creation, or when it was due. Unix seconds of the server."""
        options = self.options
        due = self.created_at + (options.delay_ms or 0) / 1000
        return due if options.at_ms is None else max(due, options.at_ms / 1000)

    def age(self) -> float:
        """Seconds since the enqueue, by the server's clock and this process's monotonic one."""
        return max(0.0, self.claimed_at - self.created_at + time.monotonic() - self.claimed_monotonic)


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as it lies in the store, for people and tools. Times are unix seconds of the server.

    :ivar state: None when the id is in no state, which only the auditor ever sees
    :ivar due_at: when a delayed job becomes ready; when the lease of an inflight job ends
    :ivar reason: why a dead job died: `max_retries`, `max_deliveries`, `rejected`, `undecodable`, ...
    :ivar error: what the last failed delivery reported, at most 4 KiB
    :ivar token: of the last claim, `<delivery>:<fence>:<nonce>`; None before the first
    :ivar held: True while the job is leased to the claim of that token
    """

    id: str
    queue: str
    state: State | None
    payload: bytes
    created_at: float | None
    priority: int | None
    deliveries: int = 0
    retries: int = 0
    due_at: float | None = None
    reason: str | None = None
    error: str | None = None
    failed_at: float | None = None
    options: Options = NO_OPTIONS
    token: str | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job of another system on its way into relay.

    :ivar id: 1 to 128 printable ASCII characters, the same whenever the job is read again, so that it is stored once
    :ivar other_id: taken instead when `id` belongs to a job with another payload or headers; empty: not stored then
    :ivar payload: as relay's own adapter would have enqueued it
    :ivar at: unix seconds at which a delayed one is due (past: ready at once) or a dead one died
    :ivar created_at: unix seconds; None for now
    :ivar priority: 0 to 9, 9 first
    :ivar headers: small texts that travel with it
    :ivar reason: why a dead one died, one word
    :ivar error: what a dead one failed of
    """

    queue: str
    id: str
    payload: bytes
    state: ArrivalState = "ready"
    at: float = 0.0
    created_at: float | None = None
    priority: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str = "failed"
    error: str = ""
    other_id: str = ""


class Claimed(list[Job]):
    """The jobs of one claim; empty when there was nothing, or when `limited` says why not.

    :ivar limited: None, or what held work back: `paused`, `rate` or `max_inflight`
    :ivar retry_after: seconds after which asking again makes sense, or None when only a wake-up will tell
    """

    __slots__ = ("limited", "retry_after")

    def __init__(self, jobs: Sequence[Job] = (), limited: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(jobs)
        self.limited = limited
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What a framework says a job is, for people and metrics, read without unpickling anything."""

    name: str
    args: str = ""
    kwargs: str = ""
    retries: int | None = None
    eta: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
