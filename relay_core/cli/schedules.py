"""`relay schedule`: recurring jobs."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

import click

from relay_core import commands
from relay_core.cli import values
from relay_core.cli.completion import queues as queue_names
from relay_core.cli.jobview import text_of
from relay_core.cli.output import age, emit, moment, plural, printable, shortened, table
from relay_core.cli.session import Group, Look, Session, confirm, may_destroy, pass_session
from relay_core.keys import ScheduleKeys
from relay_core.schedule import Schedule, Scheduled, ScheduleRunner

_RETRY_FOR = 10.0


@click.group("schedule", cls=Group)
def schedule() -> None:
    """Add, list, remove and run recurring jobs."""


@schedule.command("add")
@click.argument("name")
@click.argument("payload", type=values.payload, default="")
@click.option("--queue", "-q", required=True, help="The queue its jobs go to.", shell_complete=queue_names)
@click.option("--cron", metavar="EXPR", help="Minute, hour, day, month, weekday, e.g. '0 3 * * *'; seconds may follow.")
@click.option("--every", type=values.duration, metavar="DURATION", help="Time between two ticks, from 0.1 s on.")
@click.option("--tz", default="UTC", show_default=True, help="Time zone of --cron, e.g. Europe/Berlin.")
@click.option(
    "--missed",
    type=click.Choice(("once", "skip", "all")),
    default="once",
    show_default=True,
    help="What ticks become that nobody was there for: one job for all, none, or one each.",
)
@click.option("--catch-up", type=int, default=100, show_default=True, help="With all: at most the last so many.")
@click.option("--no-overlap", is_flag=True, help="Pass a tick over while the job of an earlier one is not over.")
@click.option("--priority", type=int, default=0, show_default=True, help="0 to 9, 9 first.")
@click.option("--max-retries", type=int, help="Failures after which a job is dead. Default: the worker's policy.")
@click.option("--max-deliveries", type=int, help="Deliveries without an answer after which a job is dead.")
@click.option(
    "--header",
    "headers",
    multiple=True,
    type=values.header,
    metavar="NAME=VALUE",
    help="A text that travels with each job; repeatable.",
)
@pass_session
def add(
    session: Session,
    /,
    name: str,
    payload: bytes,
    queue: str,
    no_overlap: bool,
    headers: tuple[tuple[str, str], ...],
    **options: Any,
) -> None:
    """Store a recurring job, or change the one of this name. Adding the same again changes nothing.

    PAYLOAD is the text itself, - for stdin, or @FILE; nothing by default. Some `relay schedule run` or `relay worker
    --schedule` must run.
    """
    stored = session.broker.schedule(name, queue, payload, overlap=not no_overlap, headers=dict(headers), **options)
    if session.json:
        emit(session, _document(stored))
    else:
        click.echo(f"schedule {name!r}: {_when(stored.schedule)}, next at {moment(stored.next_at)}")


@schedule.command("ls", cls=Look)
@pass_session
def ls(session: Session) -> None:
    """List the recurring jobs, each with its next tick."""
    found = session.broker.schedules()
    if session.json:
        emit(session, {"schedules": [_document(one) for one in found]})
        return
    if not found:
        click.echo("No schedules: `relay schedule add` makes one.")
        return
    broker = session.broker
    now = broker.store.run(commands.due(ScheduleKeys(session.prefix), 0)).now_ms / 1000
    columns = ("name", "queue", "when", "next", "missed", "job")
    table(columns, (_cells(one, now) for one in found))


@schedule.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@may_destroy("removed")
@pass_session
@click.pass_context
def rm(ctx: click.Context, session: Session, names: tuple[str, ...], yes: bool, dry_run: bool) -> None:
    """Remove recurring jobs. What they have enqueued stays. Exit code 1 when there is none of a name."""
    broker = session.broker
    there = {one.schedule.name for one in broker.schedules()}
    if there & set(names) and not dry_run:
        confirm(f"Remove {plural(len(there & set(names)), 'schedule')}?", yes=yes)
    removed = {name: name in there if dry_run else broker.unschedule(name) for name in dict.fromkeys(names)}
    if session.json:
        rows = [{"name": name, "removed": done} for name, done in removed.items()]
        emit(session, {"dry_run": dry_run, "schedules": rows})
    else:
        for name, done in removed.items():
            text = ("would be removed" if dry_run else "removed") if done else "is not there"
            click.echo(f"schedule {name!r} {text}", err=not done)
    if not all(removed.values()):
        ctx.exit(1)


@schedule.command("run")
@click.option("--once", is_flag=True, help="Look once, enqueue what is due, and end.")
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error"), case_sensitive=False),
    default="info",
    show_default=True,
    help="What is logged to stderr.",
)
@pass_session
def run(session: Session, once: bool, log_level: str) -> None:
    """Enqueue the job of each tick when it comes, until SIGTERM or Ctrl-C.

    Run as many as you like: each tick gets one job, and any of them may be killed.
    """
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    broker = session.open(retry_for=_RETRY_FOR, client_name="relay-schedule")
    broker.store.raw("PING")  # a wrong URL ends it here; later on it waits for its server
    if once:
        enqueued = len(broker.run_due().enqueued)
    else:
        runner = ScheduleRunner(broker)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: runner.stop())
        enqueued = runner.run()
    if session.json:
        emit(session, {"enqueued": enqueued})
    else:
        click.echo(f"{plural(enqueued, 'job')} enqueued.")


def _when(one: Schedule) -> str:
    if one.every is not None:
        return f"every {age(one.every)}"
    return f"{one.cron}" + ("" if one.tz == "UTC" else f" {one.tz}")


def _cells(stored: Scheduled, now: float) -> list[str]:
    one = stored.schedule
    text = text_of(one.payload)
    left = "-" if stored.next_at is None else f"in {age(stored.next_at - now)}" if stored.next_at > now else "due"
    missed = f"all, {one.catch_up}" if one.missed == "all" else one.missed
    job = plural(len(one.payload), "byte") if text is None else shortened(text, 48)
    return [one.name, one.queue, printable(_when(one)), left, missed + ("" if one.overlap else ", no overlap"), job]


def _document(stored: Scheduled) -> dict[str, Any]:
    one = stored.schedule
    return {
        "name": one.name,
        "queue": one.queue,
        "cron": one.cron,
        "every": one.every,
        "tz": one.tz,
        "missed": one.missed,
        "catch_up": one.catch_up,
        "overlap": one.overlap,
        "priority": one.priority,
        "max_retries": one.max_retries,
        "max_deliveries": one.max_deliveries,
        "headers": dict(one.headers),
        "payload": text_of(one.payload),
        "payload_bytes": len(one.payload),
        "next_at": stored.next_at,
    }
