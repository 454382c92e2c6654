"""How answers look: JSON documents, tables, progress. Text of others is shown so that it cannot steer a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import click

from relay_core.cli.session import Session, is_terminal

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 100_000
"""Columns of an output that is no terminal: nothing is cut there."""

_EXTRACTS = ("job", "error")
"""Columns with the beginning of a longer text: cut on a narrow terminal."""

_LONG = ("queue", "held back by", "found", "finding")
"""Columns that are folded on a narrow terminal."""

_REPORT_EVERY = 5.0
"""Seconds between lines of progress where there is no terminal."""


def emit(session: Session, document: dict[str, Any]) -> None:
    """Write the one JSON document of a command."""
    session.answered = True
    click.echo(json.dumps(document, ensure_ascii=True, allow_nan=False))


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if is_terminal(stream) else _WIDE
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> None:
    """Print a table; what does not fit a terminal is folded, and only extracts are cut.

    :param right: columns that hold numbers
    """
    from rich.table import Table
    from rich.text import Text

    numbers = set(right)
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # short cells stay whole, and an id is for copying; long ones make room for them
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=column not in (*_EXTRACTS, *_LONG))
    cut = [column in _EXTRACTS for column in columns]
    for row in rows:
        made.add_row(
            *(
                Text(printable(cell), no_wrap=short, overflow="ellipsis" if short else "fold")
                for cell, short in zip(row, cut, strict=True)
            )
        )
    console().print(made)


def printable(text: str, lines: bool = False) -> str:
    """The text with every character that is not for reading written as an escape.

    :param lines: leave line breaks and tabs as they are
    """
    kept = "\n\t" if lines else ""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shortened(text: str, length: int) -> str:
    """The first line, at most `length` characters of it."""
    line = text.partition("\n")[0]
    return line if len(line) <= length and line == text else line[: length - 1].rstrip() + "…"


def age(seconds: float | None) -> str:
    """Seconds as people say them: `850ms`, `12s`, `3m 5s`, `2h 10m`, `4d 1h`."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    while parts[0][0] == 0 and len(parts) > 1:
        parts.pop(0)
    return " ".join(f"{value}{unit}" for value, unit in parts[:2] if value or unit == parts[0][1])


def moment(at: float | None) -> str:
    """Unix seconds as local time with its offset."""
    if at is None:
        return "-"
    try:
        return datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return f"@{at:.3f}"  # beyond the calendar, e.g. a delay of thousands of years


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


@contextmanager
def progress(verb: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show on stderr how far bulk work has come: a bar on a terminal, else a line now and then.

    Yields what to call with the number of jobs handled since the last call.
    """
    if is_terminal(sys.stderr):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console(stderr=True), transient=True) as bar:
            task = bar.add_task(verb, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, spoken = 0, time.monotonic()

    def note(count: int) -> None:
        nonlocal done, spoken
        done += count
        if time.monotonic() - spoken >= _REPORT_EVERY:
            spoken = time.monotonic()
            click.echo(f"{verb}: {done}" + (f" of {total}" if total is not None else ""), err=True)

    yield note


def as_text(value: object) -> str:
    """A reply of the server, for people: its bytes, where it is some, as UTF-8."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
