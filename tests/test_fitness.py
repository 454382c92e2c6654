"""What a store asks of its server before the first job, and what confirms a stored one."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from relay_core.connection import aiopool, pool
from relay_core.connection.fitness import unfit
from relay_core.errors import NotDurable, RelayError, ServerTooOld, StoreError, UnsafeStore
from relay_core.settings import Durability
from tests.servers import Flavour, Server, eventually
from tests.shells import Open, count, kind, store_at  # noqa: F401 (fixtures)

NONE, AOF = Durability(), Durability(aof=True)


def info(**facts: str) -> bytes:
    return b"# Server\r\n" + "".join(f"{name}:{value}\r\n" for name, value in facts.items()).encode()


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"redis_version": "6.2.14"}, ServerTooOld),
        ({"redis_version": "7.0.0"}, None),
        ({"redis_version": "10.1.0"}, None),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.5"}, None),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.0"}, None),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.9"}, ServerTooOld),
        ({"redis_version": "7.0.0", "maxmemory_policy": "noeviction"}, None),
        ({"redis_version": "7.0.0", "maxmemory_policy": "allkeys-lru"}, UnsafeStore),
        ({"redis_version": "7.0.0", "maxmemory_policy": "volatile-ttl"}, UnsafeStore),
    ],
)
def test_a_server_is_judged_by_its_version_and_by_whether_it_may_evict(
    facts: dict[str, str], error: type[RelayError] | None
) -> None:
    found = unfit(info(**facts), "here:1", NONE)
    assert type(found) is (error or type(None))
    if found is not None:
        assert "here:1" in str(found)


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"redis_version": "7.0.15", "aof_enabled": "1"}, ServerTooOld),
        ({"redis_version": "7.2.0", "aof_enabled": "0"}, StoreError),
        ({"redis_version": "7.2.0", "aof_enabled": "1"}, None),
    ],
)
def test_confirmation_by_disk_needs_a_server_that_can_give_it(
    facts: dict[str, str], error: type[RelayError] | None
) -> None:
    assert type(unfit(info(**facts), "here:1", AOF)) is (error or type(None))


def test_a_server_that_may_evict_is_refused_until_it_is_set_right(server: Server, store_at: Open) -> None:
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    store = store_at(server.url)
    with pytest.raises(UnsafeStore, match="CONFIG SET maxmemory-policy noeviction"):
        store.run(count())
    (error,) = store.run_many([count()])
    assert isinstance(error, UnsafeStore)
    assert server.cli("EXISTS", "n") == 0
    server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert store.run(count()) == (1, False)


def test_the_server_is_looked_at_once(server: Server, store_at: Open) -> None:
    store = store_at(server.url)
    store.run(count())
    server.cli("CONFIG", "RESETSTAT")
    for _ in range(5):
        store.run(count())
        store.run_many([count(), count()])
    assert set(server.info("commandstats")) & {"cmdstat_evalsha", "cmdstat_info", "cmdstat_hello"} == {
        "cmdstat_evalsha"
    }


def test_a_server_that_closed_an_idle_connection_is_looked_at_again(
    server: Server, store_at: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have started anew, with a configuration file that says something else than CONFIG SET had."""
    monkeypatch.setattr(pool, "LOOK_AFTER", 0.0)
    monkeypatch.setattr(aiopool, "LOOK_AFTER", 0.0)
    store = store_at(server.url)
    store.run(count())
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    server.cli("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    store.run(count())
    with pytest.raises(UnsafeStore):
        store.run(count())


# --- durability


@pytest.fixture
def replicated(flavour: Flavour) -> Iterator[tuple[Server, Server]]:
    """A primary and its replica, in sync."""
    with Server(flavour, tcp=True, options={"repl-diskless-sync-delay": "0"}) as primary:
        at = f"127.0.0.1 {primary.port}"
        with Server(flavour, tcp=True, options={"replicaof": at}) as replica:
            eventually(lambda: replica.info("replication")["master_link_status"] == "up", "first sync")
            eventually(lambda: primary.cli("WAIT", "1", "100") == 1, "replica confirms")
            yield primary, replica


def test_without_the_replica_that_was_asked_for_a_durable_command_is_not_durable(
    server: Server, store_at: Open
) -> None:
    store = store_at(server.url, durability="replica:1", durability_timeout=0.05)
    with pytest.raises(NotDurable, match="0 of 1"):
        store.run(count(durable=True))
    assert server.cli("GET", "n") == b"1"
    assert store.run(count()) == (2, False)


def test_in_a_pipeline_only_the_durable_commands_are_not_durable(server: Server, store_at: Open) -> None:
    store = store_at(server.url, durability="replica:1", durability_timeout=0.05)
    first, second, third = store.run_many([count(), count(durable=True), count()])
    assert (first, third) == ((1, False), (3, False))
    assert isinstance(second, NotDurable)


def test_a_replica_confirms_as_long_as_it_answers(replicated: tuple[Server, Server], store_at: Open) -> None:
    primary, replica = replicated
    store = store_at(primary.url, durability="replica:1", durability_timeout=10)
    assert store.run(count(durable=True)) == (1, False)
    assert store.run_many([count(durable=True), count(durable=True)]) == [(2, False), (3, False)]
    assert replica.cli("GET", "n") == b"3"


def test_a_replica_that_stands_still_confirms_nothing(replicated: tuple[Server, Server], store_at: Open) -> None:
    primary, replica = replicated
    store = store_at(primary.url, durability="replica:1", durability_timeout=1)
    store.run(count(durable=True))
    replica.pause()
    try:
        with pytest.raises(NotDurable):
            store.run(count(durable=True))
    finally:
        replica.resume()


def test_a_confirmation_may_take_longer_than_the_socket_timeout(
    replicated: tuple[Server, Server], store_at: Open
) -> None:
    primary, replica = replicated
    store = store_at(primary.url, durability="replica:1", durability_timeout=10, socket_timeout=0.2)
    store.run(count(durable=True))
    replica.pause()
    resumed = threading.Timer(0.8, replica.resume)
    resumed.start()
    try:
        assert store.run(count(durable=True)) == (2, False)
    finally:
        resumed.join()


def test_the_disk_confirms_once_per_pipeline(store_at: Open) -> None:
    with Server("valkey", options={"appendonly": "yes"}) as server:
        store = store_at(server.url, durability="aof", durability_timeout=10)
        assert store.run(count(durable=True)) == (1, False)
        server.cli("CONFIG", "RESETSTAT")
        store.run_many([count(durable=True) for _ in range(5)])
        assert server.info("commandstats")["cmdstat_waitaof"].startswith("calls=1,")


def test_without_durability_nothing_is_waited_for(server: Server, store_at: Open) -> None:
    store = store_at(server.url)
    server.cli("CONFIG", "RESETSTAT")
    assert store.run(count(durable=True)) == (1, False)
    assert not {"cmdstat_wait", "cmdstat_waitaof"} & set(server.info("commandstats"))
