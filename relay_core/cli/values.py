"""What people type, turned into values: durations, moments, rates, headers, payloads.

Plain functions, given to click as `type=`; they raise click.BadParameter, to which click adds the option's name.
"""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PER = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def duration(value: str | float) -> float:
    """`90`, `1.5`, `500ms`, `30s`, `5m`, `2h`, `7d`: seconds."""
    match = re.fullmatch(r"\s*(.+?)\s*(ms|s|m|h|d|)\s*", str(value))
    try:
        return _number(match[1]) * _SECONDS[match[2]] if match else _number("")
    except ValueError:
        raise click.BadParameter(f"{value!r} is no duration; write seconds, or 500ms, 30s, 5m, 2h, 7d") from None


def moment(value: str | float) -> float:
    """Unix seconds, or ISO 8601 (`2030-01-31T09:00`, local time unless it names an offset): unix seconds."""
    text = str(value)
    try:
        return _number(text)
    except ValueError:
        pass
    # fromisoformat knows the Z only from Python 3.11 on
    text = text[:-1] + "+00:00" if text[-1:] in ("Z", "z") else text
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise click.BadParameter(
            f"{value!r} is no time; write unix seconds or ISO 8601 such as 2030-01-31T09:00+01:00"
        ) from None


@dataclass(frozen=True, slots=True)
class Since:
    """A point in time as it was typed: so long ago, or a moment of its own."""

    text: str
    ago: float | None
    at: float

    def unix(self, now: float) -> float:
        """Unix seconds. Never below 0.

        :param now: of the server
        """
        return max(0.0, self.at if self.ago is None else now - self.ago)


def since(value: str | Since) -> Since:
    """A duration (`2h`: two hours ago), or a moment (ISO 8601, or unix seconds from 10^9 on)."""
    if isinstance(value, Since):
        return value
    try:
        ago = duration(value)
    except click.BadParameter:
        pass
    else:
        if 0 <= ago < 1e9:
            return Since(value, ago, 0.0)
    try:
        at = moment(value)
        if at < 0:
            raise click.BadParameter("negative")
        return Since(value, None, at)
    except click.BadParameter:
        raise click.BadParameter(
            f"{value!r} is neither a duration such as 30m, 2h, 7d nor a time such as 2030-01-31T09:00+01:00"
        ) from None


def rate(value: str | float) -> float:
    """`10`, `10/s`, `90/m`, `1000/h`: jobs per second."""
    number, _, unit = str(value).partition("/")
    try:
        return _number(number) / _PER[unit.strip()]
    except (ValueError, KeyError):
        raise click.BadParameter(f"{value!r} is no rate; write jobs per second, or 10/s, 90/m, 1000/h") from None


def header(value: str) -> tuple[str, str]:
    """`name=value`."""
    name, equals, text = value.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"{value!r} has no name or no '='; write name=value")
    return name, text


def payload(value: str) -> bytes:
    """The text itself as UTF-8, `-` for stdin, `@file` for a file's bytes."""
    if value == "-":
        return sys.stdin.buffer.read()
    if not value.startswith("@"):
        return os.fsencode(value)
    try:
        return Path(value[1:]).read_bytes()
    except OSError as error:
        raise click.BadParameter(
            f"cannot read {value[1:]!r}: {error.strerror}; a text that begins with @ goes in by stdin, with -"
        ) from None
