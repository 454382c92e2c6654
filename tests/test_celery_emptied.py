"""The store loses what was declared, and processes that live on have it there again before they publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from amqp.exceptions import NotFound

from relay_adapters.celery.queues import moves, remembered, topology
from relay_adapters.celery.queues.places import Places
from relay_core.errors import Unavailable
from tests.celery_links import BOX, Inbox, fresh, got, link, send
from tests.servers import Server, eventually

P = Places("relay")


@pytest.fixture
def here(server: Server) -> Iterator[kombu.Connection]:
    with link(server.url) as connection:
        yield connection


@pytest.fixture
def there(server: Server) -> Iterator[kombu.Connection]:
    """Another process, as far as the transport can tell."""
    with link(server.url) as connection:
        yield connection


@pytest.fixture(params=["flushed", "restarted"])
def emptied(request: pytest.FixtureRequest, server: Server) -> Callable[[], None]:
    """Empties the store, under all that are connected to it."""

    def restart() -> None:
        server.kill()
        server.start()

    return restart if request.param == "restarted" else lambda: server.cli("FLUSHALL")


@pytest.fixture
def snapshot(server: Server) -> Iterator[Callable[[], None]]:
    """Keeps the store as it is now on disk: a server that is killed comes back with that."""
    yield lambda: server.cli("SAVE")
    (server.folder / "dump.rdb").unlink(missing_ok=True)


def queue_of(exchange: str, **options: Any) -> kombu.Queue:
    """A new queue that is bound to a topic exchange by its own name."""
    name = fresh("q")
    return kombu.Queue(name, kombu.Exchange(exchange, "topic"), routing_key=name, **options)


def publish(connection: kombu.Connection, body: Any, queue: kombu.Queue) -> None:
    """As Celery does: kombu declares the queue the first time, and never again. Mailboxes are declared by tests."""
    producer = kombu.Producer(connection.default_channel)
    declare = [] if queue.auto_delete else [queue]
    producer.publish(body, exchange=queue.exchange.name, routing_key=queue.routing_key, declare=declare)


@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
def test_what_only_a_publisher_declared_is_there_again_before_its_next_publish(
    here: kombu.Connection, there: kombu.Connection, emptied: Callable[[], None], options: dict[str, Any]
) -> None:
    queue = queue_of(fresh("x"), **options)
    queue(here.default_channel).declare()
    publish(here, 1, queue)
    assert got(there, queue.name) == [1]
    emptied()
    publish(here, 2, queue)
    assert got(there, queue.name) == [2]
    own = here.default_channel.topology.own
    assert (own._owed, own._owed_exchanges) == ({}, {}), "nothing is left to do"


def test_what_is_bound_to_an_exchange_that_nobody_declares_is_bound_again(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    queue = kombu.Queue(fresh("q"), kombu.Exchange("amq.topic", "topic"), routing_key=fresh("key"))
    publish(here, 1, queue)
    assert got(there, queue.name) == [1]
    server.cli("FLUSHALL")
    publish(here, 2, queue)
    assert got(there, queue.name) == [2]
    own = here.default_channel.topology.own
    assert (own._owed, own._owed_exchanges) == ({}, {}), "nothing is left to do"


@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
def test_it_is_there_again_also_where_another_process_has_declared_the_exchange_by_then(
    here: kombu.Connection, there: kombu.Connection, emptied: Callable[[], None], options: dict[str, Any]
) -> None:
    """A worker of one queue lives, which has it back at once; the workers of the other one start at night."""
    exchange = fresh("x")
    worked, idle = queue_of(exchange), queue_of(exchange, **options)
    for queue in (worked, idle):
        queue(here.default_channel).declare()
        publish(here, 1, queue)
    assert got(there, idle.name) == [1]
    emptied()
    worked(there.default_channel).declare()
    publish(here, 2, idle)
    assert got(there, idle.name) == [2]
    publish(here, 3, worked)
    assert got(there, worked.name) == [3]


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_a_worker_that_lives_on_and_a_publisher_have_all_of_it_back(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    exchange = fresh("x")
    worked, idle = queue_of(exchange, expires=0.6), queue_of(exchange)
    inbox = Inbox(there, worked, no_ack=True)
    publish(here, 1, worked)
    publish(here, 1, idle)
    assert inbox.wait(1) == [1]
    server.cli("FLUSHALL")
    eventually(lambda: server.cli("SCARD", P.bindings(exchange)), "the worker has its binding back")
    publish(here, 2, idle)
    publish(here, 2, worked)
    assert got(there, idle.name) == [2]
    assert inbox.wait(2) == [1, 2]


def test_the_terms_of_a_queue_that_is_published_to_directly_hold_again(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    queue = kombu.Queue(fresh("q"), max_length=3)
    queue(here.default_channel).declare()
    server.cli("FLUSHALL")

    def known() -> Any:
        send(here, 1, key=queue.name)
        return there.default_channel.topology.terms(queue.name, fresh=True)

    eventually(known, "its terms are in the store again")
    for number in range(5):
        send(here, number, key=queue.name)
    assert got(there, queue.name) == [2, 3, 4]


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_what_an_older_state_of_the_store_lacks_is_there_again(
    here: kombu.Connection, there: kombu.Connection, server: Server, snapshot: Callable[[], None]
) -> None:
    exchange = fresh("x")
    old, new = queue_of(exchange), queue_of(exchange)
    publish(here, 1, old)
    snapshot()
    publish(here, 1, new)
    server.kill()
    server.start()
    publish(here, 2, new)
    assert got(there, new.name) == [2]


@pytest.mark.parametrize("lost", ["queue", "binding", "exchange"])
def test_what_is_deleted_on_purpose_stays_deleted_also_in_a_store_that_was_emptied(
    here: kombu.Connection, there: kombu.Connection, server: Server, lost: str
) -> None:
    queue = queue_of(fresh("x"))
    publish(here, 1, queue)
    server.cli("FLUSHALL")
    publish(here, 2, queue)
    channel = there.default_channel
    if lost == "queue":
        channel.queue_delete(queue.name)
    elif lost == "binding":
        channel.queue_unbind(queue.name, queue.exchange.name, queue.routing_key)
    else:
        channel.exchange_delete(queue.exchange.name)
    if lost == "exchange":
        with pytest.raises(NotFound, match=queue.exchange.name):
            publish(here, 3, queue)
    else:
        publish(here, 3, queue)
    assert list(channel.list_bindings()) == []
    assert got(there, queue.name) == ([] if lost == "queue" else [2])


def cut_off_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The server is away when something is to be bound for the first time: the calls, counted."""
    stock, calls = moves.bind, list[int]()

    def bind(places: Places, exchange: str, queue: str, *args: Any) -> Any:
        if queue:
            calls.append(len(calls))
            if len(calls) == 1:
                raise Unavailable("cut off, for this test")
        return stock(places, exchange, queue, *args)

    monkeypatch.setattr(moves, "bind", bind)
    return calls


def test_what_this_process_has_unbound_is_not_bound_again(here: kombu.Connection, server: Server) -> None:
    queue, channel = queue_of(fresh("x")), here.default_channel
    publish(here, 1, queue)
    channel.queue_unbind(queue.name, queue.exchange.name, queue.routing_key)
    server.cli("FLUSHALL")
    send(here, 2, key=queue.name)
    channel.topology.own.revive([queue.name])
    assert channel.topology.terms(queue.name, fresh=True) is not None
    assert list(channel.list_bindings()) == []


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_a_publisher_that_is_cut_off_in_between_goes_on_with_the_next_publish(
    here: kombu.Connection, there: kombu.Connection, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = fresh("x")
    queues = [queue_of(exchange) for _ in range(3)]
    for queue in queues:
        publish(here, 1, queue)
    server.cli("FLUSHALL")
    calls = cut_off_once(monkeypatch)
    with pytest.raises(Unavailable, match="cut off"):
        send(here, 2, exchange, queues[0].name)
    for queue in queues:
        send(here, 3, exchange, queue.name)
    assert [got(there, queue.name) for queue in queues] == [[3], [3], [3]]
    assert len(calls) == 4, "what was done is not done again"


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_a_consumed_queue_that_was_declared_again_and_not_bound_is_bound_later(
    here: kombu.Connection, there: kombu.Connection, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = fresh("x")
    queue = queue_of(exchange, **{**BOX, "expires": 0.6})
    inbox = Inbox(here, queue, no_ack=True)
    calls = cut_off_once(monkeypatch)
    server.cli("FLUSHALL")
    eventually(lambda: server.cli("SCARD", P.bindings(exchange)), "it is bound again")
    assert len(calls) > 1
    send(there, 1, exchange, queue.name)
    assert inbox.wait(1) == [1]


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_a_binding_to_what_another_process_declares_waits_for_it_and_holds_nothing_up(
    here: kombu.Connection, there: kombu.Connection, server: Server
) -> None:
    mine, theirs = queue_of(fresh("x")), queue_of(fresh("x"))
    theirs(there.default_channel).declare()
    publish(here, 1, mine)
    here.default_channel.queue_bind(theirs.name, mine.exchange.name, "both")
    server.cli("FLUSHALL")
    publish(here, 2, mine)
    assert got(there, mine.name) == [2]
    publish(there, 3, theirs)

    def arrived() -> Any:
        send(here, 4, mine.exchange.name, "both")
        return got(there, theirs.name)[-1:] == [4]

    eventually(arrived, "it is bound")


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
@pytest.mark.parametrize("by_then", ["nothing is there", "the exchange is there"])
def test_a_queue_that_was_declared_before_can_be_bound_after(
    here: kombu.Connection, there: kombu.Connection, server: Server, by_then: str
) -> None:
    queue, channel = queue_of(fresh("x")), here.default_channel
    queue(channel).declare()
    server.cli("FLUSHALL")
    if by_then == "the exchange is there":
        there.default_channel.exchange_declare(queue.exchange.name, "topic", durable=True)
    channel.queue_bind(queue.name, queue.exchange.name, "another")
    send(there, 1, queue.exchange.name, "another")
    send(there, 2, queue.exchange.name, queue.name)
    assert sorted(got(there, queue.name)) == [1, 2]


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
@pytest.mark.parametrize("held_up", ["when it has seen that", "when it declares"])
def test_no_thread_publishes_before_another_one_has_declared_all(
    here: kombu.Connection, there: kombu.Connection, server: Server, monkeypatch: pytest.MonkeyPatch, held_up: str
) -> None:
    exchange = fresh("x")
    queues = [queue_of(exchange) for _ in range(5)]
    for queue in queues:
        publish(here, 1, queue)
    server.cli("FLUSHALL")
    place, name = (moves, "bind") if held_up == "when it declares" else (here.default_channel.topology.own, "_owe")
    stock, begun, go_on = getattr(place, name), threading.Event(), threading.Event()

    def hooked(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return stock(*args)

    monkeypatch.setattr(place, name, hooked)
    channels = [here.channel() for _ in queues]
    threads = [
        threading.Thread(target=kombu.Producer(channel).publish, args=(2, queue.name), kwargs={"exchange": exchange})
        for channel, queue in zip(channels, queues, strict=True)
    ]
    threads[0].start()
    assert begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    threads[-1].join(0.3)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert [got(there, queue.name) for queue in queues] == [[2]] * len(queues)


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
def test_a_publish_through_an_exchange_asks_the_store_no_more_for_it(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(topology, "FRESH", 600.0)
    queue = queue_of(fresh("x"), **options)
    queue(here.default_channel).declare()
    publish(here, 1, queue)
    store, asked = here.default_channel.broker.store, list[str]()
    for name in ("raw", "run"):
        stock = getattr(store, name)
        monkeypatch.setattr(store, name, lambda *args, stock=stock, name=name: asked.append(name) or stock(*args))
    publish(here, 2, queue)
    # the exchange's version, which mailboxes are stored by, and the enqueue
    assert asked == (["run"] if options else ["raw", "run"])


def test_a_process_forgets_the_queues_that_it_declared_and_that_have_ended(
    here: kombu.Connection, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lives for long declares one per client, or per connection that it lost, as a worker's gossip does."""
    clock = [time.monotonic()]
    for module in (topology, remembered):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    exchange, kept = kombu.Exchange(fresh("x"), "fanout"), queue_of(fresh("y"))
    kept(here.default_channel).declare()
    box = Inbox(here, kombu.Queue(fresh("box"), exchange, **BOX))
    for _ in range(5):
        for _ in range(remembered.MANY):
            with here.channel() as channel:
                queue = kombu.Queue(fresh("left"), exchange, **BOX)
                with kombu.Consumer(channel, [queue]):
                    pass
        clock[0] += BOX["expires"] + 1
    known = here.default_channel.topology
    assert len(known.own.queues) < 3 * remembered.MANY
    assert len(known._terms) < 3 * remembered.MANY
    there = {box.consumer.queues[0].name, kept.name}
    server.cli("FLUSHALL")
    assert known.terms(kept.name) is not None
    assert there == {name.decode() for name in server.cli("HKEYS", P.queues)}
    assert there == set(known.own.queues) == set(known.own.bindings)
    assert len(here.default_channel.attendance._last) < 2 * remembered.MANY
