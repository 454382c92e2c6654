"""`relay migrate`: what it says where there is nothing to move, or nothing to move it with."""

from __future__ import annotations

import sys

import pytest

from relay_core import Broker
from relay_core.cli.migrate import source_url
from relay_core.settings import parse_url
from tests.command_line import Cli
from tests.servers import AclServer, Server, free_port

MIGRATIONS = ["celery-redis", "dramatiq-redis"]


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: nothing here differs between servers."""
    return str(request.param)


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("celery-redis", [], "--key-prefix ''"),
        (
            "celery-redis",
            ["--queue", "mail", "--queue", "two words"],
            "--key-prefix '' --queue mail --queue 'two words'",
        ),
        ("dramatiq-redis", [], "--namespace dramatiq"),
        ("dramatiq-redis", ["--namespace", "shop"], "--namespace shop"),
    ],
)
def test_where_no_job_is_it_says_where_it_looked(server: Server, name: str, given: list[str], told: str) -> None:
    result = Cli(server.url).run("migrate", name, "--from", f"unix://{server.socket}?db=3", *given)
    assert result.stdout == f"0 jobs migrated to {parse_url(server.url).safe()}.\n"
    where = f"redis+unix://{server.socket}?db=3"
    assert f"No jobs were found with --from {where} {told}. If there are some" in result.stderr


@pytest.mark.parametrize(
    ("origin", "meant"),
    [
        ("redis://", "redis://localhost:6379/0"),
        ("redis:///3", "redis://localhost:6379/3"),
        ("redis://:secret@/3", "redis://***@localhost:6379/3"),
        ("redis://:6380?db=3", "redis://localhost:6380/3"),
        ("rediss://me:secret@:6380", "rediss://***@localhost:6380/0"),
        ("redis://:secret@there:6380/3", "redis://***@there:6380/3"),
        ("redis://there", "redis://there:6379/0"),
        ("redis+socket://:secret@/run/s?virtual_host=3", "redis+unix://***@/run/s?db=3"),
    ],
)
def test_a_source_is_named_as_celery_and_redis_py_name_it(origin: str, meant: str) -> None:
    assert source_url(origin).safe() == meant


@pytest.mark.parametrize("name", MIGRATIONS)
def test_a_source_that_cannot_be_reached_is_not_taken_for_the_store(server: Server, name: str) -> None:
    args = ["migrate", name, "--from", f"redis://127.0.0.1:{free_port()}/0", "--timeout", "0"]
    told = Cli(server.url).run(*args, code=3).stderr
    assert "check --from" in told
    assert "--url" not in told
    assert Cli(server.url).json(*args, code=3)["error"]["type"] == "SourceUnavailable"


@pytest.mark.parametrize("name", MIGRATIONS)
def test_a_login_that_the_source_refuses_is_told_as_the_sources(
    acl_server: AclServer, server: Server, name: str
) -> None:
    origin = f"redis://nobody:wrong@127.0.0.1:{acl_server.port}/0"
    told = Cli(server.url).run("migrate", name, "--from", origin, code=1).stderr
    assert "check the URL's user:password@, that of --from" in told


@pytest.mark.parametrize("name", MIGRATIONS)
def test_a_dry_run_refuses_a_store_that_it_could_not_move_to(server: Server, name: str) -> None:
    told = Cli("rely://here").run("migrate", name, "--from", f"unix://{server.socket}", "--dry-run", code=2).stderr
    assert "unknown scheme 'rely'" in told


def test_a_store_that_cannot_be_reached_is_not_taken_for_the_source(server: Server) -> None:
    with Broker(server.url) as broker:
        for key in ("HSET dramatiq:default.msgs 1 x", "RPUSH dramatiq:default 1"):
            broker.store.raw(*key.split())
    cli = Cli(f"relay://127.0.0.1:{free_port()}/0")
    told = cli.run("migrate", "dramatiq-redis", "--from", f"unix://{server.socket}", "--timeout", "0", code=3).stderr
    assert "check --url" in told
    assert "--from" not in told


@pytest.mark.parametrize(
    ("name", "missing", "told"),
    [
        ("celery-redis", "kombu.utils.json", "needs kombu: pip install 'relay-queue[celery]'"),
        ("dramatiq-redis", "dramatiq.common", "needs dramatiq: pip install 'relay-queue[dramatiq]'"),
    ],
)
def test_what_a_migration_needs_is_named_with_its_extra(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, missing: str, told: str
) -> None:
    monkeypatch.delitem(sys.modules, f"relay_adapters.{name.partition('-')[0]}.redis_source", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    result = Cli(server.url).run("migrate", name, "--from", f"unix://{server.socket}", code=2)
    assert f"relay migrate {name} {told}" in result.stderr
