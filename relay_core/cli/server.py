"""`relay server`: the embedded server of a data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from relay_core import embedded
from relay_core.cli.output import emit, plural
from relay_core.cli.session import Group, Session, pass_session
from relay_core.embedded import Status
from relay_core.errors import InvalidArgument
from relay_core.settings import parse_url

_DIR = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="The data folder. Default: that of --url, ./.relay for relay://.",
)


def _folder_of(session: Session, folder: Path | None) -> Path:
    """The folder that is meant. Raises InvalidArgument when neither an option nor the URL names one."""
    if folder is not None:
        return folder
    url = parse_url(session.url)
    if url.topology != "embedded":
        raise InvalidArgument(
            f"{url.safe()} is not an embedded server; name its data folder with --dir, or give --url relay://"
        )
    return Path(url.path)


def _document(status: Status) -> dict[str, Any]:
    return {
        "directory": str(status.directory),
        "running": status.running,
        "kept": status.kept,
        "pid": status.pid,
        "url": _url(status),
        "version": status.version,
        "clients": status.clients,
    }


def _url(status: Status) -> str | None:
    return f"relay+unix://{quote(status.socket)}" if status.socket else None


@click.group(cls=Group)
def server() -> None:
    """Start, stop and look at the embedded server."""


@server.command("start")
@_DIR
@pass_session
def start(session: Session, folder: Path | None) -> None:
    """Start the server, or join it.

    It is kept up without users until `stop`.
    """
    status = embedded.start(_folder_of(session, folder))
    if session.json:
        emit(session, _document(status))
    else:
        click.echo(f"{status.version or 'The server'} runs as process {status.pid}, data in {status.directory}")
        click.echo(f"reach it at {_url(status)}")


@server.command("stop")
@_DIR
@pass_session
def stop(session: Session, folder: Path | None) -> None:
    """End the server, users or not. Its data stays."""
    path = _folder_of(session, folder)
    was_running = embedded.stop(path)
    if session.json:
        emit(session, {"directory": str(path.resolve()), "was_running": was_running})
    else:
        click.echo(f"Stopped; the data stays in {path}." if was_running else f"No server ran in {path}.")


@server.command("status")
@_DIR
@pass_session
@click.pass_context
def status(ctx: click.Context, session: Session, folder: Path | None) -> None:
    """Say whether the server runs; exit code 1 when it does not."""
    found = embedded.status(_folder_of(session, folder))
    if session.json:
        emit(session, _document(found))
    elif found.running:
        until = "until `relay server stop`" if found.kept else "until its last user is gone"
        click.echo(f"{found.version or 'A server'} runs as process {found.pid} {until}, data in {found.directory}")
        click.echo(f"reach it at {_url(found)}; {plural(found.clients or 0, 'client')} now")
    else:
        click.echo(f"No server runs in {found.directory}.")
    if not found.running:
        ctx.exit(1)
