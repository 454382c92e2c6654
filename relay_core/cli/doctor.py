"""`relay doctor`: is the server fit to keep jobs?"""

from __future__ import annotations

import click

from relay_core.cli.checks import examine
from relay_core.cli.finding import Finding
from relay_core.cli.output import emit, table
from relay_core.cli.session import Command, Session, pass_session
from relay_core.errors import EmbeddedError, Unavailable


@click.command("doctor", cls=Command)
@pass_session
@click.pass_context
def doctor(ctx: click.Context, session: Session) -> None:
    """Check topology, version, eviction, memory, persistence, replicas, clock, layout, and that a job gets through.

    Exit code 1 when there is an error, 3 when there is no server; warnings are fine.
    """
    findings: list[Finding] = []
    code = 0
    try:
        findings.extend(examine(session.broker))
    except (Unavailable, EmbeddedError) as error:
        others = bool(findings)  # another primary of a cluster has answered
        findings.append(Finding("reachable", "error", str(error)))
        if others:
            findings.append(Finding("other checks", "info", "not made: bring that server back and ask again"))
        code = 3
    errors = [one for one in findings if one.level == "error"]
    if session.json:
        rows = [{"check": one.name, "level": one.level, "detail": one.detail} for one in findings]
        emit(session, {"ok": not errors, "checks": rows})
    else:
        table(("check", "level", "found"), ([one.name, one.level, one.detail] for one in findings))
    if errors:
        ctx.exit(code or 1)
