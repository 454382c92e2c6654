"""`relay audit`: is every job in one state, and in one only?"""

from __future__ import annotations

import click

from relay_core.cli.completion import queues as queue_names
from relay_core.cli.output import emit, plural, progress, table
from relay_core.cli.session import Command, Session, pass_session
from relay_core.cli.stats import known, tell_left_out
from relay_core.errors import StoreError, Unavailable


@click.command("audit", cls=Command)
@click.argument("queues", nargs=-1, metavar="[QUEUE...]", shell_complete=queue_names)
@click.option("--no-repair", is_flag=True, help="Only look.")
@pass_session
@click.pass_context
def audit(ctx: click.Context, session: Session, queues: tuple[str, ...], no_repair: bool) -> None:
    """Find jobs that are in no state or in two, and mend them. Exit code 1 when there were any.

    Of all queues, one that cannot be read does not keep the others from being looked at; the exit code is 1 too.
    """
    broker = session.broker
    for name in queues:
        known(broker, name)
    names = queues or tuple(broker.queues())
    reports, left_out = [], {}
    with progress("checked", None) as note:
        for name in names:
            try:
                reports.append(broker.audit(name, not no_repair, note))
            except (StoreError, Unavailable) as error:
                if queues or (isinstance(error, Unavailable) and not broker.url.several):
                    raise
                left_out[name] = str(error)
    clean = all(report.clean for report in reports)
    tell_left_out(left_out)
    if session.json:
        rows = [
            {
                "queue": report.queue,
                "checked": report.checked,
                "clean": report.clean,
                "repaired": report.repaired and not report.clean,
                "findings": dict(report.findings),
            }
            for report in reports
        ]
        emit(session, {"clean": clean, "queues": rows, "left_out": left_out})
    else:
        findings = [(r.queue, id, finding) for r in reports for id, finding in r.findings.items()]
        if findings:
            table(("queue", "id", "finding"), findings)
        checked = sum(report.checked for report in reports)
        state = "clean" if clean else f"{len(findings)} found" + (", none mended" if no_repair else ", all mended")
        click.echo(f"{plural(checked, 'job')} in {plural(len(reports), 'queue')} checked: {state}.")
    if left_out or not clean:
        ctx.exit(1)
