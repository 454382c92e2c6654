"""`relay migrate`: the jobs of other queue systems, moved into relay by what the adapters know of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

import click
from click.core import ParameterSource

from relay_core.cli.output import emit, plural, printable, progress, table
from relay_core.cli.session import TIMEOUT, Group, Session, shared_options
from relay_core.connection import SyncStore
from relay_core.errors import AuthError, InvalidArgument, PermissionDenied, Unavailable
from relay_core.migration import Found, Migration, Source
from relay_core.settings import StoreSettings, StoreUrl, parse_url

_LARGEST = 512 * 2**20
"""Bytes of a payload that is moved: whatever the other system took, which is what a server can keep."""

_EXTRAS = {"kombu": "celery", "dramatiq": "dramatiq"}
"""Which of relay's extras brings what a migration imports."""

_OTHER_NAMES = {"unix": "redis+unix", "redis+socket": "redis+unix"}
"""How redis-py and Celery call a server on a unix socket."""

_NO_HOST = re.compile(r"^([^/?#]*@|(?![^/?#]*@))(?=[:/?]|$)")
"""What is before the host of a URL that has none."""


class SourceUnavailable(click.ClickException):
    """The server that the jobs are on cannot be reached, as opposed to that of relay."""

    exit_code = 3


class _From(SyncStore):
    """The server that the jobs are on."""

    def raw(self, *args: Any) -> Any:
        try:
            return super().raw(*(arg.encode(errors="surrogateescape") if isinstance(arg, str) else arg for arg in args))
        except Unavailable as error:
            raise SourceUnavailable(
                f"{error}; that is where the jobs are: check --from and that its server runs. What was migrated is "
                "safe, migrate again for the rest"
            ) from error
        except (AuthError, PermissionDenied) as error:
            raise type(error)(f"{error}, that of --from") from error


def source_url(text: str) -> StoreUrl:
    """Where the jobs are now, as the other system names it. Without a host it means localhost."""
    scheme, separator, rest = text.partition("://")
    if scheme.lower() in ("redis", "rediss"):
        rest = _NO_HOST.sub(r"\1localhost", rest)
    return parse_url(f"{_OTHER_NAMES.get(scheme, scheme)}{separator}{rest.replace('virtual_host=', 'db=')}")


class Migrations(Group):
    """One command per migration that a plugin knows."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_known())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        migration = _known().get(cmd_name)
        return None if migration is None else _command(migration)


@click.group(cls=Migrations)
def migrate() -> None:
    """Move the jobs of another queue system into relay.

    Each job is stored here before it is taken away there, under the same id whenever it is read, so a migration may be
    stopped or killed at any point and started again: no job is lost. Stop the other system's workers first; its
    producers may go on, and the migration is repeated until nothing is left.
    """


def _known() -> dict[str, Migration]:
    from relay_core.cli.app import relay

    return relay.migrations()


def _command(migration: Migration) -> click.Command:
    origin = click.Option(
        ["--from", "origin"], required=True, metavar="URL", help="The server that the jobs are on, e.g. redis://host/0."
    )
    dry_run = click.Option(["--dry-run"], is_flag=True, help="Say what would be moved, and change nothing.")

    def run(origin: str, dry_run: bool, **options: Any) -> None:
        context = click.get_current_context()
        session = context.ensure_object(Session)
        timeout = TIMEOUT if session.timeout is None else session.timeout
        settings = StoreSettings(retry_for=timeout, client_name="relay-migrate", any_server=True)
        url = source_url(origin)
        store = _From(url, settings)
        context.call_on_close(store.close)
        prefix = migration.prefix(**options)
        if prefix is not None and not _names_prefix(context):
            session.prefix = prefix
            click.echo(f"Moving to the prefix {prefix!r}; name another one with --prefix.", err=True)
        looked_for = " ".join([f"--from {url.safe()}", *_choices(migration, options)])
        left = _run(session, _opened(migration, store, options), dry_run, looked_for)
        if left:
            context.exit(1)

    params = [origin, *migration.params, dry_run, *shared_options()]
    return click.Command(migration.name, callback=run, help=migration.help, params=params)


def _names_prefix(context: click.Context | None) -> bool:
    """Whether `--prefix` or RELAY_PREFIX was given, here or before the command."""
    while context is not None:
        if context.get_parameter_source("prefix") not in (None, ParameterSource.DEFAULT):
            return True
        context = context.parent
    return False


def _opened(migration: Migration, store: SyncStore, options: dict[str, Any]) -> Source:
    try:
        return migration.open(store, **options)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        raise InvalidArgument(
            f"relay migrate {migration.name} needs {module}: pip install 'relay-queue[{_EXTRAS[module]}]'"
        ) from error


def _choices(migration: Migration, options: dict[str, Any]) -> Iterator[str]:
    """The options by which a migration knows the jobs, as they were given or are by default: those with a name."""
    for param in migration.params:
        if isinstance(param.type, click.types.StringParamType):
            value = options[str(param.name)]
            for one in value if param.multiple else () if value is None else (value,):
                yield f"{param.opts[0]} {shlex.quote(printable(one))}"


def _run(session: Session, source: Source, dry_run: bool, looked_for: str) -> int:
    """Move all there is, and answer; the number of jobs that stay where they are."""
    broker = session.open(max_payload=_LARGEST)  # a URL that cannot be read is told of in a dry run, too
    found = list(source.found())
    done = 0
    if not dry_run:
        with progress("migrated", sum(one.count for one in found)) as note:
            for batch in source.batches():
                broker.adopt(batch)
                done += len(batch)
                note(len(batch))
    left = [one for one in source.left() if one.count]
    remaining = sum(one.count for one in left)
    if not done and not remaining and not any(one.count for one in found):
        click.echo(
            f"No jobs were found with {looked_for}. If there are some: is that their database (the number at the URL's "
            "end), and are these their options?",
            err=True,
        )
    if session.json:
        document = {
            "dry_run": dry_run,
            "found": [_document(one) for one in found],
            "migrated": done,
            "left": [_document(one) | {"note": one.note} for one in left],
        }
        emit(session, document)
        return remaining
    _show(found)
    total = sum(one.count for one in found)
    outcome = f"{plural(total, 'job')} would be migrated" if dry_run else f"{plural(done, 'job')} migrated"
    click.echo(f"{outcome} to {broker.url.safe()}.")
    for one in left:
        click.echo(
            f"{plural(one.count, 'job')} of queue {printable(one.queue)!r} left: {printable(one.note)}", err=True
        )
    return remaining


def _document(one: Found) -> dict[str, Any]:
    return {"queue": one.queue, "state": one.state, "count": one.count}


def _show(found: Iterable[Found]) -> None:
    rows = [(one.queue, one.state, str(one.count)) for one in found if one.count]
    if rows:
        table(("queue", "state", "jobs"), rows, right=("jobs",))
