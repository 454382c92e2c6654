"""`relay worker`: `run`, which may be left out, and `ls`."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from relay_core.cli.completion import queues as queue_names
from relay_core.cli.output import age, emit, table
from relay_core.cli.running import worker as run
from relay_core.cli.session import Group, Look, Session, pass_session
from relay_core.commands import WorkerInfo


class Workers(Group):
    """`relay worker MODULE:HANDLER` is `relay worker run MODULE:HANDLER`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        completing = ctx.resilient_parsing and not args
        if not completing and (not args or args[0] not in self.commands):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [*super().shell_complete(ctx, incomplete), *run.shell_complete(click.Context(run, ctx), incomplete)]


@click.group("worker", cls=Workers)
def worker() -> None:
    """Run a handler on the jobs of some queues, or list the live workers."""


worker.add_command(run, "run")


@worker.command("ls", cls=Look)
@click.option("--queue", "-q", help="Only workers that serve this queue.", shell_complete=queue_names)
@click.option(
    "--face",
    type=click.Choice(("worker", "celery", "dramatiq")),
    help="Only workers of this face; worker: relay's own.",
)
@pass_session
def ls(session: Session, queue: str | None, face: str | None) -> None:
    """List the live worker processes of every face, by host.

    A process that was killed is listed for up to 16 seconds after its last beat.
    """
    found = [
        one
        for one in session.broker.workers()
        if (queue is None or queue in one.queues) and (face is None or face == one.face)
    ]
    if session.json:
        emit(session, {"workers": [document(one) for one in found]})
    elif not found:
        click.echo(f"No such workers are alive at {session.where}.")
    else:
        columns = ("host", "pid", "face", "queue", "slots", "in flight", "up", "last beat")
        table(columns, (_cells(one) for one in found), right=("pid", "slots", "in flight", "up"))


def document(one: WorkerInfo) -> dict[str, Any]:
    """One worker for `--json`. Times are unix seconds of the server; `concurrency` is null when it is not known."""
    return {
        "name": one.name,
        "host": one.host,
        "pid": one.pid,
        "face": one.face,
        "queues": list(one.queues),
        "concurrency": one.concurrency or None,
        "inflight": one.inflight,
        "started_at": one.started_at,
        "beat_at": one.beat_at,
        "silence": round(one.silence, 3),
    }


def _cells(one: WorkerInfo) -> list[str]:
    return [
        one.host,
        str(one.pid),
        "relay" if one.face == "worker" else one.face,
        ", ".join(one.queues) or "-",
        str(one.concurrency or "-"),
        str(one.inflight),
        age(one.now - one.started_at),
        f"{age(one.silence)} ago",
    ]
