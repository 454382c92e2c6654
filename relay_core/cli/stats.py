"""`relay stats`: how queues stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import click

from relay_core import commands
from relay_core.broker import Broker
from relay_core.cli.completion import queues as queue_names
from relay_core.cli.output import age, emit, printable, table
from relay_core.cli.session import Look, Session, pass_session
from relay_core.commands import QueueStats
from relay_core.errors import RelayError, Unavailable

_LIMITS = ("rate", "burst", "max_inflight")
_COUNTERS = ("enqueued", "claimed", "processed", "retried", "dead", "reaped", "promoted")

_TOGETHER = 1000
"""Queues read in one pipeline: a shard that is away is waited for once for all of them."""


class QueueNotFound(RelayError):
    """Nothing was ever enqueued to a queue of this name."""


def known(broker: Broker, name: str) -> QueueStats:
    """The stats of a queue that exists. Raises QueueNotFound, with the name that was meant if it can be guessed."""
    stats = broker.stats(name)
    if any(stats.counters.values()) or stats.settings or stats.paused or stats.pending or stats.dead:
        return stats
    names = broker.queues()
    if name in names:
        return stats
    where = f"`relay queue ls` lists the queues with the prefix {broker.settings.prefix!r}"
    advice = meant(name, names) or where
    raise QueueNotFound(f"queue {name!r}: nothing was ever enqueued to it; {advice}")


def meant(name: str, names: Sequence[str]) -> str:
    """The question whether another queue was meant; empty where no name is near."""
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def read(broker: Broker, names: Sequence[str]) -> tuple[list[QueueStats], dict[str, str]]:
    """The stats of these queues, and by name why some cannot be read: one of a newer layout, or a shard that is away,
    must not hide the others.

    Raises Unavailable when no queue can be reached.
    """
    found: list[QueueStats] = []
    left_out: dict[str, str] = {}
    away: Unavailable | None = None
    for at in range(0, len(names), _TOGETHER):
        batch = names[at : at + _TOGETHER]
        results = broker.store.run_many([commands.stats(broker.settings.keys(name)) for name in batch])
        for name, result in zip(batch, results, strict=True):
            if isinstance(result, RelayError):
                left_out[name] = str(result)
                away = result if isinstance(result, Unavailable) else away
            else:
                found.append(result)
        if away is not None and not found:
            raise away
    return found, left_out


def tell_left_out(left_out: Mapping[str, str]) -> None:
    """Say on stderr which queues are not shown."""
    for name, why in left_out.items():
        click.echo(f"Warning: queue {name!r} is left out: {why}", err=True)


def none_of(session: Session, left_out: Mapping[str, str]) -> str:
    """What stands in place of a table without rows."""
    return "No queue can be read." if left_out else f"No queues yet: nothing was ever enqueued to {session.where}."


def document(stats: QueueStats) -> dict[str, Any]:
    """One queue for `--json`; `ready_by_level` has a count for each priority, 0 first."""
    return {
        "queue": stats.queue,
        "at": stats.now,
        "ready": stats.ready,
        "ready_by_level": list(stats.ready_by_level),
        "delayed": stats.delayed,
        "inflight": stats.inflight,
        "dead": stats.dead,
        "oldest_age": None if stats.oldest_at is None else max(0.0, round(stats.now - stats.oldest_at, 3)),
        "next_due_in": None if stats.next_due_at is None else max(0.0, round(stats.next_due_at - stats.now, 3)),
        "paused": stats.paused,
        "limits": limits_of(stats),
        "counters": dict(sorted(stats.counters.items())),
    }


def limits_of(stats: QueueStats) -> dict[str, float | None]:
    """Every limit by name, None when it is not set."""
    return {name: stats.settings.get(name) for name in _LIMITS}


def held_back(stats: QueueStats, *, pause: bool = True) -> str:
    """The pause and the limits of a queue in words."""
    told = ["paused"] if pause and stats.paused else []
    if "rate" in stats.settings:
        burst = f", burst {stats.settings['burst']:g}" if "burst" in stats.settings else ""
        told.append(f"rate {stats.settings['rate']:g}/s{burst}")
    if "max_inflight" in stats.settings:
        told.append(f"max inflight {stats.settings['max_inflight']:g}")
    return "; ".join(told) or ("-" if pause else "none")


def _ready(stats: QueueStats) -> str:
    """`12`, or `12 (9:2 0:10)` when other priorities than 0 are in use."""
    levels = [f"{level}:{count}" for level, count in enumerate(stats.ready_by_level) if count]
    plain = not levels or levels == [f"0:{stats.ready}"]
    return str(stats.ready) if plain else f"{stats.ready} ({' '.join(reversed(levels))})"


@click.command("stats", cls=Look)
@click.argument("queues", nargs=-1, metavar="[QUEUE...]", shell_complete=queue_names)
@pass_session
def stats(session: Session, queues: tuple[str, ...]) -> None:
    """Show depths, ages, limits and lifetime counters of these queues, or of all.

    Ready jobs are also counted by priority. Next is when the next delayed job is due.
    """
    broker = session.broker
    found, left_out = ([known(broker, name) for name in queues], {}) if queues else read(broker, broker.queues())
    tell_left_out(left_out)
    if session.json:
        emit(session, {"queues": [document(one) for one in found], "left_out": left_out})
        return
    if not found:
        click.echo(none_of(session, left_out))
        return
    columns = ("queue", "ready", "delayed", "inflight", "dead", "oldest", "next", "held back by")
    rows = (
        [
            one.queue, _ready(one), str(one.delayed), str(one.inflight), str(one.dead),
            age(None if one.oldest_at is None else one.now - one.oldest_at),
            age(None if one.next_due_at is None else one.next_due_at - one.now),
            held_back(one),
        ]
        for one in found
    )  # fmt: skip
    table(columns, rows, right=columns[1:7])
    click.echo("\nSince each queue began:")
    for one in found:
        click.echo(f"  {printable(one.queue)}: {_lifetime(one)}")


def _lifetime(stats: QueueStats) -> str:
    """The counters that have counted something, in the order of a job's life."""
    names = [*_COUNTERS, *sorted(stats.counters.keys() - set(_COUNTERS))]
    return ", ".join(f"{name} {count}" for name in names if (count := stats.counters.get(name, 0))) or "nothing yet"
