"""Control commands, replies and events on relay: nothing is lost between bind and consume, nothing grows for ever."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

import kombu
import pytest
from celery import Celery
from kombu.common import Broadcast

from benchmarks.idle import commands_within
from relay_adapters.celery.queues import moves
from relay_adapters.celery.queues.places import Places
from relay_adapters.celery.sending import upkeep
from relay_core import Broker
from relay_core.errors import Unavailable
from tests.celery_links import BOX, Inbox, fresh, got, link, send
from tests.proxy import Proxy, to_port
from tests.servers import Server, eventually

P = Places("relay")


@pytest.fixture(params=["redis"])
def flavour(request: pytest.FixtureRequest) -> Any:
    """One server: what the scripts do on either is tested with the exchanges."""
    return request.param


@pytest.fixture
def here(server: Server) -> Iterator[kombu.Connection]:
    with link(server.url) as connection:
        yield connection


@pytest.fixture
def there(server: Server) -> Iterator[kombu.Connection]:
    with link(server.url) as connection:
        yield connection


def box(connection: kombu.Connection, exchange: str = "", **options: Any) -> kombu.Queue:
    """A new mailbox, declared, and bound to a fanout exchange of that name."""
    to = kombu.Exchange(exchange, "fanout", durable=False) if exchange else None
    made = kombu.Queue(fresh("box"), exchange=to, **{**BOX, **options})
    made(connection.default_channel).declare()
    return made


def test_what_is_published_between_bind_and_consume_arrives(here: kombu.Connection, there: kombu.Connection) -> None:
    mine = box(here, "news")
    for number in range(3):
        send(there, number, "news")
    inbox = Inbox(here, mine, no_ack=True)
    send(there, 3, "news")
    assert inbox.wait(4) == [0, 1, 2, 3]
    assert inbox.quiet() == [0, 1, 2, 3]


def test_a_mailbox_that_nobody_reads_is_bounded_and_vanishes_with_its_binding(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    """An event queue of a monitor that went away."""
    kept = box(here, "events", expires=3600, max_length=100)
    gone = box(here, "events", expires=0.5, max_length=100)
    small = box(here, "events", message_ttl=0.05)
    body = "e" * 1000
    for _ in range(500):
        send(there, body, "events")
    assert server.cli("XLEN", P.box(kept.name)) == 100
    assert server.cli("MEMORY", "USAGE", P.box(kept.name), "SAMPLES", 0) < 300_000
    time.sleep(0.06)
    send(there, body, "events")
    assert server.cli("XLEN", P.box(small.name)) == 1
    eventually(lambda: not server.cli("EXISTS", P.box(gone.name)), "it is gone")
    send(there, body, "events")
    assert {name for name, *_ in there.default_channel.list_bindings()} == {kept.name, small.name}
    assert not server.cli("HEXISTS", P.queues, gone.name)


def test_a_mailbox_without_a_length_keeps_the_latest_ten_thousand(there: kombu.Connection, server: Server) -> None:
    mine = box(there, message_ttl=3600, expires=3600)
    command = [moves.publish(P, "", "", str(n), b"m", [(mine.name, 0, 10_000)]) for n in range(10_050)]
    with Broker(server.url) as broker:
        for at in range(0, len(command), 1000):
            assert broker.store.run_many(command[at : at + 1000]) == [[1]] * len(command[at : at + 1000])
    assert server.cli("XLEN", P.box(mine.name)) == 10_000
    first = server.cli("XRANGE", P.box(mine.name), "-", "+", "COUNT", 1)[0][1]
    assert first[1] == b"50"


def test_a_consumer_that_is_held_up_keeps_its_mailbox_and_loses_nothing(
    here: kombu.Connection, there: kombu.Connection
) -> None:
    """A solo worker is deaf while it runs a task, longer than its mailbox would live without it."""
    mine = box(here, "orders", expires=2.0)
    inbox = Inbox(here, mine, no_ack=True)
    ends, sent = time.monotonic() + 5.0, 0
    while time.monotonic() < ends:
        send(there, sent, "orders")
        sent += 1
        time.sleep(0.1)
    assert inbox.wait(sent) == list(range(sent))


def test_a_lost_reply_loses_no_message_and_doubles_none(server: Server, flavour: Any, pool: Any) -> None:
    tcp = pool.get(Server, flavour, tcp=True)
    with Proxy(to_port(tcp.port)) as proxy, link(proxy.url) as here, link(tcp.url) as there:
        inbox = Inbox(here, box(here, "news"), no_ack=True)
        send(there, 0, "news")
        inbox.wait(1)
        proxy.cut_reply(b"XREADGROUP")
        for number in range(1, 4):
            send(there, number, "news")
        eventually(lambda: _gone_on(inbox, 4), "all have come")
        assert inbox.bodies == [0, 1, 2, 3]
        send(there, 4, "news")
        eventually(lambda: _gone_on(inbox, 5), "the consumer goes on")
        assert inbox.bodies == [0, 1, 2, 3, 4]
        # the same over a new channel of the same process, as Celery makes one after a lost connection
        proxy.cut_reply(b"XREADGROUP")
        send(there, 5, "news")
        with pytest.raises(here.connection_errors):
            inbox.wait(6)
        inbox.channel.close()
        second = Inbox(here, *inbox.consumer.queues, no_ack=True)
        send(there, 6, "news")
        eventually(lambda: _gone_on(second, 2), "what was under way and what is new have come")
        assert second.bodies == [5, 6]


def _gone_on(inbox: Inbox, number: int) -> bool:
    try:
        inbox.connection.drain_events(timeout=0.5)
    except (TimeoutError, *inbox.connection.connection_errors):
        pass
    return len(inbox.bodies) >= number


def test_a_publish_that_is_sent_again_is_stored_once(there: kombu.Connection, server: Server) -> None:
    mine = box(there)
    boxes = [(mine.name, 0, 100)]
    with Broker(server.url) as broker:
        for again in (False, True, True):
            assert broker.store.run(moves.publish(P, "", "", "id", b"m", boxes, again)) == [1]
        assert broker.store.run(moves.publish(P, "", "", "id2", b"m", boxes, True)) == [1]
    assert server.cli("XLEN", P.box(mine.name)) == 2


def test_a_mailbox_does_not_wait_for_the_credit_for_tasks(here: kombu.Connection, there: kombu.Connection) -> None:
    tasks = kombu.Queue(fresh("tasks"))
    orders = box(here, "orders")
    inbox = Inbox(here, tasks, prefetch=1)
    inbox.channel.basic_consume(orders.name, True, inbox.bodies.append, "orders")
    for number in range(2):
        send(there, number, key=tasks.name)
    inbox.wait(1)
    send(there, "stop", "orders")
    inbox.wait(2)
    assert inbox.bodies[0] == 0
    assert inbox.bodies[1].payload == "stop"
    inbox.messages[0].ack()
    assert inbox.wait(3)[2] == 1


def test_a_consumed_queue_that_was_deleted_or_lost_is_declared_and_bound_again(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    mine = box(here, "orders", expires=0.6)
    inbox = Inbox(here, mine, no_ack=True)
    send(there, 0, "orders")
    inbox.wait(1)
    for number, lose in enumerate([lambda: there.default_channel.queue_delete(mine.name), server.client().flushall], 1):
        lose()
        eventually(lambda: server.cli("SCARD", P.bindings("orders")) == 1, "it is bound again")
        send(there, number, "orders")
        assert inbox.wait(number + 1) == list(range(number + 1))


def test_a_broadcast_task_is_in_the_queue_of_each_worker_until_it_is_acknowledged(
    here: kombu.Connection, there: kombu.Connection
) -> None:
    """kombu's Broadcast is an auto_delete queue of jobs: its tasks have leases, ETAs and credit as any other."""
    name = fresh("all")
    inboxes = [Inbox(connection, Broadcast(name), prefetch=1) for connection in (here, there)]
    for number in range(2):
        send(here, number, name)
    for inbox in inboxes:
        assert inbox.wait(1) == [0]
        inbox.messages[0].requeue()
        inbox.wait(2)
        inbox.messages[1].ack()
        assert sorted(inbox.wait(3)) == [0, 0, 1]


def test_one_message_is_handed_over_per_drain(here: kombu.Connection, there: kombu.Connection) -> None:
    """Celery counts replies by it: `inspect -d one` must not wait for more when the one has answered."""
    inbox = Inbox(here, box(here, "replies"), no_ack=True)
    for number in range(3):
        send(there, number, "replies")
    for number in range(3):
        here.drain_events(timeout=10)
        assert len(inbox.bodies) == number + 1


def test_messages_of_a_mailbox_that_are_acknowledged_come_back_until_they_are(
    here: kombu.Connection, there: kombu.Connection
) -> None:
    mine = box(here, "orders")
    inbox = Inbox(here, mine, prefetch=2)
    for number in range(4):
        send(there, number, "orders")
    inbox.wait(2)
    assert inbox.quiet() == [0, 1]
    inbox.messages[0].ack()
    inbox.messages[1].requeue()
    assert inbox.wait(4)[2:] == [2, 3]
    inbox.messages[2].reject()
    assert inbox.wait(5)[4] == 1
    inbox.channel.close()
    assert sorted(got(there, mine.name)) == [1, 3]


def test_what_mailboxes_hold_and_who_reads_them_is_told(here: kombu.Connection, there: kombu.Connection) -> None:
    mine = box(here)
    channel = there.default_channel
    for number in range(3):
        send(there, number, key=mine.name)
    assert channel.queue_declare(mine.name, passive=True).message_count == 3
    assert got(there, mine.name) == [0, 1, 2]
    send(there, 3, key=mine.name)
    assert channel.queue_purge(mine.name) == 1
    inbox = Inbox(here, mine, no_ack=True)
    send(there, 4, key=mine.name)
    assert inbox.wait(1) == [4]
    assert tuple(channel.queue_declare(mine.name, passive=True)) == (mine.name, 0, 1)


def test_what_a_purge_and_a_length_count_are_the_messages_that_wait(
    here: kombu.Connection, there: kombu.Connection
) -> None:
    """Those that were received stay in the store until its owner's next touch, which is of no concern to others."""
    mine = box(here, max_length=2)
    inbox = Inbox(here, mine, no_ack=True)
    for number in range(2):
        send(there, number, key=mine.name)
    inbox.wait(2)
    assert there.default_channel.queue_purge(mine.name) == 0
    for number in range(2, 4):
        send(there, number, key=mine.name)
    inbox.wait(4)
    inbox.consumer.cancel()
    for number in range(4, 7):
        send(there, number, key=mine.name)
    assert there.default_channel.queue_declare(mine.name, passive=True).message_count == 2
    assert there.default_channel.queue_purge(mine.name) == 2


def test_a_recover_brings_back_what_a_mailbox_gave_in_its_order(here: kombu.Connection) -> None:
    mine = box(here)
    inbox = Inbox(here, mine)
    for number in range(3):
        send(here, number, key=mine.name)
    inbox.wait(3)
    inbox.channel.basic_recover(requeue=True)
    assert inbox.wait(6) == [0, 1, 2] * 2
    assert inbox.quiet() == [0, 1, 2] * 2


def test_what_could_not_be_requeued_goes_back_when_the_channel_closes(
    here: kombu.Connection, there: kombu.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = box(here)
    inbox = Inbox(here, mine)
    send(there, 1, key=mine.name)
    inbox.wait(1)
    store = inbox.channel.broker.store
    with monkeypatch.context() as patch:
        patch.setattr(store, "run", lambda *_: (_ for _ in ()).throw(Unavailable("away")))
        with pytest.raises(Unavailable):
            inbox.messages[0].requeue()
    inbox.channel.close()
    assert got(there, mine.name) == [1]


def test_what_is_on_its_way_to_one_process_is_not_taken_for_received_by_another(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    """Of two that share a mailbox."""
    mine = box(here, message_ttl=600)
    other = Inbox(there, mine, no_ack=True)
    other.quiet()
    send(here, 1, key=mine.name)
    key = P.box(mine.name)
    eventually(lambda: server.cli("XPENDING", key, "q")[0] == 1, "it to be on its way")
    inbox = Inbox(here, mine, no_ack=True)
    send(here, 2, key=mine.name)
    assert inbox.wait(1) == [2]
    inbox.channel.attendance.touch()
    reader = there.transport._watches[other.channel, "mail"].bell
    (lost,) = reader._channels
    lost.close()  # before it was read
    reader._unsure = True
    assert other.wait(1) == [1]


def test_what_a_process_that_died_was_given_is_forgotten_once_it_is_too_old(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    mine = box(here, message_ttl=0.05)
    other = Inbox(there, mine, no_ack=True)
    other.quiet()
    key, attendance = P.box(mine.name), Inbox(here, mine, no_ack=True).channel.attendance

    def given() -> bool:
        """One of many: its time may be over before somebody reads it."""
        send(here, 1, key=mine.name)
        return bool(server.cli("XPENDING", key, "q")[0])

    eventually(given, "one to be given")
    eventually(lambda: attendance.touch() or server.cli("XPENDING", key, "q")[0] == 0, "its time to be over")


def test_a_channel_that_closes_without_its_server_tries_once_to_put_back_what_it_has_and_says_what_is_lost(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = box(here)
    inbox, tries = Inbox(here, mine), list[Any]()
    for number in range(3):
        send(here, number, key=mine.name)
    inbox.wait(3)

    def away(told: Any) -> Any:
        tries.append(told)
        return [Unavailable("away")] * len(told)

    monkeypatch.setattr(inbox.channel.broker.store, "run_many", away)
    inbox.channel.close()
    assert len(tries) == 1
    assert "3 messages of mailboxes that were not acked are lost with their channel: away" in caplog.text


def test_a_channel_that_closes_and_cannot_ask_what_its_mailbox_is_says_what_is_lost(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = box(here)
    inbox = Inbox(here, mine)
    send(here, 1, key=mine.name)
    inbox.wait(1)

    def away(*_: Any) -> NoReturn:
        raise Unavailable("away")

    monkeypatch.setattr(inbox.channel.topology, "terms", away)
    inbox.channel.close()
    assert inbox.channel.closed
    assert "1 messages of mailboxes that were not acked are lost with their channel: away" in caplog.text


def test_a_mailbox_whose_time_is_over_ends(here: kombu.Connection, server: Server) -> None:
    mine, topology = box(here), here.default_channel.topology
    send(here, 1, key=mine.name)
    upkeep.end(topology, mine.name, topology.terms(mine.name))
    assert server.cli("XLEN", P.box(mine.name)) == 1, "its time is not over"
    topology.stored.raw("ZADD", topology.places.ends, 1, mine.name)
    upkeep.end(topology, mine.name, topology.terms(mine.name))
    assert server.cli("EXISTS", P.box(mine.name)) == 0
    assert topology.terms(mine.name, fresh=True) is None


def test_what_is_too_old_is_not_taken_out_of_a_mailbox(here: kombu.Connection, server: Server) -> None:
    mine, channel = box(here, message_ttl=0.05), here.default_channel
    send(here, 1, key=mine.name)
    sent = channel.topology.stored.now_ms()
    eventually(lambda: channel.topology.stored.now_ms() > sent + 60, "its time to be over")
    assert server.cli("XLEN", P.box(mine.name)) == 1
    assert channel.basic_get(mine.name, no_ack=True) is None


def test_what_a_cancelled_consumer_was_not_handed_comes_once_to_the_next_ones(here: kombu.Connection) -> None:
    """Of the same process. It has come to the first channel, and is not to wait there for its next consumer, too."""
    mine = box(here)
    first, second = Inbox(here, prefetch=1), Inbox(here)
    one = kombu.Consumer(first.channel, [mine], callbacks=[first._take])
    one.consume()
    for number in range(4):
        send(here, number, key=mine.name)
    first.wait(1)
    one.cancel()
    two = kombu.Consumer(second.channel, [mine], callbacks=[second._take], no_ack=True)
    two.consume()
    assert second.wait(3) == [1, 2, 3]
    two.cancel()
    send(here, 4, key=mine.name)
    first.messages[0].ack()
    one.consume()
    assert first.wait(2) == [0, 4]


def test_what_comes_while_a_consumer_is_cancelled_is_told_to_the_one_that_takes_its_place_just_then(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel of another thread."""
    mine = box(here)
    first = Inbox(here, mine, no_ack=True)
    first.quiet()
    attendance, seconds = first.channel.attendance, list[Inbox]()
    part = attendance.part

    def parted(channel: int, queue: str) -> None:
        part(channel, queue)
        if not seconds:
            seconds.append(Inbox(beside, mine, no_ack=True))
            seconds[0].quiet()
            send(here, 1, key=mine.name)

    with here.clone() as beside:
        monkeypatch.setattr(attendance, "part", parted)
        first.consumer.cancel()
        assert seconds[0].wait(1) == [1]


def test_a_channel_that_reads_fewer_mailboxes_than_before_loses_nothing_of_the_others(
    here: kombu.Connection, server: Server
) -> None:
    """Nor where another channel, which had one of them first, has left in the meantime."""
    mine, other = box(here), box(here)
    first = Inbox(here, mine, no_ack=True)
    first.quiet()
    with here.clone() as beside:
        second = Inbox(beside, mine, other, no_ack=True)
        second.quiet()
        first.consumer.cancel()
        send(here, 1, key=mine.name)
        eventually(lambda: server.cli("XPENDING", P.box(mine.name), "q")[0] == 1, "it to be on its way")
        second.consumer.cancel_by_queue(other.name)
        assert second.wait(1) == [1]


@pytest.mark.parametrize("apart", [True, False], ids=["processes", "channels"])
def test_what_one_consumer_of_a_mailbox_has_not_handed_over_does_not_depend_on_another(
    here: kombu.Connection, there: kombu.Connection, server: Server, apart: bool
) -> None:
    """Each message goes to one of them. What the other one received later says nothing of it."""
    mine = box(here)
    first = Inbox(here, mine, no_ack=True)
    for number in range(4):
        send(there, number, key=mine.name)
    first.wait(1)  # the others have come to its channel, too
    with here.clone() as beside:
        second = Inbox(there if apart else beside, mine, no_ack=True)
        send(there, 4, key=mine.name)
        assert second.wait(1) == [4]
        second.channel.attendance.touch()
        first.channel.close()
        third = Inbox(here, mine, no_ack=True)
        assert third.wait(3) == [1, 2, 3]
        assert second.quiet() == [4]
        for inbox in (second, third):
            inbox.channel.attendance.touch()
    assert server.cli("XPENDING", P.box(mine.name), "q")[0] == server.cli("XLEN", P.box(mine.name)) == 0


def test_what_a_process_that_died_had_received_leaves_the_store_with_its_time(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    mine = box(here, message_ttl=0.5)
    server.cli("XADD", P.box(mine.name), "1-1", "i", "id", "m", "message")
    server.cli("XREADGROUP", "GROUP", "q", "dead", "STREAMS", P.box(mine.name), ">")
    inbox = Inbox(here, mine, no_ack=True)
    assert server.cli("XPENDING", P.box(mine.name), "q")[0] == 0
    send(there, 1, key=mine.name)
    assert inbox.wait(1) == [1]


def test_what_two_processes_put_back_is_not_taken_for_the_same(tcp_server: Server) -> None:
    """Where the second one has to send it twice."""
    with link(tcp_server.url) as there, Proxy(to_port(tcp_server.port)) as proxy:
        mine = box(there, expires=600, message_ttl=600)
        for body in ("first", "second"):
            send(there, body, key=mine.name)
        put_back = (
            "import sys, kombu, relay_adapters.celery\n"
            "with kombu.Connection(sys.argv[1]) as link:\n"
            "    link.default_channel.basic_get(sys.argv[2]).requeue()\n"
        )
        proxy.cut_request(b"second")
        for url in (tcp_server.url, proxy.url):
            subprocess.run([sys.executable, "-c", put_back, url, mine.name], check=True, timeout=60)
        assert proxy.pending == 0
        assert got(there, mine.name) == ["first", "second"]


def test_a_channel_that_closes_puts_back_what_it_had_in_one_go(tcp_server: Server) -> None:
    with link(tcp_server.url) as there, Proxy(to_port(tcp_server.port)) as proxy, link(proxy.url) as here:
        mine = box(here)
        inbox = Inbox(here, mine)
        for number in range(30):
            send(there, number, key=mine.name)
        inbox.wait(30)
        before = proxy.requests
        inbox.channel.close()
        assert proxy.requests < before + 20
        assert got(there, mine.name) == list(range(30))


# many of them, by Celery's own nodes


def test_a_hundred_nodes_answer_a_ping_and_get_a_broadcast_exactly_once(tcp_server: Server) -> None:
    """100 real pidbox nodes in four processes, as many workers' control sides are."""
    app = Celery("shop", broker=tcp_server.url, set_as_current=False)
    command = [sys.executable, "-m", "tests.celery_nodes", tcp_server.url]
    nodes = [
        subprocess.Popen([*command, str(first), "25"], stdout=subprocess.PIPE, text=True) for first in range(0, 100, 25)
    ]
    said: queue.Queue[str] = queue.Queue()
    try:
        for node in nodes:
            assert node.stdout is not None
            assert node.stdout.readline() == "ready\n"
            threading.Thread(target=lambda out=node.stdout: [said.put(line) for line in out], daemon=True).start()
        names = {f"node-{number}@here" for number in range(100)}
        replies = app.control.broadcast("ping", {"text": "a"}, reply=True, timeout=30, limit=100)
        assert sorted(name for reply in replies for name in reply) == sorted(names)
        app.control.broadcast("ping", {"text": "b"})
        app.control.broadcast("ping", {"text": "c"}, destination=["node-7@here"])
        heard = Counter(said.get(timeout=30).strip() for _ in range(201))
        assert heard == Counter([f"{name} {text}" for name in names for text in "ab"] + ["node-7@here c"])
        assert said.empty()
    finally:
        for node in nodes:
            node.kill()
            node.wait()
        app.close()
    # their mailboxes end with them, ten seconds after they were heard last
    assert all(0 < tcp_server.cli("PTTL", P.box(f"{name}.celery.pidbox")) <= 10_000 for name in names)


# a real worker


@pytest.fixture(scope="module")
def worker_server() -> Iterator[Server]:
    with Server("redis", tcp=True) as server:
        yield server


def test_an_idle_worker_with_gossip_mingle_heartbeat_and_events_sends_two_commands_a_second_at_most(
    worker_server: Server, tmp_path: Any
) -> None:
    """And what Celery infers from the driver's type is on: it mingles, gossips, and takes worker_disable_prefetch."""
    (tmp_path / "shop.py").write_text(
        f"from celery import Celery\napp = Celery('shop', broker={worker_server.url!r})\n"
        "app.conf.worker_disable_prefetch = True\n"
    )

    def worker(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "-n", name, "-c", "1", "-E", "-l", "INFO"]
        log = open(tmp_path / f"{name}.log", "w")  # noqa: SIM115 - the process writes to it
        return subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, text=True)

    def log(name: str) -> str:
        return (tmp_path / f"{name}.log").read_text()

    first = worker("one@h")
    second = None
    try:
        eventually(lambda: "ready." in log("one@h"), "the worker is ready", 60)
        # what it does once, at its start, may still be on its way
        eventually(lambda: commands_within(worker_server, 2.0) <= 6, "the start to be over", 30)
        began = time.monotonic()
        assert commands_within(worker_server, 30.0) <= 2 * (time.monotonic() - began)
        second = worker("two@h")
        eventually(lambda: "ready." in log("two@h"), "the second worker is ready", 60)
        assert "mingle: sync with 1 nodes" in log("two@h")
        assert "worker_disable_prefetch" not in log("two@h")
        boxes = worker_server.client().hkeys(P.queues)
        assert sum(name.startswith(b"celeryev.") for name in boxes) == 2
    finally:
        for process in (first, second):
            if process is not None:
                process.terminate()
        for process in (first, second):
            if process is not None:
                process.wait(30)
