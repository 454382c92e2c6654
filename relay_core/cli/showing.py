"""`show` and `ls`, which `relay job` and `relay dlq` share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain, islice

import click

from relay_core.cli.jobview import document, find, summary_document, text_of, what
from relay_core.cli.output import age, emit, moment, plural, printable, shortened, table
from relay_core.cli.session import Session
from relay_core.errors import JobNotFound
from relay_core.job import JobSummary, State, StoredJob

_SHOWN = 4000
"""Characters of a payload shown to people."""


def list_jobs(
    session: Session, queue: str, states: Sequence[State], limit: int, task: str | None, error: str | None
) -> None:
    """Print the first `limit` jobs of these states."""
    broker = session.broker
    found = chain.from_iterable(find(broker, queue, state, task=task, error=error) for state in states)
    jobs = list(islice(found, limit + 1))
    more = len(jobs) > limit
    del jobs[limit:]
    if session.json:
        emit(
            session,
            {"queue": queue, "jobs": [document(job, summary, payload=False) for job, summary in jobs], "more": more},
        )
        return
    if not jobs:
        click.echo(f"No such jobs in queue {queue!r}.")
        return
    now = broker.stats(queue).now
    # in a list of all states there is no room for errors, which mostly are those of dead jobs
    failures = (error is not None or len(states) == 1) and any(job.error for job, _summary in jobs)
    columns = _columns(states, failures)
    rows = (_cells(job, summary, now) for job, summary in jobs)
    table(columns, ([cells[column] for column in columns] for cells in rows), right=("pri", "age", "tries"))
    if more:
        click.echo(f"There are more: raise --limit ({limit}).", err=True)


def _columns(states: Sequence[State], failures: bool) -> list[str]:
    """Those that tell jobs of these states apart, so that they fit a terminal."""
    if tuple(states) == ("dead",):
        return ["id", "tries", "when", "job", "error"]
    head = ["id", "state"] if len(states) > 1 else ["id"]
    return [*head, "pri", "age", "tries", "when", "job", *(["error"] if failures else [])]


def _cells(job: StoredJob, summary: JobSummary | None, now: float) -> dict[str, str]:
    return {
        "id": job.id,
        "state": job.state or "-",
        "pri": "-" if job.priority is None else str(job.priority),
        "age": "-" if job.created_at is None else age(now - job.created_at),
        "tries": str(job.deliveries),
        "when": _when(job, now),
        "job": what(job, summary),
        "error": shortened(" ".join(part for part in (job.reason, job.error) if part), 60),
    }


def _when(job: StoredJob, now: float) -> str:
    if job.state == "dead" and job.failed_at is not None:
        return f"died {age(now - job.failed_at)} ago"
    if job.due_at is None:
        return "-"
    if job.state == "delayed":
        return f"due in {age(job.due_at - now)}" if job.due_at > now else "due"
    return f"lease {age(job.due_at - now)}" if job.due_at > now else "lease over"


def show_job(session: Session, queue: str, id: str, *, raw: bool, dead: bool = False) -> None:
    """Print all that is known of a job. Raises JobNotFound.

    :param raw: write the bytes of the payload and nothing else
    :param dead: only if it is dead
    """
    job = session.broker.show(queue, id)
    if job is None or (dead and job.state != "dead"):
        where = f"is {job.state}, not dead" if job else "is not there: it was never stored, or it is done"
        raise JobNotFound(f"job {id} in queue {queue!r} {where}; look with `relay job ls --queue {queue}`")
    if raw:
        sys.stdout.buffer.write(job.payload)
        sys.stdout.buffer.flush()
        return
    summary = session.broker.plugins.describe(job)
    if session.json:
        emit(session, document(job, summary, payload=True))
        return
    for name, value in _facts(job, summary):
        click.echo(f"{name:<12}{printable(value)}")
    text = text_of(job.payload)
    click.echo(f"{'payload':<12}{plural(len(job.payload), 'byte')}" + ("" if text is not None else ", not text"))
    click.echo()
    click.echo(printable(text[:_SHOWN], lines=True) if text is not None else job.payload[: _SHOWN // 4].hex(" "))
    if len(job.payload) > (_SHOWN if text is not None else _SHOWN // 4):
        click.echo("The payload goes on: --raw writes all of it.", err=True)


def _facts(job: StoredJob, summary: JobSummary | None) -> list[tuple[str, str]]:
    facts = [("id", job.id), ("queue", job.queue), ("state", job.state or "none: run `relay audit`")]
    if summary is not None:
        told = summary_document(summary)
        extra = told.pop("extra")
        told["task"] = told.pop("name")
        order = ("task", "args", "kwargs", "eta")
        facts += [(name, str(told[name])) for name in order if told[name]]
        facts += [(name, str(value)) for name, value in extra.items()]
    facts += [
        ("priority", "-" if job.priority is None else str(job.priority)),
        ("created", moment(job.created_at)),
        ("deliveries", str(job.deliveries)),
        ("retries", str(job.retries)),
    ]
    if job.due_at is not None:
        facts.append(("due" if job.state == "delayed" else "lease ends", moment(job.due_at)))
    if job.options.dedup_key is not None:
        facts.append(("dedup key", job.options.dedup_key))
    limits = (("max retries", job.options.max_retries), ("max deliv.", job.options.max_deliveries))
    facts += [(name, str(value)) for name, value in limits if value is not None]
    facts += [("header", f"{name}={value}") for name, value in job.options.headers.items()]
    if job.failed_at is not None:
        facts.append(("failed", moment(job.failed_at)))
    facts += [(name, value) for name, value in (("reason", job.reason), ("error", job.error)) if value]
    return facts
