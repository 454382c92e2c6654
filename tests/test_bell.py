"""Bells: rung by a marker, punctual, selectable, and honest about a connection that was cut."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import os
import select
import threading
import time

import pytest

from relay_core.connection import SyncStore
from relay_core.errors import PermissionDenied, Unavailable
from relay_core.settings import StoreSettings, parse_url
from tests.forking import child_of, code_of
from tests.proxy import Proxy, to_socket
from tests.servers import AclServer, Server, eventually
from tests.shells import Open, count, kind, store_at  # noqa: F401 (fixtures)


def blocked(server: Server) -> int:
    return int(server.info("clients")["blocked_clients"])


def ring(server: Server, marker: str = "m") -> None:
    server.cli("ZADD", marker, "1", "x")


def test_a_marker_that_is_there_already_rings_at_once(server: Server, store_at: Open) -> None:
    ring(server)
    bell = store_at(server.url).bell([b"m"])
    assert bell.wait(3600)
    assert server.cli("EXISTS", "m") == 0
    bell.close()


def test_a_marker_set_later_wakes_the_one_who_waits(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"other", b"m"])

    def ring_once_blocked() -> None:
        eventually(lambda: blocked(server) == 1, "bell is armed")
        ring(server)

    ringer = threading.Thread(target=ring_once_blocked)
    ringer.start()
    assert bell.wait(3600)
    ringer.join()
    bell.close()


def test_two_bells_are_not_rung_by_one_marker(server: Server, store_at: Open) -> None:
    store = store_at(server.url)
    first, second = store.bell([b"m"]), store.bell([b"m"])
    first.arm(20)
    eventually(lambda: blocked(server) == 1, "first is armed")
    second.arm(20)
    eventually(lambda: blocked(server) == 2, "second is armed")
    ring(server)
    assert first.wait(5)
    assert not second.wait(0.05)
    first.close()
    second.close()


def test_a_wait_ends_on_time(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])

    def late(seconds: float) -> float:
        began = time.monotonic()
        assert not bell.wait(seconds)
        return time.monotonic() - began - seconds

    waits = (0.003, 0.017, 0.05)
    assert all(late(seconds) >= -0.001 for seconds in waits * 5)
    bell.arm(3600)
    server.pause()  # no wait ends because the server gives up, which is late
    for seconds in waits:
        eventually(lambda: late(seconds) < 0.01, "a moment in which the machine is not busy")  # noqa: B023
    server.resume()
    bell.close()


def test_a_wait_of_no_time_looks_and_returns(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])
    assert not bell.wait(0)
    bell.arm(20)
    eventually(lambda: blocked(server) == 1, "bell is armed")
    ring(server)
    eventually(lambda: bell.wait(0), "bell rings")
    bell.close()


def test_a_marker_that_comes_between_two_waits_is_kept_for_the_second(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])
    bell.arm(20)
    eventually(lambda: not bell.wait(0.01) and bell.armed, "it to be armed")
    ring(server)
    assert bell.wait(5)
    eventually(lambda: not bell.armed, "bell has rung and waits no more")
    bell.close()


def test_a_server_that_gave_up_disarms_the_bell(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])
    bell.arm(0.01)
    assert bell.armed

    def given_up() -> bool:
        assert not bell.rung()
        return not bell.armed

    eventually(given_up, "server gives up")
    ring(server)
    assert bell.wait(5)
    bell.close()


def test_arming_twice_blocks_once(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])
    bell.arm(20)
    bell.arm(20)
    eventually(lambda: blocked(server) == 1, "bell is armed")
    ring(server)
    assert bell.wait(5)
    ring(server)
    assert not bell.rung()
    assert server.cli("EXISTS", "m") == 1
    bell.close()


def test_looking_never_blocks(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])
    assert not bell.rung()
    bell.arm(3600)
    for _ in range(2000):  # a look that waits for a tenth of a second makes this test run out of its time
        assert not bell.rung()
    bell.close()


def test_another_thread_can_end_a_wait(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])

    def wake_once_blocked() -> None:
        eventually(lambda: blocked(server) == 1, "bell is armed")
        bell.wake()

    waker = threading.Thread(target=wake_once_blocked)
    waker.start()
    assert not bell.wait(3600)
    waker.join()
    assert bell.armed
    ring(server)
    assert bell.wait(5)
    bell.close()


def test_a_wake_that_comes_before_the_wait_ends_the_wait(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])
    bell.arm(20)
    bell.wake()
    assert not bell.wait(3600)
    bell.close()


def test_closing_leaves_nobody_blocked_at_the_server(server: Server, store_at: Open) -> None:
    bell = store_at(server.url).bell([b"m"])
    bell.arm(100)
    eventually(lambda: blocked(server) == 1, "bell is armed")
    bell.close()
    eventually(lambda: blocked(server) == 0, "server forgets the bell")
    ring(server)
    assert server.cli("EXISTS", "m") == 1


def test_a_cut_connection_is_unavailable_and_the_next_arming_connects_anew(server: Server, store_at: Open) -> None:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        bell = store_at(proxy.url).bell([b"m"])
        bell.arm(20)
        eventually(lambda: blocked(server) == 1, "bell is armed")
        proxy.cut_all()
        with pytest.raises(Unavailable):
            bell.wait(5)
        assert not bell.armed
        eventually(lambda: blocked(server) == 0, "the server has seen the end, and gives no marker to who is gone")
        ring(server)
        assert bell.wait(5)
        bell.close()


def test_a_bell_at_a_server_that_is_down_is_unavailable_at_once(server: Server, store_at: Open) -> None:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        bell = store_at(proxy.url, retry_for=3600).bell([b"m"])
        proxy.refuse()
        with pytest.raises(Unavailable):
            bell.wait(3600)
        proxy.refuse(False)
        assert not bell.wait(0.01)
        bell.close()


def test_a_marker_out_of_the_users_reach_is_told(acl_server: AclServer, store_at: Open) -> None:
    bell = store_at(acl_server.url).bell([b"other:m"])
    with pytest.raises(PermissionDenied):
        bell.wait(5)
    bell.close()


def test_a_blocked_wait_outlasts_the_socket_timeout(server: Server, store_at: Open) -> None:
    bell = store_at(server.url, socket_timeout=0.1).bell([b"m"])
    bell.arm(20)
    assert not bell.wait(0.4)
    assert bell.armed
    ring(server)
    assert bell.wait(5)
    bell.close()


def test_commands_run_beside_an_armed_bell(server: Server, store_at: Open) -> None:
    store = store_at(server.url, max_connections=1)
    bell = store.bell([b"m"])
    bell.arm(20)
    assert store.run(count()) == (1, False)
    bell.close()


def test_an_event_loop_can_select_on_an_armed_bell(server: Server) -> None:
    store = SyncStore(parse_url(server.url), StoreSettings())
    bell = store.bell([b"m"])
    bell.arm(20)
    assert select.select(bell.filenos(), [], [], 0.05)[0] == []
    ring(server)
    assert select.select(bell.filenos(), [], [], 10)[0] != []
    assert bell.rung()
    bell.close()
    store.close()


def test_a_child_of_fork_has_a_bell_of_its_own(server: Server) -> None:
    store = SyncStore(parse_url(server.url), StoreSettings())
    bell = store.bell([b"m", b"n"])
    bell.arm(50)
    eventually(lambda: blocked(server) == 1, "parent's bell is armed")

    def look() -> bool:
        let_go = not bell.armed
        bell.arm(50)  # for longer than this takes: the server is not to give up
        waits = bell.armed and not bell.rung()
        bell.close()
        return let_go and waits

    assert code_of(child_of(look)) == 0
    eventually(lambda: blocked(server) == 1, "only the parent's bell is left")
    ring(server)
    assert bell.wait(5)
    bell.close()
    store.close()


def test_a_bell_does_not_outlive_its_process_in_a_forked_child(server: Server) -> None:
    """A child that never uses the bell must not hold the parent's connection open after the parent's end."""
    ready, go = os.pipe()

    def live_on() -> bool:
        os.close(go)
        os.read(ready, 1)  # until the test ends
        return True

    def end() -> bool:
        bell = SyncStore(parse_url(server.url), StoreSettings()).bell([b"m"])
        bell.arm(100)
        eventually(lambda: blocked(server) == 1, "bell is armed")
        return child_of(live_on) > 0

    assert code_of(child_of(end)) == 0
    try:
        eventually(lambda: blocked(server) == 0, "server forgets the bell", 5)
    finally:
        os.close(go)
        os.close(ready)
