"""The stores against real servers: what is repeated, what is raised, and that no reply is taken for another's."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from relay_core.clock import sent_now
from relay_core.commands.command import Command
from relay_core.errors import (
    AuthError,
    LayoutError,
    PermissionDenied,
    RelayError,
    StoreError,
    Unavailable,
)
from tests.proxy import Proxy, to_socket
from tests.servers import AclServer, Server, TlsServer, eventually, free_port
from tests.shells import Open, count, kind, script, store_at  # noqa: F401 (fixtures)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        yield proxy


class Clock:
    """In place of the module `time` of the stores: a second passes between two looks, however long anything takes.

    Threads that other tests have left behind, to keep leases for one, have the time as it is.

    :ivar looks: how many there were. The first is as a command begins, then one is after each try that did not help
    """

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.looks = 0
        self._others = set(threading.enumerate()) - {threading.current_thread()}

    def monotonic(self) -> float:
        if threading.current_thread() in self._others:
            return time.monotonic()
        self.looks += 1
        return float(self.looks)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("attempts", "sync", "aio"):
        monkeypatch.setattr(f"relay_core.connection.{module}.time", clock)
    return clock


def failing(reply: str, times: int = 1_000_000) -> Command[tuple[bytes, bool]]:
    """Answers `times` times with an error reply, then with whether its argument says that it was re-sent."""
    body = f"if redis.call('INCR', KEYS[1]) <= {times} then return redis.error_reply({reply!r}) end return ARGV[1]"
    return Command(script(body), (b"tries",), (0,), lambda reply, resent: (int(reply) > 0, resent), resent_at=0)


# --- scripts


def test_a_script_that_the_server_does_not_know_is_loaded_and_run_once(server: Server, store_at: Open) -> None:
    store = store_at(server.url)
    server.cli("SCRIPT", "FLUSH")
    assert store.run(count()) == (1, False)
    server.cli("SCRIPT", "FLUSH")
    assert store.run(count()) == (2, False)


def test_in_a_pipeline_only_the_commands_with_an_unknown_script_go_again(server: Server, store_at: Open) -> None:
    store = store_at(server.url)
    server.cli("SCRIPT", "FLUSH")
    store.run(count("known"))
    other = script("return redis.call('INCRBY', KEYS[1], 10)")
    unknown = Command(other, (b"unknown",), (), lambda reply, resent: (reply, resent))
    assert store.run_many([count("known"), unknown, count("known"), unknown]) == [
        (2, False),
        (10, False),
        (3, False),
        (20, False),
    ]


def test_an_empty_pipeline_is_nothing_to_do(server: Server, store_at: Open) -> None:
    assert store_at(server.url).run_many([]) == []


def test_a_long_pipeline_gives_each_command_its_own_reply(server: Server, store_at: Open) -> None:
    echo = script("return ARGV[1]")
    commands = [
        Command(echo, (b"k",), (b"%d " % i + b"x" * 2000,), lambda reply, resent: int(reply.split()[0]))
        for i in range(1500)
    ]
    assert store_at(server.url).run_many(commands) == list(range(1500))


def test_an_error_that_parse_raises_is_the_result_of_its_command_alone(server: Server, store_at: Open) -> None:
    def refuse(reply: Any, resent: bool) -> None:
        raise StoreError("not what was hoped for")

    store = store_at(server.url)
    bad: Command[None] = Command(script("return 1"), (b"k",), (), refuse)
    good, error, also_good = store.run_many([count(), bad, count()])
    assert (good, also_good) == ((1, False), (2, False))
    assert isinstance(error, StoreError)
    with pytest.raises(StoreError, match="hoped for"):
        store.run(bad)


# --- lost replies


def test_a_lost_reply_makes_the_command_go_again_as_a_re_send(server: Server, proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url)
    flag = Command(
        script("redis.call('INCR', KEYS[1]) return ARGV[1]"),
        (b"n",),
        (0,),
        lambda reply, resent: (int(reply) > 0, resent),
        resent_at=0,
    )
    assert store.run(flag) == (False, False)
    proxy.cut_reply(b"EVALSHA")
    assert store.run(flag) == (True, True)
    assert server.cli("GET", "n") == b"3"


def test_a_lost_request_is_treated_as_if_it_might_have_run(server: Server, proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url)
    store.run(count())
    proxy.cut_request(b"EVALSHA")
    assert store.run(count()) == (2, True)


def test_a_reply_that_never_comes_is_given_up_after_the_socket_timeout(
    server: Server, proxy: Proxy, store_at: Open
) -> None:
    store = store_at(proxy.url, socket_timeout=0.2)
    store.run(count())
    number = 1

    def seconds() -> float:
        nonlocal number
        number += 2
        proxy.swallow_reply(b"EVALSHA")
        began = time.monotonic()
        assert store.run(count()) == (number, True)
        return time.monotonic() - began

    assert seconds() >= 0.2
    eventually(lambda: seconds() < 2, "a moment in which the machine is not busy")


def test_a_re_send_says_how_long_ago_the_first_send_was(proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url, socket_timeout=0.2)
    store.run(count())
    age = Command(script("return ARGV[1]"), (b"n",), (0,), lambda reply, _resent: int(reply), resent_at=0)
    assert store.run(age) == 0
    proxy.swallow_reply(b"EVALSHA")
    first = store.run(age)
    proxy.swallow_reply(b"EVALSHA", times=2)
    second = store.run(age)
    earlier = store.run(replace(age, since=sent_now() - 60))
    assert 200 <= first < 10_000
    assert 400 <= second < 10_000
    assert 60_000 <= earlier < 70_000


def test_a_late_reply_is_not_taken_for_that_of_the_next_command(proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url, socket_timeout=0.2, retry_for=0)
    store.run(count("a"))
    proxy.delay = 0.4
    with pytest.raises(Unavailable):
        store.run(count("a"))
    proxy.delay = 0.0
    assert store.run(count("b")) == (1, False)


def test_once_a_send_may_have_run_every_later_one_is_a_re_send(server: Server, proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url)
    answer = failing("MISCONF cannot save", times=2)
    store.run(count())
    proxy.cut_reply(b"EVALSHA")
    # cut; MISCONF, which was surely not executed; and then at last
    assert store.run(answer) == (True, True)


def test_a_command_that_may_have_run_is_given_up_as_such(proxy: Proxy, store_at: Open, clock: Clock) -> None:
    store = store_at(proxy.url, retry_for=4)
    store.run(count())
    proxy.cut_reply(b"EVALSHA", times=10_000)
    with pytest.raises(Unavailable, match=r"tried for 4\.0 s, it may have been executed") as caught:
        store.run(count())
    assert caught.value.maybe_executed


def test_of_a_cut_pipeline_only_the_commands_without_a_reply_go_again(
    server: Server, proxy: Proxy, store_at: Open
) -> None:
    store = store_at(proxy.url)
    store.run(count("warm"))
    proxy.cut_reply(b"EVALSHA", after=len(b":1\r\n"))
    assert store.run_many([count("a"), count("b"), count("c")]) == [(1, False), (2, True), (2, True)]
    assert server.cli("MGET", "a", "b", "c") == [b"1", b"2", b"2"]


def test_a_reply_cut_in_its_middle_counts_as_lost(server: Server, proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url)
    long = Command(
        script("redis.call('INCR', KEYS[1]) return string.rep('x', 5000)"),
        (b"n",),
        (),
        lambda reply, resent: (len(reply), resent),
    )
    store.run(long)
    proxy.cut_reply(b"EVALSHA", after=1000)
    assert store.run(long) == (5000, True)


def test_a_connection_that_the_server_closed_while_idle_costs_nothing(server: Server, store_at: Open) -> None:
    store = store_at(server.url)
    store.run(count())
    server.cli("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    store.rest(1.1)  # the stores look at a connection after a second without use
    assert store.run(count()) == (2, False)


# --- not executed


NOT_EXECUTED = [
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down",
    "CLUSTERDOWN The cluster is down",
    "NOREPLICAS Not enough good replicas to write.",
    "BUSY Redis is busy running a script.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "MISCONF Redis is configured to save RDB snapshots",
    "EXECABORT Transaction discarded because of: READONLY You can't write against a read only replica.",
]


@pytest.mark.parametrize("reply", NOT_EXECUTED)
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_what_the_server_could_not_do_now_is_repeated_as_it_was(reply: str, server: Server, store_at: Open) -> None:
    assert store_at(server.url).run(failing(reply, times=3)) == (False, False)
    assert server.cli("GET", "tries") == b"4"


@pytest.mark.parametrize("reply", NOT_EXECUTED)
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_what_the_server_cannot_do_for_long_is_given_up_as_not_executed(
    reply: str, server: Server, store_at: Open, clock: Clock
) -> None:
    with pytest.raises(Unavailable, match=r"tried for 4\.0 s, it was not executed") as caught:
        store_at(server.url, retry_for=4).run(failing(reply))
    assert not caught.value.maybe_executed
    assert reply.rpartition("because of: ")[2].split()[0] in str(caught.value)
    assert server.cli("GET", "tries") == b"4"


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_in_a_pipeline_only_the_commands_that_were_not_executed_go_again(server: Server, store_at: Open) -> None:
    replies = store_at(server.url).run_many([count(), failing("BUSY wait", times=2), count()])
    assert replies == [(1, False), (False, False), (2, False)]


def test_nobody_listening_is_unavailable_and_not_executed(store_at: Open, clock: Clock) -> None:
    with pytest.raises(Unavailable, match=r"tried for 4\.0 s") as caught:
        store_at(f"relay://u:hunter2@127.0.0.1:{free_port()}/0", retry_for=4).run(count())
    assert not caught.value.maybe_executed
    assert clock.looks == 5
    assert "127.0.0.1" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_retrying_for_no_time_tries_once(proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url, retry_for=0)
    store.run(count())
    proxy.cut_reply(b"EVALSHA")
    with pytest.raises(Unavailable) as caught:
        store.run(count())
    assert caught.value.maybe_executed
    assert store.run(count()) == (3, False)


def test_a_server_that_comes_back_in_time_is_waited_for(tcp_server: Server, store_at: Open) -> None:
    store = store_at(tcp_server.url)
    store.run(count())
    tcp_server.kill()
    back = threading.Timer(0.5, tcp_server.start)
    back.start()
    try:
        number, _resent = store.run(count())
    finally:
        back.join()
    assert number == 1  # nothing was saved


def test_a_replica_is_named_as_one(store_at: Open) -> None:
    told = "it is a replica: the URL, or the sentinels in it, must name the primary"
    with Server("valkey", options={"replicaof": f"127.0.0.1 {free_port()}"}) as replica:
        store = store_at(replica.url, retry_for=0)
        with pytest.raises(Unavailable, match=told):
            store.run(count())


def test_a_full_server_is_named_with_its_setting(server: Server, store_at: Open) -> None:
    store = store_at(server.url, retry_for=0.2)
    server.cli("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(Unavailable, match="maxmemory") as caught:
        store.run(count())
    assert not caught.value.maybe_executed


# --- permanent


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("NOPERM this user has no permissions", PermissionDenied),
        ("WRONGPASS invalid username-password pair", AuthError),
        ("NOAUTH Authentication required.", AuthError),
        ("RELAY_LAYOUT the queue has layout 9", LayoutError),
        ("ERR something else", StoreError),
        ("WRONGTYPE Operation against a key", StoreError),
    ],
)
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_what_repeating_cannot_help_is_raised_at_once(
    reply: str, error: type[StoreError], server: Server, store_at: Open
) -> None:
    store = store_at(server.url)
    with pytest.raises(error) as caught:
        store.run(failing(reply))
    assert type(caught.value) is error
    first, second = store.run_many([failing(reply), count()])
    assert type(first) is error
    assert second == (1, False)
    assert server.cli("GET", "tries") == b"2"


def test_a_database_that_the_server_does_not_have_is_said_to_be_the_urls(server: Server, store_at: Open) -> None:
    with pytest.raises(StoreError, match="no database of this number, the one at the URL's end"):
        store_at(server.url.replace("db=0", "db=999")).run(count())


def test_a_wrong_password_is_an_auth_error_that_does_not_show_it(
    acl_server: AclServer, store_at: Open, clock: Clock
) -> None:
    url = f"relay://{acl_server.user}:hunter2@127.0.0.1:{acl_server.port}/0"
    with pytest.raises(AuthError) as caught:
        store_at(url).run(count("relay:n"))
    assert "hunter2" not in str(caught.value)
    assert clock.looks == 1, "nothing is repeated"


def test_the_wrong_kind_of_tls_is_named_as_such(
    tcp_server: Server, tls_server: TlsServer, mutual_tls_server: TlsServer, store_at: Open
) -> None:
    mutual = f"relays://localhost:{mutual_tls_server.port}/0?ssl_ca_certs={mutual_tls_server.ca}"
    quiet = store_at(f"relays://127.0.0.1:{tcp_server.port}/0", retry_for=0, connect_timeout=0.2)
    with pytest.raises(Unavailable, match=r"speaks no TLS there, use relay:// in place.*it was not executed"):
        quiet.run(count())
    for url, hint in [
        (f"relay://127.0.0.1:{tls_server.port}/0", "speaks TLS there, use relays:// in place"),
        (f"relay+cluster://127.0.0.1:{tls_server.port}", r"use relays\+cluster:// in place of relay\+cluster://"),
        (f"relay+sentinel://127.0.0.1:{tls_server.port}/a/0", r"use relays\+sentinel:// in place of"),
        (f"relay://u:p@127.0.0.1:{tls_server.port}/0", "speaks TLS there, use relays:// in place"),
        (mutual, "name it with ssl_certfile"),
    ]:
        with pytest.raises(Unavailable, match=rf"{hint}.*it was not executed"):
            store_at(url, retry_for=0).run(count())


def test_a_server_that_was_there_is_not_said_to_speak_tls(proxy: Proxy, store_at: Open) -> None:
    store = store_at(proxy.url, retry_for=0)
    assert store.run(count()) == (1, False)
    proxy.refuse()
    proxy.cut_all()
    with pytest.raises(Unavailable) as caught:
        store.run(count())
    assert "TLS" not in str(caught.value)


def test_an_acl_user_works_within_its_keys_and_is_told_what_is_outside(acl_server: AclServer, store_at: Open) -> None:
    store = store_at(acl_server.url)
    assert store.run(count("relay:n")) == (1, False)
    with pytest.raises(PermissionDenied):
        store.run(count("other:n"))
    with pytest.raises(PermissionDenied):
        store.raw("CONFIG", "GET", "port")


def test_the_credential_provider_is_asked_at_each_connect(acl_server: AclServer, store_at: Open) -> None:
    asked: list[int] = []

    def provide() -> tuple[str | None, str]:
        asked.append(1)
        return acl_server.user, acl_server.password

    store = store_at(f"relay://127.0.0.1:{acl_server.port}/0", credential_provider=provide)
    assert store.run(count("relay:n")) == (1, False)
    before = len(asked)
    acl_server.cli("CLIENT", "KILL", "USER", acl_server.user)
    store.run(count("relay:n"))
    assert len(asked) > before


def test_a_credential_provider_that_raises_is_an_auth_error_without_its_words(
    acl_server: AclServer, store_at: Open
) -> None:
    def provide() -> tuple[str | None, str]:
        raise ValueError("hunter2")

    with pytest.raises(RelayError) as caught:
        store_at(f"relay://127.0.0.1:{acl_server.port}/0", credential_provider=provide, retry_for=0.2).run(
            count("relay:n")
        )
    assert "hunter2" not in str(caught.value)


def test_an_argument_that_cannot_be_sent_is_refused_before_the_send(server: Server, store_at: Open) -> None:
    store = store_at(server.url)
    with pytest.raises(RelayError):
        store.raw("SET", "k", object())  # type: ignore[arg-type]
    assert store.raw("GET", "k") is None
