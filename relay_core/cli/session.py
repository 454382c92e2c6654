"""What all commands share: the options that say which store to use and how to answer, and the broker."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TextIO, TypeVar

import click

from relay_core.broker import Broker
from relay_core.errors import InvalidArgument, UnsafeStore

TIMEOUT = 5.0
"""Seconds for which a command goes on trying to reach the server."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Session:
    """One run of the command line.

    :ivar url: of the store, see `Broker`
    :ivar prefix: what every key begins with
    :ivar json: answer with one JSON document on stdout
    :ivar timeout: seconds for which an unreachable server is tried; None: the command's default
    :ivar any_server: take a server that is not fit to keep jobs, too
    :ivar wants_json: `--json` was typed, whether or not the line could be read up to there
    """

    url: str = "relay://"
    prefix: str = "relay"
    json: bool = False
    timeout: float | None = None
    any_server: bool = False
    answered: bool = False
    wants_json: bool = False
    _broker: Broker | None = None

    def open(self, *, retry_for: float = TIMEOUT, **options: Any) -> Broker:
        """The broker of this run, made at the first call with these options of `Broker`. No I/O."""
        if self._broker is None:
            if self.timeout is not None:
                retry_for = self.timeout
                options.setdefault("connect_timeout", max(self.timeout, 0.1))
                # of a server that hangs, too; but each script has a second, which the largest on a slow one may need
                options.setdefault("socket_timeout", min(max(self.timeout, 1.0), TIMEOUT))
            options.setdefault("client_name", "relay-cli")
            options.setdefault("any_server", self.any_server)
            self._broker = Broker(self.url, prefix=self.prefix, quiet=self.json, retry_for=retry_for, **options)
        return self._broker

    @property
    def broker(self) -> Broker:
        return self.open()

    @property
    def where(self) -> str:
        """The store, for people: the same server has more of them."""
        return f"{self.broker.url.safe()} with the prefix {self.prefix!r}"

    def close(self) -> None:
        if self._broker is not None:
            self._broker.close()
            self._broker = None


pass_session = click.make_pass_decorator(Session, ensure=True)
"""Decorator of a command that takes the Session as its first argument. For commands of plugins too."""


def _note(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """An option of the innermost command wins over the same one before it."""
    session = ctx.ensure_object(Session)
    if value is not None and param.name is not None:
        setattr(session, param.name, value)


def shared_options(*, environment: bool = False) -> list[click.Option]:
    """`--url`, `--prefix`, `--timeout` and `--json`; the environment speaks once, at the root."""
    return [
        click.Option(
            ["--url"],
            envvar="RELAY_URL" if environment else None,
            expose_value=False,
            callback=_note,
            help="The store. Default: RELAY_URL, or relay:// (the embedded server in ./.relay).",
        ),
        click.Option(
            ["--prefix"],
            envvar="RELAY_PREFIX" if environment else None,
            expose_value=False,
            callback=_note,
            help="What every key begins with. Default: RELAY_PREFIX, or relay.",
        ),
        click.Option(
            ["--timeout"],
            type=click.FloatRange(0, 86_400),
            expose_value=False,
            callback=_note,
            metavar="SECONDS",
            help="How long to try to reach the server. Default: 5; 10 for worker.",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            default=None,
            is_eager=True,
            expose_value=False,
            callback=_note,
            help="Answer with one JSON document on stdout.",
        ),
    ]


class Command(click.Command):
    """A command with the shared options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += shared_options()


class Look(Command):
    """A command that changes nothing. A server that may evict jobs is just what its user has to see, so it is warned
    of and shown."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UnsafeStore as error:
            click.echo(f"Warning: {error}", err=True)
            session = ctx.ensure_object(Session)
            session.close()
            session.any_server = True
            return super().invoke(ctx)


class Group(click.Group):
    """A group whose commands have the shared options."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], self.list_commands(ctx), n=1) if args else []
            if near and "Did you mean" not in error.message:
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None
            raise


def may_destroy(what: str) -> Callable[[F], F]:
    """Give a command `--yes` and `--dry-run`; see `confirm`."""

    def decorate(function: F) -> F:
        function = click.option("--dry-run", is_flag=True, help=f"Say what would be {what}, and change nothing.")(
            function
        )
        return click.option("--yes", "-y", is_flag=True, help="Do not ask.")(function)

    return decorate


def is_terminal(stream: TextIO | None) -> bool:
    """None is a stream that was closed by who started this."""
    return stream is not None and stream.isatty()


def confirm(question: str, *, yes: bool) -> None:
    """Go on after `--yes` or a yes on the terminal; refuse where nobody can be asked.

    Raises InvalidArgument without a terminal, click.Abort for a no.
    """
    if yes:
        return
    if not is_terminal(sys.stdin):
        raise InvalidArgument(
            f"{question} Nobody can be asked here: give --yes to do it, --dry-run to see what it does"
        )
    click.confirm(question, abort=True, err=True)
