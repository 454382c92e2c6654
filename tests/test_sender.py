"""The sender: a command that is sent now, and whose reply is taken later, is carried out once, whatever happens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest

from relay_core import Broker, JobSpec
from relay_core.connection import Sender
from relay_core.errors import Unavailable
from tests.proxy import Proxy, to_port
from tests.servers import Server, eventually
from tests.topologies import Cluster


@pytest.fixture
def broker(redis_server: Server) -> Iterator[Broker]:
    with Broker(redis_server.url) as broker:
        yield broker


def begun(broker: Broker, sender: Sender, queue: str = "q", count: int = 2) -> Any:
    """A claim that was sent; calling it gives the jobs."""
    rest = broker.begin(broker.operations.finish(queue, (), (), count), sender)
    return lambda: [job.payload for job in rest()[2]]


def test_the_server_has_the_command_before_its_reply_is_taken(broker: Broker) -> None:
    broker.enqueue_many("q", [b"1", b"2", b"3", b"4"])
    sender = broker.store.sender()
    assert begun(broker, sender)() == [b"1", b"2"]  # the server has the script now
    take = begun(broker, sender)
    eventually(lambda: broker.stats("q").inflight == 4, "the claim to be carried out")
    eventually(sender.arrived, "its reply")
    assert take() == [b"3", b"4"]
    assert begun(broker, sender)() == []
    sender.close()


def test_a_server_that_does_not_know_the_script_is_given_it(redis_server: Server, broker: Broker) -> None:
    broker.enqueue("q", b"1")
    broker.claim("q")
    broker.enqueue("q", b"2")
    redis_server.cli("SCRIPT", "FLUSH")
    assert begun(broker, broker.store.sender())() == [b"2"]


def test_before_the_first_command_of_a_store_nothing_is_sent_ahead(redis_server: Server) -> None:
    with Broker(redis_server.url) as other, Broker(redis_server.url) as fresh:
        other.enqueue("q", b"1")
        sender = fresh.store.sender()
        take = begun(fresh, sender)  # what kind of server that is, is not known yet
        assert sender.arrived()
        assert not sender.sockets()
        assert take() == [b"1"]


def test_where_an_enqueue_has_to_be_confirmed_nothing_is_sent_ahead(redis_server: Server) -> None:
    with Broker(redis_server.url, durability="replica:1", durability_timeout=0.1) as broker:
        broker.stats("q")
        sender = broker.store.sender()
        broker.operations._registered.add("q")
        rest = broker.begin(broker.operations.enqueue("q", JobSpec(b"1")), sender)
        assert not sender.sockets()
        with pytest.raises(Exception, match="replicas confirmed"):
            rest()


@pytest.mark.parametrize("fault", ["cut_reply", "cut_request", "closed"])
def test_a_command_is_carried_out_once_though_its_connection_is_lost(redis_server: Server, fault: str) -> None:
    with Proxy(to_port(redis_server.port)) as proxy, Broker(proxy.url) as broker:
        broker.enqueue_many("q", [b"1", b"2", b"3"])
        sender = broker.store.sender()
        assert begun(broker, sender, count=1)() == [b"1"]
        if fault != "closed":
            getattr(proxy, fault)(b"EVALSHA")
        take = begun(broker, sender, count=1)
        if fault == "closed":
            sender.close()
        assert take() == [b"2"]
        assert broker.stats("q").inflight == 2
        assert begun(broker, sender)() == [b"3"]


def test_a_server_that_is_gone_is_told_of_when_the_reply_is_taken() -> None:
    with Server("valkey", tcp=True) as own, Broker(own.url, retry_for=0.3) as broker:
        broker.stats("q")
        sender = broker.store.sender()
        begun(broker, sender)()
        own.pause()
        take = begun(broker, sender)
        assert not sender.arrived()
        own.kill()
        eventually(sender.arrived, "the end of the connection to be noticed")
        with pytest.raises(Unavailable, match="may have been executed"):
            take()


def test_a_server_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the reply is a part of the time for which a command is repeated."""
    again: list[Any] = []
    with Server("valkey", tcp=True) as own, Broker(own.url, retry_for=1.0, socket_timeout=1.0) as broker:
        sender = broker.store.sender()
        broker.stats("q")
        begun(broker, sender)()
        own.pause()
        take = begun(broker, sender)
        monkeypatch.setattr(broker.store, "_exchange", lambda *args: again.append(args))
        with pytest.raises(Unavailable, match="may have been executed"):
            take()
        assert again == []
        own.resume()


def test_each_server_of_a_cluster_has_a_connection_of_its_own(cluster: Cluster) -> None:
    with Broker(cluster.url) as broker:
        queues = [f"q{n}" for n in range(12)]
        for queue in queues:
            broker.enqueue(queue, queue.encode())
        sender = broker.store.sender()
        for queue in queues:
            assert begun(broker, sender, queue)() == [queue.encode()]
        before = sender.sockets()
        assert (
            len(before)
            == len({at.port for at in broker.store.locate([broker.settings.keys(q).marker for q in queues]).values()})
            > 1
        )
        for queue in queues:
            assert begun(broker, sender, queue)() == []
        assert sender.sockets() == before
        sender.close()


def test_a_child_of_a_fork_leaves_the_reply_to_its_parent(broker: Broker) -> None:
    broker.enqueue_many("q", [b"1", b"2"])
    sender = broker.store.sender()
    begun(broker, sender, count=1)()
    take = begun(broker, sender, count=1)
    context = multiprocessing.get_context("fork")
    seen = context.SimpleQueue()
    child = context.Process(target=lambda: seen.put(len(sender.sockets())))
    child.start()
    child.join(30)
    assert seen.get() == 0
    assert take() == [b"2"]
