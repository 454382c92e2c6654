"""What fails halfway leaves nothing behind: no message that nobody delivers, no credit that never comes back, no
channel that was closed."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import celery.worker.state
import kombu
import pytest

from relay_adapters.celery.holding import owed
from relay_adapters.celery.holding.apart import Apart
from relay_adapters.celery.holding.owed import Owed
from relay_adapters.celery.receiving.consuming import Consuming
from relay_adapters.celery.receiving.settling import Settling
from relay_adapters.celery.workerstate import running_tags
from relay_core import Broker, Verdict
from relay_core.errors import InvalidArgument, RelayError, StoreError, Unavailable
from tests.celery_links import Inbox, Loop, fresh, link, send
from tests.servers import Server, eventually
from tests.signals import handled_by


@pytest.fixture
def connection(server: Server) -> Iterator[kombu.Connection]:
    with link(server.url, lease=3.0, max_payload=600) as connection:
        yield connection


def away(*_: Any, **__: Any) -> NoReturn:
    raise Unavailable("away")


def refused(*_: Any) -> NoReturn:
    raise StoreError("no")


def test_what_was_claimed_of_one_queue_is_delivered_though_the_next_one_fails(
    connection: kombu.Connection, broker: Broker
) -> None:
    good, bad = fresh("good"), fresh("bad")
    inbox = Inbox(connection, kombu.Queue(good), kombu.Queue(bad))
    send(connection, 1, key=good)
    broker.store.raw("SET", broker.settings.keys(bad).config, "no hash")
    with pytest.raises(StoreError):
        inbox.wait(2)
    assert inbox.bodies == [1]


@pytest.mark.parametrize("way", ["ahead", "at_once"])
def test_a_queue_that_fails_keeps_no_other_from_being_asked(
    connection: kombu.Connection, broker: Broker, way: str
) -> None:
    channel: Any = connection.channel()
    good, bad = fresh("good"), fresh("bad")
    for queue in (bad, good):
        kombu.Queue(queue)(channel).declare()
        channel.basic_consume(queue, False, lambda message: None, fresh("tag"))
    send(connection, 1, key=good)
    broker.store.raw("SET", broker.settings.keys(bad).config, "no hash")
    ahead = channel.claim_ahead(3, channel.broker.store.sender(), set()) if way == "ahead" else None
    found, again = channel.claim(3, set(), ahead)
    assert [raw["body"] for raw, _queue in found] == [b"1"]
    assert again == 0.0, "the error is met again at once"
    with pytest.raises(StoreError):
        channel.claim(3, set())


@pytest.mark.parametrize("sent", [0, 1])
def test_a_claim_says_that_its_server_is_away_once_what_it_found_is_delivered(
    connection: kombu.Connection, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    channel: Any = connection.channel()
    first, second = fresh("first"), fresh("second")
    for queue in (first, second):
        kombu.Queue(queue)(channel).declare()
        channel.basic_consume(queue, False, lambda message: None, fresh("tag"))
    for n in range(sent):
        send(connection, n, key=first)
    stock = Consuming._claim_one
    monkeypatch.setattr(
        Consuming, "_claim_one", lambda self, queue, *a: (stock if queue == first else away)(self, queue, *a)
    )
    with nullcontext() if sent else pytest.raises(Unavailable):
        found, again = channel.claim(3, set())
        assert [raw["body"] for raw, _queue in found] == [b"0"]
        assert again == 0.0, "the error is met again at once"


@pytest.mark.parametrize("way", ["ahead", "at_once"])
def test_of_a_claim_of_which_one_message_fails_the_others_are_delivered_or_handed_back(
    connection: kombu.Connection,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    channel: Any = connection.channel()
    queue = fresh("claim")
    kombu.Queue(queue)(channel).declare()
    for n in range(3):
        send(connection, n, key=queue)
    channel.basic_consume(queue, False, lambda message: None, fresh("tag"))
    stock = Consuming._message

    def failing(self: Any, job: Any, tag: str) -> Any:
        return away() if job.payload.endswith(b"\n1") else stock(self, job, tag)

    monkeypatch.setattr(Consuming, "_message", failing)
    ahead = channel.claim_ahead(3, channel.broker.store.sender(), set()) if way == "ahead" else None
    found, again = channel.claim(3, set(), ahead)
    assert [raw["body"] for raw, _queue in found] == [b"0"]
    assert again == 0.0, "the error is met again at once"
    assert "could not be taken in" in caplog.text
    assert channel.leases.holding == 1
    eventually(lambda: broker.stats(queue).ready == 1, "the last to be handed back")
    eventually(lambda: broker.reap(queue) or broker.stats(queue).ready == 2, "the lease of the one that failed to end")
    assert sorted((job.payload[-1:], job.deliveries) for job in broker.claim(queue, 3)) == [(b"1", 2), (b"2", 1)]


def test_what_was_claimed_before_a_claim_is_interrupted_is_handed_back(
    connection: kombu.Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a signal's handler raises, or gevent's Timeout, between two queues."""
    first, second = fresh("first"), fresh("second")
    inbox = Inbox(connection, kombu.Queue(first), kombu.Queue(second))
    send(connection, 1, key=first)
    stock = Consuming._claim_one

    def interrupted(self: Any, queue: str, *args: Any) -> Any:
        if self.leases.holding:
            raise KeyboardInterrupt
        return stock(self, queue, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Consuming, "_claim_one", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inbox.wait(1)
    assert inbox.wait(1) == [1]
    assert inbox.messages[0].delivery_info["redelivered"] is False


@pytest.mark.parametrize("end", ["ack", "reject"])
def test_a_message_whose_end_the_server_could_not_be_told_gives_its_credit_back(
    connection: kombu.Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    queue = fresh("credit")
    inbox = Inbox(connection, kombu.Queue(queue), prefetch=1)
    for n in range(2):
        send(connection, n, key=queue)
    inbox.wait(1)
    with monkeypatch.context() as patched:
        patched.setattr(Broker, "ack_many", away)
        patched.setattr(Settling, "_refuse", refused)
        with pytest.raises((Unavailable, StoreError)):
            getattr(inbox.messages[0], end)()
    assert inbox.wait(2)[:2] == [0, 1]


@pytest.mark.parametrize("end", ["ack", "reject", "requeue"])
def test_what_runs_as_its_channel_closes_is_ended_all_the_same(
    connection: kombu.Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    inbox = Inbox(connection, queue := kombu.Queue(fresh("runs")))
    send(connection, 1, key=queue.name)
    inbox.wait(1)
    (message,) = inbox.messages
    monkeypatch.setattr("relay_adapters.celery.receiving.settling.running_tags", lambda: {message.delivery_tag})
    inbox.channel.close()
    assert broker.stats(queue.name).inflight == 1
    getattr(message, end)()
    eventually(lambda: not broker.stats(queue.name).inflight, "it to end")
    stats = broker.stats(queue.name)
    assert (stats.counters.get("processed", 0), stats.dead, stats.ready) == (
        end == "ack",
        end == "reject",
        end == "requeue",
    )


@pytest.mark.parametrize("asked", [True, False], ids=["basic_get", "consumer"])
def test_a_message_that_needs_no_ack_is_not_lost_where_the_server_could_not_be_told(
    connection: kombu.Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """It was claimed to be acked, and would be acked later without having been handed to anybody."""
    queue, channel, messages = fresh("lost"), connection.default_channel, list[Any]()
    kombu.Queue(queue)(channel).declare()
    for n in range(2):
        send(connection, n, key=queue)
    if not asked:
        channel.basic_consume(queue, False, messages.append, "first")
        connection.drain_events(timeout=20)
        channel.basic_consume(queue, True, messages.append, "second")
    with monkeypatch.context() as patched:
        patched.setattr(Broker, "ack_many", away)
        if asked:
            messages = [channel.basic_get(queue, no_ack=True) for _ in range(2)]
        else:
            connection.drain_events(timeout=20)
    assert [message.payload for message in messages] == [0, 1]
    if not asked:
        messages[0].ack()
    eventually(lambda: broker.stats(queue).counters["processed"] == 2, "the server to be told of both")


class There:
    """A server, or several, that have trouble with the queue `bad`."""

    def __init__(self, trouble: RelayError) -> None:
        self.trouble, self.done = trouble, list[str]()

    @property
    def operations(self) -> There:
        return self

    def each(self, jobs: list[Any]) -> list[Verdict | RelayError]:
        self.done.extend(job.id for job in jobs if job.queue != "bad")
        return [self.trouble if job.queue == "bad" else Verdict.DONE for job in jobs]

    ack_each = release_each = each

    def drive(self, results: list[Any]) -> list[Any]:
        return results


def held_of(id: str, queue: str) -> Any:
    return SimpleNamespace(tag=id, job=SimpleNamespace(id=id, queue=queue))


def test_what_the_server_does_not_take_of_one_queue_holds_up_no_other() -> None:
    owed, there = Owed(), There(StoreError("no"))
    owed.ack(held_of("ack", "bad"))
    owed.ack(held_of("another ack", "good"))
    owed.release(held_of("release", "good").job)
    owed.refuse(held_of("refusal", "bad"), refused)
    owed.refuse(held_of("another refusal", "good"), lambda: there.done.append("another refusal"))
    for _ in range(2):
        with pytest.raises(StoreError):
            owed.pay(cast(Any, there), lambda taken, verdicts: None, lambda tag: None)
    assert sorted(there.done) == ["another ack", "another refusal", "release"]


def test_what_is_owed_to_a_server_that_is_away_alone_holds_up_no_other_and_no_heartbeat_for_long() -> None:
    """In one go, for a process that ends has no other."""
    owed, there = Owed(several=True), There(Unavailable("away"))
    owed.ack(held_of("ack", "bad"))
    owed.ack(held_of("another ack", "good"))
    owed.release(held_of("release", "bad").job)
    owed.release(held_of("another release", "good").job)
    owed.refuse(held_of("refusal", "good"), lambda: there.done.append("refusal"))
    told: list[str] = []
    with pytest.raises(Unavailable):
        owed.pay(cast(Any, there), lambda taken, verdicts: told.extend(held.tag for held in taken), lambda tag: None)
    assert there.done == ["another ack", "another release"]
    assert told == ["another ack"]
    assert owed.away
    there.trouble = StoreError("no")
    with pytest.raises(StoreError):
        owed.pay(cast(Any, there), lambda taken, verdicts: None, lambda tag: None)
    assert there.done[2:] == ["refusal"]


def test_a_wake_up_that_is_passed_on_takes_no_message_along(connection: kombu.Connection, broker: Broker) -> None:
    channel: Any = connection.channel()
    kombu.Queue(queue := fresh("passed"))(channel).declare()
    channel.basic_consume(queue, False, lambda message: None, fresh("tag"))
    send(connection, 1, key=queue)
    channel.pass_on({queue})
    assert (broker.stats(queue).ready, broker.stats(queue).inflight) == (1, 0)


def test_what_is_owed_is_due_at_once_but_for_acks_that_wait_for_company() -> None:
    for owe in (lambda owed: owed.release(held_of("a", "q").job), lambda owed: owed.refuse(held_of("a", "q"), refused)):
        owe(debt := Owed())
        assert debt.due(0.0)
    assert not Owed().due(time.monotonic() + 60)
    debt = Owed()
    debt.ack(held_of("a", "q"))
    assert not debt.due(0.0)
    assert debt.due(time.monotonic() + owed.LINGER)


def test_acks_that_are_too_many_for_one_round_trip_go_with_the_next_ones() -> None:
    owed, acks = Owed(), [held_of(f"{n}", "q") for n in range(5)]
    for ack in acks:
        owed.ack(ack)
    assert owed.take_acks("q", 2) == acks[:2]
    owed.ack(later := held_of("later", "q"))
    assert owed.pending(["q"])
    assert owed.take_acks("q") == [*acks[2:], later]
    assert not owed.acks


@pytest.mark.parametrize("several", [True, False])
def test_a_refusal_that_its_server_cannot_be_told_waits_behind_those_of_other_servers(several: bool) -> None:
    """And in its place where there is one server, which is away for all of them."""
    owed, told = Owed(several), list[str]()
    for id in ("bad", "good"):
        owed.refuse(held_of(id, id), away if id == "bad" else lambda: None)
    for _ in range(2):
        with pytest.raises(Unavailable):
            owed.pay(cast(Any, None), lambda taken, verdicts: None, told.append)
    assert told == (["good"] if several else [])


def test_leases_are_extended_beside_a_refusal_that_a_full_server_does_not_take(server: Server, broker: Broker) -> None:
    """Also where they may be over: else a worker could not connect again, and the server would never be emptied."""
    held, refused, dead = fresh("held"), fresh("refused"), fresh("dead")
    ends = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    with link(server.url, lease=60.0, retry_for=0.0) as connection:
        kombu.Queue(dead)(connection.default_channel).declare()
        inbox = Inbox(connection, kombu.Queue(held), kombu.Queue(refused, queue_arguments=ends))
        send(connection, 1, key=held)
        send(connection, 2, key=refused)
        assert sorted(inbox.wait(2)) == [1, 2]
        server.cli("CONFIG", "SET", "maxmemory", "1")
        inbox.messages[inbox.bodies.index(2)].reject()
        leases = inbox.channel.leases
        leases.rows[False].sure(0.0)  # as after a time without the server
        leases.heartbeat.extend()
        assert leases.rows[False].until > time.monotonic()
        server.cli("CONFIG", "SET", "maxmemory", "0")
        eventually(lambda: broker.stats(dead).ready == 1, "the refusal")


def test_a_handler_of_signals_tells_what_is_owed_while_its_thread_adds_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that connects while its process holds leases that may be over."""
    owed, there = Owed(), There(StoreError("no"))

    def pay() -> None:
        owed.pay(cast(Any, there), lambda taken, verdicts: None)

    def now() -> float:
        ring()
        return 0.0

    monkeypatch.setattr("relay_adapters.celery.holding.owed.time", SimpleNamespace(monotonic=now))
    with handled_by(pay) as ring:
        owed.ack(held_of("a", "q"))
    pay()
    assert there.done == ["a"]


def test_acks_that_a_claim_could_not_take_along_are_sent_soon(
    server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the thread that keeps the leases, though it saw none meanwhile: its next beat may be long after that, where no
    worker may be told to stop."""
    monkeypatch.setattr(owed, "LINGER", 0.5)
    monkeypatch.setattr("relay_adapters.celery.holding.heartbeat.is_worker", lambda: False)
    with link(server.url, lease=60) as connection:
        loop = Loop(connection, prefetch=1)
        leases = loop.channel.leases

        def fails(*_: Any) -> NoReturn:
            eventually(lambda: not leases.heartbeat._watching, "the thread to see none")
            raise Unavailable("away")

        send(connection, 1, key=loop.queue)
        loop.until(lambda: loop.got, "it to come")
        loop.got[0].ack()
        with monkeypatch.context() as patch:
            patch.setattr(loop.channel.broker, "drive", fails)
            with pytest.raises(Unavailable):
                loop.watch._claim(1)
        eventually(lambda: not broker.stats(loop.queue).inflight, "its ack to be sent", 10)


def test_leases_are_kept_where_their_thread_could_not_be_started_at_first(
    connection: kombu.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a process may have no more threads just then: the next message asks for it again."""

    def fails(_: Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    inbox = Inbox(connection, queue := kombu.Queue(fresh("threadless")))
    send(connection, 1, key=queue.name)
    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", fails)
        with pytest.raises(RuntimeError):
            inbox.wait(1)
    inbox.wait(1)
    (held,) = inbox.channel.leases.snapshot()
    until = held.until
    eventually(lambda: held.until > until, "its lease to be extended", 10)


@pytest.mark.parametrize("end", ["rejected", "expired"])
def test_a_message_that_is_too_large_with_its_x_death_ends_as_one_that_nobody_takes(
    connection: kombu.Connection, broker: Broker, end: str
) -> None:
    queue, dead = fresh("large"), fresh("dead")
    kombu.Queue(dead)(connection.default_channel).declare()
    ends: dict[str, Any] = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    if end == "expired":
        ends["x-message-ttl"] = 1
    declared = kombu.Queue(queue, queue_arguments=ends)
    declared(connection.default_channel).declare()
    with pytest.raises(InvalidArgument):
        send(connection, "x" * 600, key=queue)
    send(connection, "x" * 300, key=queue)
    sent = broker.stats(queue).now
    eventually(lambda: broker.stats(queue).now > sent + 0.005, "its time to be over")
    inbox = Inbox(connection, declared)
    if end == "rejected":
        inbox.wait(1)
        inbox.messages[0].reject()
    eventually(lambda: bool(inbox.quiet(0.1)) == (end == "rejected") and not broker.stats(queue).pending, "it to end")
    assert broker.stats(queue).dead == (end == "rejected")
    assert not broker.stats(dead).pending


def test_a_channel_that_was_closed_is_not_kept(connection: kombu.Connection) -> None:
    channel: Any = connection.channel()
    for name in (fresh("kept"), fresh("kept")):
        kombu.Queue(name)(channel).declare()
        channel.basic_consume(name, False, lambda message: None, fresh("tag"))
    channel.close()
    gone = weakref.ref(channel)
    del channel
    gc.collect()
    assert gone() is None


def test_a_connection_that_is_closed_by_what_it_delivers_leaves_its_loop(connection: kombu.Connection) -> None:
    Inbox(connection, kombu.Queue(fresh("first")))
    loop, transport = Loop(connection, 4), connection.transport
    loop.received = lambda message: transport.close_connection(connection.connection)
    send(connection, 1, key=loop.queue)
    loop.until(lambda: loop.got, "the message")
    assert not loop.hub.readers
    assert transport._busy is None
    assert transport._timer is None


def test_a_connection_that_comes_to_another_loop_is_heard_by_that_one_alone(connection: kombu.Connection) -> None:
    first = Loop(connection, 4)
    first.until(lambda: first.watch.bell and first.watch.bell.armed, "the first to listen")
    second = Loop(connection, 4)

    def heard() -> bool:
        sockets = [socket.fileno() for loop in (first, second) for socket in loop.watch.sockets()]
        return len(sockets) >= 2 and set(sockets) <= set(second.hub.readers)

    second.until(heard, "both channels to be heard")
    assert not first.hub.readers


@pytest.mark.parametrize("place", [0, 1])
def test_a_loop_turns_at_once_while_any_of_its_channels_has_more_to_hand_over(
    connection: kombu.Connection, place: int
) -> None:
    class Watch:
        bell, look_at, channel = None, float("inf"), SimpleNamespace(closed=False)

        def __init__(self, busy: bool) -> None:
            self.busy = busy

        quiet = staticmethod(lambda now: False)
        look = staticmethod(lambda ask: 0)
        arm = staticmethod(lambda: None)
        sockets = staticmethod(list)

    Loop(connection, 4)
    transport: Any = connection.transport
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "_watches", {n: Watch(n == place) for n in (0, 1)})
        for _ in range(2):  # at first it turns once more for its timer
            transport._tick()
    assert transport._hurried


def test_an_ack_keeps_no_loop_waiting_for_the_server(
    connection: kombu.Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(connection, 4)
    send(connection, 1, key=loop.queue)
    loop.until(lambda: loop.got, "the message")
    monkeypatch.setattr(Broker, "ack_many", away)
    loop.got[0].ack()
    eventually(lambda: broker.stats(loop.queue).counters.get("processed") == 1, "the thread to tell of it")


def test_a_loop_looks_in_time_for_what_comes_again_after_a_pause(connection: kombu.Connection) -> None:
    loop = Loop(connection, 4)
    send(connection, 1, key=loop.queue)
    loop.until(lambda: loop.got and loop.watch.look_at > time.monotonic(), "the message")
    loop.got[0].requeue()
    assert loop.watch.look_at <= time.monotonic()


def test_a_socket_that_another_thread_has_just_closed_does_not_end_the_loop(connection: kombu.Connection) -> None:
    loop, closed = Loop(connection, 4), socket.socket()
    closed.close()
    sockets = loop.watch.sockets
    loop.watch.sockets = lambda: [*sockets(), closed]
    send(connection, 1, key=loop.queue)
    loop.until(lambda: loop.got, "the message")


def test_the_tasks_that_run_are_told_while_others_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Request:
        def __init__(self, tag: str) -> None:
            self.message = type("Message", (), {"delivery_tag": tag})

    requests = [Request("1.a"), Request("2.b"), Request("3.c")]

    class Changing(weakref.WeakSet[Request]):
        def __iter__(self) -> Iterator[Request]:
            for request in super().__iter__():
                self.update(requests)  # as another thread may between two steps
                yield request

    monkeypatch.setattr(celery.worker.state, "active_requests", Changing(requests[:2]))
    assert running_tags() == {"1.a", "2.b", "3.c"}


def test_a_suspect_that_is_taken_while_another_thread_lets_go_of_the_last_one_is_kept() -> None:
    class Leases:
        """Of which the first suspect is just gone."""

        class broker:
            class settings:
                lease = 60.0

        thread: Thread | None = None
        taken: list[bool] = []  # noqa: RUF012

        def get(self, tag: str) -> Any:
            if tag == "new":
                return type("Held", (), {"acked": False, "started": True, "task": False})
            if self.thread is None and apart._tag == "old" and taking:
                self.thread = Thread(target=lambda: self.taken.append(apart.take("new", lambda: None)))
                self.thread.start()
                self.thread.join(0.2)  # for as long as it needs, or until the other thread keeps it waiting
            return None

    leases: Any = Leases()
    apart, taking = Apart(leases), False
    assert apart.take("old", lambda: None)
    taking = True
    assert not apart.shut
    leases.thread.join()
    assert leases.taken == [True]
    assert apart.shut


FORKED = """
import os, sys
import kombu, relay_adapters.celery
with kombu.Connection(sys.argv[1]) as before:
    before.connect()
if child := os.fork():
    os.waitpid(child, 0)
    os._exit(0)
connection, got = kombu.Connection(sys.argv[1]), []
channel = connection.channel()
channel.basic_consume(sys.argv[2], False, got.append, "tag")
while not got:
    connection.drain_events(timeout=20)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_forked_child_holds_at_its_end_is_handed_back(
    connection: kombu.Connection, server: Server, broker: Broker
) -> None:
    queue = fresh("forked")
    kombu.Queue(queue)(connection.default_channel).declare()
    send(connection, 1, key=queue)
    subprocess.run([sys.executable, "-c", FORKED, server.url, queue], check=True, timeout=60)
    stats = broker.stats(queue)
    assert (stats.ready, stats.inflight, stats.counters["claimed"]) == (1, 0, 1)
