"""The test servers themselves: a fixture that lies would make every other test worthless."""

from __future__ import annotations

import os
import signal

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests import servers
from tests.servers import AclServer, Flavour, MissingServer, Server, TlsServer
from tests.topologies import Cluster, SentinelTrio


def plain_client(port: int) -> redis.Redis:
    return redis.Redis(port=port, socket_timeout=5, retry=Retry(NoBackoff(), 0))


def test_each_flavour_is_the_server_that_it_says(server: Server, flavour: Flavour) -> None:
    assert ("valkey_version" in server.info("server")) == (flavour == "valkey")


def test_a_server_is_empty_and_unpaused_after_a_reset(server: Server) -> None:
    server.cli("SET", "left", "behind")
    server.cli("CONFIG", "SET", "maxmemory", "1000000", "maxmemory-policy", "allkeys-lru")
    server.pause()
    server.reset()
    assert server.cli("DBSIZE") == 0
    assert server.info("memory")["maxmemory_policy"] == "noeviction"


def test_a_killed_server_runs_again_after_a_reset_where_it_was(tcp_server: Server) -> None:
    url, pid = tcp_server.url, tcp_server.pid
    tcp_server.kill()
    with pytest.raises(redis.ConnectionError):
        tcp_server.cli("PING")
    tcp_server.reset()
    assert (tcp_server.url, tcp_server.cli("PING")) == (url, b"PONG")
    assert tcp_server.pid != pid


def test_a_missing_server_program_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingServer, match="setup-servers"):
        Server("redis")


def test_a_port_that_was_taken_meanwhile_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server("redis", tcp=True) as first:
        ports = iter([first.port, servers.free_port()])
        monkeypatch.setattr(servers, "free_port", lambda: next(ports))
        with Server("redis", tcp=True) as second:
            assert second.port != first.port
            assert second.cli("CONFIG", "GET", "port")[1] == str(second.port).encode()


def test_closing_a_server_leaves_neither_process_nor_folder() -> None:
    with Server("valkey") as server:
        pid = server.pid
    assert not server.folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_the_tls_server_refuses_plain_text(tls_server: TlsServer) -> None:
    assert tls_server.cli("PING") == b"PONG"
    with plain_client(tls_server.port) as plain, pytest.raises(redis.ConnectionError):
        plain.ping()


def test_the_acl_server_confines_the_worker_to_its_prefix(acl_server: AclServer) -> None:
    with acl_server.client(username=acl_server.user, password=acl_server.password) as client:
        client.set("relay:x", "1")
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set("other:x", "1")
    with pytest.raises(redis.AuthenticationError), plain_client(acl_server.port) as stranger:
        stranger.ping()


@pytest.mark.slow
def test_the_sentinel_trio_fails_over_by_order_and_after_a_kill(sentinel_trio: SentinelTrio) -> None:
    first = sentinel_trio.primary
    second = sentinel_trio.failover()
    assert second is not first
    assert sentinel_trio.kill_primary() is second
    third = sentinel_trio.wait_for_primary(other_than=second)
    assert third.cli("SET", "k", "v") == b"OK"
    sentinel_trio.reset()
    assert second.running
    assert sentinel_trio.primary.cli("DBSIZE") == 0


@pytest.mark.slow
def test_a_cluster_serves_every_slot_again_after_a_primary_is_killed(cluster: Cluster) -> None:
    slot = cluster.slot_of("some key")
    dead = cluster.kill_primary_of(slot)
    cluster.wait_until_replaced(dead)
    assert cluster.primary_of(slot) is not dead
    assert cluster.primary_of(slot).cli("SET", "some key", "v") == b"OK"
    cluster.reset()
    assert dead.running
    assert all(node.cli("DBSIZE") == 0 for node in cluster.nodes)
