"""The root of the command line: loads commands when they are asked for, and turns errors into exit codes."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from relay_core import __version__
from relay_core.cli.output import emit
from relay_core.cli.session import Group, Session, shared_options
from relay_core.errors import EmbeddedError, InvalidArgument, PluginError, RelayError, Unavailable
from relay_core.migration import Migration

FAILED, BAD_INPUT, UNREACHABLE = 1, 2, 3

COMMANDS = {
    "demo": ("relay_core.cli.running:demo", "Three frameworks index real files while a worker is killed."),
    "worker": ("relay_core.cli.workers:worker", "Run a handler on the jobs of some queues, or list the live workers."),
    "top": ("relay_core.cli.top:top", "Queues as they change: depths, rates, waits, workers."),
    "stats": ("relay_core.cli.stats:stats", "Depths, ages, limits and lifetime counters of queues."),
    "queue": ("relay_core.cli.queues:queue", "List, pause, resume, purge, limit and remove queues."),
    "job": ("relay_core.cli.jobs:job", "List, show, enqueue and cancel jobs."),
    "dlq": ("relay_core.cli.dlq:dlq", "List, show, requeue and purge dead jobs."),
    "migrate": ("relay_core.cli.migrate:migrate", "Move the jobs of another queue system into relay."),
    "schedule": ("relay_core.cli.schedules:schedule", "Add, list, remove and run recurring jobs."),
    "audit": ("relay_core.cli.audit:audit", "Find jobs that are in no state or in two, and mend them."),
    "exporter": ("relay_core.cli.exporter:exporter", "Serve Prometheus metrics of all queues."),
    "doctor": ("relay_core.cli.doctor:doctor", "Is the server fit to keep jobs?"),
    "server": ("relay_core.cli.server:server", "Start, stop and look at the embedded server."),
    "completion": ("relay_core.cli.completion:completion", "What makes a shell complete commands, options and queues."),
    "version": ("relay_core.cli.version:version", "Versions of relay and what it runs on."),
}


def exit_code(error: RelayError) -> int:
    """3 when there is no server to ask, 2 for what the caller got wrong, else 1."""
    if isinstance(error, (Unavailable, EmbeddedError)):
        return UNREACHABLE
    return BAD_INPUT if isinstance(error, InvalidArgument) else FAILED


class Relay(Group):
    """Built-in commands by name, then those that plugins add."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += shared_options(environment=True)
        self.params.append(
            click.Option(
                ["--version"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_version,
                help="Say which version of relay this is, and end; `relay version` says more.",
            )
        )
        self._extras: Group | None = None

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:  # of the answer, whose disk is full, say; a reader that has left is click's business
            click.echo(f"Error: {error}", err=True)
            sys.exit(FAILED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        session = ctx.ensure_object(Session)
        session.wants_json = "--json" in args[: args.index("--") if "--" in args else None]
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _answer(session, error, error.format_message())
            raise

    def _added(self) -> dict[str, click.Command]:
        """Commands of plugins. Looking for them reads the metadata of all distributions, so it is done late."""
        if self._extras is None:
            from relay_core.plugins import Plugins

            self._extras = Group("plugins")
            Plugins().register_commands(self._extras)
        return {name: added for name, added in self._extras.commands.items() if not isinstance(added, Migration)}

    def migrations(self) -> dict[str, Migration]:
        """Those that plugins know; they are under `relay migrate`."""
        self._added()
        assert self._extras is not None
        return {name: added for name, added in self._extras.commands.items() if isinstance(added, Migration)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        try:
            added = self._added()
        except PluginError as error:
            click.echo(f"Warning: {error}", err=True)
            added = {}
        return [*COMMANDS, *sorted(added.keys() - COMMANDS.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return self._added().get(cmd_name)
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table above: printing it imports none of them."""
        rows = []
        for name in self.list_commands(ctx):
            if name in COMMANDS:
                rows.append((name, COMMANDS[name][1]))
            elif (command := self.get_command(ctx, name)) is not None and not command.hidden:
                rows.append((name, command.get_short_help_str()))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """From the table above, so that a key press imports none of the commands."""
        if incomplete[:1] == "-":
            return click.Command.shell_complete(self, ctx, incomplete)
        added = {name: command.get_short_help_str() for name, command in self._added().items() if not command.hidden}
        known = added | {name: text for name, (_where, text) in COMMANDS.items()}
        return [CompletionItem(name, help=text) for name, text in sorted(known.items()) if name.startswith(incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        session = ctx.ensure_object(Session)
        ctx.call_on_close(session.close)
        try:
            return super().invoke(ctx)
        except RelayError as error:
            advice = "; check --url (RELAY_URL) and that the server runs" if isinstance(error, Unavailable) else ""
            click.echo(f"Error: {error}{advice}", err=True)
            _answer(session, error, str(error))
            ctx.exit(exit_code(error))
        except click.ClickException as error:
            _answer(session, error, error.format_message())
            raise
        except click.Abort as error:
            _answer(session, error, "nothing was done: the answer was no")
            raise


def _version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        session = ctx.ensure_object(Session)
        if session.wants_json:
            emit(session, {"relay": __version__})
        else:
            click.echo(f"relay {__version__}")
        ctx.exit()


def _answer(session: Session, error: Exception, message: str) -> None:
    """With --json an error is a document too, unless the answer is out already."""
    unread = session.wants_json and isinstance(error, click.UsageError)  # it may come before --json
    if (session.json or unread) and not session.answered:
        emit(session, {"error": {"type": type(error).__name__, "message": message}})


@click.command(cls=Relay, context_settings={"help_option_names": ["-h", "--help"]})
def relay() -> None:
    """A job queue on Redis and Valkey: run workers, look at queues, mend what went wrong.

    Exit codes: 0 fine; 1 what was asked for failed, was not found or is unhealthy; 2 bad input; 3 the server
    cannot be reached.
    """
