"""What a schedule is: which job it enqueues, when, and what becomes of the ticks that were missed."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from relay_core.errors import InvalidArgument, InvalidRecord
from relay_core.schedule.cron import Cron, zone
from relay_core.validation import JobSpec, payload_bytes, payload_size, seconds, whole

Missed = Literal["skip", "once", "all"]

MAX_PAYLOAD = 65_536
"""Bytes of a plan's payload, after the plugins' encoding."""

MAX_CATCH_UP = 1000

LATE = 60.0
"""Seconds after which a tick counts as missed under `skip`."""

_NAME = re.compile(r"[!-~]{1,96}")
_VERSION = 1
_SPANS = (60, 600, 7200, 86_400, 14 * 86_400, 366 * 86_400)


@dataclass(frozen=True)
class Schedule:
    """A recurring job.

    :ivar name: yours, 1 to 96 printable ASCII characters without spaces; a job's id is `<name>@<unix ms of its tick>`
    :ivar queue: where its jobs go
    :ivar payload: at most 64 KiB
    :ivar cron: `0 3 * * *`, in the time zone `tz`; or else
    :ivar every: seconds between two ticks, from 0.1 on; the first is one interval after the schedule was stored
    :ivar tz: IANA name of a time zone. Default UTC
    :ivar missed: of the ticks that came while nobody ran schedules, `once` enqueues the last one, `skip` none that is
        over 60 s late, `all` each, at most the last `catch_up`. Default `once`
    :ivar catch_up: 1 to 1000. Default 100
    :ivar overlap: False: a tick is passed over while the job of an earlier one is not over. Default True
    """

    name: str
    queue: str
    payload: bytes = b""
    cron: str | None = None
    every: float | None = None
    tz: str = "UTC"
    missed: Missed = "once"
    catch_up: int = 100
    overlap: bool = True
    priority: int = 0
    max_retries: int | None = None
    max_deliveries: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidArgument(
                f"a schedule's name must be 1 to 96 printable ASCII characters without spaces, got {self.name!r}"
            )
        if (self.cron is None) == (self.every is None):
            raise InvalidArgument(f"schedule {self.name!r}: give either a cron expression or an interval")
        if self.every is not None:
            seconds("every", self.every, least=0.1)
            zone(self.tz)
        if self.missed not in get_args(Missed):
            raise InvalidArgument(f"missed must be one of {', '.join(get_args(Missed))}, got {self.missed!r}")
        whole("catch_up", self.catch_up, least=1, most=MAX_CATCH_UP)
        if not isinstance(self.overlap, bool):
            raise InvalidArgument(f"overlap must be True or False, got {self.overlap!r}")
        payload_size(payload_bytes(self.payload), MAX_PAYLOAD)
        if not isinstance(self.headers, Mapping):
            raise InvalidArgument(f"headers must map str to str, got {self.headers!r}")
        self.job(0).stored(b"")
        if self.cron is not None:
            _ = self._ticks  # raises for an expression that cannot be used

    @cached_property
    def _ticks(self) -> Cron:
        return Cron(self.cron or "", self.tz)

    @property
    def dedup_key(self) -> str | None:
        """What the jobs of a schedule without overlap hold until they are done."""
        return None if self.overlap else f"schedule:{self.name}"

    def job(self, tick_ms: int) -> JobSpec:
        """The job of a tick."""
        return JobSpec(
            self.payload,
            id=f"{self.name}@{tick_ms}",
            priority=self.priority,
            max_retries=self.max_retries,
            max_deliveries=self.max_deliveries,
            dedup_key=self.dedup_key,
            headers=dict(self.headers),
        )

    def after(self, ms: int, anchor_ms: int) -> int:
        """The first tick after a moment. All are unix ms.

        :param anchor_ms: when the schedule was stored; from there intervals are counted
        """
        if self.every is None:
            return self._ticks.after(ms)
        step = max(1, round(self.every * 1000))
        return anchor_ms + (math.floor((ms - anchor_ms) / step) + 1) * step

    def last_ticks(self, count: int, first_ms: int, now_ms: int, anchor_ms: int) -> list[int]:
        """The last `count` ticks from `first_ms`, which is one, up to now, the oldest first."""
        found: list[int] = []
        for span in (*_SPANS, math.inf):
            start = max(first_ms - 1, now_ms - span * 1000)
            found = []
            tick = self.after(int(start), anchor_ms)
            while tick <= now_ms:
                found.append(tick)
                tick = self.after(tick, anchor_ms)
            if len(found) >= count or start == first_ms - 1:
                break
        return found[-count:]

    def to_enqueue(self, first_ms: int, now_ms: int, anchor_ms: int) -> list[int]:
        """Which of the ticks from `first_ms` up to now get a job, by the policy for missed ones."""
        ticks = self.last_ticks(self.catch_up if self.missed == "all" else 1, first_ms, now_ms, anchor_ms)
        return [tick for tick in ticks if self.missed != "skip" or now_ms - tick <= LATE * 1000]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A schedule as it is stored.

    :ivar next_at: unix seconds of its next tick, by the server's clock; None for one that was removed meanwhile
    """

    schedule: Schedule
    next_at: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is stored of a schedule: its payload is encoded by the plugins, its queue is the one they route it to.

    :ivar anchor_ms: unix ms of the server at which it was stored
    """

    schedule: Schedule
    anchor_ms: int

    def pack(self) -> bytes:
        """JSON of what is not left at its default."""
        kept: dict[str, Any] = {"v": _VERSION, "anchor_ms": self.anchor_ms}
        for name, one in Schedule.__dataclass_fields__.items():
            value = getattr(self.schedule, name)
            if name == "payload":
                kept[name] = base64.b64encode(value).decode()
            elif name in ("name", "queue") or value not in (one.default, {}):
                kept[name] = dict(value) if isinstance(value, Mapping) else value
        return json.dumps(kept, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def unpack(cls, raw: bytes) -> Plan:
        """Raises InvalidRecord, for one of a newer release perhaps."""
        try:
            kept = json.loads(raw)
            if kept.pop("v") != _VERSION:
                raise ValueError("it is of a newer release")
            anchor = int(kept.pop("anchor_ms"))
            kept["payload"] = base64.b64decode(kept.get("payload", ""))
            return cls(Schedule(**kept), anchor)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRecord(f"a plan of {len(raw)} bytes cannot be read: {error}") from error
