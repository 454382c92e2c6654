"""The command line as a whole: exit codes, JSON everywhere, errors in one line, options in either place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from relay_core import Broker, __version__, hookimpl
from relay_core.cli.app import COMMANDS, relay
from relay_core.cli.session import Session
from relay_core.job import Arrival
from relay_core.keys import LAYOUT
from relay_core.migration import Found, Migration, SourceStore
from relay_core.plugins import Plugins
from tests.command_line import Cli, environment, finished, spawn
from tests.servers import AclServer, Server, free_port


def bury(broker: Broker, queue: str, *payloads: bytes, error: str = "no luck") -> list[str]:
    """Dead jobs: their ids."""
    broker.enqueue_many(queue, payloads)
    jobs = broker.claim(queue, count=len(payloads))
    for job in jobs:
        broker.nack(job, error, dead=True)
    return [job.id for job in jobs]


# --- JSON everywhere


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_every_command_that_answers_has_json_of_one_document(cli: Cli, broker: Broker, tmp_path: Path) -> None:
    broker.enqueue("mail", b"hello", id="one")
    broker.cancel("unused", broker.enqueue("unused", b"x").id)
    dead, again, gone = bury(broker, "bad", b"x", b"y", b"z")
    folder = str(tmp_path / "data")
    answers: dict[str, Any] = {}
    for line in (
        "version", "stats", "stats mail", "audit", "audit mail --no-repair", "doctor",
        "queue ls", "queue pause mail", "queue resume mail", "queue limit mail --rate 5", "queue purge mail --dry-run",
        "queue rm unused",
        "job ls -q mail", "job show one -q mail", "job enqueue hi -q mail", "job cancel one -q mail --yes",
        "top --interval 100ms", "worker ls", "schedule add a -q mail --every 1h", "schedule ls", "schedule run --once",
        "schedule rm a --yes", "dlq ls -q bad", f"dlq show {dead} -q bad", f"dlq requeue {again} -q bad",
        f"dlq purge {gone} -q bad --yes",
        f"server start --dir {folder}", f"server status --dir {folder}", f"server stop --dir {folder}",
    ):  # fmt: skip
        answers[line] = cli.json(*line.split())
    assert all(isinstance(answer, dict) for answer in answers.values())
    assert answers["stats mail"]["queues"][0]["ready"] == 1
    assert answers["audit"]["clean"] is True
    assert answers["job show one -q mail"]["payload"] == "hello"
    assert answers["queue limit mail --rate 5"]["limits"] == {"rate": 5.0, "burst": 5.0, "max_inflight": None}
    named = {line.split()[0] for line in answers}
    elsewhere = {"demo", "migrate", "exporter", "completion"}
    assert named == COMMANDS.keys() - elsewhere, "these are tested in processes of their own"


def test_json_is_taken_before_and_after_the_command(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b"hello")
    assert json.loads(cli.run("--json", "queue", "ls").stdout) == cli.json("queue", "ls")


def test_an_error_is_a_json_document_too_and_a_line_on_stderr(cli: Cli) -> None:
    result = cli.run("job", "show", "nope", "-q", "mail", "--json", code=1)
    told = json.loads(result.stdout)["error"]
    assert told["type"] == "JobNotFound"
    assert result.stderr == f"Error: {told['message']}\n"


def test_a_job_of_a_queue_that_is_not_there_is_asked_for_by_the_nearest_name(cli: Cli, broker: Broker) -> None:
    broker.enqueue("mail", b"hello", id="one")
    told = cli.run("job", "show", "one", "-q", "mial", code=1).stderr
    assert "job one in queue 'mial': nothing was ever enqueued to it; did you mean 'mail'?" in told


def test_where_no_queue_is_the_store_and_the_prefix_are_named(cli: Cli, broker: Broker) -> None:
    for command in ("stats", "queue ls"):
        told = cli.run("--prefix", "shop:relay", *command.split()).stdout
        where = f"{broker.url.safe()} with the prefix 'shop:relay'"
        assert told == f"No queues yet: nothing was ever enqueued to {where}.\n"
    told = cli.run("--prefix", "shop:relay", "worker", "ls").stdout
    assert told == f"No such workers are alive at {broker.url.safe()} with the prefix 'shop:relay'.\n"
    assert "with the prefix 'shop:relay'" in cli.run("--prefix", "shop:relay", "dlq", "ls", "-q", "mail", code=1).stderr


def test_a_slip_in_the_name_of_a_command_is_met_by_the_nearest_one(cli: Cli) -> None:
    for words, meant in ((["dql"], "dlq"), (["queue", "puase"], "pause"), (["migrate", "celery"], "celery-redis")):
        assert f"Did you mean {meant!r}?" in cli.run(*words, code=2).stderr


def test_a_misused_option_is_a_json_document_too(cli: Cli) -> None:
    assert "--limit" in cli.json("job", "ls", "-q", "mail", "--limit", "0", code=2)["error"]["message"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stats --limt --json", "--limt"),
        ("job ls --limt 3 --json", "--limt"),
        ("--limt stats --json", "--limt"),
        ("jub --json", "jub"),
    ],
)
def test_what_cannot_be_parsed_is_a_json_document_too(cli: Cli, line: str, said: str) -> None:
    assert said in json.loads(cli.run(*line.split(), code=2).stdout)["error"]["message"]


def test_json_behind_two_dashes_is_an_argument(cli: Cli) -> None:
    assert cli.run("stats", "--limt", "--", "--json", code=2).stdout == ""


def test_the_version_is_an_option_too(cli: Cli) -> None:
    assert cli.run("--version").stdout == f"relay {__version__}\n"
    assert cli.json("--version") == {"relay": __version__}


def test_the_timeout_holds_for_replies_too() -> None:
    for given, expected in ((None, 5.0), (0.1, 1.0), (2.0, 2.0), (60.0, 5.0)):
        assert Session("relay://127.0.0.1:1", timeout=given).open()._store_settings.socket_timeout == expected


# --- exit codes


@pytest.mark.parametrize("group", ["", "job", "queue", "dlq", "schedule", "server", "migrate"])
def test_a_list_of_commands_cuts_no_line_short(cli: Cli, group: str) -> None:
    told = cli.run(*group.split(), "--help").stdout.partition("Commands:")[2]
    assert told
    assert [line for line in told.splitlines() if line.endswith("...")] == []


def test_without_a_command_the_help_lists_all(cli: Cli) -> None:
    shown = cli.run("--help").stdout
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_what_is_not_there_exits_1_and_says_which(cli: Cli) -> None:
    assert "job nope in queue 'mail'" in cli.run("job", "show", "nope", "-q", "mail", code=1).stderr
    assert "queue 'mail'" in cli.run("stats", "mail", code=1).stderr


def test_a_slip_in_a_queue_name_is_guessed(cli: Cli, broker: Broker) -> None:
    broker.enqueue("newsletters", b"x")
    assert "did you mean 'newsletters'?" in cli.run("stats", "newsleters", code=1).stderr
    assert "did you mean 'newsletters'?" in cli.run("queue", "purge", "newsleters", "--yes", code=1).stderr


def test_a_slip_in_a_command_is_guessed(cli: Cli) -> None:
    assert "'stats'" in cli.run("stat", code=2).stderr


@pytest.mark.parametrize(
    "line",
    [
        "stats --url foo://bar",
        "--prefix a{b stats",
        "job enqueue x -q q --priority 11",
        "job enqueue x -q q --delay -1",
        "job enqueue x -q q --delay nan",
        "job enqueue x -q q --delay soon",
        "job enqueue x -q q --at yesterday",
        "job enqueue x -q q --at 2030-01-01 --delay 5",
        "job enqueue x -q q --header novalue",
        "job enqueue x -q q --dedup-for 5",
        "job enqueue @/no/such/file -q q",
        "job enqueue x",
        "job ls -q q --state lost",
        "queue limit q --rate 0",
        "queue limit q --rate fast",
        "queue limit q --burst 5",
        "queue limit q --none --rate 5",
        "dlq requeue -q q",
        "dlq requeue 1 --all -q q",
        "dlq purge -q q",
        "worker nowhere -q q",
        "frobnicate",
    ],
)
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_bad_input_exits_2_and_stores_nothing(cli: Cli, server: Server, line: str) -> None:
    assert "Error: " in cli.run(*line.split(), code=2).stderr
    assert server.cli("KEYS", "*") == []


@pytest.mark.parametrize(
    "line", ["stats", "queue ls", "job enqueue x -q q", "dlq ls -q q", "audit", "doctor", "queue pause q"]
)
def test_a_server_that_cannot_be_reached_exits_3_and_names_it(line: str) -> None:
    port = free_port()
    result = Cli(f"relay://127.0.0.1:{port}").run(*line.split(), "--timeout", "0", code=3)
    assert f"127.0.0.1:{port}" in result.stdout + result.stderr


def test_version_does_not_need_a_server() -> None:
    assert Cli(f"relay://127.0.0.1:{free_port()}").json("version")["server"] is None


def test_version_names_the_server_that_answers(cli: Cli, server: Server) -> None:
    told = cli.json("version")
    assert told["server"].startswith(server.flavour)
    assert {"celery", "dramatiq"} <= told["adapters"].keys()


def test_version_does_not_start_the_embedded_server(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert Cli(f"relay://?dir={folder}").json("version")["server"] is None
    assert not folder.exists()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_wrong_password_exits_1_and_is_not_shown(acl_server: AclServer) -> None:
    url = f"relay://{acl_server.user}:sesame@127.0.0.1:{acl_server.port}/0"
    result = Cli(url).run("stats", code=1)
    assert "password" in result.stderr
    assert "sesame" not in result.stdout + result.stderr


# --- which store


def test_the_innermost_url_and_prefix_win(cli: Cli, server: Server) -> None:
    Cli("relay://127.0.0.1:1").run("--prefix", "outer", "job", "enqueue", "x", "-q", "q", "--url", server.url)
    Cli("relay://127.0.0.1:1").run("job", "enqueue", "x", "-q", "q", "--url", server.url, "--prefix", "inner")
    assert cli.json("queue", "ls", "--prefix", "outer")["queues"][0]["queue"] == "q"
    assert cli.json("--prefix", "outer", "queue", "ls", "--prefix", "inner")["queues"][0]["queue"] == "q"
    assert cli.json("queue", "ls")["queues"] == []


def test_the_prefix_may_come_from_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_PREFIX", "mine")
    cli.run("job", "enqueue", "x", "-q", "q")
    assert cli.json("queue", "ls", "--prefix", "mine")["queues"]
    monkeypatch.delenv("RELAY_PREFIX")
    assert cli.json("queue", "ls")["queues"] == []


# --- plugins


class Greeter:
    """A plugin with a command of its own, and one that would take a built-in's name."""

    @hookimpl
    def relay_register_commands(self, group: click.Group) -> None:
        @group.command("greet")
        def greet() -> None:
            """Say hello."""
            click.echo("hello from a plugin")

        group.add_command(greet, "stats")
        group.add_command(Migration("elsewhere", Elsewhere, "Move what is elsewhere."))


class Elsewhere:
    """A queue system with one job that can be moved and one that cannot."""

    def __init__(self, store: SourceStore) -> None:
        self.store = store

    def found(self) -> list[Found]:
        return [Found("mail", "ready", 1)]

    def batches(self) -> Iterator[list[Arrival]]:
        yield [Arrival("mail", "one", b"x")]
        self.store.raw("SET", "moved", "yes")

    def left(self) -> list[Found]:
        return [Found("mail", "ready", 1, "it is nailed down")]


def test_plugins_add_commands_and_cannot_replace_built_in_ones(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_core.plugins._entry_points", lambda: ())
    monkeypatch.setattr("relay_core.plugins.Plugins", lambda: Plugins([Greeter()], installed=False))
    monkeypatch.setattr(relay, "_extras", None)
    assert cli.run("greet").stdout == "hello from a plugin\n"
    assert "Say hello." in cli.run("--help").stdout
    assert "hello" not in cli.run("stats").stdout


def test_a_migration_of_a_plugin_is_a_command_under_migrate(
    cli: Cli, broker: Broker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_core.plugins.Plugins", lambda: Plugins([Greeter()], installed=False))
    monkeypatch.setattr(relay, "_extras", None)
    assert "elsewhere" in cli.run("migrate", "--help").stdout
    assert "elsewhere" not in cli.run("--help").stdout
    origin = server.url.replace("relay+unix", "unix")
    told = cli.run("migrate", "elsewhere", "--from", origin, "--dry-run", code=1)
    assert f"1 job would be migrated to {broker.url.safe()}." in told.stdout
    assert broker.stats("mail").ready == 0
    told = cli.run("migrate", "elsewhere", "--from", origin, code=1)
    assert f"1 job migrated to {broker.url.safe()}." in told.stdout
    assert "1 job of queue 'mail' left: it is nailed down" in told.stderr
    assert [job.id for job in broker.claim("mail")] == ["one"]
    assert server.cli("GET", "moved") == b"yes"
    found = {"queue": "mail", "state": "ready", "count": 1}
    assert cli.json("migrate", "elsewhere", "--from", origin, code=1) == {
        "dry_run": False, "found": [found], "migrated": 1, "left": [found | {"note": "it is nailed down"}],
    }  # fmt: skip
    assert cli.run("migrate", "elsewhere", "--from", "relay://127.0.0.1:1/0", "--timeout", "0", code=3)
    assert "no host" in cli.run("migrate", "elsewhere", "--from", "redis+sentinel://", code=2).stderr


# --- what lies in the store


def test_a_queue_of_a_newer_layout_is_refused_by_name(cli: Cli, broker: Broker, server: Server) -> None:
    broker.enqueue("mail", b"x")
    server.cli("HSET", broker.settings.keys("mail").config, "v", LAYOUT + 1)
    assert "layout" in cli.run("stats", "mail", code=1).stderr


def test_audit_exits_1_when_it_found_something_and_0_once_it_is_mended(
    cli: Cli, broker: Broker, server: Server
) -> None:
    lost = broker.enqueue("mail", b"x").id
    server.cli("DEL", *broker.settings.keys("mail").ready)
    only_looked = cli.json("audit", "--no-repair", code=1)
    assert only_looked["queues"][0]["findings"].keys() == {lost}
    assert only_looked["queues"][0]["repaired"] is False
    assert lost in cli.run("audit", code=1).stdout
    assert "clean" in cli.run("audit").stdout
    assert [job.id for job in broker.claim("mail")] == [lost]


# --- where the answer goes


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize("line", ["stats", "stats --json", "job show none -q mail --json", "--help"])
def test_an_answer_that_cannot_be_written_is_an_error_in_one_line(
    server: Server, broker: Broker, tmp_path: Path, line: str
) -> None:
    broker.enqueue("mail", b"hello")
    with open("/dev/full", "w") as full:
        code, _out, said = finished(spawn(*line.split(), url=server.url, cwd=tmp_path, stdout=full))
    assert (code, said.splitlines()[-1:]) == (1, ["Error: [Errno 28] No space left on device"])
    assert "Traceback" not in said


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize(
    ("line", "stream", "code"),
    [("stats", 1, 0), ("top --interval 100ms", 1, 0), ("queue purge mail", 0, 2), ("audit", 2, 0)],
)
def test_a_command_whose_caller_closed_a_stream_does_its_work(
    server: Server, broker: Broker, tmp_path: Path, line: str, stream: int, code: int
) -> None:
    broker.enqueue("mail", b"hello")
    shut = ["sh", "-c", f'exec "$@" {stream}>&-', "sh", sys.executable, "-m", "relay_core.cli", *line.split()]
    done = subprocess.run(shut, cwd=tmp_path, env=environment(server.url), capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
