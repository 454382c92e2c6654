"""`relay version`: what is installed, and which server answers."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, entry_points
from importlib.metadata import version as version_of
from pathlib import Path

import click

from relay_core import __version__, embedded
from relay_core.cli.output import emit
from relay_core.cli.session import Command, Session, pass_session
from relay_core.errors import RelayError

_PATIENCE = 0.5
"""Seconds for a server to answer; who wants to know why it does not asks `relay doctor`."""


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version_of(name)
    except PackageNotFoundError:
        return None


def server_version(info: bytes) -> str:
    """`valkey 9.1.0` or `redis 7.0.15`, from an INFO reply."""
    facts = dict(re.findall(r"^(\w+_version):(.*?)\r?$", info.decode(errors="replace"), re.MULTILINE))
    if "valkey_version" in facts:
        return f"valkey {facts['valkey_version']}"
    return f"redis {facts.get('redis_version', 'of unknown version')}"


def _server(session: Session) -> str | None:
    """Which server answers, or None. Never starts the embedded one."""
    broker = session.open(retry_for=0.0, any_server=True, connect_timeout=_PATIENCE, socket_timeout=_PATIENCE)
    if broker.url.topology == "embedded":
        return embedded.status(Path(broker.url.path)).version
    try:
        return server_version(broker.store.raw("INFO", "server"))
    except RelayError:
        return None


@click.command("version", cls=Command)
@pass_session
def version(session: Session) -> None:
    """Show the versions of relay, Python, redis-py, frameworks and, if it can be reached, the server."""
    server = _server(session)
    plugins = session.broker.plugins
    facts = {
        "relay": __version__,
        "python": platform.python_version(),
        "redis-py": installed("redis"),
        "celery": installed("celery"),
        "dramatiq": installed("dramatiq"),
        "server": server,
    }
    names = sorted(entry.name for entry in entry_points(group="relay"))
    if session.json:
        emit(session, {**facts, "plugins": names, "adapters": dict(sorted(plugins.adapters.items()))})
        return
    for name, value in facts.items():
        missing = "not reached (`relay doctor` says why)" if name == "server" else "not installed"
        click.echo(f"{name:<10}{value or missing}")
    click.echo(f"{'plugins':<10}{', '.join(names) or 'none'}")
    for name, text in sorted(plugins.adapters.items()):
        click.echo(f"{'adapter':<10}{name}: {text}")
