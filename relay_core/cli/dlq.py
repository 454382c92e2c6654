"""`relay dlq`: the jobs that are dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any

import click

from relay_core import commands
from relay_core.cli import values
from relay_core.cli.completion import queues as queue_names
from relay_core.cli.output import emit, plural, progress
from relay_core.cli.session import Group, Look, Session, confirm, may_destroy, pass_session
from relay_core.cli.showing import list_jobs, show_job
from relay_core.cli.sift import Filter, Run, Tally, pages
from relay_core.cli.stats import known
from relay_core.errors import InvalidArgument
from relay_core.job import JobSummary, StoredJob

_BATCH = 200

_QUEUE = click.option("--queue", "-q", required=True, help="The queue's name.", shell_complete=queue_names)
_ALL = click.option("--all", "every", is_flag=True, help="All dead jobs, or all that the filters pick.")
_LIMIT = click.option("--limit", type=click.IntRange(1), help="At most so many of them, the longest dead first.")
_RESUME = click.option("--resume", is_flag=True, help="Go on where a run with the same filters was killed.")


def _filtered(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--queue` and the filters, and hand them to it as one Filter."""

    @wraps(function)
    def command(
        *args: Any, queue: str, task: str | None, error: str | None, since: values.Since | None, **options: Any
    ) -> None:
        function(*args, pick=Filter(queue, task, error, since), **options)

    texts = (
        click.option("--since", type=values.since, metavar="TIME", help="Only jobs that died since: 2h, or ISO 8601."),
        click.option("--error", metavar="TEXT", help="Only jobs whose reason or error holds this text."),
        click.option("--task", metavar="NAME", help="Only jobs of this task, as their framework names it."),
        _QUEUE,
    )
    for option in texts:
        command = option(command)
    return command


@click.group(cls=Group)
def dlq() -> None:
    """List, show, requeue and purge dead jobs."""


@dlq.command("ls", cls=Look)
@_filtered
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="At most so many jobs.")
@pass_session
def ls(session: Session, pick: Filter, limit: int) -> None:
    """List dead jobs, the longest dead first."""
    list_jobs(session, pick.queue, ("dead",), limit, _dead(session, pick), errors=pick.error is not None)


def _dead(session: Session, pick: Filter) -> Iterator[tuple[StoredJob, JobSummary | None]]:
    now = known(session.broker, pick.queue).now
    for page in pages(session.broker, pick, pick.start(now), now, records=True):
        yield from ((job, summary) for job, summary, _point in page.jobs)


@dlq.command("show", cls=Look)
@click.argument("id")
@_QUEUE
@click.option("--raw", is_flag=True, help="Write the payload's bytes and nothing else.")
@pass_session
def show(session: Session, id: str, queue: str, raw: bool) -> None:
    """Show one dead job with its decoded payload, reason and error."""
    show_job(session, queue, id, raw=raw, dead=True)


@dlq.command("requeue")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@_filtered
@_ALL
@_LIMIT
@_RESUME
@may_destroy("requeued")
@pass_session
@click.pass_context
def requeue(
    ctx: click.Context,
    session: Session,
    ids: tuple[str, ...],
    pick: Filter,
    every: bool,
    limit: int | None,
    resume: bool,
    yes: bool,
    dry_run: bool,
) -> None:
    """Make dead jobs ready again.

    Those with these IDs, those that a filter picks, or --all. Their retries and deliveries count anew. It never asks;
    --yes is for scripts that give it to every command. Exit code 1 when a job that was named is not dead.
    """
    _check(ids, pick, every, limit, resume)
    if ids:
        _named(ctx, session, pick.queue, ids, "requeued", dry_run)
        return
    run = Run(session.broker, "requeued", pick, resume=resume)
    tally = Tally(run.count(limit)) if dry_run else _bulk(session, pick.queue, run, "requeued", limit)
    _answer(ctx, session, pick.queue, "requeued", tally, 0, dry_run)


@dlq.command("purge")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@_filtered
@_ALL
@_LIMIT
@_RESUME
@may_destroy("dropped")
@pass_session
@click.pass_context
def purge(
    ctx: click.Context,
    session: Session,
    ids: tuple[str, ...],
    pick: Filter,
    every: bool,
    limit: int | None,
    resume: bool,
    yes: bool,
    dry_run: bool,
) -> None:
    """Drop dead jobs for good.

    Those with these IDs, those that a filter picks, or --all. Exit code 1 when a job that was named is not dead.
    """
    _check(ids, pick, every, limit, resume)
    queue = pick.queue
    if ids:
        found = _dead_of(session, queue, ids)
        if found and not dry_run:
            confirm(f"Drop {plural(len(found), 'dead job')} of queue {queue!r} for good?", yes=yes)
        _named(ctx, session, queue, ids, "purged", dry_run)
        return
    run = Run(session.broker, "purged", pick, resume=resume)
    tally = Tally() if yes and not dry_run else Tally(run.count(limit))
    if not dry_run and (yes or tally.done):
        confirm(f"Drop {plural(tally.done, 'dead job')} of queue {queue!r} for good?", yes=yes)
        tally = _bulk(session, queue, run, "purged", limit)
    _answer(ctx, session, queue, "purged", tally, 0, dry_run)


def _check(ids: Sequence[str], pick: Filter, every: bool, limit: int | None, resume: bool) -> None:
    """Raises InvalidArgument when it is not clear which jobs are meant."""
    if bool(ids) == (every or pick.picks):
        raise InvalidArgument("which dead jobs? give either IDs, or --all, or a filter (--task, --error, --since)")
    if ids and (limit is not None or resume):
        raise InvalidArgument("--limit and --resume go with --all or a filter, not with IDs")


def _move(session: Session, queue: str, verb: str, ids: Sequence[str]) -> int:
    """Requeue or drop those of at most 200 jobs that are still dead: how many."""
    build = commands.requeue if verb == "requeued" else commands.drop
    answers: list[bool] = session.broker.store.run(build(session.broker.settings.keys(queue), ids))
    return sum(answers)


def _bulk(session: Session, queue: str, run: Run, verb: str, limit: int | None) -> Tally:
    try:
        return run.carry_out(partial(_move, session, queue, verb), limit, partial(progress, "looked at"))
    except BaseException:
        click.echo(f"Stopped: {run.tally.done} {verb}; the same command with --resume goes on from here.", err=True)
        raise


def _dead_of(session: Session, queue: str, ids: Sequence[str]) -> list[str]:
    """Those of the ids that are dead now."""
    return [id for id in ids if (job := session.broker.show(queue, id)) is not None and job.state == "dead"]


def _named(ctx: click.Context, session: Session, queue: str, ids: Sequence[str], verb: str, dry_run: bool) -> None:
    """Requeue or drop the jobs with these ids."""
    ids = list(dict.fromkeys(ids))
    if dry_run:
        done = len(_dead_of(session, queue, ids))
    else:
        done = 0
        with progress(verb, len(ids)) as note:
            for at in range(0, len(ids), _BATCH):
                batch = ids[at : at + _BATCH]
                done += _move(session, queue, verb, batch)
                note(len(batch))
    _answer(ctx, session, queue, verb, Tally(done), len(ids), dry_run)


def _answer(
    ctx: click.Context, session: Session, queue: str, verb: str, tally: Tally, named: int, dry_run: bool
) -> None:
    """Say what was done; exit with 1 when jobs were named that are not dead."""
    missing = max(0, named - tally.done)
    if session.json:
        counts = {verb: tally.done, "before": tally.before, "looked_at": tally.looked_at, "not_dead": missing}
        emit(session, {"queue": queue, "dry_run": dry_run, **counts})
    else:
        earlier = f", {tally.before} before" if tally.before else ""
        would = "would be " if dry_run else ""
        click.echo(f"{plural(tally.done, 'dead job')} of queue {queue!r} {would}{verb}{earlier}.")
        if missing:
            click.echo(f"{missing} of the named ones not {verb}: not dead, or not there.", err=True)
    if missing:
        ctx.exit(1)
