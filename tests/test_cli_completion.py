"""`relay completion`: what bash completes, in a bash that has sourced it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relay_core import Broker
from tests.command_line import Cli, environment
from tests.servers import Server, free_port

# Completes each line of stdin, as readline would, and prints what it offers on one line.
TRY = r"""
eval "$(relay completion bash)"
function=$(complete -p relay | sed -E 's/.*-F ([^ ]+) .*/\1/')
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=()
    "$function" relay "${COMP_WORDS[COMP_CWORD]}" ""
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: nothing here differs between servers."""
    return str(request.param)


def completed(url: str, folder: Path, *lines: str) -> list[list[str]]:
    """What bash offers for each of these lines."""
    command = Path(sys.executable).parent
    env = environment(url) | {"PATH": f"{command}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "--norc", "-c", TRY], input="\n".join(lines) + "\n", env=env, cwd=folder, text=True,
        capture_output=True,
    )  # fmt: skip
    assert result.stderr == ""
    return [line.split() for line in result.stdout.splitlines()]


def test_bash_completes_commands_options_values_and_queues(server: Server, tmp_path: Path) -> None:
    with Broker(server.url) as broker:
        for name in ("mail", "mailbox", "reports", "two words"):
            broker.enqueue(name, b"x")
    commands, deeper, options, values, queues, argument, worker = completed(
        server.url, tmp_path,
        "relay d", "relay dlq re", "relay dlq requeue --re", "relay job ls --state d", "relay dlq ls --queue mai",
        "relay stats re", "relay worker ",
    )  # fmt: skip
    assert commands == ["demo", "dlq", "doctor"]
    assert deeper == ["requeue"]
    assert options == ["--resume"]
    assert values == ["delayed", "dead"]
    assert queues == ["mail", "mailbox"]
    assert argument == ["reports"]
    assert worker == ["ls", "run"]


def test_without_a_server_no_queues_are_offered_and_none_is_started(tmp_path: Path) -> None:
    assert completed(f"relay://127.0.0.1:{free_port()}", tmp_path, "relay stats m", "relay worker --conc") == [
        [],
        ["--concurrency"],
    ]
    assert completed(f"relay://?dir={tmp_path / 'data'}", tmp_path, "relay stats m") == [[]]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script_of_its_own(shell: str) -> None:
    script = Cli("relay://").run("completion", shell).stdout
    assert f"_RELAY_COMPLETE={shell}_complete" in script
    assert "relay" in script


def test_an_unknown_shell_is_bad_input() -> None:
    assert "'tcsh'" in Cli("relay://").run("completion", "tcsh", code=2).stderr
