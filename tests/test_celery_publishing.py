"""What a publish stores, and how often: ids, re-sends, dedup, due times, batches, threads, forks."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
from celery import Celery
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError

from relay_adapters.celery import options
from relay_adapters.celery.holding import leases
from relay_adapters.celery.messages import envelope
from relay_adapters.celery.sending import upkeep
from relay_core import Broker
from relay_core.errors import InvalidArgument, Unavailable
from tests.aging import age_by
from tests.celery_client import app_of, broker, cut, flavour, server, store_of  # noqa: F401 (fixtures)
from tests.celery_workers import ROOT, client_of
from tests.servers import Near, Server
from tests.signals import handled_by


@pytest.fixture
def app(server: Server, tmp_path: Path) -> Iterator[Celery]:
    app = app_of(server.url, tmp_path)
    yield app
    app.close()


def stored(broker: Broker, queue: str = "celery") -> list[Any]:
    return [*broker.jobs(queue, "ready"), *broker.jobs(queue, "delayed")]


def test_a_body_lies_in_the_store_as_its_bytes_behind_one_line_of_headers(app: Celery, broker: Broker) -> None:
    result = app.send_task("pay", [1, "é"], {"to": "you"})
    (job,) = stored(broker)
    head, _, body = job.payload.partition(b"\n")
    assert json.loads(body)[:2] == [[1, "é"], {"to": "you"}]
    assert json.loads(head)["task"]["task"] == "pay"
    assert b"base64" not in job.payload
    assert job.id == result.id


def test_every_kind_of_body_arrives_as_it_was_sent(server: Server, broker: Broker) -> None:
    bodies: list[tuple[Any, dict[str, Any]]] = [
        ({"a": [1, None]}, {}),
        (b"\x00\n\xff", {"content_type": "application/data", "content_encoding": "binary"}),
        ("text\nof lines", {"content_type": "text/plain", "content_encoding": "utf-8"}),
        ({"big": "x" * 5000}, {"compression": "zlib"}),
        (datetime(2030, 1, 1, tzinfo=timezone.utc), {"headers": {"when": datetime(2030, 1, 2)}}),
    ]
    with Connection(server.url) as connection:
        queue = connection.SimpleQueue("bodies")
        for body, options in bodies:
            queue.put(body, **options)
        for body, options in bodies:
            message = queue.get(timeout=5)
            assert message.payload == body
            for name, value in options.get("headers", {}).items():
                assert message.headers[name] == value
            message.ack()
        queue.close()


def test_a_message_in_the_store_of_kombus_redis_transport_is_read_too() -> None:
    raw = {"body": "W1sxXSwge30sIG51bGxd", "content-type": "application/json", "content-encoding": "utf-8"}
    raw |= {"headers": {}, "properties": {"body_encoding": "base64", "delivery_tag": "t", "delivery_info": {}}}
    found = envelope.unpack(envelope.pack_stored(raw))
    assert found["body"] == b"[[1], {}, null]"
    assert found["properties"] == {"delivery_info": {}}


@pytest.mark.parametrize("there", ["redis", "relay"])
def test_what_was_consumed_elsewhere_is_published_as_it_is(server: Server, broker: Broker, there: str) -> None:
    """As `celery migrate` and shovels do, which pass the properties of the delivery on."""
    url = server.url if there == "relay" else f"redis://127.0.0.1:{server.port}/1"
    sent = ["YWJj", {"b": ["xxxx", 1]}, "text"]
    with Connection(url) as source, Connection(server.url) as target:
        with source.SimpleQueue("source") as queue:
            for body in sent:
                queue.put(body)
            for _ in sent:
                message = queue.get(timeout=5)
                body, content_type, encoding = message.body, message.content_type, message.content_encoding
                target.Producer(serializer=None).publish(
                    body, routing_key="target", content_type=content_type, content_encoding=encoding,
                    headers=message.headers, **message.properties,
                )  # fmt: skip
                message.ack()
        with target.SimpleQueue("target") as queue:
            assert [queue.get(timeout=5, block=True).payload for _ in sent] == sent


def test_a_task_id_that_is_used_again_while_its_task_waits_is_another_task(app: Celery, broker: Broker) -> None:
    for n in range(3):
        app.send_task("nightly", [n], task_id="nightly")
    assert {job.id for job in stored(broker)} == {"nightly", "nightly~1", "nightly~2"}


def test_however_many_tasks_of_one_id_wait_all_are_stored(app: Celery, broker: Broker) -> None:
    for n in range(15):
        app.send_task("pay", [n], task_id="t")
    found = [broker.plugins.describe(job) for job in stored(broker)]
    assert [summary.args for summary in found if summary is not None] == [f"[{n}]" for n in range(15)]


def test_a_publish_that_kombu_repeats_stores_one_task(app: Celery, broker: Broker) -> None:
    app.send_task("warm-up", queue="other")
    with cut(store_of(app), 2) as lost:
        result = app.send_task("pay", [1])
    assert lost == [0]
    assert [job.id for job in stored(broker)] == [result.id]


def test_a_repeated_publish_of_a_task_that_ran_in_between_stores_none(app: Celery, broker: Broker) -> None:
    app.send_task("warm-up", queue="other")
    store = store_of(app)
    with cut(store, 1):
        losing = store.run

        def ran_meanwhile(command: Any) -> Any:
            try:
                return losing(command)
            except Unavailable:
                broker.ack(*broker.claim("celery"))
                raise

        store.run = ran_meanwhile
        app.send_task("pay", [1])
    assert stored(broker) == []


@pytest.mark.parametrize("there", ["waits", "was done"])
@pytest.mark.parametrize("stored_at_first", [True, False])
def test_a_repeated_publish_of_an_id_that_was_used_long_before_is_stored_once(
    app: Celery, broker: Broker, there: str, stored_at_first: bool
) -> None:
    app.send_task("nightly", [1], task_id="nightly", queue="q")
    age_by(broker, "q", 3600)
    if there == "was done":
        broker.ack(*broker.claim("q"))
        age_by(broker, "q", 3600)
    with cut(store_of(app), 1, stored=stored_at_first) as lost:
        app.send_task("nightly", [2], task_id="nightly", queue="q")
    assert lost == [0]
    waiting = [job.id for job in stored(broker, "q")]
    assert waiting == (["nightly", "nightly~1"] if there == "waits" else ["nightly"])


def test_a_publish_that_was_surely_not_stored_is_another_task_of_its_id(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [1], task_id="x")
    with cut(store_of(app), 1, stored=False, known=True) as lost:
        app.send_task("pay", [2], task_id="x")
    assert lost == [0]
    assert [job.id for job in stored(broker)] == ["x", "x~1"]


@pytest.mark.since("celery", "5.7")
def test_a_publish_that_celery_repeats_by_itself_stores_one_task(app: Celery, broker: Broker) -> None:
    """As it does with what a worker sends after a task has ended, its links for one."""
    from celery.app.amqp import _callback_publish_retry

    app.send_task("warm-up", queue="other")
    token = _callback_publish_retry.set(True)
    try:
        with cut(store_of(app), 2) as lost:
            result = app.send_task("pay", [1])
    finally:
        _callback_publish_retry.reset(token)
    assert lost == [0]
    assert [job.id for job in stored(broker)] == [result.id]


def test_headers_that_several_messages_share_make_none_the_other(server: Server, broker: Broker) -> None:
    shared = {"tenant": "t"}
    options = {"client_name": f"test-{uuid.uuid4().hex}"}
    with Connection(server.url, transport_options=options) as connection:
        producer = connection.Producer()
        producer.publish("warm-up", routing_key="other")
        with cut(producer.channel.broker.store, 1), pytest.raises(Unavailable):
            producer.publish("one", routing_key="celery", headers=shared)
        producer.publish("two", routing_key="celery", headers=shared)
    assert len(stored(broker)) == 2


def test_headers_of_a_task_that_are_used_for_the_next_one_make_neither_the_other(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [0], task_id="z")
    headers = {"lang": "py", "task": "pay", "id": "a", "root_id": "a"}
    with app.producer_or_acquire() as producer:
        with cut(store_of(app), 1), pytest.raises(Unavailable):
            producer.publish([[1], {}, {}], routing_key="celery", exchange="", headers=headers)
        headers["id"] = headers["root_id"] = "b"
        producer.publish([[2], {}, {}], routing_key="celery", exchange="", headers=headers)
    assert [job.id for job in stored(broker)] == ["z", "a", "b"]


def test_a_header_of_another_broker_does_not_pass_for_a_repeated_publish(app: Celery, broker: Broker) -> None:
    """As a task has it that was sent on to Redis when relay was away, and is retried over relay."""
    app.send_task("pay", [1], task_id="one", headers={"relay_again": ["one", 16.4, "one"]})
    app.send_task("pay", [2], task_id="one", headers={"relay_again": ["one", 16.4, "one"]})
    assert [job.id for job in stored(broker)] == ["one", "one~1"]


def test_a_publish_that_fails_for_good_says_so_in_kombus_words(app: Celery, broker: Broker) -> None:
    app.send_task("warm-up", queue="other")
    with cut(store_of(app), 99), pytest.raises(OperationalError, match="cut"):
        app.send_task("pay", [1])


def test_a_dedup_key_stores_one_task_while_another_waits(app: Celery, broker: Broker) -> None:
    first = app.send_task("pay", [1], relay_dedup_key="order-1")
    app.send_task("pay", [2], relay_dedup_key="order-1")
    app.send_task("pay", [3], headers={"relay_dedup_key": "order-1"})
    app.send_task("pay", [4], relay_dedup_key="order-2", relay_dedup_for=60)
    app.send_task("pay", [5], relay_dedup_key="order-2", relay_dedup_for=60)
    jobs = stored(broker)
    assert len(jobs) == 2
    assert jobs[0].id == first.id
    broker.ack_many(broker.claim("celery", 2))
    app.send_task("pay", [6], relay_dedup_key="order-1")
    app.send_task("pay", [7], relay_dedup_key="order-2", relay_dedup_for=60)
    assert len(stored(broker)) == 1


def test_a_dedup_key_may_be_made_of_the_name_and_the_arguments(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [1], {"b": 2, "a": 1}, relay_dedup_key=True)
    app.send_task("pay", [1], {"a": 1, "b": 2}, relay_dedup_key=True)
    app.send_task("pay", [2], {"a": 1, "b": 2}, relay_dedup_key=True)
    app.send_task("bill", [1], {"a": 1, "b": 2}, relay_dedup_key=True)
    assert len(stored(broker)) == 3
    with pytest.raises(InvalidArgument, match=r"relay_dedup_key=True.*'pay'.*task_serializer='json'"):
        app.send_task("pay", [1], relay_dedup_key=True, serializer="pickle")


def test_a_dedup_key_of_a_message_that_is_no_task_has_to_be_its_own(server: Server, broker: Broker) -> None:
    with Connection(server.url) as connection, connection.SimpleQueue("celery") as queue:
        with pytest.raises(InvalidArgument, match=r"relay_dedup_key=True.* give a key of your own"):
            queue.put({"a": 1}, headers={"relay_dedup_key": True})
        for _ in range(2):
            queue.put({"a": 1}, headers={"relay_dedup_key": "k"})
    assert len(stored(broker)) == 1


@pytest.mark.parametrize("key", [None, False])
def test_a_dedup_key_may_be_none(app: Celery, broker: Broker, key: object) -> None:
    for _ in range(2):
        app.send_task("pay", relay_dedup_key=key, relay_dedup_for=60)
    assert len(stored(broker)) == 2


def test_the_retry_of_a_task_is_no_duplicate_of_it(app: Celery, broker: Broker) -> None:
    keyed = {"relay_dedup_key": "k", "relay_dedup_for": 60}
    app.send_task("pay", [1], task_id="t", headers=keyed)
    app.send_task("pay", [1], task_id="t", headers=keyed, retries=1)
    assert {job.id for job in stored(broker)} == {"t", "t.1"}


def test_a_priority_may_be_a_truth_value(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [1], priority=True)
    assert [job.priority for job in stored(broker)] == [1]


def test_an_eta_that_no_message_waits_for_is_refused_in_the_words_of_a_task(app: Celery, broker: Broker) -> None:
    with pytest.raises(InvalidArgument, match=r"the eta of task 'pay' \(.*\) is 30\.0 years away; .* 10 years at most"):
        app.send_task("pay", countdown=30 * 365 * 86_400)
    assert stored(broker) == []


@pytest.mark.parametrize("protocol", [1, 2])
def test_an_eta_waits_in_the_store_and_without_a_time_zone_is_utc_as_to_celerys_workers(
    server: Server, tmp_path: Path, protocol: int, near: Near
) -> None:
    options = {"client_name": f"protocol-{protocol}-{uuid.uuid4().hex}"}
    app = client_of(server.url, tmp_path, task_protocol=protocol, broker_transport_options=options)
    soon = datetime.now(timezone.utc) + timedelta(hours=1)
    app.send_task("pay", eta=soon, queue="aware")
    app.send_task("pay", eta=soon.replace(tzinfo=None), queue="naive")
    app.send_task("pay", countdown=-5, queue="past")
    app.send_task("pay", eta=soon, expires=60, queue="expiring")
    app.send_task("pay", eta=soon, expires=86_400, queue="later")
    with Broker(server.url) as broker:
        (job,) = broker.jobs("aware", "delayed")
        assert job.due_at == near(soon.timestamp())
        if protocol == 2:
            assert envelope.head_of(job.payload)["headers"]["eta"] == soon.isoformat()
            (expiring,) = broker.jobs("expiring", "delayed")
            assert expiring.due_at < soon.timestamp() - 3000
        (later,) = broker.jobs("later", "delayed")
        assert later.due_at == near(soon.timestamp())
        (naive,) = broker.jobs("naive", "delayed")
        assert naive.due_at == near(soon.timestamp())
        assert broker.stats("past").ready == 1
    app.close()


@pytest.mark.since("kombu", "5.7")
def test_a_batch_of_a_producer_is_stored_in_few_round_trips(app: Celery, server: Server, broker: Broker) -> None:
    app.send_task("warm-up", queue="celery")
    broker.purge("celery")
    server.cli("CONFIG", "RESETSTAT")
    with app.producer_or_acquire() as producer:
        assert producer.supports_batch_publish
        with producer.batch():
            for n in range(100):
                app.send_task("pay", [n], producer=producer)
            assert stored(broker) == []
    assert broker.stats("celery").ready == 100
    calls = server.info("commandstats")["cmdstat_evalsha"]
    assert int(calls.split(",")[0].removeprefix("calls=")) < 10


@pytest.mark.since("kombu", "5.7")
def test_what_a_full_batch_could_not_take_is_sent_again_and_stored_once(app: Celery, broker: Broker) -> None:
    store = store_of(app)
    with app.producer_or_acquire() as producer, producer.batch(max_size=3), cut(store, 1) as lost:
        for n in range(5):
            try:
                app.send_task("pay", [n], task_id=f"t{n}", producer=producer, retry=False)
            except OperationalError:
                app.send_task("pay", [n], task_id=f"t{n}", producer=producer, retry=False)
    assert lost == [0]
    assert [job.id for job in stored(broker)] == [f"t{n}" for n in range(5)]


@pytest.mark.since("kombu", "5.7")
def test_a_flush_that_is_interrupted_and_repeated_stores_each_once(app: Celery, broker: Broker) -> None:
    class Limit(Exception):
        """A soft time limit."""

    app.send_task("warm-up", queue="celery")
    store = store_of(app)
    run, left = store.run, [1]

    def struck(command: Any) -> Any:
        answer = run(command)
        if left:
            left.pop()
            raise Limit
        return answer

    with app.producer_or_acquire() as producer, producer.batch() as batch:
        for n in range(3):
            app.send_task("pay", [n], task_id=f"t{n}", producer=producer)
        store.run = struck
        with pytest.raises(Limit):
            batch.flush()
        batch.flush()
        store.run = run
    assert [job.id for job in stored(broker)][1:] == ["t0", "t1", "t2"]


@pytest.mark.since("kombu", "5.7")
def test_a_batch_that_raises_stores_nothing(app: Celery, broker: Broker) -> None:
    def broken() -> None:
        with app.producer_or_acquire() as producer, producer.batch():
            app.send_task("pay", [1], producer=producer)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        broken()
    assert stored(broker) == []


def test_many_threads_publish_through_one_app(app: Celery, broker: Broker) -> None:
    def publish(name: str) -> None:
        for n in range(50):
            app.send_task("pay", [name, n])

    threads = [threading.Thread(target=publish, args=(f"t{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broker.stats("celery").ready == 400


@pytest.mark.parametrize(("module", "made"), [(options, "Broker"), (upkeep, "Topology"), (leases, "Leases")])
def test_a_handler_of_signals_publishes_while_its_thread_makes_the_first_connection(
    server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch, module: Any, made: str
) -> None:
    """Of all that a process has once, both use the same."""
    ours: list[Any] = []

    def publish() -> None:
        with Connection(server.url, transport_options={"client_name": name}) as connection:
            connection.Producer().publish("x", routing_key="celery")
            channel = connection.default_channel
            ours.append((channel.broker, channel.attendance, channel.leases))

    name, make = f"test-{uuid.uuid4().hex}", getattr(module, made)
    with handled_by(publish) as ring:

        def ringing(*args: Any, **given: Any) -> Any:
            ring()
            return make(*args, **given)

        monkeypatch.setattr(module, made, ringing)
        publish()
    assert broker.stats("celery").ready == 2
    assert ours[0] == ours[1]


def test_a_handler_of_signals_connects_while_its_thread_takes_a_message(
    server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program does that sends a task where Celery tells it that its worker stops."""

    def publish() -> None:
        with Connection(server.url) as connection:
            connection.Producer().publish("x", routing_key="other")

    with Connection(server.url) as connection, handled_by(publish) as ring:
        channel = connection.default_channel
        Queue("celery", channel=channel).declare()
        for _ in range(2):
            connection.Producer().publish("x", routing_key="celery")
        assert channel.basic_get("celery") is not None
        row = channel.leases.rows[False]
        sure = row.sure

        def ringing(until: float) -> None:
            ring()
            sure(until)

        monkeypatch.setattr(row, "sure", ringing)
        row.until += 60  # the next message is taken for one whose lease ends sooner
        assert channel.basic_get("celery") is not None
    assert broker.stats("other").ready == 1


def test_children_of_a_fork_publish_on_connections_of_their_own(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [0])
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=lambda n=n: [app.send_task("pay", [n, i]) for i in range(20)]) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    app.send_task("pay", [1])
    assert broker.stats("celery").ready == 82


def test_tools_read_a_task_without_its_body(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [1, "secret"], {"a": 2}, argsrepr="(1, '***')", countdown=60, retries=2, serializer="pickle")
    (job,) = stored(broker)
    summary = broker.plugins.describe(job)
    assert summary is not None
    assert (summary.name, summary.args, summary.kwargs, summary.retries) == ("pay", "(1, '***')", "{'a': 2}", 2)
    assert summary.eta is not None
    assert summary.extra["root_id"] == summary.extra["id"]


def test_a_rejected_message_is_redelivered_and_acks_work_from_any_thread(server: Server, broker: Broker) -> None:
    with Connection(server.url) as connection:
        channel = connection.channel()
        Queue("plain", channel=channel).declare()
        with connection.Producer(channel) as producer:
            producer.publish({"n": 1}, routing_key="plain")
        message = channel.basic_get("plain")
        assert message.delivery_info["redelivered"] is False
        message.requeue()
        again = channel.basic_get("plain")
        assert again.payload == {"n": 1}
        assert again.delivery_info["redelivered"] is True
        thread = threading.Thread(target=again.ack)
        thread.start()
        thread.join()
        assert broker.stats("plain").inflight == 0


def test_a_channel_that_closes_hands_back_what_was_not_acked(server: Server, broker: Broker) -> None:
    with Connection(server.url) as connection:
        channel = connection.channel()
        Queue("plain", channel=channel).declare()
        connection.Producer(channel).publish("x", routing_key="plain")
        message = channel.basic_get("plain")
        assert broker.stats("plain").inflight == 1
        channel.close()
        (job,) = broker.jobs("plain", "ready")
        assert job.deliveries == 0
        message.channel.leases.pop(message.delivery_tag)


def test_a_message_that_is_none_goes_to_dead_and_the_rest_arrives(server: Server, broker: Broker) -> None:
    broker.enqueue("odd", b"no message")
    with Connection(server.url) as connection:
        channel = connection.channel()
        Queue("odd", channel=channel).declare()
        connection.Producer(channel).publish("fine", routing_key="odd")
        found: list[Any] = []
        consumer = connection.Consumer([Queue("odd")], channel=channel, callbacks=[lambda body, m: found.append(body)])
        with consumer:
            connection.drain_events(timeout=5)
    assert found == ["fine"]
    assert [job.reason for job in broker.dead("odd")] == ["undecodable"]


def test_a_queue_is_declared_once_per_connection_and_copied_no_more(
    server: Server, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    for name in ("bind", "declare"):
        stock = getattr(Queue, name)

        def noted(queue: Queue, *args: Any, name: str = name, stock: Any = stock, **options: Any) -> Any:
            asked.append((name, queue.name))
            return stock(queue, *args, **options)

        monkeypatch.setattr(Queue, name, noted)
    plain, passing = Queue("plain"), Queue("passing", auto_delete=True)

    def publish(connection: Connection, queue: Queue) -> list[str]:
        asked.clear()
        producer = connection.Producer()
        producer.publish(1, routing_key=queue.name, declare=[queue], retry=True)
        return [name for name, _queue in asked]

    with Connection(server.url, transport_options={"client_name": uuid.uuid4().hex}) as connection:
        assert "declare" in publish(connection, plain)
        assert publish(connection, plain) == []
        connection.close()
        connection.connect()
        assert "declare" in publish(connection, plain)
        assert ["declare" in publish(connection, passing) for _ in range(2)] == [True, True]
        # kombu remembers names alone, and asks about this kind each time
        assert "declare" in publish(connection, Queue("plain", auto_delete=True))
    with Connection("memory://") as other:
        assert [bool(publish(other, plain)) for _ in range(2)] == [True, True]  # kombu's own way


def test_a_producer_of_the_pool_keeps_its_exchange_whatever_connection_it_gets(
    server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Any] = []
    stock = Exchange.bind
    monkeypatch.setattr(Exchange, "bind", lambda self, channel: copied.append(self) or stock(self, channel))

    def published(pool: Any, text: str) -> Any:
        with pool.acquire(block=True) as producer:
            producer.publish(text, routing_key="kept")
            assert producer.exchange.channel is producer.channel is producer.connection.default_channel
            return producer.exchange

    with Connection(server.url, transport_options={"client_name": uuid.uuid4().hex}) as connection:
        pool = connection.Pool(2)
        producers = kombu.pools.ProducerPool(pool, limit=1)
        Queue("kept")(connection.default_channel).declare()
        first = published(producers, "one")
        copied.clear()
        with pool.acquire(block=True) as taken:
            assert published(producers, "two") is first
            other = first.channel.connection.client
        assert published(producers, "three") is first
        assert other is not taken
        assert copied == []
        # one that a user has bound is the user's, and stays as it is
        own = Exchange("own", type="direct")(connection.default_channel)
        producer = connection.Producer(exchange=own)
        with pool.acquire(block=True) as another:
            producer.revive(another)
            assert producer.exchange is not own
            assert (own.channel, producer.exchange.channel) == (connection.default_channel, another.default_channel)
            producer.exchange = Exchange("another", type="direct")
            producer.revive(connection)
            assert (producer.exchange.name, producer.exchange.channel) == ("another", connection.default_channel)
        pool.force_close_all()
    assert [envelope.unpack(job.payload)["body"] for job in stored(broker, "kept")] == [b"one", b"two", b"three"]


def test_a_producer_of_another_transport_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Connection("memory://") as connection:
        producer = connection.Producer()
        before = producer.exchange
        producer.revive(connection)
        assert producer.exchange is not before
        assert not [name for name in vars(producer) if name.startswith("relay")]


def test_who_has_loaded_the_transport_loads_nothing_of_relay_when_sending(server: Server) -> None:
    """A program that forks for each batch, as Airflow's scheduler does, loads it once; its children send at once."""
    script = (
        "import sys, celery, relay_adapters.celery.transport\n"
        "before = set(sys.modules)\n"
        "celery.Celery(broker=sys.argv[1], set_as_current=False).send_task('add', (1, 2))\n"
        "ours = ('relay_core', 'relay_adapters.celery')\n"
        "print(*(name for name in set(sys.modules) - before if name.startswith(ours)))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, server.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == ([], "")
