"""A claim that is under way while a Celery worker does other things: what it claims is held whoever takes the reply,
and nothing is lost when nobody does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, get_ident
from typing import Any

import kombu
import pytest

from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.receiving import watch
from relay_adapters.celery.receiving.ahead import Ahead
from relay_core import Broker
from relay_core.connection import Sender, readable
from relay_core.errors import StoreError, Unavailable
from relay_core.operations import Settings
from tests.celery_links import Loop, fresh, link, send
from tests.celery_workers import CeleryWorker, client_of, lines
from tests.proxy import Proxy, to_port
from tests.servers import Server, eventually

LEASE = 0.9


@pytest.fixture(scope="module")
def tcp() -> Iterator[Server]:
    with Server("valkey", tcp=True) as server:
        yield server


class Desk:
    """A channel that consumes one queue of `sent` messages, beside a broker of another process's kind."""

    def __init__(self, connection: kombu.Connection, engine: Broker, sent: int) -> None:
        self.channel: Any = connection.channel()
        self.queue, self.engine, self.leases = fresh("ahead"), engine, self.channel.leases
        kombu.Queue(self.queue)(self.channel).declare()
        for n in range(sent):
            send(connection, n, key=self.queue)
        self.channel.basic_consume(self.queue, False, lambda message: None, fresh("tag"))
        self.sender: Sender = self.channel.broker.store.sender()

    def ahead(self, room: int) -> Ahead:
        found = self.channel.claim_ahead(room, self.sender, {self.queue})
        assert isinstance(found, Ahead)
        return found

    def take(self, ahead: Ahead) -> list[int]:
        """The bodies of what comes of it."""
        return bodies(self.channel.claim(ahead.room, {self.queue}, ahead))

    def counts(self) -> tuple[int, int]:
        """How many are ready, and how many are held."""
        stats = self.engine.stats(self.queue)
        return stats.ready, stats.inflight

    def held(self, count: int) -> None:
        eventually(lambda: self.counts()[1] == count, f"{count} to be held")


@contextmanager
def desk(url: str, engine: Broker, sent: int, **options: Any) -> Iterator[Desk]:
    with link(url, lease=LEASE, **{"retry_for": 0.5, **options}) as connection:
        yield Desk(connection, engine, sent)


@pytest.fixture
def engine(tcp: Server) -> Iterator[Broker]:
    with Broker(tcp.url, lease=LEASE) as broker:
        yield broker


def bodies(found: tuple[list[Any], Any]) -> list[int]:
    return [int(raw["body"]) for raw, _queue in found[0]]


def test_it_is_sent_at_once_with_the_acks_that_wait_and_its_reply_is_taken_later(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 5) as here:
        (first,) = here.channel.claim(1, {here.queue})[0]
        here.leases.ack_later(first[0]["properties"]["delivery_tag"])
        ahead = here.ahead(3)
        eventually(ahead.arrived, "the reply")
        assert here.counts() == (1, 3)
        assert here.take(ahead) == [1, 2, 3]
        assert here.leases.holding == 3
        assert not here.leases.owed.pending([here.queue])


def test_what_was_claimed_keeps_its_lease_though_nobody_takes_the_reply(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 4) as here:
        here.channel.claim(1, {here.queue})
        ahead = here.ahead(3)
        ends = 3 * LEASE
        eventually(lambda: here.leases.holding == 4, "the thread to take the reply")
        tags = set(ahead.tags)
        before = {tag: here.leases.get(tag).until for tag in tags}
        eventually(
            lambda: all(here.leases.get(tag).until > before[tag] + ends for tag in tags), "the leases to be kept", 20
        )
        assert not engine.claim(here.queue)
        found = here.channel.claim(3, {here.queue}, ahead)
        assert bodies(found) == [1, 2, 3]
        assert {raw["properties"]["delivery_tag"] for raw, _queue in found[0]} == tags
        assert not any(raw["properties"]["delivery_info"]["redelivered"] for raw, _queue in found[0])
        assert all(here.leases.start(tag) for tag in tags)


@pytest.mark.parametrize("fault", ["cut_reply", "cut_request"])
def test_a_claim_whose_connection_is_cut_is_made_once(tcp: Server, engine: Broker, fault: str) -> None:
    with Proxy(to_port(tcp.port)) as proxy, desk(proxy.url, engine, 5, retry_for=10) as here:
        here.take(here.ahead(1))  # its connection is open
        getattr(proxy, fault)(b"EVALSHA")
        ahead = here.ahead(2)
        assert sorted(here.take(ahead)) == [1, 2]
        assert here.counts() == (2, 3)
        assert here.take(here.ahead(2)) == [3, 4]


def test_where_the_server_is_gone_the_taker_hears_of_it_and_the_acks_stay() -> None:
    kept = {"appendonly": "yes", "appendfsync": "always"}
    with Server("valkey", tcp=True, options=kept) as own, Broker(own.url) as there, desk(own.url, there, 3) as here:
        (first,) = here.channel.claim(1, {here.queue}, here.ahead(1))[0]
        own.pause()
        here.leases.ack_later(first[0]["properties"]["delivery_tag"])
        ahead = here.ahead(2)
        assert not ahead.arrived()
        own.kill()
        with pytest.raises(Unavailable):
            here.take(ahead)
        assert here.leases.owed.pending([here.queue])
        own.start()
        eventually(lambda: here.counts() == (2, 0), "the ack to arrive")


def test_a_claim_that_is_never_answered_keeps_no_thread_from_the_leases(tcp: Server, engine: Broker) -> None:
    with Proxy(to_port(tcp.port)) as proxy, desk(proxy.url, engine, 4) as here:
        (held,), (done,) = here.channel.claim(1, {here.queue})[0], here.channel.claim(1, {here.queue}, here.ahead(1))[0]
        tag, acked = (delivery[0]["properties"]["delivery_tag"] for delivery in (held, done))
        proxy.swallow_reply(b"EVALSHA")
        until = here.leases.get(tag).until
        here.leases.ack_later(acked)
        ahead = here.ahead(1)
        eventually(lambda: here.leases.get(tag).until > until + 3 * LEASE, "the lease to be kept")
        assert not ahead.arrived()
        here.leases.abandon(ahead)
        eventually(lambda: not here.leases._ahead, "the claim to be given up")
        eventually(lambda: here.leases.holding == 1, "the ack to be sent again")
        # what it claimed is leased no longer than that
        eventually(lambda: engine.reap(here.queue) or here.counts() == (2, 1), "the message to come back")


def test_the_claim_of_a_channel_that_is_gone_is_handed_back_uncounted(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 3) as here:
        ahead = here.ahead(2)
        here.held(2)
        here.leases.abandon(ahead)
        here.held(0)
        assert here.counts() == (3, 0)
        assert not here.sender.sockets()
        assert [job.deliveries for job in engine.claim(here.queue, 2)] == [1, 1]


def test_what_was_handed_back_meanwhile_is_not_delivered(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 3) as here:
        ahead = here.ahead(3)
        ahead.settle()
        here.leases.hand_back(ahead.tags[:2])
        assert here.take(ahead) == [2]
        assert here.counts() == (2, 1)


def test_before_its_process_ends_it_is_handed_back(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 3) as here:
        here.ahead(3)
        here.leases.end()
        assert here.counts() == (3, 0)


def test_one_that_does_not_decode_or_has_expired_is_held_no_longer(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 0) as here:
        engine.enqueue(here.queue, b"no message")
        send(here.channel.connection.client, "late", key=here.queue, expiration=0.001)
        send(here.channel.connection.client, 7, key=here.queue)
        over = engine.stats(here.queue).now + 0.001
        eventually(lambda: engine.stats(here.queue).now > over, "a millisecond to pass")
        assert here.take(here.ahead(3)) == [7]
        assert here.leases.holding == 1
        assert here.counts() == (0, 1)
        assert engine.stats(here.queue).dead == 1


def test_of_several_queues_the_next_one_is_asked_when_the_first_is_known(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 2) as here:
        others = [fresh("other"), fresh("other")]
        for name in others:
            kombu.Queue(name)(here.channel).declare()
            here.channel.basic_consume(name, False, lambda message: None, fresh("tag"))
            for n in range(10, 13):
                send(here.channel.connection.client, n, key=name)
        ahead = here.ahead(3)
        assert ahead.queue == here.queue
        assert here.take(ahead) == [0, 1, 10]
        ahead = here.ahead(3)  # round robin: those that gave go to the end
        assert ahead.queue == others[1]
        assert here.take(ahead) == [10, 11, 12]


def test_of_a_queue_without_acks_nothing_is_claimed_ahead(tcp: Server, engine: Broker) -> None:
    with desk(tcp.url, engine, 1) as here:
        here.channel.basic_cancel(next(iter(here.channel._tag_to_queue)))
        here.channel.basic_consume(here.queue, True, lambda message: None, fresh("tag"))
        assert here.channel.claim_ahead(1, here.sender, {here.queue}) is None
        assert here.counts() == (1, 0)


def test_a_solo_task_that_holds_up_the_loop_costs_what_was_claimed_ahead_nothing(tcp: Server, tmp_path: Path) -> None:
    tcp.reset()
    client = client_of(tcp.url, tmp_path)
    flags, options = ("-P", "solo", "-c", "1", "--prefetch-multiplier", "4"), {"lease": LEASE}
    with Broker(tcp.url) as broker, CeleryWorker(tcp.url, tmp_path, *flags, name="one", options=options):
        broker.pause("celery")  # so that the first four are fetched at once
        for key in ("quick-0", "quick-1", "quick-2"):
            client.send_task("tests.celery_app.run", (key,))
        client.send_task("tests.celery_app.hold", ("long", "go"))
        for n in range(6):
            client.send_task("tests.celery_app.late", (f"after-{n}",))
        broker.resume("celery")
        eventually(lambda: lines(tmp_path, "started", "long"), "the long one to start")
        # it and three that were claimed before it began; the acks of the quick ones went along
        eventually(lambda: broker.stats("celery").inflight == 4, "more to be claimed")
        assert broker.stats("celery").counters.get("processed") == 3
        with CeleryWorker(tcp.url, tmp_path, *flags, name="two", options=options):
            eventually(lambda: len(lines(tmp_path, start="after-")) == 3, "the other worker to run the rest")
            beats = [job.due_at for job in broker.jobs("celery", "inflight")]
            eventually(
                lambda: min(job.due_at for job in broker.jobs("celery", "inflight")) > max(beats) + 2 * LEASE,
                "the leases to be kept",
            )
            assert len(lines(tmp_path, start="after-")) == 3
            (tmp_path / "go").touch()
            eventually(lambda: len(lines(tmp_path, start="after-")) == 6, "all to run")
    runs = [line.split() for line in lines(tmp_path, start="after-")]
    assert sorted(run[0] for run in runs) == [f"after-{n}" for n in range(6)]
    assert sorted(run[2] for run in runs) == ["one"] * 3 + ["two"] * 3
    client.close()


@pytest.fixture
def loop(tcp: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setattr("relay_adapters.celery.receiving.watch.waiting_in_pool", lambda: 1)
    with link(tcp.url, lease=60) as connection:
        yield Loop(connection, 4)


def test_under_an_event_loop_all_messages_come_once_while_their_acks_go_with_the_claims(
    loop: Loop, tcp: Server, engine: Broker
) -> None:
    claims: list[Ahead] = []
    stock = loop.channel.claim_ahead
    loop.channel.claim_ahead = lambda *args: claims.append(stock(*args)) or claims[-1]
    for n in range(50):
        send(loop.channel.connection.client, n, key=loop.queue)
    assert loop.all_done(engine) == list(range(50))
    assert len(claims) >= 12
    assert all(claim is not None for claim in claims)


def test_while_the_pool_has_tasks_waiting_few_are_not_asked_for(loop: Loop, engine: Broker) -> None:
    rooms: list[int] = []
    stock = loop.channel.claim_ahead
    loop.channel.claim_ahead = lambda room, *rest: rooms.append(room) or stock(room, *rest)
    for n in range(20):
        send(loop.channel.connection.client, n, key=loop.queue)
    # the first of them starts, and is acked, while the rest is still handed over
    loop.received = lambda message: None if len(loop.got) % 3 else message.ack()
    assert sorted(loop.all_done(engine)) == list(range(20))
    assert len(rooms) >= 5
    assert min(rooms) >= 3


def test_a_claim_of_few_is_put_off_for_a_moment_only(
    loop: Loop, engine: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits in the pool may wait for a process that is slow or gone, while others are idle."""
    monkeypatch.setattr(Settings, "max_block", 3600.0)
    monkeypatch.setattr(watch, "_SOON", 1e9)
    for n in range(8):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: len(loop.got) == 4, "the first messages")
    loop.got[0].ack()
    loop.until(lambda: not loop.channel.leases.owed.acks, "the ack to be sent")
    assert len(loop.got) == 4
    assert loop.watch.look_at <= loop.watch._put_off_until
    loop.watch._put_off_until = loop.watch.look_at = time.monotonic()
    loop.until(lambda: len(loop.got) == 5, "one more")


def test_the_next_claim_of_few_is_put_off_anew(loop: Loop, engine: Broker) -> None:
    for n in range(8):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: len(loop.got) == 4, "the first messages")
    for n in range(2):
        loop.got[n].ack()
        loop.until(lambda n=n: len(loop.got) == 5 + n, "one more")
        assert loop.watch._put_off_until is None


def test_a_connection_that_the_server_closed_while_it_rested_is_given_up(loop: Loop, tcp: Server) -> None:
    """Else the loop finds it readable, for ever."""
    for n in range(8):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.received = lambda message: message.ack()
    loop.until(lambda: len(loop.got) == 8 and not loop.channel.leases.owed.acks, "all")
    loop.until(lambda: loop.watch.ahead is None and loop.watch.bell.armed, "the loop to wait")
    [rests] = loop.watch._sender.sockets()
    host, port = rests.getsockname()
    tcp.cli("CLIENT", "KILL", "ADDR", f"{host}:{port}")
    loop.until(lambda: not loop.watch._sender.sockets(), "it to be closed")
    assert rests.fileno() == -1
    send(loop.channel.connection.client, 8, key=loop.queue)
    loop.until(lambda: len(loop.got) == 9, "the next message")


def test_where_nobody_tells_when_tasks_start_none_is_put_off(loop: Loop, engine: Broker) -> None:
    loop.channel.leases.untold = True
    for n in range(8):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: len(loop.got) == 4, "the first messages")
    loop.got[0].ack()
    loop.until(lambda: len(loop.got) == 5, "one more")


def test_a_prefetch_of_more_than_one_claim_can_bring_is_claimed_ahead_too(
    tcp: Server, engine: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_adapters.celery.receiving.watch.waiting_in_pool", lambda: 1)
    with link(tcp.url, lease=60) as connection:
        loop = Loop(connection, 100)
        for n in range(120):
            send(connection, n, key=loop.queue)
        loop.until(lambda: len(loop.got) >= 99, "two claims")


def test_an_ack_on_another_thread_wakes_the_loop(loop: Loop) -> None:
    """Also that of an older kombu, whose `call_soon` does not."""
    loop.until(lambda: loop.watch.bell is not None and loop.watch.bell.armed, "the loop to wait")
    waker = loop.channel.connection._waker[0].fileno()
    assert waker in loop.hub.readers
    loop.channel.credit_freed()
    assert not readable([waker], 0), "nobody has to wake the thread that runs"
    for _ in range(3):
        thread = Thread(target=loop.channel.credit_freed)
        thread.start()
        thread.join(30)
    assert readable([waker], 0)
    loop.until(lambda: not readable([waker], 0), "the loop to turn")


def test_a_loop_hears_a_connection_that_took_the_number_of_one_before(
    loop: Loop, engine: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "max_block", 3600.0)  # no look in passing shall find it
    for n in range(12):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: len(loop.got) == 4, "the first messages")
    before = loop.watch._sender.sockets()[0].fileno()
    loop.watch._sender.close()
    for message in loop.got[:3]:
        message.ack()
    loop.until(lambda: len(loop.got) == 7, "the next messages")
    assert loop.watch._sender.sockets()[0].fileno() == before
    del loop.got[:3]
    assert loop.all_done(engine) == list(range(3, 12))


def test_a_loop_goes_on_with_a_claim_whose_reply_another_thread_took(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "max_block", 3600.0)  # no look in passing shall find it
    woken: list[int] = []
    monkeypatch.setattr(loop.channel, "credit_freed", lambda: woken.append(get_ident()))
    for n in range(7):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: len(loop.got) == 4, "the first messages")
    for message in loop.got[:3]:
        message.ack()
    with monkeypatch.context() as held:
        held.setattr(Ahead, "arrived", lambda ahead: False)
        loop.until(lambda: loop.watch.ahead is not None, "a claim to be sent")
        woken.clear()
        other = Thread(target=loop.watch.ahead.settle)
        other.start()
        other.join(30)
    assert woken == [other.ident]
    loop.until(lambda: len(loop.got) == 7, "what it claimed")


@pytest.mark.parametrize("full", [False, True])
def test_a_loop_waits_for_no_server_that_is_away_however_long_others_are_to(full: bool) -> None:
    """A claim that finds it gone, and a wake-up that cannot be passed on, as the bell has not noticed yet."""
    with Server("valkey", tcp=True) as server, link(server.url, retry_for=3600.0) as connection:
        loop = Loop(connection, 1)
        if full:
            send(connection, 1, key=loop.queue)
            loop.until(lambda: loop.got, "the one that there is room for")
            marker = loop.channel.marker(loop.queue)
            loop.watch.bell.popped, loop.watch.bell.rung = (marker,), lambda: True
        else:
            loop.watch.hungry = True
        server.kill()
        with pytest.raises(Unavailable):
            loop.watch.look()
        server.start()  # the thread that keeps the leases is patient


def consume_too(loop: Loop, queue: str) -> None:
    """A second queue, of which a wake-up can come as of the first."""
    kombu.Queue(queue)(loop.channel).declare()
    loop.channel.basic_consume(queue, False, loop.got.append, fresh("tag"))
    loop.until(lambda: loop.watch.bell and loop.watch.bell.armed, "a bell that waits for both")


def waits_for_more(loop: Loop, tcp: Server) -> None:
    bell, marker = loop.watch.bell, loop.channel.marker(loop.queue)
    loop.until(
        lambda: bell.armed and not tcp.cli("EXISTS", marker) and not bell.rung(), "a bell that waits for another"
    )


def passed_on(loop: Loop, tcp: Server, marker: bytes) -> None:
    loop.watch.look_at = float("inf")  # at the next look in passing the other would have looked, too
    loop.until(lambda: tcp.cli("EXISTS", marker), "the wake-up to be there for another worker")


def test_a_wake_up_during_a_claim_that_found_nothing_is_not_forgotten(
    loop: Loop, tcp: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = loop.channel.connection.client
    send(client, 1, key=loop.queue)
    loop.until(lambda: loop.got, "the first message")
    waits_for_more(loop, tcp)
    with monkeypatch.context() as held:
        held.setattr(Ahead, "arrived", lambda ahead: False)
        loop.got.pop().ack()  # which goes along with a claim
        loop.until(lambda: loop.watch.ahead is not None, "a claim to be sent")
        eventually(loop.watch.ahead._sender.arrived, "its reply, which is empty")
        send(client, 2, key=loop.queue)
        loop.until(lambda: not loop.watch.bell.armed, "the bell to ring")
    loop.until(lambda: loop.watch.ahead is None, "that reply to be taken")
    loop.watch.look_at = float("inf")  # no look in passing shall find it
    loop.until(lambda: loop.got, "the second message")


def test_a_wake_up_that_came_while_a_claim_went_out_is_passed_on(
    loop: Loop, tcp: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, marker = loop.channel.connection.client, loop.channel.marker(loop.queue)
    send(client, 1, key=loop.queue)
    loop.until(lambda: loop.got, "the first message")
    waits_for_more(loop, tcp)
    stock = loop.channel.claim_ahead

    def just_then(*args: Any) -> Any:
        loop.channel.claim_ahead = stock
        for n in range(2, 8):
            send(client, n, key=loop.queue)
        tcp.cli("DEL", marker)  # as if they had come at once: the bell has heard of them all
        return stock(*args)

    loop.channel.claim_ahead = just_then
    with monkeypatch.context() as held:
        held.setattr(Ahead, "arrived", lambda ahead: False)
        loop.got.pop().ack()
        loop.until(lambda: loop.watch.ahead is not None and not loop.watch.bell.armed, "the bell to ring meanwhile")
    loop.until(lambda: len(loop.got) == 4, "as many as there is credit for")
    passed_on(loop, tcp, marker)


def test_a_wake_up_of_a_queue_that_a_claim_did_not_come_to_is_passed_on(tcp: Server) -> None:
    with link(tcp.url, queue_order_strategy="priority") as connection:
        loop, second = Loop(connection, 2), fresh("second")
        marker = loop.channel.marker(second)
        consume_too(loop, second)
        send(connection, 1, key=second)
        eventually(lambda: not tcp.cli("EXISTS", marker), "the bell to take the wake-up")
        for n in range(3):
            send(connection, n, key=loop.queue)
        loop.until(lambda: len(loop.got) == 2, "as many as there is credit for")
        assert [message.delivery_info["routing_key"] for message in loop.got] == [loop.queue] * 2
        passed_on(loop, tcp, marker)
        loop.channel.pass_on = lambda rang: pytest.fail("it is another's by now")
        turns = iter(range(20))
        loop.until(lambda: next(turns, None) is None, "the loop to turn")


@pytest.mark.parametrize("credit", [1, 2])
def test_a_wake_up_is_passed_on_for_its_own_queue_alone(
    tcp: Server, monkeypatch: pytest.MonkeyPatch, credit: int
) -> None:
    with link(tcp.url) as connection:
        loop, second = Loop(connection, credit), fresh("second")
        channel, passed = loop.channel, list[str]()
        consume_too(loop, second)
        stock = channel.broker.operations.finish

        def finish(queue: str, acks: Any, nacks: Any, count: int, woken: bool) -> Any:
            passed.extend([queue] * (count == 0 and woken))
            return stock(queue, acks, nacks, count, woken)

        monkeypatch.setattr(channel.broker.operations, "finish", finish)
        send(connection, 1, key=second)
        loop.until(lambda: len(loop.got) == 1, "the message")
        if credit == 2:
            loop.until(lambda: loop.watch.bell.armed, "a bell that waits again")
            channel.basic_qos(0, 1, False)
            send(connection, 2, key=second)
            loop.until(lambda: passed, "the wake-up to be passed on")
        turns = iter(range(20))
        loop.until(lambda: next(turns, None) is None, "the loop to turn")
        assert passed == [second] * (credit - 1), "a claim has passed it on, or there was no credit for one"


def test_a_wake_up_that_the_bell_of_an_earlier_connection_took_is_passed_on(tcp: Server) -> None:
    with link(tcp.url) as connection:
        loop = Loop(connection, 2)
        marker = loop.channel.marker(loop.queue)
        for n in range(5):
            send(connection, n, key=loop.queue)
        tcp.cli("DEL", marker)
        loop.until(lambda: len(loop.got) == 2, "as many as there is credit for")
        passed_on(loop, tcp, marker)


def test_a_wake_up_of_a_queue_whose_claim_failed_is_passed_on(tcp: Server) -> None:
    with link(tcp.url, queue_order_strategy="priority") as connection:
        loop, second = Loop(connection, 3), fresh("second")
        marker, stock = loop.channel.marker(second), loop.channel._claim_one
        consume_too(loop, second)
        for n in range(6):
            send(connection, n, key=second)
        eventually(loop.watch.bell._channels[0].connection.can_read, "the bell to take the wake-up")
        send(connection, 6, key=loop.queue)
        tcp.cli("DEL", marker, loop.channel.marker(loop.queue))  # as if they had come at once

        def fails_once(queue: str, *rest: Any) -> Any:
            if queue == second:
                loop.channel._claim_one = stock
                raise StoreError("for once")
            return stock(queue, *rest)

        loop.channel._claim_one = fails_once
        loop.until(lambda: len(loop.got) == 3, "as many as there is credit for")
        passed_on(loop, tcp, marker)


def test_a_wake_up_whose_claim_failed_is_followed_by_the_next_look(tcp: Server) -> None:
    with link(tcp.url) as connection:
        loop = Loop(connection, 3)
        loop.until(lambda: loop.watch.bell and loop.watch.bell.armed, "a bell that waits")
        stock = loop.channel.claim

        def fails_once(*args: Any) -> Any:
            loop.channel.claim = stock
            raise Unavailable("for once")

        loop.channel.claim = fails_once
        loop.watch.look_at = float("inf")  # no look in passing shall find it
        send(connection, 1, key=loop.queue)
        eventually(loop.watch.bell._channels[0].connection.can_read, "the bell to take the wake-up")
        with pytest.raises(Unavailable):
            loop.watch.look()
        loop.until(lambda: loop.got, "the message")


def test_a_channel_that_closes_does_not_wait_for_its_claim(
    loop: Loop, engine: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(9):
        send(loop.channel.connection.client, n, key=loop.queue)
    loop.until(lambda: len(loop.got) == 4, "the first messages")
    leases = loop.channel.leases
    settled: list[int] = []
    stock = Ahead._settle

    def settle(ahead: Ahead) -> None:
        settled.append(get_ident())
        stock(ahead)

    with monkeypatch.context() as held:
        held.setattr(Ahead, "arrived", lambda ahead: False)
        for message in loop.got[:3]:
            message.ack()
        loop.until(lambda: loop.watch.ahead is not None, "a claim to be sent")
    monkeypatch.setattr(Ahead, "_settle", settle)
    # its reply is not there at the first looks, and the thread has no other reason to look again
    monkeypatch.setattr(leases.heartbeat, "_leave", lambda now: 3600.0)
    looks, arrived, leases.heartbeat._next = iter([False] * 3), Sender.arrived, float("inf")
    monkeypatch.setattr(Sender, "arrived", lambda sender: next(looks, True) and arrived(sender))
    loop.channel.close()
    eventually(lambda: engine.stats(loop.queue).ready == 5, "all that was claimed ahead to be handed back")
    assert settled
    assert get_ident() not in settled
    assert not leases._ahead
    assert [job.deliveries for job in engine.claim(loop.queue, 9)] == [1] * 5


def test_a_channel_listens_by_one_bell_while_its_queues_are_the_same(loop: Loop) -> None:
    """One that was left behind would take the wake-ups that the next one waits for."""
    bell = loop.watch._listen()
    assert loop.watch._listen() is bell
    kombu.Queue(other := fresh("other"))(loop.channel).declare()
    loop.channel.basic_consume(other, False, lambda message: None, fresh("tag"))
    assert loop.watch._listen() is not bell
    with pytest.raises(Unavailable, match="closed"):
        bell.sockets()


def test_the_thread_that_keeps_the_leases_waits_for_no_reply(engine: Broker) -> None:
    waited: list[bool] = []

    class Claim:
        def __init__(self, abandoned: bool) -> None:
            self.abandoned = abandoned

        def settle(self, wait: bool) -> bool:
            waited.append(wait)
            return False

        hand_back = settle

    leases: Any = Leases(engine)
    leases._ahead += [Claim(True), Claim(False)]
    assert leases.settle_claims(), "it has to look again"
    assert waited == [False, False]


def test_a_solo_worker_that_may_hold_one_task_holds_nothing_but_what_it_runs(tcp: Server, tmp_path: Path) -> None:
    tcp.reset()
    client = client_of(tcp.url, tmp_path)
    flags = ("-P", "solo", "-c", "1", "--prefetch-multiplier", "1")
    with Broker(tcp.url) as broker, CeleryWorker(tcp.url, tmp_path, *flags):
        broker.pause("celery")
        for n in range(3):
            client.send_task("tests.celery_app.run", (f"quick-{n}",))
        client.send_task("tests.celery_app.hold", ("long", "go"))
        for n in range(3):
            client.send_task("tests.celery_app.late", (f"after-{n}",))
        broker.resume("celery")
        eventually(lambda: lines(tmp_path, "started", "long"), "the long one to start")
        stats = broker.stats("celery")
        assert (stats.ready, stats.inflight) == (3, 1)
        (tmp_path / "go").touch()
        eventually(lambda: len(lines(tmp_path, start="after-")) == 3, "all to run")
    client.close()
