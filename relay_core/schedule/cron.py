"""Ticks of cron expressions, in a time zone, as unix ms.

croniter knows the expressions; it is only ever asked in plain wall-clock time, and the changes of the clock are dealt
with here, so that all its releases agree.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from relay_core.errors import InvalidArgument

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Cron:
    """A cron expression of five fields, or six with seconds last, in a time zone.

    Where the clock is put back, an hour comes twice: an expression that names hours ticks in the first one only,
    one with `*`, a step or a range of hours in both. Where the clock is put forward, an hour is left out: what names
    a time in it ticks so much later as the clock was put forward, once.

    Raises InvalidArgument, which says what is wrong and what to install.
    """

    def __init__(self, expression: str, tz: str = "UTC") -> None:
        self._expression = _checked(expression)
        self._zone = zone(tz)
        self._croniter = _croniter()
        self._once = re.fullmatch(r"[\d,]+", self._expression.split()[1]) is not None
        try:
            self._walls(datetime(2024, 1, 1, tzinfo=timezone.utc))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InvalidArgument(f"cron expression {expression!r} cannot be used: {error}") from error

    def after(self, ms: int) -> int:
        """The first tick after this moment. Both are unix ms."""
        start = at = _EPOCH + timedelta(milliseconds=ms)
        offset, before = self._offset(at), self._offset(at - timedelta(days=1))
        if self._once and before < offset and at < self._change(at, before) + offset - before:
            offset = before  # times in the hour that is left out are still to come
        wall = at + offset  # what the clock on the wall shows, labelled as UTC
        while True:
            wall = self._walls(wall)
            at = wall - offset
            if self._offset(at) == offset:
                if self._once and at.astimezone(self._zone).fold:
                    continue  # the hour that comes a second time
                return round((at - _EPOCH).total_seconds() * 1000)
            change = self._change(at, offset)
            later = self._offset(change)
            if self._once and wall < change + later:
                return round((at - _EPOCH).total_seconds() * 1000)  # in the hour that is left out
            offset = later
            wall = max(change - timedelta(milliseconds=1), start) + offset

    def _walls(self, wall: datetime) -> datetime:
        """The next time on the wall, in ignorance of changes of the clock."""
        found: datetime = self._croniter(self._expression, wall).get_next(datetime)
        return found

    def _offset(self, at: datetime) -> timedelta:
        return at.astimezone(self._zone).utcoffset() or timedelta(0)

    def _change(self, at: datetime, offset: timedelta) -> datetime:
        """The first second, up to `at`, from which on another offset is in force."""
        step = timedelta(hours=6)
        before = at - step
        while self._offset(before) != offset:
            before -= step
        low, high = int(before.timestamp()), int(at.timestamp())
        while high - low > 1:
            middle = (low + high) // 2
            if self._offset(_EPOCH + timedelta(seconds=middle)) == offset:
                low = middle
            else:
                high = middle
        return _EPOCH + timedelta(seconds=high)


def zone(name: str) -> ZoneInfo:
    """The time zone of an IANA name. Raises InvalidArgument for one that is not known here."""
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, AttributeError, OSError) as error:
        raise InvalidArgument(
            f"time zone {name!r} is not known here; write an IANA name such as Europe/Berlin. Where the system has no "
            "time zones: pip install 'relay-queue[schedule]'"
        ) from error


@lru_cache(maxsize=1)
def _croniter() -> Any:
    try:
        from croniter import croniter
    except ImportError as error:
        raise InvalidArgument(
            f"cron expressions need croniter ({error}): pip install 'relay-queue[schedule]', or use an interval"
        ) from error
    return croniter


def _checked(expression: str) -> str:
    if not isinstance(expression, str):
        raise InvalidArgument(f"a cron expression is a text such as '0 3 * * *', got {expression!r}")
    text = _ALIASES.get(expression.strip().lower(), expression.strip())
    fields = text.split()
    if len(fields) not in (5, 6):
        raise InvalidArgument(
            f"cron expression {expression!r} has {len(fields)} fields; write minute, hour, day, month, weekday, and "
            "if you like seconds at the end, or one of " + ", ".join(_ALIASES)
        )
    if re.search(r"(?i)(^|[\s,])[rh](\(|/|,|\s|$)", text):
        # a random field would tick at another time in each process
        raise InvalidArgument(f"cron expression {expression!r}: H and R fields are random, and cannot be used")
    return " ".join(fields)
