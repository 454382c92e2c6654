"""`relay doctor`: each thing that can be wrong with a server is named, with what to do about it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from relay_core import Broker
from relay_core.keys import LAYOUT
from tests.command_line import Cli
from tests.servers import AclServer, Server, eventually, free_port
from tests.topologies import Cluster


def findings(cli: Cli, code: int, *options: str) -> dict[str, tuple[str, str]]:
    """Check -> (level, detail); of several servers the last."""
    told: Any = cli.json(*options, "doctor", code=code)
    assert told["ok"] is (code == 0)
    return {row["check"]: (row["level"], row["detail"]) for row in told["checks"]}


def test_a_fit_server_passes_all_checks_and_nothing_is_left_behind(server: Server) -> None:
    found = findings(Cli(server.url), 0)
    assert {
        "reachable",
        "topology",
        "version",
        "eviction",
        "memory",
        "persistence",
        "clock",
        "layout",
        "write",
    } == found.keys()
    assert {name for name, (level, _detail) in found.items() if level == "ok"} >= {"version", "eviction", "write"}
    assert server.flavour in found["version"][1]
    assert server.cli("KEYS", "*") == []


def test_a_server_that_may_evict_is_an_error_that_names_the_setting(server: Server) -> None:
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    level, detail = findings(Cli(server.url), 1)["eviction"]
    assert level == "error"
    assert "maxmemory-policy" in detail
    assert "noeviction" in detail
    shown = Cli(server.url).run("doctor", code=1).stdout
    assert "maxmemory-policy" in shown, "people get a table too"
    assert "reachable" in shown


@pytest.mark.parametrize(
    "line",
    [
        "stats",
        "stats mail",
        "top --once",
        "queue ls",
        "job ls -q mail",
        "job show ONE -q mail",
        "dlq ls -q mail",
        "worker ls",
        "schedule ls",
    ],
)
def test_what_only_looks_warns_of_a_server_that_may_evict_and_shows_it(server: Server, line: str) -> None:
    cli = Cli(server.url)
    one = str(cli.json("job", "enqueue", "hello", "-q", "mail")["id"])
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    words = line.replace("ONE", one).split()
    plain = cli.run(*words)
    assert plain.stderr.count("Warning:") == 1
    assert "set it to noeviction" in plain.stderr
    assert plain.stdout
    assert cli.json(*words)


def test_what_changes_a_store_refuses_a_server_that_may_evict(server: Server) -> None:
    cli = Cli(server.url)
    cli.json("job", "enqueue", "hello", "-q", "mail")
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    for line in ("job enqueue hello -q mail", "queue purge mail --yes", "queue pause mail", "audit mail"):
        assert "set it to noeviction" in cli.run(*line.split(), code=1).stderr
    assert cli.json("version")["server"], "which says no more than what answers"
    assert cli.json("stats", "mail")["queues"][0]["ready"] == 1


def test_a_server_without_persistence_is_a_warning(server: Server) -> None:
    server.cli("CONFIG", "SET", "save", "")
    level, detail = findings(Cli(server.url), 0)["persistence"]
    assert level == "warn"
    assert "appendonly" in detail


def test_snapshots_alone_are_a_warning_that_shows_them(server: Server) -> None:
    server.cli("CONFIG", "SET", "save", "900 1")
    try:
        level, detail = findings(Cli(server.url), 0)["persistence"]
    finally:
        server.cli("CONFIG", "SET", "save", "")
    assert level == "warn"
    assert "900 1" in detail


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_memory_that_is_full_is_no_server_that_is_away(server: Server) -> None:
    server.cli("CONFIG", "SET", "maxmemory", "1")
    found = findings(Cli(server.url), 1, "--timeout", "0.1")
    assert found["reachable"][0] == "ok"
    assert found["memory"][0] == "warn"
    level, detail = found["write"]
    assert level == "error"
    assert "maxmemory" in detail


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_memory_that_is_nearly_full_is_a_warning(server: Server) -> None:
    server.cli("SET", "ballast", "x" * 8_000_000)  # beside which room for the check's job is less than a tenth
    used = int(server.info("memory")["used_memory"])
    server.cli("CONFIG", "SET", "maxmemory", used + 200_000)
    level, detail = findings(Cli(server.url), 0)["memory"]
    assert level == "warn"
    assert "maxmemory" in detail


def test_a_queue_of_a_newer_layout_is_an_error_that_names_it(server: Server) -> None:
    with Broker(server.url) as broker:
        broker.enqueue("mail", b"x")
        broker.enqueue("other", b"x")
        server.cli("HSET", broker.settings.keys("mail").config, "v", LAYOUT + 1)
    level, detail = findings(Cli(server.url), 1)["layout"]
    assert level == "error"
    assert "'mail'" in detail
    assert "'other'" not in detail


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_user_who_may_not_run_scripts_is_an_error_and_the_other_checks_are_made(acl_server: AclServer) -> None:
    acl_server.cli("ACL", "SETUSER", acl_server.user, "-evalsha")
    try:
        found = findings(Cli(acl_server.url), 1)
    finally:
        acl_server.cli("ACL", "SETUSER", acl_server.user, "+evalsha")
    assert found["write"][0] == "error"
    assert "evalsha" in found["write"][1].lower()
    assert found["layout"][0] == "ok"


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_user_who_may_not_read_the_configuration_is_told_only_of_persistence(acl_server: AclServer) -> None:
    found = findings(Cli(acl_server.url), 0)
    assert found["persistence"][0] == "warn"
    assert found["write"][0] == "ok"


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_the_narrow_user_of_the_operators_page_is_enough_and_leaves_nothing_behind(acl_server: AclServer) -> None:
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    (rules,) = re.findall(r"^user relay on >secret (.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    acl_server.cli("ACL", "SETUSER", "narrow", "reset", "on", ">secret", *rules.split())
    try:
        cli = Cli(f"relay://narrow:secret@127.0.0.1:{acl_server.port}/0")
        assert findings(cli, 0)["write"][0] == "ok"
        assert acl_server.cli("KEYS", "*") == []
        cli.run("job", "enqueue", "x", "-q", "mail", "--delay", "60")
        for line in ("stats", "job ls -q mail", "audit", "queue pause mail", "queue purge mail --yes"):
            cli.run(*line.split())
        cli.run(*["schedule", "add", "a", "-q", "mail", "--every", "100ms"])
        eventually(lambda: cli.json("schedule", "run", "--once")["enqueued"], "its tick")
        for line in ("schedule ls", "schedule rm a --yes"):
            cli.run(*line.split())
        with Broker(acl_server.url) as broker:
            broker.resume("mail")
            for job in broker.claim("mail", count=10, wait=1.0):
                broker.nack(job, "no", dead=True)
        for line in ("dlq ls -q mail --error no", "dlq requeue -q mail --limit 1 --all", "dlq purge -q mail --all -y"):
            cli.run(*line.split())
    finally:
        acl_server.cli("ACL", "DELUSER", "narrow")


def test_a_server_that_is_not_there_still_gets_a_table() -> None:
    cli = Cli(f"relay://127.0.0.1:{free_port()}")
    assert "reachable" in cli.run("doctor", "--timeout", "0", code=3).stdout


@pytest.mark.slow
def test_every_primary_of_a_cluster_is_looked_at(cluster: Cluster) -> None:
    told: Any = Cli(cluster.url).json("doctor")
    assert sum(row["check"] == "eviction" for row in told["checks"]) == 3
    assert told["checks"][-1]["check"] == "write"
    assert told["checks"][-1]["level"] == "ok"


def test_a_clock_that_is_a_day_off_is_told_with_what_it_affects(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - 86_400)
    level, detail = findings(Cli(server.url), 0)["clock"]
    assert level == "info"
    assert "ahead of this machine's; relay goes by the server's, only --at and logs are affected" in detail
