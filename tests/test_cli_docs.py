"""docs/cli.md against the real commands: each command and option is described, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from relay_core.cli.app import COMMANDS, relay
from relay_core.cli.session import Group, shared_options
from tests.command_line import Cli
from tests.servers import Server

PAGE = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
SHARED = {name for option in shared_options() for name in option.opts}


def leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """All commands that do something, by their full names."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in COMMANDS if command is relay else command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        yield from leaves(child, f"{path} {name}")


REAL = dict(leaves(relay, "relay"))


def sections() -> dict[str, str]:
    """The text under each `### relay …` heading."""
    parts = re.split(r"^#{2,3} (.+)$", PAGE, flags=re.MULTILINE)
    return {title: text for title, text in zip(parts[1::2], parts[2::2], strict=True) if title.startswith("relay ")}


def options_in(text: str) -> set[str]:
    """What the first column of a table of options names."""
    rows = re.findall(r"^\| (`-.*?) \|", text, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(--?[\w-]+)`", row)}


def test_the_page_describes_each_command_and_no_other() -> None:
    assert list(sections().keys() - REAL.keys()) == []
    assert list(REAL.keys() - sections().keys()) == []


@pytest.mark.parametrize("path", REAL)
def test_the_page_describes_each_option_and_no_other(path: str) -> None:
    real = {name for param in REAL[path].params if isinstance(param, click.Option) for name in param.opts}
    assert options_in(sections()[path]) == real - SHARED
    assert real >= SHARED, "every command has the shared options"


def test_the_page_describes_the_shared_options() -> None:
    assert options_in(PAGE.split("## Options of every command")[1].split("\n## ")[0]) == SHARED


@pytest.mark.parametrize("path", REAL)
def test_every_command_and_option_has_a_help_text(path: str) -> None:
    command = REAL[path]
    assert command.help
    assert all(param.help for param in command.params if isinstance(param, click.Option))


def test_the_plugin_on_the_page_works(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    plugin: dict[str, object] = {}
    exec(source, plugin)
    extras = Group("plugins")
    register = plugin["relay_register_commands"]
    assert callable(register)
    register(extras)
    monkeypatch.setattr(relay, "_extras", extras)
    cli = Cli(server.url)
    cli.run("job", "enqueue", "x", "-q", "mail")
    assert float(cli.run("oldest", "mail").stdout) > 1_600_000_000
