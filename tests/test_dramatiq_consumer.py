"""RelayConsumer by hand: what it holds, who may settle it, and what happens to what is left."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq.broker import MessageProxy

import relay_core
from relay_adapters.dramatiq import RelayBroker
from relay_adapters.dramatiq.message import RelayMessage
from relay_core.job import Options, StoredJob
from relay_core.operations import Settings
from tests.servers import Server, eventually


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = RelayBroker(url=server.url, lease=0.6)
    dramatiq.set_broker(broker)
    broker.declare_queue("default")
    yield broker
    broker.close()


def send(broker: RelayBroker, count: int) -> list[Any]:
    return [broker.enqueue(dramatiq.Message("default", "any", (x,), {}, {})) for x in range(count)]


def taken(consumer: Any) -> RelayMessage:
    message = next(consumer)
    assert isinstance(message, RelayMessage)
    return message


def inflight(broker: RelayBroker) -> int:
    return broker.core.stats("default").inflight


def test_a_consumer_holds_no_more_than_its_prefetch(broker: RelayBroker) -> None:
    send(broker, 10)
    consumer = broker.consume("default", prefetch=3, timeout=50)
    held = [taken(consumer) for _ in range(3)]
    assert next(consumer) is None
    assert inflight(broker) == 3
    consumer.ack(held[0])
    assert taken(consumer).args == (3,)
    consumer.close()


def test_next_returns_within_its_timeout_when_there_is_nothing(broker: RelayBroker) -> None:
    consumer = broker.consume("default", timeout=200)

    def waited() -> float:
        started = time.monotonic()
        assert next(consumer) is None
        return time.monotonic() - started

    assert waited() > 0.15
    eventually(lambda: waited() < 0.6, "a moment in which the machine is not busy")
    consumer.close()


def test_a_waiting_consumer_gets_a_new_message_at_once(broker: RelayBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "max_block", 3600.0)  # no look in passing shall find it
    consumer = broker.consume("default", timeout=3_600_000)
    timer = threading.Timer(0.2, send, (broker, 1))
    timer.start()
    assert next(consumer) is not None
    timer.join()
    consumer.close()


def test_a_full_consumer_gets_its_next_message_as_soon_as_one_is_acked(broker: RelayBroker) -> None:
    send(broker, 2)
    consumer = broker.consume("default", prefetch=1, timeout=3_600_000)
    first = taken(consumer)
    timer = threading.Timer(0.2, consumer.ack, (first,))
    timer.start()
    assert taken(consumer).args == (1,)
    timer.join()
    consumer.close()


def test_one_wake_up_starts_all_who_wait_while_work_remains(
    broker: RelayBroker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "max_block", 3600.0)  # nobody finds out by a look in passing
    brokers = [RelayBroker(url=server.url, lease=15) for _ in range(3)]
    got: list[int] = []

    def wait(own: RelayBroker) -> None:
        own.declare_queue("default")
        consumer = own.consume("default", prefetch=1, timeout=3_600_000)
        message = taken(consumer)
        got.append(message.args[0])
        consumer.ack(message)
        consumer.close()

    threads = [threading.Thread(target=wait, args=(own,), daemon=True) for own in brokers]
    for thread in threads:
        thread.start()
    eventually(lambda: int(server.info("clients")["blocked_clients"]) == 3, "all three wait for a wake-up")
    payloads = [dramatiq.Message("default", "any", (x,), {}, {}).encode() for x in range(3)]
    broker.core.enqueue_many("default", payloads)
    for thread in threads:
        thread.join(60)
    assert sorted(got) == [0, 1, 2]
    for own in brokers:
        own.close()


def test_messages_and_delivered_messages_are_enqueued_from_many_threads(broker: RelayBroker) -> None:
    send(broker, 1)
    consumer = broker.consume("default", prefetch=50)
    proxy = taken(consumer)

    def enqueue() -> None:
        for _ in range(5):
            broker.enqueue(proxy)  # type: ignore[arg-type]
            broker.enqueue(proxy._message)

    threads = [threading.Thread(target=enqueue) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broker.get_queue_message_counts("default") == (40, 0, 0)
    consumer.ack(proxy)
    assert len({job.id for job in broker.core.jobs("default", "ready")}) == 40
    consumer.close()


def test_an_ack_reaches_the_store_although_nobody_asks_for_more(broker: RelayBroker) -> None:
    send(broker, 1)
    consumer = broker.consume("default", prefetch=2)
    consumer.ack(taken(consumer))
    assert inflight(broker) == 0
    assert broker.core.stats("default").counters["processed"] == 1
    consumer.close()


def test_messages_are_acked_from_many_threads_and_through_another_consumer(broker: RelayBroker) -> None:
    send(broker, 64)
    consumer, other = broker.consume("default", prefetch=64), broker.consume("default")
    held = [taken(consumer) for _ in range(64)]

    def ack(part: list[RelayMessage]) -> None:
        for message in part:
            other.ack(message)

    threads = [threading.Thread(target=ack, args=(held[n::8],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: inflight(broker) == 0, "all acks arrive")
    assert broker.core.stats("default").counters["processed"] == 64
    assert next(broker.consume("default", timeout=10)) is None
    consumer.close()
    other.close()


def test_closing_hands_back_the_buffer_in_order_and_uncounted_and_keeps_what_was_given_out(
    broker: RelayBroker,
) -> None:
    send(broker, 5)
    consumer = broker.consume("default", prefetch=5)
    first = taken(consumer)
    assert inflight(broker) == 5
    consumer.close()
    assert inflight(broker) == 1
    assert [message.args[0] for message in ready(broker)] == [1, 2, 3, 4]
    consumer.ack(first)
    assert inflight(broker) == 0
    successor = broker.consume("default", prefetch=5)
    assert taken(successor).lease.job.deliveries == 1
    successor.close()


def ready(broker: RelayBroker) -> list[dramatiq.Message[Any]]:
    return [dramatiq.Message.decode(job.payload) for job in broker.core.jobs("default", "ready")]


def test_what_a_closed_consumer_left_running_takes_slots_of_its_successor(broker: RelayBroker) -> None:
    send(broker, 5)
    consumer = broker.consume("default", prefetch=2)
    held = [taken(consumer), taken(consumer)]
    consumer.close()
    successor = broker.consume("default", prefetch=2, timeout=50)
    assert next(successor) is None
    successor.ack(held.pop())
    assert next(successor) is not None
    successor.close()


def test_requeue_hands_back_what_was_not_started(broker: RelayBroker) -> None:
    send(broker, 2)
    consumer = broker.consume("default", prefetch=2)
    consumer.requeue([taken(consumer), taken(consumer)])
    assert (inflight(broker), len(ready(broker))) == (0, 2)
    assert taken(consumer).lease.job.deliveries == 1
    consumer.close()


def test_heartbeats_keep_buffered_and_running_messages_for_as_long_as_it_takes(server: Server) -> None:
    lease = 2.0  # so that a machine that stands still for a second costs none
    broker = RelayBroker(url=server.url, lease=lease)
    broker.declare_queue("default")
    send(broker, 3)
    consumer = broker.consume("default", prefetch=3)
    held = taken(consumer)
    with relay_core.Broker(server.url) as rival:
        assert not rival.claim("default", 3, wait=2.5 * lease)
    assert held.lease.holds()
    consumer.close()
    broker.close()


def test_a_message_that_nobody_holds_any_more_comes_back_after_its_lease(broker: RelayBroker, server: Server) -> None:
    send(broker, 1)
    consumer = broker.consume("default")
    assert taken(consumer) is not None
    gc.collect()
    with relay_core.Broker(server.url) as rival:
        assert len(rival.claim("default", 1, wait=5.0)) == 1
    consumer.close()


def test_an_ack_of_a_lost_lease_changes_nothing_and_raises_nothing(
    broker: RelayBroker, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    send(broker, 1)
    consumer = broker.consume("default")
    message = taken(consumer)
    owners = broker.core.settings.keys("default").owners
    server.cli("HSET", owners, message.lease.job.id, "2:99:other 0 h")
    consumer.ack(message)
    consumer.nack(message)
    assert inflight(broker) == 1
    assert "after its lease was lost" in caplog.text
    consumer.close()


def test_settling_twice_counts_once(broker: RelayBroker) -> None:
    send(broker, 2)
    consumer = broker.consume("default", prefetch=2)
    one, two = taken(consumer), taken(consumer)
    consumer.ack(one)
    consumer.ack(one)
    consumer.nack(one)
    consumer.nack(two)
    consumer.nack(two)
    consumer.ack(two)
    counters = broker.core.stats("default").counters
    assert (counters["processed"], counters["dead"]) == (1, 1)
    consumer.close()


def test_a_message_of_another_broker_is_left_alone(broker: RelayBroker) -> None:
    consumer = broker.consume("default")
    strange = MessageProxy(dramatiq.Message("default", "any", (), {}, {}))
    consumer.ack(strange)
    consumer.nack(strange)
    consumer.requeue([strange])
    consumer.close()


def test_acks_that_could_not_be_sent_are_sent_when_the_store_is_back(server: Server) -> None:
    broker = RelayBroker(url=server.url, lease=5, socket_timeout=1.0, retry_for=0.1)
    broker.declare_queue("default")
    send(broker, 1)
    consumer = broker.consume("default")
    message = taken(consumer)
    server.pause()
    with pytest.raises(dramatiq.errors.ConnectionClosed):
        consumer.ack(message)
    server.resume()
    consumer.ack(message)  # as Dramatiq does
    assert inflight(broker) == 0
    broker.close()


def job_of(payload: bytes, headers: dict[str, str]) -> StoredJob:
    return StoredJob("id", "q", "ready", payload, 0.0, 0, options=Options(headers=headers))


def test_a_job_is_described_from_its_json_and_only_if_it_is_dramatiqs() -> None:
    describe = relay_core.Broker("relay://127.0.0.1:1/0").plugins.describe
    options = {"retries": 2, "eta": 1_700_000_000_000}
    payload = dramatiq.Message("q", "mail", (1, "x"), {"to": "you"}, options).encode()
    ours = {"relay_adapter": "dramatiq"}
    summary = describe(job_of(payload, ours))
    assert summary is not None
    assert (summary.name, summary.args, summary.kwargs, summary.retries) == ("mail", "1, 'x'", "to='you'", 2)
    assert summary.eta == "2023-11-14T22:13:20+00:00"
    assert describe(job_of(payload, {})) is None
    for spoiled in (b"\x80\x04pickle", b"[]", b'{"options": null}', b'{"options": {}}'):
        summary = describe(job_of(spoiled, ours))
        assert summary is not None
        assert "not JSON" in summary.name


def test_the_plugin_that_every_broker_loads_imports_no_dramatiq() -> None:
    code = "import sys, relay_core; b = relay_core.Broker('relay://127.0.0.1:1/0'); "
    code += "assert 'dramatiq' in b.plugins.adapters; assert 'dramatiq' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_relay_broker_has_no_call_and_refuses_unknown_options() -> None:
    assert not callable(RelayBroker(url="relay://127.0.0.1:1/0"))
    with pytest.raises(TypeError, match="heartbeat_timeout"):
        RelayBroker(url="relay://127.0.0.1:1/0", heartbeat_timeout=1)
