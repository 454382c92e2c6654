"""`relay dlq`: the jobs that are dead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import click

from relay_core.cli.jobview import find
from relay_core.cli.output import emit, plural, progress
from relay_core.cli.session import Group, Session, confirm, may_destroy, pass_session
from relay_core.cli.showing import list_jobs, show_job
from relay_core.errors import InvalidArgument

_BATCH = 200

_QUEUE = click.option("--queue", "-q", required=True, help="The queue's name.")
_TASK = click.option("--task", metavar="NAME", help="Only jobs of this task, as their framework names it.")
_ERROR = click.option("--error", metavar="TEXT", help="Only jobs whose reason or error holds this text.")
_ALL = click.option("--all", "every", is_flag=True, help="All dead jobs, or all that the filters pick.")


@click.group(cls=Group)
def dlq() -> None:
    """List, show, requeue and purge dead jobs."""


@dlq.command("ls")
@_QUEUE
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="At most so many jobs.")
@_TASK
@_ERROR
@pass_session
def ls(session: Session, queue: str, limit: int, task: str | None, error: str | None) -> None:
    """List dead jobs, the longest dead first."""
    list_jobs(session, queue, ("dead",), limit, task, error)


@dlq.command("show")
@click.argument("id")
@_QUEUE
@click.option("--raw", is_flag=True, help="Write the payload's bytes and nothing else.")
@pass_session
def show(session: Session, id: str, queue: str, raw: bool) -> None:
    """Show one dead job with its decoded payload, reason and error."""
    show_job(session, queue, id, raw=raw, dead=True)


@dlq.command("requeue")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@_QUEUE
@_ALL
@click.option("--limit", type=click.IntRange(1), help="At most so many of them, the longest dead first.")
@_TASK
@_ERROR
@click.option("--dry-run", is_flag=True, help="Say how many would be requeued, and change nothing.")
@pass_session
@click.pass_context
def requeue(
    ctx: click.Context,
    session: Session,
    ids: tuple[str, ...],
    queue: str,
    every: bool,
    limit: int | None,
    task: str | None,
    error: str | None,
    dry_run: bool,
) -> None:
    """Make dead jobs ready again: those with these IDs, those that a filter picks, or --all.

    Their retries and deliveries count anew. Exit code 1 when a job that was named is not dead.
    """
    chosen = _choose(session, ids, queue, every, limit, task, error)
    if chosen is None:
        dead = session.broker.stats(queue).dead
        done = dead if limit is None else min(limit, dead)
        if not dry_run:
            with progress("requeued", done) as note:
                done = session.broker.requeue(queue, None, limit, note)
    elif dry_run:
        done = len(_dead_of(session, queue, chosen))
    else:
        done = _in_batches(chosen, "requeued", lambda batch: session.broker.requeue(queue, batch))
    _answer(ctx, session, queue, "requeued", done, len(chosen or ()) if ids else 0, dry_run)


@dlq.command("purge")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@_QUEUE
@_ALL
@_TASK
@_ERROR
@may_destroy("dropped")
@pass_session
@click.pass_context
def purge(
    ctx: click.Context,
    session: Session,
    ids: tuple[str, ...],
    queue: str,
    every: bool,
    task: str | None,
    error: str | None,
    yes: bool,
    dry_run: bool,
) -> None:
    """Drop dead jobs for good: those with these IDs, those that a filter picks, or --all.

    Exit code 1 when a job that was named is not dead.
    """
    chosen = _choose(session, ids, queue, every, None, task, error)
    found = None if chosen is None else _dead_of(session, queue, chosen)
    done = session.broker.stats(queue).dead if found is None else len(found)
    if done and not dry_run:
        confirm(f"Drop {plural(done, 'dead job')} of queue {queue!r} for good?", yes=yes)
        if found is None:
            with progress("purged", done) as note:
                done = session.broker.purge(queue, ("dead",), note)
        else:
            done = _in_batches(found, "purged", lambda batch: _drop(session, queue, batch))
    _answer(ctx, session, queue, "purged", done, len(chosen or ()) if ids else 0, dry_run)


def _choose(
    session: Session,
    ids: Sequence[str],
    queue: str,
    every: bool,
    limit: int | None,
    task: str | None,
    error: str | None,
) -> list[str] | None:
    """The ids to work on, None for all dead ones. Raises InvalidArgument when it is not clear which are meant."""
    filtered = task is not None or error is not None
    if bool(ids) == (every or filtered):
        raise InvalidArgument("which dead jobs? give either their IDs, or --all, or a filter (--task, --error)")
    if ids:
        return list(dict.fromkeys(ids))[:limit]
    if not filtered:
        return None
    found = find(session.broker, queue, "dead", task=task, error=error)
    return [job.id for job, _summary in islice(found, limit)]


def _dead_of(session: Session, queue: str, ids: Sequence[str]) -> list[str]:
    """Those of the ids that are dead now."""
    return [id for id in ids if (job := session.broker.show(queue, id)) is not None and job.state == "dead"]


def _drop(session: Session, queue: str, ids: Sequence[str]) -> int:
    """Drop jobs by id. One that somebody requeued in this very moment is dropped too; one that runs is not."""
    return sum(state not in (None, "inflight") for state in session.broker.cancel_many(queue, ids))


def _in_batches(ids: Sequence[str], verb: str, work: Callable[[Sequence[str]], int]) -> int:
    done = 0
    with progress(verb, len(ids)) as note:
        for at in range(0, len(ids), _BATCH):
            batch = ids[at : at + _BATCH]
            done += work(batch)
            note(len(batch))
    return done


def _answer(ctx: click.Context, session: Session, queue: str, verb: str, done: int, named: int, dry_run: bool) -> None:
    """Say what was done; exit with 1 when jobs were named that are not dead."""
    missing = max(0, named - done)
    if session.json:
        emit(session, {"queue": queue, "dry_run": dry_run, verb: done, "not_dead": missing})
    else:
        click.echo(f"{plural(done, 'dead job')} of queue {queue!r} {'would be ' if dry_run else ''}{verb}.")
        if missing:
            click.echo(f"{missing} of the named ones not {verb}: not dead, or not there.", err=True)
    if missing:
        ctx.exit(1)
