"""`relay completion`: what a shell sources to complete commands, options and names of queues."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from relay_core import embedded
from relay_core.broker import Broker
from relay_core.cli.session import Command, Session
from relay_core.errors import RelayError

_SHELLS = ("bash", "zsh", "fish")

_PATIENCE = 0.5
"""Seconds for which a key press waits for the server."""


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options and the names of queues.

    \b
    bash: eval "$(relay completion bash)"         in ~/.bashrc
    zsh:  eval "$(relay completion zsh)"          in ~/.zshrc, after compinit
    fish: relay completion fish | source          in ~/.config/fish/config.fish
    """
    found = get_completion_class(shell)
    assert found is not None, f"click knows no completion for {shell}"
    source = found(ctx.find_root().command, {}, "relay", "_RELAY_COMPLETE").source_vars()
    click.echo(found.source_template % source)


def queues(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of queues, if the server answers at once; it never starts the embedded one."""
    session = ctx.find_root().ensure_object(Session)
    names: list[str] = []
    quick: dict[str, Any] = {"retry_for": 0.0, "connect_timeout": _PATIENCE, "socket_timeout": _PATIENCE}
    with suppress(RelayError), Broker(session.url, prefix=session.prefix, quiet=True, **quick) as broker:
        if broker.url.topology != "embedded" or embedded.status(Path(broker.url.path)).version is not None:
            names = broker.queues()
    return [
        CompletionItem(name) for name in names if name.startswith(incomplete) and name.isprintable() and " " not in name
    ]
