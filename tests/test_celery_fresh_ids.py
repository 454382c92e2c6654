"""Ids that Celery has just made are told from those that somebody chose, or that were used before."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import celery
import pytest
from kombu import Connection, Exchange, Queue
from kombu.utils.uuid import uuid

from relay_adapters.celery.messages import freshids
from relay_core import Broker
from relay_core.job import FreshId
from relay_core.operations import serverclock
from tests.proxy import Proxy, to_port
from tests.servers import Server


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(serverclock, "LATELY", 60.0)  # however slow the machine is
    stock: Any = uuid
    before = stock.__defaults__
    freshids.install()
    yield
    stock.__defaults__ = before
    freshids._made.clear()


def test_an_id_is_fresh_once() -> None:
    id = celery.uuid()
    assert UUID(id).version == 4
    first, second = freshids.fresh(id), freshids.fresh(id)
    assert (type(first), type(second)) == (FreshId, str)
    assert first == second == id


def test_what_somebody_chose_is_none() -> None:
    assert type(freshids.fresh(str(uuid4()))) is str


def test_of_two_threads_one_has_a_fresh_one() -> None:
    for _ in range(50):
        id, found, both = uuid(), list[type](), threading.Barrier(2)

        def look(id: str = id, found: list[type] = found, both: threading.Barrier = both) -> None:
            both.wait()
            found.append(type(freshids.fresh(id)))

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found, key=str) == sorted([FreshId, str], key=str)


def test_what_a_parent_made_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    id = uuid()
    real = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: real + 1)  # as in a child, however it was forked
    assert type(freshids.fresh(id)) is str


def test_those_of_somebody_who_makes_ids_in_another_way_are_none() -> None:
    stock: Any = uuid
    same = UUID(int=7, version=4)
    stock.__defaults__ = (lambda: same,)
    freshids.install()
    assert uuid() == uuid() == str(same)
    assert type(freshids.fresh(uuid())) is str


def test_what_is_never_sent_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freshids, "MOST", 3)
    ids = [uuid() for _ in range(4)]
    assert len(freshids._made) == 1
    assert [type(freshids.fresh(id)) for id in ids] == [str, str, str, FreshId]


def test_installing_it_again_changes_nothing() -> None:
    stock: Any = uuid
    before = stock.__defaults__
    freshids.install()
    assert stock.__defaults__ == before


def test_they_are_remembered_from_the_first_connection_on(server: Server) -> None:
    stock: Any = uuid
    stock.__defaults__ = (uuid4,)
    assert type(freshids.fresh(uuid())) is str
    with Connection(server.url) as connection:
        assert connection.transport
        assert type(freshids.fresh(uuid())) is FreshId


@pytest.fixture
def app(server: Server) -> Iterator[celery.Celery]:
    made = celery.Celery("fresh", broker=server.url, set_as_current=False)
    yield made
    made.close()


def _transactions(server: Server) -> int:
    told = server.info("commandstats").get("cmdstat_exec", "calls=0,")
    return int(told.removeprefix("calls=").partition(",")[0])


def test_tasks_that_are_sent_one_after_the_other_take_no_script(app: celery.Celery, server: Server) -> None:
    results = [app.send_task("t", (n,)) for n in range(5)]
    assert _transactions(server) >= 3
    with Broker(server.url) as broker:
        jobs = broker.claim("celery", 10)
        assert [job.id for job in jobs] == [result.id for result in results]
        assert broker.ack_many(jobs) == [1] * 5
        assert broker.audit("celery").clean


def test_a_task_that_is_sent_again_by_its_id_is_another_one(app: celery.Celery, server: Server) -> None:
    for _ in range(3):
        app.send_task("t")
    id = uuid()
    for n in range(3):
        app.send_task("t", (n,), task_id=id)
    with Broker(server.url) as broker:
        assert [job.id for job in broker.claim("celery", 10)][3:] == [id, f"{id}~1", f"{id}~2"]


@pytest.mark.parametrize("also", [[], [b"EVALSHA"]], ids=["once", "twice"])
def test_a_publish_that_is_cut_off_and_repeated_is_one_task(also: list[bytes], redis_server: Server) -> None:
    with Proxy(to_port(redis_server.port)) as proxy, Broker(redis_server.url) as broker:
        options = {"retry_for": 0.0}
        app = celery.Celery("cut", broker=proxy.url, broker_transport_options=options, set_as_current=False)
        queue = f"fresh-cut-{len(also)}"
        for _ in range(3):
            app.send_task("t", queue=queue)
        assert broker.ack_many(broker.claim(queue, 9)) == [1] * 3
        for request in (b"HSETNX", *also):
            proxy.cut_reply(request)
        signature = app.signature("t", queue=queue)
        id = signature.freeze().id
        signature.apply_async(retry=True, retry_policy={"max_retries": 9, "interval_start": 0.0})
        assert not proxy.pending
        assert [job.id for job in broker.claim(queue, 9)] == [id]
        signature.apply_async()
        assert [job.id for job in broker.claim(queue, 9)] == [f"{id}~1"]
        app.close()


def test_a_message_to_several_queues_is_in_each(app: celery.Celery, server: Server) -> None:
    topic = Exchange("news", type="topic")
    app.conf.task_queues = [Queue(name, topic, routing_key="a.#") for name in ("left", "right")]
    with app.connection_for_write() as connection:
        for queue in app.conf.task_queues:
            queue(connection).declare()
    ids = [app.send_task("t", exchange=topic, routing_key="a.b").id for _ in range(4)]
    with Broker(server.url) as broker:
        for name in ("left", "right"):
            assert [job.id for job in broker.claim(name, 10)] == ids
            assert broker.audit(name).clean
