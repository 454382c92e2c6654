"""`relay top`: what goes on in the queues, seen again every two seconds."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from relay_core.broker import Broker
from relay_core.cli import values
from relay_core.cli.completion import queues as queue_names
from relay_core.cli.output import age, console, emit, plural, printable
from relay_core.cli.session import Look, Session, is_terminal, pass_session
from relay_core.cli.stats import known, read, tell_left_out
from relay_core.commands import QueueStats, WorkerInfo
from relay_core.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import Group

_ORDER = ("ready", "done/s", "fail/s", "p99 wait", "dead", "workers", "inflight", "in/s", "delayed")
"""Columns beside the queue's name, the ones that a narrow terminal must show first."""

_SHOWN = ("ready", "delayed", "inflight", "dead", "in/s", "done/s", "fail/s", "p99 wait", "workers")
"""The same in the order of display."""

_NAME = 12
"""Columns of the terminal for a queue's name, at least."""


@dataclass(frozen=True, slots=True)
class Row:
    """One queue now. Rates are per second since the look before, None at the first look.

    :ivar failed: per second: retried, or gone to dead
    :ivar wait: seconds; 99 in 100 of the ready jobs have waited at most so long, None when none is ready
    """

    stats: QueueStats
    enqueued: float | None
    processed: float | None
    failed: float | None
    wait: float | None
    workers: int


@dataclass(frozen=True, slots=True)
class Frame:
    """All queues at one look.

    :ivar left_out: by name, why a queue cannot be read
    """

    rows: Sequence[Row]
    workers: Sequence[WorkerInfo]
    left_out: Mapping[str, str] = field(default_factory=dict)


class Looks:
    """Looks at queues again and again, and makes rates of the counters that the store keeps.

    :param queues: these; none: all that are there at each look
    """

    def __init__(self, broker: Broker, queues: Sequence[str]) -> None:
        self._broker = broker
        self._queues = queues
        self._before: dict[str, QueueStats] = {}

    def look(self) -> Frame:
        workers = self._broker.workers()
        serving = Counter(queue for worker in workers for queue in set(worker.queues))
        found, left_out = read(self._broker, self._queues or self._broker.queues())
        rows = [self._row(stats, self._before.get(stats.queue), serving[stats.queue]) for stats in found]
        self._before = {stats.queue: stats for stats in found}
        return Frame(rows, workers, left_out)

    @staticmethod
    def _row(now: QueueStats, before: QueueStats | None, workers: int) -> Row:
        passed = now.now - before.now if before is not None else 0.0

        def rate(*names: str) -> float | None:
            if before is None or passed <= 0:
                return None
            moved = sum(now.counters.get(name, 0) - before.counters.get(name, 0) for name in names)
            return max(0.0, moved / passed)  # a store that was emptied counts anew

        wait = None if now.patient_at is None else max(0.0, now.now - now.patient_at)
        return Row(now, rate("enqueued"), rate("processed"), rate("retried", "dead"), wait, workers)


@click.command("top", cls=Look)
@click.argument("queues", nargs=-1, metavar="[QUEUE...]", shell_complete=queue_names)
@click.option(
    "--interval",
    type=values.duration,
    default=2.0,
    show_default=True,
    metavar="DURATION",
    help="Time between two looks, from 0.1 s on.",
)
@click.option("--once", is_flag=True, help="Look twice, one interval apart, print that and end.")
@pass_session
def top(session: Session, queues: tuple[str, ...], interval: float, once: bool) -> None:
    """Show queues as they change: depths, jobs per second, waits and workers, of these queues or of all.

    in/s, done/s and fail/s are jobs enqueued, acked, and retried or gone to dead per second. p99 wait: 99 in 100 of the
    ready jobs have waited at most so long. Ctrl-C ends it. Without a terminal, or with --json, it is as with --once.
    """
    interval = max(0.1, interval)
    broker = session.broker
    for name in queues:
        known(broker, name)
    looks = Looks(broker, queues)
    # a dumb terminal cannot go back to the top of the screen
    if once or session.json or not is_terminal(sys.stdout) or console().is_dumb_terminal:
        looks.look()
        time.sleep(interval)
        frame = looks.look()
        tell_left_out(frame.left_out)
        if session.json:
            rows = [document(row) for row in frame.rows]
            emit(session, {"interval": interval, "queues": rows, "left_out": frame.left_out, **_totals(frame)})
        else:
            console().print(render(frame, console().width))
        return
    # by an exception, so that the terminal gets its screen back
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    with suppress(KeyboardInterrupt):
        _watch(looks, interval)


def _watch(looks: Looks, interval: float) -> None:
    from rich.live import Live

    screen = console()
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        frame: Frame | None = None
        trouble = ""
        while True:
            try:
                frame, trouble = looks.look(), ""
            except Unavailable as error:
                trouble = f"The server cannot be reached: {error}"
            # the terminal may change its size before the next look
            until = time.monotonic() + interval
            while (left := until - time.monotonic()) > 0:
                live.update(render(frame, screen.width, screen.height, trouble or _left_out(frame)), refresh=True)
                time.sleep(min(0.25, left))


def document(row: Row) -> dict[str, Any]:
    """One queue for `--json`. Rates are per second, times in seconds."""
    stats = row.stats
    return {
        "queue": stats.queue,
        "ready": stats.ready,
        "delayed": stats.delayed,
        "inflight": stats.inflight,
        "dead": stats.dead,
        "paused": stats.paused,
        "enqueued_per_second": _rounded(row.enqueued),
        "processed_per_second": _rounded(row.processed),
        "failed_per_second": _rounded(row.failed),
        "p99_wait": _rounded(row.wait),
        "workers": row.workers,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _totals(frame: Frame) -> dict[str, Any]:
    return {"workers": len(frame.workers), "worker_inflight": sum(worker.inflight for worker in frame.workers)}


def _left_out(frame: Frame | None) -> str:
    """The first queue that cannot be read, in a line."""
    if frame is None or not frame.left_out:
        return ""
    (name, why), *others = frame.left_out.items()
    return f"queue {name!r}{f' and {len(others)} more' if others else ''} cannot be read: {why}"


def _urgency(row: Row) -> tuple[float, ...]:
    """What sorts those that need a look most to the top."""
    return -(row.wait or 0.0), -(row.failed or 0.0), -row.stats.dead, -row.stats.pending


def render(frame: Frame | None, width: int, height: int | None = None, trouble: str = "") -> Group:
    """The frame for a terminal of this size: what does not fit is left out, columns by their weight.

    Where queues are left out, the ones that are shown are those whose jobs wait longest.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    if frame is not None:
        parts.append(Text(_head(frame), no_wrap=True, overflow="ellipsis"))
        rows, room = list(frame.rows), None if height is None else max(1, height - 3 - bool(trouble))
        hidden = 0 if room is None or len(rows) <= room else len(rows) - room + 1
        if hidden:
            rows = sorted(rows, key=_urgency)[: len(rows) - hidden]
        cells = [_cells(row) for row in rows]
        columns, name_width = fitting(cells, width)
        grid = Table(box=None, padding=0, pad_edge=False, header_style="bold", expand=False)
        grid.add_column("queue", no_wrap=True, overflow="ellipsis", width=name_width)
        for column in columns:
            grid.add_column(column, justify="right", no_wrap=True, width=_room(cells, column))
        for cell in cells:
            style = "red" if cell["dead"] != "0" or cell["fail/s"] not in ("-", "0") else ""
            name = Text(cell["queue"], style="dim" if cell["paused"] else style)
            grid.add_row(name, *(cell[column] for column in columns))
        parts.append(grid)
        if hidden:
            more = f"and {plural(hidden, 'queue')} more, whose jobs wait less: name those to see"
            parts.append(Text(more, no_wrap=True, overflow="ellipsis"))
    if trouble:
        parts.append(Text(printable(trouble), style="red", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def fitting(cells: Sequence[dict[str, str]], width: int) -> tuple[list[str], int]:
    """The columns beside the name that fit a terminal of this width, in the order of display, and the name's width."""
    longest = max((len("queue"), *(len(row["queue"]) for row in cells)))
    left = width - min(_NAME, longest)
    chosen = set()
    for column in _ORDER:
        needed = _room(cells, column)
        if needed > left:
            break
        left -= needed
        chosen.add(column)
    return [column for column in _SHOWN if column in chosen], max(1, min(longest, min(_NAME, longest) + left))


def _room(cells: Sequence[dict[str, str]], column: str) -> int:
    """The width of a column that is set to the right, with two blanks before it."""
    return 2 + max((len(column), *(len(row[column]) for row in cells)))


def _head(frame: Frame) -> str:
    rows = frame.rows
    waiting, dead = sum(row.stats.ready for row in rows), sum(row.stats.dead for row in rows)
    done = sum(row.processed or 0.0 for row in rows)
    words = (plural(len(rows), "queue"), f"{waiting} ready", f"{_rate(done)} done/s", f"{dead} dead")
    return "relay top: " + ", ".join((*words, plural(len(frame.workers), "worker")))


def _cells(row: Row) -> dict[str, str]:
    stats = row.stats
    return {
        "queue": printable(stats.queue) + (" (paused)" if stats.paused else ""),
        "paused": "paused" if stats.paused else "",
        "ready": str(stats.ready),
        "delayed": str(stats.delayed),
        "inflight": str(stats.inflight),
        "dead": str(stats.dead),
        "in/s": _rate(row.enqueued),
        "done/s": _rate(row.processed),
        "fail/s": _rate(row.failed),
        "p99 wait": age(row.wait),
        "workers": str(row.workers),
    }


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
