"""`relay doctor` on every way to run a store: one server, unix socket, TLS, embedded, Sentinel and Cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from relay_core import Broker
from tests.command_line import Cli
from tests.servers import Server, TlsServer, eventually
from tests.topologies import Cluster, Sentinel, SentinelTrio


def findings(cli: Cli, code: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Check -> what it found, once for each server."""
    told: Any = cli.json("doctor", code=code)
    found: dict[str, list[tuple[str, str]]] = {}
    for row in told["checks"]:
        found.setdefault(row["check"], []).append((row["level"], row["detail"]))
    return found


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_one_server_over_tcp_or_its_socket_is_fine(tcp_server: Server, unix_server: Server) -> None:
    assert findings(Cli(tcp_server.url))["topology"] == [("ok", "one server")]
    assert findings(Cli(unix_server.url))["topology"] == [("ok", "one server, over its unix socket")]


def test_one_server_over_tls_is_fine(tls_server: TlsServer) -> None:
    found = findings(Cli(tls_server.url))
    assert found["topology"] == [("ok", "one server, over TLS")]
    assert found["write"][0][0] == "ok"


def test_an_embedded_server_is_told_as_one(tmp_path: Path) -> None:
    cli = Cli(f"relay://?dir={tmp_path / 'data'}")
    try:
        found = findings(cli)
    finally:
        cli.run("server", "stop", "--dir", str(tmp_path / "data"))
    ((level, detail),) = found["topology"]
    assert level == "info"
    assert str(tmp_path / "data") in detail
    assert found["persistence"][0][0] == "ok"
    assert found["write"][0][0] == "ok"


def test_a_sentinel_in_place_of_a_server_is_told_as_one(tcp_server: Server) -> None:
    with Sentinel(tcp_server.flavour, "main", tcp_server.port, 1) as sentinel:
        found = findings(Cli(sentinel.url), code=1)
    ((level, detail),) = found["topology"]
    assert level == "error"
    assert f"use relay+sentinel://127.0.0.1:{sentinel.port}/SERVICE" in detail


@pytest.mark.slow
def test_a_sentinel_trio_is_told_with_its_replicas_and_what_a_failover_would_lose(sentinel_trio: SentinelTrio) -> None:
    cli = Cli(sentinel_trio.url)
    primary = sentinel_trio.primary
    found = findings(cli)
    ((level, detail),) = found["topology"]
    assert level == "ok"
    assert f"'relay-main' is 127.0.0.1:{primary.port}" in detail
    assert detail.endswith("; the URL names 3")
    ((level, detail),) = found["replication"]
    assert level == "warn"
    assert "min-replicas-to-write is 0" in detail
    assert "durability='replica:1'" in detail
    try:
        primary.cli("CONFIG", "SET", "min-replicas-to-write", "1")
        assert findings(cli)["replication"] == [("ok", "1 replica in sync, min-replicas-to-write is 1")]
        primary.cli("CONFIG", "SET", "min-replicas-to-write", "2")
        found = findings(cli, 1)
        assert found["replication"][0][0] == "error"
        assert "every write is refused" in found["replication"][0][1]
        assert "write" not in found
    finally:
        primary.cli("CONFIG", "SET", "min-replicas-to-write", "0")
    assert found["sentinels"] == [("ok", "3 sentinels agree on the primary, and see enough others for a failover")]
    one = Cli(f"relay+sentinel://127.0.0.1:{sentinel_trio.sentinels[0].port}/relay-main/0")
    found = findings(one)
    assert found["topology"][0][0] == "warn"
    ((level, detail),) = found["topology"]
    assert level == "warn"
    assert "the URL names 1 of 3, the others are" in detail
    for sentinel in sentinel_trio.sentinels[1:]:
        assert f"127.0.0.1:{sentinel.port}" in detail
    assert "who starts while it is away finds no primary" in detail
    assert found["sentinels"] == [("ok", "1 sentinel answers, and sees enough others for a failover")]
    replica = next(server for server in sentinel_trio.servers if server is not primary)
    found = findings(Cli(replica.url), 1)
    assert found["topology"][0][0] == "error"
    assert f"replica of 127.0.0.1:{primary.port}" in found["topology"][0][1]
    replica.kill()
    eventually(lambda: "no replica is connected" in str(findings(cli).get("replication")), "the replica is gone")


def sentinel_findings(url: str) -> dict[str, list[str]]:
    """Level -> what was found of the sentinels."""
    found: dict[str, list[str]] = {}
    for level, detail in findings(Cli(url))["sentinels"]:
        found.setdefault(level, []).append(detail)
    return found


@pytest.mark.slow
def test_sentinels_that_are_away_silent_or_something_else_are_told_one_by_one(sentinel_trio: SentinelTrio) -> None:
    first, second, third = sentinel_trio.sentinels
    name = {one: f"127.0.0.1:{one.port}" for one in sentinel_trio.sentinels}
    url, other = sentinel_trio.url, f"127.0.0.1:{sentinel_trio.primary.port}"
    third.pause()
    try:
        (detail,) = sentinel_findings(url)["warn"]
        assert detail.startswith(f"{name[third]}: ")
        assert "bring it back" in detail
    finally:
        third.resume()
    eventually(lambda: second.sees(3, 1) and first.sees(3, 1), "the third is seen again")
    (detail,) = sentinel_findings(url.replace(name[third], other))["warn"]
    assert detail.startswith(f"{other}: ")
    assert "it is no sentinel" in detail
    third.kill()
    second.kill()
    eventually(lambda: b"NOQUORUM" in _quorum(first), "the first is alone")
    told = sentinel_findings(url)["warn"]
    assert len(told) == 2, "who is away, and that a failover is not to be had"
    assert name[second] in told[0]
    assert name[third] in told[0]
    assert told[1].startswith(f"{name[first]}: NOQUORUM ")
    assert "nobody takes over" in told[1]


def _quorum(sentinel: Sentinel) -> bytes:
    try:
        return bytes(sentinel.cli("SENTINEL", "CKQUORUM", sentinel.service))
    except Exception as error:
        return str(error).encode()


@pytest.mark.slow
def test_sentinels_that_name_two_primaries_or_none_are_told(tcp_server: Server) -> None:
    flavour, port = tcp_server.flavour, tcp_server.port
    with (
        Server(flavour, tcp=True) as another,
        Sentinel(flavour, "main", port, 1) as right,
        Sentinel(flavour, "main", another.port, 1) as wrong,
        Sentinel(flavour, "backup", port, 1) as ignorant,
    ):
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in (right, wrong, ignorant))
        stranger, apart = sentinel_findings(f"relay+sentinel://{hosts}/main/0")["warn"]
    assert stranger.startswith(f"127.0.0.1:{ignorant.port}: no service 'main' is known there")
    assert "they do not agree on the primary" in apart
    assert f"127.0.0.1:{port} say 127.0.0.1:{right.port}" in apart
    assert f"127.0.0.1:{another.port} say 127.0.0.1:{wrong.port}" in apart


def test_a_sentinel_whose_user_may_only_ask_for_the_primary_is_no_trouble(tcp_server: Server) -> None:
    with Sentinel(tcp_server.flavour, "main", tcp_server.port, 1) as sentinel:
        rights = ("on", ">narrow", "+@connection", "+sentinel|get-master-addr-by-name")
        sentinel.cli("ACL", "SETUSER", "relay", *rights)
        query = "?sentinel_username=relay&sentinel_password="
        url = f"relay+sentinel://127.0.0.1:{sentinel.port}/main/0{query}"
        found = sentinel_findings(f"{url}narrow")
        assert set(found) == {"info"}
        assert "+sentinel|ckquorum +sentinel|sentinels lets it" in found["info"][0]
        wrong = Cli(f"{url}wide").run("doctor", code=1)
    assert "wide" not in wrong.stdout
    assert "wants another user name or password" in wrong.stdout


@pytest.mark.slow
def test_every_primary_of_a_cluster_is_looked_at_and_its_slots_and_replicas_counted(cluster: Cluster) -> None:
    cli = Cli(cluster.url)
    found = findings(cli)
    assert found["topology"] == [("ok", "a cluster of 3 primaries, all 16384 slots are served")]
    for check in ("version", "eviction", "memory", "persistence", "clock", "replication"):
        assert len(found[check]) == 3, check
    assert {level for level, _detail in found["replication"]} == {"warn"}
    primaries = {node for node in cluster.nodes if node.info("replication")["role"] == "master"}
    for node in primaries:
        assert any(detail.startswith(f"127.0.0.1:{node.port}: ") for _level, detail in found["eviction"])
    spoiled = next(iter(primaries))
    spoiled.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        told = findings(cli, 1)
        assert f"127.0.0.1:{spoiled.port}" in str([row for row in told["eviction"] if row[0] == "error"])
    finally:
        spoiled.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")


@pytest.mark.slow
def test_a_primary_without_a_replica_and_slots_that_nobody_serves_are_told(cluster: Cluster) -> None:
    cli = Cli(cluster.url)
    dead = cluster.kill_primary_of(0)
    told = cli.json("doctor", "--timeout", "0.2", code=3)["checks"]
    assert f"127.0.0.1:{dead.port}" in next(row["detail"] for row in told if row["level"] == "error")
    assert told[-1] == {"check": "other checks", "level": "info", "detail": ANY}
    cluster.reset()
    replica = next(node for node in cluster.nodes if node.info("replication")["role"] == "slave")
    followed = int(replica.info("replication")["master_port"])
    replica.kill()
    eventually(
        lambda: f"without a replica: 127.0.0.1:{followed}" in str(findings(cli).get("replication")), "it is told"
    )
    with Broker(cluster.url) as broker:
        for name in ("c", "post"):  # of two primaries, and the list of names lies at the third
            broker.enqueue(name, b"x")
        lost = cluster.slot_of(broker.settings.keys("post").jobs)
    owner = cluster.primary_of(lost)
    low, high = next((low, high) for low, high, port in cluster._ranges(owner) if low <= lost <= high)
    for node in cluster.nodes:
        if node.running:
            node.cli("CONFIG", "SET", "cluster-require-full-coverage", "no")
            node.cli("CLUSTER", "DELSLOTSRANGE", low, high)
    try:
        found = findings(cli, 1)
        assert found["topology"][0][0] == "error"
        assert "slots are served" in found["topology"][0][1]
        for command, code in (("stats", 0), ("audit", 1)):
            told = cli.json(command, "--timeout", "0.2", code=code)
            assert [row["queue"] for row in told["queues"]] == ["c"], "one that is away hides no other"
            assert list(told["left_out"]) == ["post"]
    finally:
        for node in cluster.nodes:
            if node.running:
                node.cli("CONFIG", "SET", "cluster-require-full-coverage", "yes")
        owner.cli("CLUSTER", "ADDSLOTSRANGE", low, high)
