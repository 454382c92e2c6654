"""`show` and `ls`, which `relay job` and `relay dlq` share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import click

from relay_core import commands
from relay_core.broker import Broker
from relay_core.cli import history
from relay_core.cli.jobview import document, summary_document, text_of, what
from relay_core.cli.output import age, emit, plural, printable, shortened, table
from relay_core.cli.session import Session
from relay_core.cli.stats import QueueNotFound, known
from relay_core.commands import WorkerInfo
from relay_core.errors import JobNotFound
from relay_core.job import JobSummary, State, StoredJob

_SHOWN = 4000
"""Characters of a payload shown to people."""

_SUSPECTS = 5


def list_jobs(
    session: Session,
    queue: str,
    states: Sequence[State],
    limit: int,
    found: Iterator[tuple[StoredJob, JobSummary | None]],
    *,
    errors: bool,
) -> None:
    """Print the first `limit` of the jobs found. Payloads are let go one by one.

    :param states: those that were looked at
    :param errors: show what failed, if anything did
    """
    now = known(session.broker, queue).now
    first = islice(found, limit)
    if session.json:
        rows = [document(job, summary, payload=False) for job, summary in first]
        emit(session, {"queue": queue, "jobs": rows, "more": next(found, None) is not None})
        return
    failed = False
    cells = []
    for job, summary in first:
        failed = failed or bool(job.error)
        cells.append(_cells(job, summary, now))
    if not cells:
        click.echo(f"No such jobs in queue {queue!r}.")
        return
    # in a list of all states there is no room for errors, which mostly are those of dead jobs
    columns = _columns(states, failed and (errors or len(states) == 1))
    table(columns, ([row[column] for column in columns] for row in cells), right=("pri", "age", "tries"))
    if next(found, None) is not None:
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
    broker = session.broker
    (stored,) = broker.store.run(commands.show(broker.settings.keys(queue), [id]))
    if stored is None:
        try:
            known(broker, queue)
        except QueueNotFound as error:
            raise JobNotFound(f"job {id} in {error}") from None
    if stored is None or (dead and stored.state != "dead"):
        where = f"is {stored.state}, not dead" if stored else "is not there: it was never stored, or it is done"
        raise JobNotFound(f"job {id} in queue {queue!r} {where}; look with `relay job ls --queue {queue}`")
    job, problem = _decoded(broker, stored)
    if raw:
        sys.stdout.buffer.write(job.payload)
        sys.stdout.buffer.flush()
        return
    summary = broker.plugins.describe(job)
    if session.json:
        suspects = [one.name for one in _suspects(broker, job)]
        more = {"payload_error": problem, "history": history.document(job), "may_be_held_by": suspects}
        emit(session, document(job, summary, payload=True) | more)
        return
    for name, value in _facts(job, summary):
        click.echo(f"{name:<12}{printable(value)}")
    _history(broker, job)
    _payload(job.payload, problem)


def _decoded(broker: Broker, job: StoredJob) -> tuple[StoredJob, str | None]:
    """The job with its payload decoded by the plugins; else as it is stored, and why."""
    try:
        return replace(job, payload=broker.plugins.decode(job.payload, job.queue)), None
    except Exception as error:  # of a plugin; somebody may be looking for just this
        return job, repr(error)


def _history(broker: Broker, job: StoredJob) -> None:
    click.echo("\nHistory")
    for line in history.lines(job, broker.stats(job.queue).now):
        click.echo(f"  {printable(line)}")
    suspects = _suspects(broker, job)
    if suspects:
        names = ", ".join(f"{one.host}:{one.pid} ({one.face})" for one in suspects[:_SUSPECTS])
        more = f" and {len(suspects) - _SUSPECTS} more" if len(suspects) > _SUSPECTS else ""
        click.echo(f"             by one of the live workers of its queue: {printable(names)}{more}")
    click.echo(f"  ({history.NOT_KEPT})")


def _suspects(broker: Broker, job: StoredJob) -> list[WorkerInfo]:
    """Who may hold the job: a claim is known by its token, not by its worker."""
    return [one for one in broker.workers() if job.queue in one.queues and one.inflight] if job.held else []


def _payload(payload: bytes, problem: str | None) -> None:
    kind, shown, whole = _laid_out(payload)
    click.echo(f"\nPayload: {plural(len(payload), 'byte')}, {kind}")
    if problem is not None:
        click.echo(f"It is shown as it is stored, for a plugin could not decode it: {printable(problem)}", err=True)
    click.echo(printable(shown[:_SHOWN], lines=True))
    if len(shown) > _SHOWN or not whole:
        click.echo("The payload goes on: --raw writes all of it.", err=True)


def _laid_out(payload: bytes) -> tuple[str, str, bool]:
    """What kind of bytes they are, how they are shown, and whether that is all of them.

    JSON is given line breaks and indents, also one document per line, as Celery's head and body are. What is not text
    is shown as hexadecimal bytes, after a first line of JSON if it has one.
    """
    text = text_of(payload)
    if text is not None:
        pretty = _pretty(text) or _pretty_lines(text)
        return ("text", text, True) if pretty is None else ("JSON", pretty, True)
    head, newline, body = payload.partition(b"\n")
    first = _pretty(text_of(head) or "") if newline else None
    rest = payload if first is None else body
    shown = rest[: _SHOWN // 4].hex(" ")
    whole = len(rest) <= _SHOWN // 4
    return ("not text", shown, whole) if first is None else ("JSON and what is not text", f"{first}\n{shown}", whole)


def _pretty(text: str) -> str | None:
    """A JSON object or array with line breaks and indents; None for what is neither."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _pretty_lines(text: str) -> str | None:
    """Several of them, one on each line."""
    lines = [_pretty(line) for line in text.splitlines() if line.strip()]
    return None if None in lines or not lines else "\n".join(line for line in lines if line is not None)


def _facts(job: StoredJob, summary: JobSummary | None) -> list[tuple[str, str]]:
    facts = [("id", job.id), ("queue", job.queue), ("state", job.state or "none: run `relay audit`")]
    if summary is not None:
        told = summary_document(summary)
        extra = told.pop("extra")
        told["task"] = told.pop("name")
        order = ("task", "args", "kwargs", "eta")
        facts += [(name, str(told[name])) for name in order if told[name]]
        facts += [(name, str(value)) for name, value in extra.items()]
    facts.append(("priority", "-" if job.priority is None else str(job.priority)))
    if job.options.dedup_key is not None:
        facts.append(("dedup key", job.options.dedup_key))
    limits = (("max retries", job.options.max_retries), ("max deliv.", job.options.max_deliveries))
    facts += [(name, str(value)) for name, value in limits if value is not None]
    facts += [("header", f"{name}={value}") for name, value in job.options.headers.items()]
    return facts
