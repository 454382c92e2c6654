"""Every kind of store that a URL can name, on real servers, with failovers while commands are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from relay_core.commands.command import Command
from relay_core.connection.steps import Address, Exchange, Outcome
from relay_core.connection.topology import Router
from relay_core.errors import AuthError, InvalidArgument, NotDurable, StoreError, Unavailable, UnsafeStore
from relay_core.settings import StoreSettings, parse_url
from tests.servers import AclServer, Flavour, Server, TlsServer, eventually
from tests.shells import KINDS, Face, Kind, count, open_store, script
from tests.topologies import Cluster, Sentinel, SentinelTrio

Open = Callable[..., Face]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def store_at(kind: Kind) -> Iterator[Open]:
    """`store_at(url, **settings)` opens a store and closes it after the test."""
    opened: list[Face] = []

    def open_at(url: str, **settings: Any) -> Face:
        opened.append(open_store(kind, parse_url(url), StoreSettings(**{"retry_for": 30.0} | settings)))
        return opened[-1]

    yield open_at
    for store in opened:
        store.close()


def keys_of_each_node(cluster: Cluster) -> list[str]:
    """One key per primary."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < cluster.PRIMARIES:
        key = f"relay:{{k{number}}}"
        found.setdefault(cluster.primary_of(cluster.slot_of(key)).port, key)
        number += 1
    return list(found.values())


def meanwhile(store: Face, command: Command[Any], work: Callable[[], object]) -> int:
    """Run the command again and again until `work` is done elsewhere, and once more; how often it ran."""
    runs = 0
    with ThreadPoolExecutor(1) as other:
        done = other.submit(work)
        last = False
        while not last:
            last = done.done()
            store.run(command)
            runs += 1
            store.rest(0.002)
        done.result()
    return runs


def port_of(store: Face) -> int:
    """Where the store's server listens, as that says itself."""
    lines = store.raw("INFO", "server").decode().splitlines()
    return int(next(line.split(":")[1] for line in lines if line.startswith("tcp_port:")))


def check_all_shells(store: Face) -> None:
    """One command, a pipeline, a plain command and a bell."""
    assert store.run(count("relay:{a}n")) == (1, False)
    assert store.run_many([count("relay:{a}n"), count("relay:{b}n")]) == [(2, False), (1, False)]
    assert store.raw("GET", "relay:{a}n") == b"2"
    bell = store.bell([b"relay:{a}m", b"relay:{b}m"])
    try:
        assert not bell.wait(0.01)
        store.raw("ZADD", "relay:{b}m", 0, "w")
        assert bell.wait(10)
        store.raw("ZADD", "relay:{a}m", 0, "w")
        assert bell.wait(10)
    finally:
        bell.close()


# --- one server


@pytest.mark.parametrize("fixture", ["tcp_server", "unix_server", "acl_server", "tls_server", "mutual_tls_server"])
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_every_way_to_one_server_serves_every_shell(
    fixture: str, flavour: Flavour, store_at: Open, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(fixture)
    check_all_shells(store_at(server.url))


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_an_acl_user_also_gets_through_on_the_word_redis(acl_server: AclServer, store_at: Open) -> None:
    check_all_shells(store_at(acl_server.url.replace("relay://", "redis://")))


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_the_database_of_the_url_is_the_one_used(tcp_server: Server, store_at: Open) -> None:
    store_at(tcp_server.url.removesuffix("/0") + "/3").raw("SET", "where", "3")
    assert store_at(tcp_server.url).raw("GET", "where") is None
    assert tcp_server.info("keyspace")["db3"].startswith("keys=1,")


def test_an_untrusted_certificate_is_refused_at_once_and_the_setting_named(
    tls_server: TlsServer, store_at: Open
) -> None:
    store = store_at(tls_server.url.partition("?")[0])
    with pytest.raises(StoreError, match="ssl_ca_certs"):
        store.raw("PING")


def test_a_missing_certificate_file_is_named(tls_server: TlsServer, store_at: Open) -> None:
    store = store_at(tls_server.url + ".gone")
    with pytest.raises(StoreError, match="ssl_ option cannot be read"):
        store.raw("PING")


def test_an_unknown_ssl_setting_is_refused_when_the_store_is_made(tls_server: TlsServer, store_at: Open) -> None:
    with pytest.raises(InvalidArgument, match="ssl_bogus"):
        store_at(tls_server.url, ssl={"ssl_bogus": True})


def test_ssl_settings_win_over_the_url(tls_server: TlsServer, store_at: Open) -> None:
    store = store_at(tls_server.url + ".gone", ssl={"ssl_ca_certs": str(tls_server.ca)})
    assert store.raw("PING") == b"PONG"


# --- sentinel


def test_the_primary_that_the_sentinels_name_serves_every_shell(sentinel_trio: SentinelTrio, store_at: Open) -> None:
    store = store_at(sentinel_trio.url)
    check_all_shells(store)
    assert port_of(store) == sentinel_trio.primary.port
    assert list(store.raw_all("DBSIZE")) == [f"127.0.0.1:{sentinel_trio.primary.port}"]


def test_commands_get_through_a_planned_failover(sentinel_trio: SentinelTrio, store_at: Open) -> None:
    store = store_at(sentinel_trio.url)
    old = port_of(store)
    assert meanwhile(store, count(), sentinel_trio.failover) > 1
    # The old primary goes on as if nothing had happened, until the sentinels make it a replica.
    assert sentinel_trio.primary.port != old
    eventually(lambda: port_of(store) == sentinel_trio.primary.port, "the new primary is used", 5.0)


def test_commands_get_through_the_death_of_the_primary(sentinel_trio: SentinelTrio, store_at: Open) -> None:
    store = store_at(sentinel_trio.url)
    store.run(count())
    dead = sentinel_trio.kill_primary()
    assert store.run(count())[0] >= 1
    assert store.run_many([count("other")] * 3) == [(1, False), (2, False), (3, False)]
    assert port_of(store) == sentinel_trio.wait_for_primary(dead).port


def test_a_bell_is_cut_by_a_failover_and_rings_at_the_new_primary(sentinel_trio: SentinelTrio, store_at: Open) -> None:
    store = store_at(sentinel_trio.url)
    bell = store.bell([b"m"])
    try:
        bell.arm(30)
        sentinel_trio.failover()
        with pytest.raises(Unavailable):
            bell.wait(30)
        store.raw("ZADD", "m", 0, "w")
        assert bell.wait(30)
    finally:
        bell.close()


def test_sentinels_that_are_down_are_passed_over(sentinel_trio: SentinelTrio, store_at: Open) -> None:
    sentinel_trio.sentinels[0].kill()
    assert store_at(sentinel_trio.url).raw("PING") == b"PONG"


def test_sentinels_that_are_silent_are_passed_over_long_before_a_server_would_be(
    sentinel_trio: SentinelTrio, store_at: Open
) -> None:
    """As when the machine of one is gone: the system takes its connections, and nothing answers."""
    store = store_at(sentinel_trio.url, socket_timeout=600.0, connect_timeout=600.0)
    for sentinel in sentinel_trio.sentinels[:2]:
        sentinel.pause()
    with ThreadPoolExecutor(1) as other:
        done = other.submit(store.raw, "PING")
        try:
            eventually(done.done, "the last sentinel is asked")
        finally:
            for sentinel in sentinel_trio.sentinels:
                sentinel.resume()
        assert done.result() == b"PONG"


SENTINELS = "relay+sentinel://127.0.0.1:1,127.0.0.1:2,127.0.0.1:3/main/0"
SILENT, NAMED = Outcome([], TimeoutError("silent")), Outcome([[b"127.0.0.1", b"9"]])


def questions(router: Router, answer: Callable[[int], Outcome]) -> list[int]:
    """The ports of the sentinels that the next command asks, and that answer so."""
    flow, asked, outcome = router.discover(), [], None
    with suppress(StopIteration):
        while True:
            step = flow.send(outcome)
            assert isinstance(step, Exchange)
            asked.append(step.address.port)
            outcome = answer(step.address.port)
    return asked


def test_while_all_sentinels_are_silent_most_commands_ask_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary that they named last may be well, and a question to one that is silent takes as long as it may."""
    now = 0.0
    monkeypatch.setattr("relay_core.connection.topology.time.monotonic", lambda: now)
    router = Router(parse_url(SENTINELS))
    assert questions(router, lambda port: NAMED) == [1]

    def silence(port: int) -> Outcome:
        nonlocal now
        now += 5  # longer than they are apart while one answers
        return SILENT

    now += 2
    asked = []
    for command in range(60):
        if questions(router, silence):
            asked.append(command)
        now += 1
    assert asked == [0, 3, 8, 17, 26, 35, 44, 53]  # one a second, without what the questions took
    assert router.address(b"q") == Address("127.0.0.1", 9)
    now += 9
    for _ in range(3):
        assert len(questions(router, lambda port: NAMED)) == 1  # as often as ever
        now += 2


def test_a_sentinel_that_did_not_answer_is_asked_last() -> None:
    router = Router(parse_url(SENTINELS))

    def ask() -> list[int]:
        router.doubt(Address("127.0.0.1", 9))
        return questions(router, lambda port: SILENT if port == 3 else NAMED)

    assert [ask() for _ in range(4)] == [[2], [3, 1], [2], [3, 1]]


def test_a_service_that_no_sentinel_knows_is_named(sentinel_trio: SentinelTrio, store_at: Open) -> None:
    store = store_at(sentinel_trio.url.replace("relay-main", "relay-mian"), retry_for=0.1)
    with pytest.raises(Unavailable, match="knows no service 'relay-mian'"):
        store.raw("PING")


def test_a_server_in_place_of_a_sentinel_is_named_as_one(store_at: Open, tcp_server: Server) -> None:
    url = f"relay+sentinel://127.0.0.1:{tcp_server.port}/main/0"
    with pytest.raises(Unavailable, match=r"it is no sentinel, .* relay:// is the URL of one"):
        store_at(url, retry_for=0.1).raw("PING")


def test_sentinels_with_a_password_get_their_own_credentials(store_at: Open) -> None:
    with Server("redis", tcp=True) as server, Sentinel("redis", "main", server.port, 1) as sentinel:
        sentinel.cli("ACL", "SETUSER", "default", "resetpass", ">secret-of-sentinel")
        url = f"relay+sentinel://127.0.0.1:{sentinel.port}/main/0"
        with pytest.raises(AuthError, match=r"the sentinel wants .* sentinel_password="):
            store_at(url).raw("PING")
        with pytest.raises(AuthError) as refused:
            store_at(url + "?sentinel_password=wrong-one").raw("PING")
        assert "wrong-one" not in str(refused.value)
        assert store_at(url + "?sentinel_password=secret-of-sentinel").raw("PING") == b"PONG"


def test_a_user_of_a_sentinel_needs_the_right_to_one_question(store_at: Open) -> None:
    """As docs/operations.md says, with a name for CLIENT LIST, too."""
    with Server("redis", tcp=True) as server, Sentinel("redis", "main", server.port, 1) as sentinel:
        sentinel.cli("ACL", "SETUSER", "relay", "on", ">secret", "+sentinel|get-master-addr-by-name")
        url = f"relay+sentinel://127.0.0.1:{sentinel.port}/main/0?sentinel_username=relay&sentinel_password=secret"
        assert store_at(url, client_name="worker").raw("CLIENT", "GETNAME") == b"worker"


def test_a_write_is_durable_once_the_replica_has_it(sentinel_trio: SentinelTrio, store_at: Open) -> None:
    store = store_at(sentinel_trio.url, durability="replica:1", durability_timeout=30.0)
    assert store.run(count(durable=True)) == (1, False)
    assert store.run_many([count(durable=True), count("free")]) == [(2, False), (1, False)]


def test_a_write_that_no_replica_confirms_in_time_is_stored_and_not_durable(
    sentinel_trio: SentinelTrio, store_at: Open
) -> None:
    store = store_at(sentinel_trio.url, durability="replica:2", durability_timeout=0.05)
    with pytest.raises(NotDurable, match=r"1 of 2 replicas|0 of 2 replicas"):
        store.run(count(durable=True))
    durable, free = store.run_many([count(durable=True), count("free")])
    assert isinstance(durable, NotDurable)
    assert free == (1, False)
    assert store.raw("GET", "n") == b"2"


# --- cluster


def test_every_shell_reaches_the_nodes_of_its_keys(cluster: Cluster, store_at: Open) -> None:
    store = store_at(cluster.url)
    check_all_shells(store)
    keys = keys_of_each_node(cluster)
    assert store.run_many([count(key) for key in keys * 3]) == [(n, False) for n in (1, 2, 3) for _ in keys]
    assert len(store.raw_all("DBSIZE")) == 3


def test_every_primary_of_a_cluster_is_checked_at_the_first_use(cluster: Cluster, store_at: Open) -> None:
    bad = cluster.primary_of(16_000)
    bad.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        here = next(key for key in keys_of_each_node(cluster) if cluster.primary_of(cluster.slot_of(key)) is not bad)
        with pytest.raises(UnsafeStore, match=f":{bad.port}.*maxmemory-policy"):
            store_at(cluster.url).run(count(here))
    finally:
        bad.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")


def test_commands_get_through_the_death_of_a_cluster_primary(cluster: Cluster, store_at: Open) -> None:
    store = store_at(cluster.url)
    keys = keys_of_each_node(cluster)
    store.run_many([count(key) for key in keys])
    dead = cluster.kill_primary_of(cluster.slot_of(keys[0]))
    results = store.run_many([count(key) for key in keys])
    assert [type(result) for result in results] == [tuple] * 3, results
    assert [result[0] for result in results[1:]] == [2, 2], "only what was not answered may have gone again"
    cluster.wait_until_replaced(dead)
    assert f"127.0.0.1:{dead.port}" not in store.raw_all("PING")


def test_a_bell_finds_its_marker_on_the_node_that_took_over(cluster: Cluster, store_at: Open) -> None:
    store = store_at(cluster.url)
    markers = [key.encode() for key in keys_of_each_node(cluster)]
    bell = store.bell(markers)
    try:
        bell.arm(60)
        assert bell.armed
        dead = cluster.kill_primary_of(cluster.slot_of(markers[0]))
        # it may have been given to the connection that was lost
        eventually(lambda: bell.wait(1) and markers[0] in bell.popped, "it rings once there is a server again", 60)
        cluster.wait_until_replaced(dead)
        for marker in markers:
            store.raw("ZADD", marker, 0, "w")
            eventually(lambda: bell_rings(bell), f"ring of {marker!r}")
    finally:
        bell.close()


def bell_rings(bell: Any) -> bool:
    """Wait a moment for the bell; one that is cut counts as not rung, as to any worker."""
    try:
        rung: bool = bell.wait(1)
        return rung
    except Unavailable:
        return False


def test_commands_follow_a_slot_that_moves(cluster: Cluster, store_at: Open) -> None:
    store = store_at(cluster.url)
    key = keys_of_each_node(cluster)[0]
    slot = cluster.slot_of(key)
    source = cluster.primary_of(slot)
    # any of the six: after a failover a node that began as a replica leads
    target = next(node for node in cluster.nodes if node is not source and node.info("replication")["role"] == "master")
    ids = {node: node.cli("CLUSTER", "MYID") for node in (source, target)}
    store.run(count(key))
    target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    try:
        assert store.run(count(key)) == (2, False)
        source.cli("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        target.cli("SCRIPT", "FLUSH")
        assert store.run(count(key)) == (3, False), "asked at the new owner"
        assert store.run_many([count(key), count(key)]) == [(4, False), (5, False)]
    finally:
        cluster.hand_over(slot, source, target)
    assert store.run(count(key)) == (6, False), "moved to the new owner"
    # Back again, so that the next test finds the slots as they were.
    source.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[target])
    target.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[source])
    target.cli("MIGRATE", "127.0.0.1", source.port, key, 0, 5000)
    cluster.hand_over(slot, target, source)
    assert store.run(count(key)) == (7, False)


def test_keys_of_several_slots_in_one_command_are_refused_at_once(cluster: Cluster, store_at: Open) -> None:
    keys = [key.encode() for key in keys_of_each_node(cluster)]
    two = replace(count(), script=script("return #KEYS"), keys=(keys[0], keys[1]))
    with pytest.raises(StoreError, match="CROSSSLOT"):
        store_at(cluster.url).run(two)


def test_a_cluster_node_under_a_plain_url_is_told_apart(cluster: Cluster, store_at: Open) -> None:
    keys = keys_of_each_node(cluster)
    store = store_at(f"relay://127.0.0.1:{cluster.primary_of(cluster.slot_of(keys[0])).port}")
    with pytest.raises(StoreError, match=r"relay\+cluster://"):
        store.run(count(keys[1]))


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_a_single_server_under_a_cluster_url_is_told_apart(tcp_server: Server, store_at: Open) -> None:
    with pytest.raises(StoreError, match="use relay://"):
        store_at(f"relay+cluster://127.0.0.1:{tcp_server.port}").raw("PING")
