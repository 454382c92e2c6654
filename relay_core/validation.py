"""What callers may ask for. Every refusal says what, which value, and what to do; nothing was stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from relay_core.commands import NewJob
from relay_core.errors import InvalidArgument
from relay_core.job import MAX_COUNT, Job, Options, Record, new_id
from relay_core.keys import LEVELS
from relay_core.retry import MAX_DELAY, RetryPolicy

MAX_PAYLOAD = 16 * 2**20
"""Bytes, the default limit of one payload."""

_ID = re.compile(r"[!-~]{1,128}")
_MAX_DEDUP_KEY = 512
_MAX_AT = 2**33 * 30
_NOTHING = (None,) * 7


def _shown(value: Any) -> str:
    """The start of its repr; an int of thousands of digits, or a broken repr, is named by its type."""
    try:
        return repr(value)[:80]
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


def _finite(value: Any) -> bool:
    """True for an int or float, no bool, that is neither NaN nor infinite; ints of any size are compared exactly."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def seconds(name: str, value: Any, *, least: float = 0.0, most: float = MAX_DELAY) -> float:
    """A finite number of seconds within bounds."""
    if not _finite(value):
        raise InvalidArgument(f"{name} must be a finite number of seconds, got {_shown(value)}")
    if not least <= value <= most:
        raise InvalidArgument(f"{name} must be between {least:g} and {most:g} seconds, got {_shown(value)}")
    return float(value)


def whole(name: str, value: Any, *, least: int, most: int) -> int:
    """An int within bounds; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidArgument(f"{name} must be a whole number from {least} to {most}, got {_shown(value)}")
    return value


def _storable(text: Any, most: int) -> bool:
    """True for a str of 1 to `most` bytes of UTF-8; one with half a surrogate pair has none."""
    try:
        return isinstance(text, str) and 0 < len(text.encode()) <= most
    except UnicodeEncodeError:
        return False


def job_ids(ids: Any) -> Sequence[str]:
    """Ids of jobs, in a list."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InvalidArgument(f"ids must be a list of job ids, got {_shown(ids)}; write [id] for one")
    found: list[str] = list(ids)
    for id in found:
        if not isinstance(id, str):
            raise InvalidArgument(f"a job's id is a text, got {_shown(id)}")
    return found


def check_job(move: str, job: Any) -> None:
    """Refuse what is no claimed job."""
    if not isinstance(job, Job):
        raise InvalidArgument(f"{move} takes the Job that claim gave, got {_shown(job)}")


def check_jobs(move: str, jobs: Any) -> None:
    """Refuse what is no list of claimed jobs."""
    if isinstance(jobs, str) or not isinstance(jobs, Sequence):
        raise InvalidArgument(f"{move} takes the Jobs that claim gave, got {_shown(jobs)}")
    for job in jobs:
        check_job(move, job)


def payload_bytes(payload: Any) -> bytes:
    """The payload as bytes."""
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, (bytearray, memoryview)):
        return bytes(payload)
    raise InvalidArgument(
        f"payload must be bytes, got {type(payload).__name__}: {_shown(payload)}; "
        "encode it first, e.g. json.dumps(x).encode()"
    )


def payload_size(payload: bytes, limit: int) -> None:
    """Refuse a payload over the broker's limit."""
    if len(payload) > limit:
        raise InvalidArgument(
            f"payload has {len(payload)} bytes, at most {limit} are allowed; keep large data elsewhere and send "
            "its address, or raise max_payload"
        )


def _headers(headers: Any) -> None:
    """Refuse what is no mapping of texts to texts."""
    if not isinstance(headers, Mapping):
        raise InvalidArgument(f"headers must map str to str, got {_shown(headers)}")
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidArgument(f"headers must map str to str, got {_shown(name)}: {_shown(value)}")


def _checked_id(id: Any) -> str:
    """The id, or a fresh one for None."""
    if id is None:
        return new_id()
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise InvalidArgument(f"id must be 1 to 128 printable ASCII characters without spaces, got {_shown(id)}")
    return id


@lru_cache(maxsize=256)
def _plain_head(priority: int, *headers: tuple[str, str]) -> bytes:
    """What stands before the payload of a job that asks for nothing but these, checked."""
    whole("priority", priority, least=0, most=LEVELS - 1)
    _headers(dict(headers))
    return Record.pack(priority, Options(headers=dict(headers)), b"")


def plain_job(payload: bytes, id: str | None, priority: int, headers: Mapping[str, str] | None) -> NewJob | None:
    """A job that asks for nothing else, as most do. None when its headers are more than the one that an adapter knows
    its jobs by."""
    if type(priority) is not int:
        return None
    if headers is None:
        head = _plain_head(priority)
    elif type(headers) is dict and len(headers) == 1:
        (mark,) = headers.items()
        if type(mark[1]) is not str:
            return None
        head = _plain_head(priority, mark)
    else:
        return None
    return NewJob(_checked_id(id), "", "", head + payload)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job to enqueue. All but the payload is optional.

    :ivar id: yours, 1 to 128 printable ASCII characters, so that a repeated enqueue stores one job
    :ivar delay: seconds until it is ready
    :ivar at: unix seconds at which it is ready, by the server's clock; not together with `delay`
    :ivar priority: 0 to 9, 9 first. Default 0
    :ivar max_retries: failures after which it goes to dead. Default: the retry policy's
    :ivar max_deliveries: deliveries without an answer (its worker died) after which it goes to dead.
        Default: the broker's
    :ivar dedup_key: while a job of this key is in the queue, another is not stored
    :ivar dedup_for: seconds for which the key is taken, whether the job is done or not. Default: until it is done
    :ivar headers: small texts that travel with it
    :ivar retry: a policy of its own
    """

    payload: bytes
    id: str | None = None
    delay: float | None = None
    at: float | None = None
    priority: int = 0
    max_retries: int | None = None
    max_deliveries: int | None = None
    dedup_key: str | None = None
    dedup_for: float | None = None
    headers: Mapping[str, str] | None = None
    retry: RetryPolicy | None = None

    def _asked(self) -> tuple[object, ...]:
        return (
            self.max_retries, self.max_deliveries, self.dedup_key, self.dedup_for, self.retry, self.delay, self.at,
        )  # fmt: skip

    def due(self) -> str:
        """The due time as the enqueue script takes it."""
        if self.delay is not None and self.at is not None:
            raise InvalidArgument(f"give delay ({self.delay!r}) or at ({self.at!r}), not both")
        if self.at is not None:
            if not _finite(self.at) or not 0 <= self.at < _MAX_AT:
                raise InvalidArgument(f"at must be unix seconds from 0 to {_MAX_AT}, got {_shown(self.at)}")
            return f"@{round(self.at * 1000)}"
        ms = round(seconds("delay", self.delay) * 1000) if self.delay is not None else 0
        return f"+{ms}" if ms else ""

    def options(self) -> Options:
        """What goes into the record beside the payload, checked."""
        due = self.due()
        if self.max_retries is not None:
            whole("max_retries", self.max_retries, least=0, most=MAX_COUNT)
        if self.max_deliveries is not None:
            whole("max_deliveries", self.max_deliveries, least=1, most=MAX_COUNT)
        if self.dedup_key is not None and not _storable(self.dedup_key, _MAX_DEDUP_KEY):
            raise InvalidArgument(
                f"dedup_key must be a text of 1 to {_MAX_DEDUP_KEY} bytes, got {_shown(self.dedup_key)}"
            )
        dedup_ms = None
        if self.dedup_for is not None:
            if self.dedup_key is None:
                raise InvalidArgument(f"dedup_for ({self.dedup_for!r}) needs a dedup_key")
            dedup_ms = math.ceil(seconds("dedup_for", self.dedup_for, least=0.001) * 1000)
        if self.headers is not None:
            _headers(self.headers)
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise InvalidArgument(f"retry must be a RetryPolicy, got {_shown(self.retry)}")
        return Options(
            max_retries=self.max_retries,
            max_deliveries=self.max_deliveries,
            dedup_key=self.dedup_key,
            dedup_ms=dedup_ms,
            headers=self.headers or {},
            retry=self.retry.to_dict() if self.retry else None,
            delay_ms=int(due[1:]) if due[:1] == "+" else None,
            at_ms=int(due[1:]) if due[:1] == "@" else None,
        )

    def stored(self, payload: bytes) -> NewJob:
        """The job as the enqueue script takes it, with the payload as it goes into the store."""
        if self._asked() == _NOTHING:
            plain = plain_job(payload, self.id, self.priority, self.headers)
            if plain is not None:
                return plain
        id = _checked_id(self.id)
        whole("priority", self.priority, least=0, most=LEVELS - 1)
        options = self.options()
        record = Record.pack(self.priority, options, payload)
        dedup = f"{options.dedup_ms or 0}:{options.dedup_key}" if options.dedup_key else ""
        return NewJob(id, self.due(), dedup, record)
