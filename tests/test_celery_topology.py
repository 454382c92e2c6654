"""Celery's exchanges, bindings and queues on relay: kept in the store, seen and changed by every process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed
from kombu.exceptions import ChannelError
from kombu.transport.virtual import NotEquivalentError, UndeliverableWarning
from redis.crc import key_slot

from relay_adapters.celery.queues.exchanges import TYPES
from relay_core.errors import InvalidArgument, Unavailable
from tests.celery_links import BOX, Inbox, fresh, got, link, send
from tests.servers import Server, eventually
from tests.topologies import Cluster, SentinelTrio


@pytest.fixture
def url(flavour: Any, server: Server) -> str:
    return server.url


@pytest.fixture
def here(url: str) -> Iterator[kombu.Connection]:
    with link(url) as connection:
        yield connection


@pytest.fixture
def there(url: str) -> Iterator[kombu.Connection]:
    """Another process, as far as the transport can tell."""
    with link(url) as connection:
        yield connection


def declare(connection: kombu.Connection, kind: str, *keys: str, **options: Any) -> tuple[str, str]:
    """A new exchange and a new queue that is bound to it by these keys."""
    exchange, queue = fresh("x"), fresh("q")
    channel = connection.default_channel
    channel.exchange_declare(exchange, kind)
    kombu.Queue(queue, **options)(channel).declare()
    for key in keys:
        channel.queue_bind(queue, exchange, key)
    return exchange, queue


# seen and changed by every process


@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_binding_of_another_process_is_not_missed_by_the_next_publish(
    here: kombu.Connection, there: kombu.Connection, kind: str, options: dict[str, Any]
) -> None:
    exchange, first = declare(here, kind, "k.1", **options)
    send(here, 1, exchange, "k.1")
    second = fresh("q")
    kombu.Queue(second, **options)(there.default_channel).declare()
    there.default_channel.queue_bind(second, exchange, "k.1")
    send(here, 2, exchange, "k.1")
    assert got(there, first) == [1, 2]
    assert got(there, second) == [2]


@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
def test_an_unbound_queue_is_not_reached_any_more(
    here: kombu.Connection, there: kombu.Connection, options: dict[str, Any]
) -> None:
    exchange, queue = declare(here, "topic", "a", "b", **options)
    send(here, 1, exchange, "a")
    there.default_channel.queue_unbind(queue, exchange, "a")
    send(here, 2, exchange, "a")
    send(here, 3, exchange, "b")
    assert got(here, queue) == [1, 3]
    assert [binding.routing_key for _, binding in here.default_channel.topology.stored.bound(queue)] == ["b"]


@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
def test_a_queue_deleted_by_another_process_is_gone_with_messages_and_bindings(
    here: kombu.Connection, there: kombu.Connection, options: dict[str, Any]
) -> None:
    exchange, queue = declare(here, "direct", "k", **options)
    send(here, 1, exchange, "k")
    assert there.default_channel.queue_delete(queue) == 1
    with pytest.raises(NotFound, match=queue):
        here.default_channel.queue_declare(queue, passive=True)
    assert list(here.default_channel.list_bindings()) == []
    send(here, 2, exchange, "k")
    kombu.Queue(queue, **options)(here.default_channel).declare()
    assert got(here, queue) == []


def meanwhile(monkeypatch: pytest.MonkeyPatch, link: kombu.Connection, script: str, change: Callable[[], Any]) -> None:
    """Another process makes a change just before the first of these scripts of the link reaches the store."""
    store, changes = link.default_channel.topology.stored.broker.store, [change]
    run = store.run

    def hooked(command: Any) -> Any:
        if command.script.name.endswith(script) and changes:
            changes.pop()()
        return run(command)

    monkeypatch.setattr(store, "run", hooked)


@pytest.mark.parametrize("deleted", ["queue", "exchange"])
def test_a_binding_that_is_made_while_either_of_its_ends_is_deleted_goes_too(
    here: kombu.Connection, there: kombu.Connection, monkeypatch: pytest.MonkeyPatch, deleted: str
) -> None:
    exchange, queue = declare(here, "direct", "a")
    script = "delete" if deleted == "queue" else "discard"
    meanwhile(monkeypatch, here, script, lambda: there.default_channel.queue_bind(queue, exchange, "b"))
    if deleted == "queue":
        here.default_channel.queue_delete(queue)
    else:
        here.default_channel.exchange_delete(exchange)
    stored = there.default_channel.topology.stored
    assert stored.rows(exchange) == []
    assert stored.bound(queue) == []


def test_a_mailbox_that_is_declared_again_while_it_is_found_to_have_vanished_stays(
    here: kombu.Connection, there: kombu.Connection, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, queue = declare(here, "fanout", "", **BOX)
    box = here.default_channel.topology.places.box(queue)
    server.cli("DEL", box)
    meanwhile(monkeypatch, here, "delete", lambda: kombu.Queue(queue, **BOX)(there.default_channel).declare())
    send(here, 1, exchange)
    assert server.cli("EXISTS", box) == 1
    send(here, 2, exchange)
    assert got(there, queue) == [2]


@pytest.mark.parametrize(
    "options", [{"x-dead-letter-exchange": "", "x-message-ttl": 60_000, "x-expires": 60_000}, None]
)
def test_a_deleted_queue_leaves_nothing(here: kombu.Connection, server: Server, options: dict[str, Any] | None) -> None:
    exchange, other = declare(here, "direct", "k")
    before = set(server.cli("KEYS", "*"))
    queue = fresh("q")
    kombu.Queue(queue, queue_arguments=options, **({} if options else BOX))(here.default_channel).declare()
    here.default_channel.queue_bind(queue, exchange, "k")
    with server.client() as client:  # a consumer that died
        client.zadd(here.default_channel.topology.places.consumers(queue), {"somebody": 1e15})
    here.default_channel.queue_delete(queue)
    assert set(server.cli("KEYS", "*")) <= before
    assert got(here, other) == []


def test_an_exchange_deleted_by_another_process_is_not_found_and_its_queues_stay(
    here: kombu.Connection, there: kombu.Connection
) -> None:
    exchange, queue = declare(here, "direct", "k")
    send(here, 1, exchange, "k")
    with pytest.raises(PreconditionFailed, match="in use"):
        there.default_channel.exchange_delete(exchange, if_unused=True)
    there.default_channel.exchange_delete(exchange)
    with pytest.raises(NotFound, match=exchange):
        send(here, 2, exchange, "k")
    with pytest.raises(NotFound, match=exchange):
        here.default_channel.exchange_declare(exchange, passive=True)
    here.default_channel.exchange_declare(exchange, "topic")
    send(here, 3, exchange, "k")
    assert got(here, queue) == [1]


@pytest.mark.parametrize("name", ["", "amq.", "amq.direct"])
def test_an_exchange_of_the_brokers_own_is_not_deleted_and_what_is_declared_afterwards_works(
    here: kombu.Connection, there: kombu.Connection, name: str
) -> None:
    declare(here, "direct", "k")
    with pytest.raises(AccessRefused, match="always there"):
        here.default_channel.exchange_delete(name)
    exchange, queue = declare(there, "direct", "k")
    send(here, 1, exchange, "k")
    assert got(there, queue) == [1]


@pytest.mark.parametrize("name", ["amq.", "amq.mine"])
def test_a_name_that_is_reserved_for_the_broker_is_not_declared(here: kombu.Connection, name: str) -> None:
    with pytest.raises(AccessRefused, match=r"begins with 'amq\.'"):
        here.default_channel.exchange_declare(name, "direct")
    assert name not in here.default_channel.get_exchanges()


def test_what_is_declared_outlives_its_connection(url: str, here: kombu.Connection) -> None:
    with link(url) as gone:
        exchange, queue = declare(gone, "topic", "a.*")
    send(here, 1, exchange, "a.b")
    assert got(here, queue) == [1]
    assert list(here.get_manager().get_bindings()) == [{"destination": queue, "source": exchange, "routing_key": "a.*"}]
    assert exchange in here.default_channel.get_exchanges()


def test_passive_declares_find_what_is_there_and_nothing_else(here: kombu.Connection, there: kombu.Connection) -> None:
    exchange, queue = declare(here, "fanout", "")
    there.default_channel.exchange_declare(exchange, "fanout", passive=True)
    assert tuple(there.default_channel.queue_declare(queue, passive=True)) == (queue, 0, 0)
    send(here, 1, exchange)
    assert there.default_channel.queue_declare(queue, passive=True).message_count == 1
    with pytest.raises(NotFound, match="no queue"):
        there.default_channel.queue_declare(fresh("q"), passive=True)
    with pytest.raises(NotFound, match="no exchange"):
        there.default_channel.exchange_declare(fresh("x"), passive=True)
    with pytest.raises(NotFound, match="no exchange"):
        there.default_channel.queue_bind(queue, fresh("x"), "k")
    with pytest.raises(NotFound, match="no queue"):
        there.default_channel.queue_bind(fresh("q"), exchange, "k")


@pytest.mark.parametrize("change", [{"type": "topic"}, {"durable": True}, {"arguments": {"alternate-exchange": "a"}}])
def test_an_exchange_declared_otherwise_is_refused_by_the_name_of_what_differs(
    here: kombu.Connection, there: kombu.Connection, change: dict[str, Any]
) -> None:
    exchange = fresh("x")
    here.default_channel.exchange_declare(exchange, "direct")
    there.default_channel.exchange_declare(exchange, "direct")
    with pytest.raises(PreconditionFailed, match=next(iter(change))) as caught:
        there.default_channel.exchange_declare(exchange, **{"type": "direct", **change})
    assert isinstance(caught.value, NotEquivalentError)
    with pytest.raises(ChannelError, match="headers"):
        there.default_channel.exchange_declare(fresh("x"), "headers")


def test_the_exchanges_that_amqp_has_are_always_there(here: kombu.Connection) -> None:
    queue, channel = fresh("q"), here.default_channel
    kombu.Queue(queue)(channel).declare()
    for kind in TYPES:
        channel.exchange_declare(f"amq.{kind}", passive=True)
        channel.queue_bind(queue, f"amq.{kind}", kind)
        send(here, kind, f"amq.{kind}", kind)
    channel.queue_bind(queue, routing_key="k")
    send(here, "k", "amq.direct", "k")
    assert got(here, queue) == [*TYPES, "k"]


def test_an_exchange_that_amqp_has_cannot_be_made_of_another_type(here: kombu.Connection) -> None:
    topology = here.default_channel.topology
    here.default_channel.broker.store.raw("HDEL", topology.places.exchanges, "amq.direct")
    with pytest.raises(NotEquivalentError, match=r"inequivalent arg 'type' for exchange 'amq\.direct'"):
        here.default_channel.exchange_declare("amq.direct", "topic")


def test_if_empty_and_if_unused_keep_what_they_say(here: kombu.Connection, there: kombu.Connection) -> None:
    channel = there.default_channel
    for options in ({}, BOX):
        _exchange, queue = declare(here, "direct", "k", **options)
        send(here, 1, key=queue)
        assert channel.queue_delete(queue, if_empty=True) is None
        assert got(there, queue) == [1]
        inbox = Inbox(here, kombu.Queue(queue, **options), no_ack=True)
        assert channel.queue_delete(queue, if_unused=True) is None
        send(there, 2, key=queue)
        assert inbox.wait(1) == [2]
        inbox.consumer.cancel()
        eventually(lambda q=queue: channel.queue_delete(q, if_unused=True) == 0, "the queue is unused")
        with pytest.raises(NotFound):
            channel.queue_declare(queue, passive=True)
    assert channel.queue_delete(fresh("q")) is None


def test_the_consumers_of_other_processes_are_counted(url: str, here: kombu.Connection) -> None:
    queue = kombu.Queue(fresh("q"))
    inbox = Inbox(here, queue)
    assert here.default_channel.queue_declare(queue.name, passive=True).consumer_count == 1
    # a process is not in its own way: it may be coming back after a lost connection
    assert here.default_channel.queue_declare(queue.name).consumer_count == 0
    consumers = here.default_channel.topology.places.consumers(queue.name)
    here.default_channel.topology.stored.raw("ZADD", consumers, 1, "one-that-died", 10**15, "one-that-lives")
    assert here.default_channel.queue_declare(queue.name).consumer_count == 1
    here.default_channel.topology.stored.raw("ZREM", consumers, "one-that-lives")
    inbox.consumer.cancel()
    eventually(
        lambda: here.default_channel.queue_declare(queue.name, passive=True).consumer_count == 0, "the consumer left"
    )


def test_consumers_that_died_are_forgotten_when_another_one_says_that_it_lives(here: kombu.Connection) -> None:
    queue = kombu.Queue(fresh("q"))
    topo = here.default_channel.topology
    consumers = topo.places.consumers(queue.name)
    topo.stored.raw("ZADD", consumers, 1, "one-that-died")
    with kombu.Consumer(here.default_channel, [queue]):
        assert topo.stored.raw("ZSCORE", consumers, "one-that-died") is None
        assert topo.stored.raw("PTTL", consumers) > 0, "they are forgotten also when none is left"


def test_a_message_that_a_mailbox_kept_for_its_time_is_not_taken_out_of_it(here: kombu.Connection) -> None:
    queue = fresh("q")
    kombu.Queue(queue, **BOX | {"message_ttl": 0.05})(here.default_channel).declare()
    send(here, 1, key=queue)
    topo = here.default_channel.topology
    sent = topo.stored.now_ms()
    eventually(lambda: topo.stored.now_ms() > sent + 51, "its time to be over")
    assert got(here, queue) == []


def test_bindings_of_a_store_that_was_emptied_are_not_taken_for_those_of_before(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    exchange, _gone = declare(here, "fanout", "", **BOX)
    send(here, 1, exchange)
    server.cli("FLUSHALL")
    there.default_channel.exchange_declare(exchange, "fanout")
    queue = fresh("q")
    kombu.Queue(queue, **BOX)(there.default_channel).declare()
    there.default_channel.queue_bind(queue, exchange, "")
    send(here, 2, exchange)
    assert got(there, queue) == [2]


# routing


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("a.*", ["a.b", "a."], ["a", "a.b.c", "b.a", "ab"]),
        ("a.#", ["a", "a.b", "a.b.c"], ["b", "ab", "b.a"]),
        ("#.z", ["z", "a.z", "a.b.z"], ["z.a", "az"]),
        ("a.#.z", ["a.z", "a.b.z", "a.b.c.z"], ["a", "z", "az"]),
        ("*.b", ["a.b"], ["b", "a.a.b", "a-b"]),
        ("#", ["", "a", "a.b"], []),
        ("*", ["a"], ["a.b", ""]),
        ("*.#", ["a", "a.b"], [""]),
        ("", [""], ["a", "."]),
        ("a.b", ["a.b"], ["a", "a.b.c", "axb", "a*b"]),
        ("a+", ["a+"], ["aa"]),
    ],
)
def test_a_topic_matches_as_on_rabbitmq(pattern: str, matching: list[str], others: list[str]) -> None:
    topic = TYPES["topic"](None)
    row = topic.prepare_bind("q", "x", pattern, {})
    assert [key for key in matching if not topic.lookup([row], "x", key, None)] == []
    assert [key for key in others if topic.lookup([row], "x", key, None)] == []


def test_a_publish_is_one_message_in_each_queue_however_many_bindings_match(here: kombu.Connection) -> None:
    exchange, first = declare(here, "topic", "#", "a.*", "a.b", "x")
    others = [fresh("q"), fresh("q")]
    for queue, options in zip(others, ({}, BOX), strict=True):
        kombu.Queue(queue, exchange=kombu.Exchange(exchange, "topic", durable=False), routing_key="a.#", **options)(
            here.default_channel
        ).declare()
    send(here, 1, exchange, "a.b")
    assert [got(here, queue) for queue in (first, *others)] == [[1], [1], [1]]


def test_a_fanout_reaches_all_but_those_whose_pattern_does_not_match(here: kombu.Connection) -> None:
    exchange, plain = declare(here, "fanout", "some.key")
    _x, workers = declare(here, "fanout")
    here.default_channel.queue_bind(workers, exchange, "worker.#")
    for key in ("worker.heartbeat", "task.sent", ""):
        send(here, [key], exchange, key)
    assert got(here, plain) == [["worker.heartbeat"], ["task.sent"], [""]]
    assert got(here, workers) == [["worker.heartbeat"]]


def test_what_reaches_no_queue_goes_to_the_alternate_exchange_or_the_deadletter_queue(
    here: kombu.Connection, url: str
) -> None:
    alternate, queue = declare(here, "fanout", "")
    exchange = fresh("x")
    here.default_channel.exchange_declare(exchange, "direct", arguments={"alternate-exchange": alternate})
    here.default_channel.exchange_declare(second := fresh("x"), "direct", arguments={"alternate-exchange": second})
    send(here, 1, exchange, "nobody")
    send(here, 2, second, "nobody")
    assert got(here, queue) == [1]
    fallback = fresh("q")
    with link(url, deadletter_queue=fallback) as other, pytest.warns(UndeliverableWarning, match=second):
        send(other, 3, second, "nobody")
    assert got(here, fallback) == [3]


@pytest.mark.parametrize(
    ("strategy", "order"), [("round_robin", "b a c b a c"), ("priority", "b b a a c c"), ("sorted", "a a b b c c")]
)
def test_queues_are_asked_in_the_order_of_kombus_strategy(url: str, strategy: str, order: str) -> None:
    mark = fresh("")
    with link(url, queue_order_strategy=strategy) as connection:
        queues = [kombu.Queue(f"{name}{mark}") for name in "bac"]
        for queue in queues:
            queue(connection.default_channel).declare()
            for _ in range(2):
                send(connection, queue.name[0], key=queue.name)
        inbox = Inbox(connection, *queues, prefetch=1)
        for number in range(1, 7):
            inbox.wait(number)
            inbox.messages[-1].ack()
        assert " ".join(inbox.bodies) == order
    with link(url, queue_order_strategy="no-such") as connection, pytest.raises(InvalidArgument, match="no-such"):
        connection.channel()


def test_a_full_server_takes_what_workers_declare_so_that_they_can_start_and_empty_it(
    url: str, here: kombu.Connection, server: Server
) -> None:
    exchange, queue = declare(here, "direct", "k")
    send(here, 1, exchange, "k")
    server.cli("CONFIG", "SET", "maxmemory", "1")
    with link(url, retry_for=0.0) as worker:
        with pytest.raises(Unavailable, match="maxmemory"):
            send(worker, 2, exchange, "k")
        known = kombu.Exchange(exchange, "direct", durable=False)
        inbox = Inbox(worker, kombu.Queue(queue, known, routing_key="k"))
        assert inbox.wait(1) == [1]
        inbox.messages[0].ack()
        news = kombu.Exchange(fresh("news"), "fanout")
        orders = Inbox(worker, kombu.Queue(fresh("box"), news, **BOX), no_ack=True)
        orders.channel.queue_bind(queue, "amq.topic", "#")
        send(worker, "stop", news.name)
        assert orders.wait(1) == ["stop"]
        kombu.Queue(perishable := fresh("q"), expires=60)(worker.default_channel).declare()
        topology = worker.default_channel.topology
        before = server.cli("ZSCORE", topology.places.ends, perishable)

        def used() -> Any:
            topology.use(perishable, topology.terms(perishable))
            return server.cli("ZSCORE", topology.places.ends, perishable) > before

        eventually(used, "it ends later")


def test_a_limit_that_is_added_to_a_queue_is_seen_by_who_publishes_through_its_exchange(
    here: kombu.Connection, there: kombu.Connection
) -> None:
    exchange, queue = declare(here, "topic", "a.#")
    for number in range(8):
        send(here, number, exchange, "a.b")
    kombu.Queue(queue, max_length=5)(there.default_channel).declare()

    def sent() -> Any:
        send(here, 9, exchange, "a.b")
        return there.default_channel.queue_declare(queue, passive=True).message_count == 5

    eventually(sent, "the queue is as short as it should be")


@pytest.mark.parametrize(
    ("headers", "properties", "kept"),
    [
        ({}, {"correlation_id": "1"}, False),
        ({}, {}, True),
        ({"task": "work", "id": "1"}, {"correlation_id": "1"}, True),
        ({}, {"correlation_id": "1", "reply_to": "me"}, True),
    ],
    ids=["reply", "message", "task", "request"],
)
def test_a_reply_to_who_is_gone_is_dropped_and_all_else_waits_for_its_queue(
    here: kombu.Connection, there: kombu.Connection, headers: Any, properties: Any, kept: bool
) -> None:
    queue = fresh("q")
    send(here, 1, key=queue, headers=headers, **properties)
    assert (queue in there.default_channel.broker.queues()) is kept
    assert got(there, queue) == ([1] if kept else [])
    kombu.Queue(queue)(there.default_channel).declare()
    send(here, 2, key=queue, headers=headers, **properties)
    assert got(there, queue) == [2]


# where it lies


def test_every_key_has_the_prefix_and_what_is_changed_together_one_slot(url: str, server: Server) -> None:
    with link(url, prefix="mine") as connection:
        exchange, _queue = declare(connection, "topic", "#")
        _x, box = declare(connection, "topic", **BOX)
        connection.default_channel.queue_bind(box, exchange, "a.{b}.#")
        inbox = Inbox(connection, kombu.Queue(box, **BOX), no_ack=True)
        send(connection, 1, exchange, "a.{b}.c")
        inbox.wait(1)
        names = [key for key in server.cli("KEYS", "*") if b"{celery}" in key]
        assert {key[:14] for key in names} == {b"mine:{celery}:"}
        assert {key_slot(key) for key in names} == {key_slot(b"celery")}
        assert {name for key in server.cli("KEYS", "*") if not (name := key.decode()).startswith("mine:")} == set()


@pytest.mark.parametrize("where", ["cluster", "sentinel_trio"])
def test_all_kinds_work_on_cluster_and_sentinel_also_after_a_failover(
    where: str, request: pytest.FixtureRequest
) -> None:
    topology: Cluster | SentinelTrio = request.getfixturevalue(where)
    with link(topology.url, retry_for=30.0) as here, link(topology.url, retry_for=30.0) as there:
        exchange, queue = declare(here, "topic", "k.*")
        box = fresh("q")
        inbox = Inbox(here, kombu.Queue(box, **BOX), no_ack=True)
        here.default_channel.queue_bind(box, exchange, "#")
        send(there, 1, exchange, "k.1")
        assert inbox.wait(1) == [1]
        assert got(there, queue) == [1]
        if isinstance(topology, Cluster):
            dead = topology.kill_primary_of(topology.slot_of("relay:{celery}:x"))
            topology.wait_until_replaced(dead)
        else:
            eventually(lambda: _replicated(topology), "the replica has it all")
            topology.wait_for_primary(other_than=topology.kill_primary())
        send(there, 2, exchange, "k.2")
        eventually(lambda: _drained(inbox) == [1, 2], "the message came over the new connection")
        assert got(there, queue) == [2]


def _replicated(trio: SentinelTrio) -> bool:
    info = trio.primary.info("replication")
    return f"offset={info['master_repl_offset']}" in str(info)


def _drained(inbox: Inbox) -> list[Any]:
    inbox.connection.drain_events(timeout=1.0)
    return inbox.bodies


# Celery's command line


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_celery_amqp_and_purge_work_from_processes_of_their_own(server: Server, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        f"from celery import Celery\napp = Celery('shop', broker={server.url!r})\n@app.task\ndef work(): pass\n"
    )

    def celery(*args: str) -> str:
        command = [sys.executable, "-m", "celery", "-A", "shop", *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    celery("amqp", "exchange.declare", "ex", "topic")
    celery("amqp", "queue.declare", "box")
    celery("amqp", "queue.bind", "box", "ex", "a.*")
    celery("amqp", "basic.publish", "hello", "ex", "a.b")
    assert "hello" in celery("amqp", "basic.get", "box")
    celery("call", "shop.work")
    assert "Purged 1 message from 1 known task queue" in celery("purge", "-f")
