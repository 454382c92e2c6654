"""`relay job`: single jobs, whatever their state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import click

from relay_core.cli import values
from relay_core.cli.completion import queues as queue_names
from relay_core.cli.jobview import find
from relay_core.cli.output import emit, plural, printable
from relay_core.cli.session import Group, Look, Session, confirm, may_destroy, pass_session
from relay_core.cli.showing import list_jobs, show_job
from relay_core.job import STATES, State

_QUEUE = click.option("--queue", "-q", required=True, help="The queue's name.", shell_complete=queue_names)


@click.group(cls=Group)
def job() -> None:
    """List, show, enqueue and cancel jobs."""


@job.command("ls", cls=Look)
@_QUEUE
@click.option("--state", multiple=True, type=click.Choice(STATES), help="Only this state; repeatable. Default: all.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="At most so many jobs.")
@click.option("--task", metavar="NAME", help="Only jobs of this task, as their framework names it.")
@click.option("--error", metavar="TEXT", help="Only jobs whose reason or error holds this text.")
@pass_session
def ls(session: Session, queue: str, state: tuple[str, ...], limit: int, task: str | None, error: str | None) -> None:
    """List jobs: ready ones in the order of claims, the others by time."""
    states = cast("Sequence[State]", state or STATES)
    found = chain.from_iterable(find(session.broker, queue, one, task=task, error=error) for one in states)
    list_jobs(session, queue, states, limit, found, errors=error is not None)


@job.command("show", cls=Look)
@click.argument("id")
@_QUEUE
@click.option("--raw", is_flag=True, help="Write the payload's bytes and nothing else.")
@pass_session
def show(session: Session, id: str, queue: str, raw: bool) -> None:
    """Show one job with its decoded payload."""
    show_job(session, queue, id, raw=raw)


@job.command("enqueue")
@click.argument("payload", type=values.payload)
@_QUEUE
@click.option(
    "--delay", type=values.duration, metavar="DURATION", help="Until it is ready: seconds, or 30s, 5m, 2h, 7d."
)
@click.option("--at", type=values.moment, metavar="TIME", help="When it is ready: unix seconds or ISO 8601.")
@click.option("--priority", type=int, default=0, show_default=True, help="0 to 9, 9 first.")
@click.option("--id", help="The job's id, so that a repeated enqueue stores one job. Default: a new one.")
@click.option("--dedup-key", help="Store nothing while a job of this key is in the queue.")
@click.option(
    "--dedup-for",
    type=values.duration,
    metavar="DURATION",
    help="How long the key is taken. Default: until the job is done.",
)
@click.option("--max-retries", type=int, help="Failures after which it is dead. Default: the worker's policy.")
@click.option("--max-deliveries", type=int, help="Deliveries without an answer after which it is dead.")
@click.option(
    "--header",
    "headers",
    multiple=True,
    type=values.header,
    metavar="NAME=VALUE",
    help="A text that travels with it; repeatable.",
)
@pass_session
def enqueue(
    session: Session, /, payload: bytes, queue: str, headers: tuple[tuple[str, str], ...], **options: Any
) -> None:
    """Store one job and print its id. PAYLOAD is the text itself, - for stdin, or @FILE."""
    stored = session.broker.enqueue(queue, payload, headers=dict(headers) or None, **options)
    if session.json:
        emit(session, {"id": stored.id, "queue": queue, "duplicate": stored.duplicate})
        return
    click.echo(stored.id)
    if stored.duplicate:
        click.echo(f"Nothing was stored: job {stored.id} of queue {queue!r} has that id or dedup key.", err=True)


_LEFT = {
    None: "is not there: it was never stored, or it is done",
    "inflight": "is running and was left alone; it ends by itself, or when its lease is over",
}


@job.command("cancel")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@_QUEUE
@may_destroy("cancelled")
@pass_session
@click.pass_context
def cancel(ctx: click.Context, session: Session, ids: tuple[str, ...], queue: str, yes: bool, dry_run: bool) -> None:
    """Take jobs out of their queue. One that runs is left alone: exit code 1."""
    broker = session.broker
    states: list[State | None]
    if dry_run:
        states = [found.state if (found := broker.show(queue, id)) else None for id in ids]
    else:
        confirm(f"Cancel {plural(len(ids), 'job')} of queue {queue!r}?", yes=yes)
        states = broker.cancel_many(queue, ids)
    if session.json:
        rows = [
            {"id": id, "state": state, "cancelled": state not in _LEFT and not dry_run}
            for id, state in zip(ids, states, strict=True)
        ]
        emit(session, {"queue": queue, "dry_run": dry_run, "jobs": rows})
    else:
        verb = "would be cancelled" if dry_run else "cancelled"
        for id, state in zip(ids, states, strict=True):
            outcome = _LEFT.get(state) or f"{verb}, it was {state}"
            click.echo(f"job {printable(id)} of queue {queue!r}: {outcome}", err=state in _LEFT)
    if any(state in _LEFT for state in states):
        ctx.exit(1)
