"""`relay queue`: whole queues."""

from __future__ import annotations

import shlex
from typing import Any, cast

import click

from relay_core.cli import values
from relay_core.cli.completion import queues as queue_names
from relay_core.cli.output import emit, plural, progress, table
from relay_core.cli.session import Group, Look, Session, confirm, may_destroy, pass_session
from relay_core.cli.stats import held_back, known, limits_of, meant, none_of, read, tell_left_out
from relay_core.errors import InvalidArgument, RelayError
from relay_core.job import STATES, State


class QueueNotEmpty(RelayError):
    """What has jobs is not removed."""


@click.group(cls=Group)
def queue() -> None:
    """List, pause, resume, purge, limit and remove queues."""


@queue.command("ls", cls=Look)
@pass_session
def ls(session: Session) -> None:
    """List the queues ever enqueued to, but for removed ones."""
    found, left_out = read(session.broker, session.broker.queues())
    tell_left_out(left_out)
    if session.json:
        rows = [
            {
                "queue": one.queue,
                "ready": one.ready,
                "delayed": one.delayed,
                "inflight": one.inflight,
                "dead": one.dead,
                "paused": one.paused,
            }
            for one in found
        ]
        emit(session, {"queues": rows, "left_out": left_out})
    elif not found:
        click.echo(none_of(session, left_out))
    else:
        columns = ("queue", "ready", "delayed", "inflight", "dead", "held back by")
        table(
            columns,
            ([s.queue, str(s.ready), str(s.delayed), str(s.inflight), str(s.dead), held_back(s)] for s in found),
            right=columns[1:5],
        )


@queue.command("pause")
@click.argument("name", metavar="QUEUE", shell_complete=queue_names)
@pass_session
def pause(session: Session, name: str) -> None:
    """Stop all claims of a queue, in every worker. Enqueue goes on."""
    session.broker.pause(name)
    _answer(session, name, "paused", {"paused": True})


@queue.command("resume")
@click.argument("name", metavar="QUEUE", shell_complete=queue_names)
@pass_session
def resume(session: Session, name: str) -> None:
    """End a pause."""
    session.broker.resume(name)
    _answer(session, name, "resumed", {"paused": False})


@queue.command("purge")
@click.argument("name", metavar="QUEUE", shell_complete=queue_names)
@click.option(
    "--state",
    multiple=True,
    type=click.Choice(("ready", "delayed", "dead")),
    default=("ready", "delayed"),
    help="Drop jobs in this state; repeatable. Default: ready and delayed.",
)
@may_destroy("dropped")
@pass_session
def purge(session: Session, name: str, state: tuple[str, ...], yes: bool, dry_run: bool) -> None:
    """Drop the jobs of a queue for good. What runs is left alone."""
    stats = known(session.broker, name)
    states = cast("tuple[State, ...]", tuple(dict.fromkeys(state)))
    done = sum(int(getattr(stats, one)) for one in states)
    if done and not dry_run:
        confirm(f"Drop {plural(done, 'job')} ({', '.join(states)}) of queue {name!r} for good?", yes=yes)
        with progress("purged", done) as note:
            done = session.broker.purge(name, states, note)
    if session.json:
        emit(session, {"queue": name, "states": list(states), "dry_run": dry_run, "purged": done})
    else:
        verb = "would be purged" if dry_run else "purged"
        click.echo(f"{plural(done, 'job')} ({', '.join(states)}) of queue {name!r} {verb}.")


@queue.command("rm")
@click.argument("name", metavar="QUEUE", shell_complete=queue_names)
@pass_session
def rm(session: Session, name: str) -> None:
    """Forget a queue that holds no job.

    Its name, settings, counters and dedup keys go.
    """
    known(session.broker, name)
    if not session.broker.delete_queue(name):
        stats = session.broker.stats(name)
        kept = ", ".join(f"{getattr(stats, one)} {one}" for one in STATES if getattr(stats, one))
        states = "".join(f" --state {one}" for one in STATES if one != "inflight" and getattr(stats, one))
        first = f"drop them first: relay queue purge {shlex.quote(name)}{states}" if states else "let them end first"
        raise QueueNotEmpty(f"queue {name!r} stays, for it holds jobs: {kept}; {first}")
    if session.json:
        emit(session, {"queue": name, "removed": True})
    else:
        click.echo(f"queue {name!r} removed.")


@queue.command("limit")
@click.argument("name", metavar="QUEUE", shell_complete=queue_names)
@click.option("--rate", type=values.rate, metavar="RATE", help="Claims per second: 10, or 10/s, 90/m, 1000/h.")
@click.option("--burst", type=int, help="Claims that may come at once. Default: one second's worth of --rate.")
@click.option("--max-inflight", type=int, help="Jobs claimed at a time, over all workers.")
@click.option("--none", "unset", is_flag=True, help="Take all limits away.")
@pass_session
def limit(
    session: Session, name: str, rate: float | None, burst: int | None, max_inflight: int | None, unset: bool
) -> None:
    """Set a queue's limits for all workers; what is not named stays. Without options: show them."""
    broker = session.broker
    given = rate is not None or burst is not None or max_inflight is not None
    if unset and given:
        raise InvalidArgument("give either --none, to take all limits away, or new limits")
    if unset:
        broker.limit(name)
    elif given:
        old = broker.stats(name).settings
        if rate is None and "rate" in old:
            rate = old["rate"]
            burst = int(old["burst"]) if burst is None and "burst" in old else burst
        if max_inflight is None and "max_inflight" in old:
            max_inflight = int(old["max_inflight"])
        broker.limit(name, rate, burst, max_inflight)
    stats = broker.stats(name)
    _answer(session, name, f"limits: {held_back(stats, pause=False)}", {"limits": limits_of(stats)})


def _answer(session: Session, name: str, text: str, facts: dict[str, Any]) -> None:
    # a queue may be set up before its first job; its name may also be a slip
    if name not in (names := session.broker.queues()):
        question = meant(name, names)
        click.echo(f"Note: nothing was ever enqueued to queue {name!r}{f'; {question}' if question else '.'}", err=True)
    if session.json:
        emit(session, {"queue": name, **facts})
    else:
        click.echo(f"queue {name!r}: {text}")
