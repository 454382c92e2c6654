"""What a queue is declared to be on relay: its arguments, each honoured or refused by name; priorities, time limits,
lengths, dead letters, and queues that end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from functools import partial
from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from amqp.exceptions import PreconditionFailed
from kombu.common import itermessages

from relay_adapters.celery.queues import topology
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.sending import routing, upkeep
from relay_adapters.celery.sending.upkeep import attendance_of
from relay_core import Broker
from relay_core.errors import Unavailable
from relay_core.job import Arrival
from relay_core.testing.times import advance
from tests.aging import age_by
from tests.celery_links import BOX, Inbox, fresh, got, link, send
from tests.servers import Server, eventually


@pytest.fixture(params=["redis"])
def flavour(request: pytest.FixtureRequest) -> Any:
    """One server: what the scripts do on either is tested with the exchanges."""
    return request.param


@pytest.fixture
def here(server: Server) -> Iterator[kombu.Connection]:
    with link(server.url, retry={"base": 0.05, "jitter": False}) as connection:
        yield connection


def queue(connection: kombu.Connection, **options: Any) -> str:
    """A new queue: options of kombu.Queue, or its arguments by `x_…`."""
    name = fresh("q")
    arguments = {key.replace("_", "-"): options.pop(key) for key in list(options) if key.startswith("x_")}
    kombu.Queue(name, queue_arguments=arguments, **options)(connection.default_channel).declare()
    return name


def headers_of(connection: kombu.Connection, name: str) -> dict[str, Any]:
    message = connection.default_channel.basic_get(name, no_ack=True)
    assert message is not None
    return dict(message.headers)


# arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x-max-length-bytes", 1000), ("x-single-active-consumer", True), ("x-overflow", "reject-publish"),
        ("x-queue-type", "stream"), ("x-no-such-thing", 1), ("x-max-priority", 256), ("x-max-priority", "9"),
        ("x-expires", 0), ("x-message-ttl", -1), ("x-message-ttl", True), ("x-dead-letter-exchange", 1),
        ("x-dead-letter-routing-key", "alone"),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_honoured_is_refused_by_its_name(
    here: kombu.Connection, argument: str, value: Any
) -> None:
    name = fresh("q")
    with pytest.raises(PreconditionFailed, match=f"{name}.*{argument}") as caught:
        here.default_channel.queue_declare(name, arguments={argument: value})
    assert caught.value.code == 406
    assert isinstance(caught.value, here.channel_errors)


def test_arguments_that_only_say_where_rabbitmq_keeps_a_queue_are_let_pass(here: kombu.Connection) -> None:
    name = queue(here, x_queue_type="quorum", x_queue_mode="lazy", x_overflow="drop-head", other=None)
    send(here, 1, key=name)
    assert got(here, name) == [1]


def test_a_declaration_that_names_another_value_is_refused_and_one_that_names_none_is_not(
    here: kombu.Connection, server: Server
) -> None:
    name = queue(here, max_priority=5)
    with link(server.url) as there:
        kombu.Queue(name)(there.default_channel).declare()
        kombu.Queue(name, message_ttl=60)(there.default_channel).declare()
        with pytest.raises(PreconditionFailed, match=r"x-max-priority.*received 9 but current is 5"):
            kombu.Queue(name, max_priority=9)(there.default_channel).declare()
        with pytest.raises(PreconditionFailed, match=r"x-message-ttl.*received 1000 but current is 60000"):
            kombu.Queue(name, message_ttl=1)(here.default_channel).declare()
        kombu.Queue(name, max_priority=5, message_ttl=60)(there.default_channel).declare()
    box = queue(here, **BOX)
    with pytest.raises(PreconditionFailed, match="another kind"):
        kombu.Queue(box, max_priority=3)(here.default_channel).declare()


def test_what_is_known_of_a_queue_survives_the_way_through_the_store() -> None:
    full = Terms(1, 2, 3, 4, "x", "k", 5, True, False)
    assert Terms.from_json(full.to_json()) == full
    assert Terms().to_json() == "{}"
    assert Terms.from_json('{"ttl":5,"newer":1}') == Terms(ttl=5)
    assert Terms(expires=1, ttl=1, auto_delete=True, durable=False).mailbox
    for change in ({"durable": True}, {"auto_delete": False}, {"ttl": None}, {"expires": None}, {"max_priority": 1}):
        fields = {"expires": 1, "ttl": 1, "auto_delete": True, "durable": False, **change}
        assert not Terms(**fields).mailbox  # type: ignore[arg-type]


# priorities


@pytest.mark.parametrize(
    ("most", "given", "level"),
    [
        (None, 0, 0), (None, 9, 9), (None, 200, 9), (None, -3, 0), (5, 5, 5), (5, 9, 5), (10, 10, 9), (10, 3, 2),
        (255, 0, 0), (255, 255, 9), (255, 128, 4), (255, 28, 0), (255, 29, 1),
    ],
)  # fmt: skip
def test_priorities_of_0_to_255_are_mapped_onto_ten_levels(most: int | None, given: int, level: int) -> None:
    assert Terms(max_priority=most).level(given) == level


@pytest.mark.parametrize(("order", "first"), [("amqp", [9, 5, 0]), ("redis", [0, 5, 9])])
def test_priorities_within_a_queue_are_in_the_order_that_the_option_names(
    server: Server, order: str, first: list[int]
) -> None:
    with link(server.url, priority_order=order) as connection:
        name = queue(connection, max_priority=9)
        for priority in (5, 0, 9):
            send(connection, priority, key=name, priority=priority)
        assert got(connection, name) == first


# time limits


def test_an_expired_message_is_not_delivered_and_others_behind_it_are(here: kombu.Connection, broker: Broker) -> None:
    name, short = queue(here), queue(here, message_ttl=60)
    send(here, "late", key=name, expiration=60)
    send(here, "none", key=name)
    send(here, "late", key=short)
    for one in (name, short):
        age_by(broker, one, 100)
    send(here, "soon", key=short, expiration=90)
    assert got(here, name) == ["none"]
    assert got(here, short) == ["soon"]


def test_an_expired_task_is_delivered_as_expired_so_that_its_worker_revokes_it(
    here: kombu.Connection, broker: Broker
) -> None:
    name = queue(here, message_ttl=60)
    send(here, 1, key=name, headers={"task": "t", "id": "1", "lang": "py"})
    age_by(broker, name, 100)
    assert headers_of(here, name)["expires"].startswith("1970")
    send(here, 1, key=name, headers={"task": "t", "id": "2", "lang": "py"})
    assert "expires" not in headers_of(here, name)


def test_an_expired_task_of_protocol_1_is_delivered_as_expired_too(here: kombu.Connection, broker: Broker) -> None:
    name = queue(here, message_ttl=60)
    send(here, {"task": "t", "id": "1", "args": [], "kwargs": {}, "eta": None, "expires": None}, key=name)
    age_by(broker, name, 100)
    message = here.default_channel.basic_get(name, no_ack=True)
    assert message.payload["expires"].startswith("1970")
    assert message.payload["id"] == "1"


@pytest.mark.parametrize("protocol", [1, 2])
def test_an_expired_task_keeps_its_own_time_where_that_is_over_too(
    here: kombu.Connection, broker: Broker, protocol: int
) -> None:
    """What is connected to `task_revoked` sees when it expired."""
    name = queue(here, message_ttl=60)
    over, ahead = (datetime.now(timezone.utc) + timedelta(hours=hours) for hours in (-1, 1))
    for id, expires in (("1", over), ("2", ahead)):
        head = {"task": "t", "id": id, "lang": "py", "eta": None, "expires": expires.isoformat()}
        if protocol == 1:
            send(here, {**head, "args": [], "kwargs": {}}, key=name)
        else:
            send(here, 1, key=name, headers=head)
    age_by(broker, name, 100)
    told = []
    for _ in range(2):
        message = here.default_channel.basic_get(name, no_ack=True)
        told.append((message.payload if protocol == 1 else message.headers)["expires"])
    assert told == [over.isoformat(), "1970-01-01T00:00:00+00:00"]


def test_a_time_limit_counts_from_when_a_task_is_due(here: kombu.Connection, broker: Broker) -> None:
    name = queue(here, message_ttl=60)
    due = time.time() + 100.6
    eta = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(due)) + f".{int(due % 1 * 1e6):06}+00:00"
    send(here, 1, key=name, headers={"task": "t", "id": "1", "eta": eta})
    age_by(broker, name, 100)  # since its publish its time is over
    advance(broker, 100, name)
    inbox = Inbox(here, kombu.Queue(name, message_ttl=60), no_ack=True)
    inbox.wait(1)
    assert "expires" not in inbox.messages[0].headers


def waited(broker: Broker, name: str, seconds: int) -> None:
    """So long ago everything was sent that is in a queue, which holds delayed messages alone, and so much is over."""
    age_by(broker, name, seconds)
    advance(broker, seconds, name)
    broker.promote(name)


def send_due(here: kombu.Connection, key: str, seconds: float, skew: float, ago: float = 0.0) -> None:
    """A task that waits, sent so long ago by a client whose clock is wrong by `skew` seconds."""
    right = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: right() - ago + skew)
        eta = datetime.fromtimestamp(time.time() + seconds, timezone.utc).isoformat()
        send(here, 1, key=key, headers={"task": "t", "id": "1", "lang": "py", "eta": eta})


@pytest.mark.parametrize("skew", [-86_400.0, 50.0, 86_400.0])
def test_a_time_limit_counts_by_the_server_s_clock_whatever_that_of_the_client_says(
    here: kombu.Connection, broker: Broker, skew: float
) -> None:
    name = queue(here, message_ttl=60)
    for seconds, over in ((3600, False), (3700, True)):
        send_due(here, name, 3600, skew, ago=seconds)
        waited(broker, name, seconds)
        assert ("expires" in headers_of(here, name)) == over


def test_the_time_limit_of_a_task_that_was_taken_over_counts_from_when_it_is_due(
    here: kombu.Connection, broker: Broker
) -> None:
    name, now = queue(here, message_ttl=60), time.time()
    send_due(here, name, 3600, skew=0.0, ago=3600)
    (job,) = broker.jobs(name, "delayed")
    broker.purge(name)
    broker.adopt([Arrival(name, "moved", job.payload, "delayed", at=now - 1, created_at=now - 3600)])
    assert "expires" not in headers_of(here, name)


# dead letters


def dead_letter_queue(here: kombu.Connection, key: str = "#") -> tuple[str, str]:
    """An exchange for dead letters, and the queue that gets them."""
    exchange = fresh("dead")
    here.default_channel.exchange_declare(exchange, "topic")
    name = queue(here)
    here.default_channel.queue_bind(name, exchange, key)
    return exchange, name


def test_a_rejected_message_goes_to_the_dead_letter_exchange_with_its_history(
    here: kombu.Connection, broker: Broker
) -> None:
    exchange, dead = dead_letter_queue(here, "by.this")
    name = queue(here, x_dead_letter_exchange=exchange, x_dead_letter_routing_key="by.this")
    send(here, {"n": 1}, key=name, headers={"mine": 1}, priority=7)
    message = here.default_channel.basic_get(name)
    message.reject()
    assert broker.stats(name).pending == broker.stats(name).dead == 0
    (stored,) = broker.jobs(dead, "ready")
    assert stored.priority == 7
    letter = here.default_channel.basic_get(dead)
    assert letter.payload == {"n": 1}
    assert letter.delivery_info["exchange"] == exchange
    assert letter.delivery_info["routing_key"] == "by.this"
    (death,) = letter.headers["x-death"]
    assert (death["queue"], death["reason"], death["count"], death["exchange"], death["routing-keys"]) == (
        name, "rejected", 1, "", [name],
    )  # fmt: skip
    assert letter.headers["mine"] == 1
    assert letter.headers["x-first-death-queue"] == name


def test_a_message_that_dies_again_in_the_same_queue_is_counted(here: kombu.Connection) -> None:
    name = queue(here, x_dead_letter_exchange="")
    send(here, 1, key=name)
    for _ in range(3):
        here.default_channel.basic_get(name).reject()
    assert [death["count"] for death in headers_of(here, name)["x-death"]] == [3]


def test_a_dead_letter_is_no_duplicate_of_itself(here: kombu.Connection) -> None:
    """Each queue remembers the key of what it held, and a letter may come back to one by a delay queue."""
    name = queue(here, x_dead_letter_exchange="")
    send(here, 1, key=name, headers={"relay_dedup_key": "k", "relay_dedup_for": 60})
    for _ in range(2):
        here.default_channel.basic_get(name).reject()
    assert got(here, name) == [1]


def test_a_dead_letter_does_not_wait_again_for_the_clock_of_its_client(here: kombu.Connection, broker: Broker) -> None:
    exchange, dead = dead_letter_queue(here)
    name = queue(here, x_dead_letter_exchange=exchange)
    send_due(here, name, 3600, skew=86_400.0)
    waited(broker, name, 3600)
    here.default_channel.basic_get(name).reject()
    assert got(here, dead) == [1]


def test_a_failed_task_of_a_queue_with_a_dead_letter_exchange_goes_there_at_once(
    here: kombu.Connection, broker: Broker
) -> None:
    """As over AMQP: it is not retried by relay's policy first."""
    exchange, dead = dead_letter_queue(here)
    name = queue(here, x_dead_letter_exchange=exchange)
    send(here, 1, key=name)
    message = here.default_channel.basic_get(name)
    held = here.default_channel.leases.get(message.delivery_tag)
    held.task, held.cause = True, ValueError("no")
    message.reject()
    assert broker.stats(name).pending == 0
    assert got(here, dead) == [1]


def test_a_message_that_another_consumer_has_meanwhile_is_no_dead_letter(
    here: kombu.Connection, broker: Broker
) -> None:
    exchange, dead = dead_letter_queue(here)
    name = queue(here, x_dead_letter_exchange=exchange)
    send(here, 1, key=name)
    message = here.default_channel.basic_get(name)
    held = here.default_channel.leases.get(message.delivery_tag)
    broker.release(held.job)  # as when its lease is over
    (elsewhere,) = broker.claim(name)
    message.reject()
    assert broker.stats(dead).ready == 0
    broker.ack(elsewhere)


def test_a_reject_holds_up_no_event_loop(here: kombu.Connection, broker: Broker, server: Server) -> None:
    """Where the server is full, which lets a message leave its queue and takes no dead letter."""
    exchange, dead = dead_letter_queue(here)
    name = queue(here, x_dead_letter_exchange=exchange)
    send(here, 1, key=name)
    message, store = here.default_channel.basic_get(name), here.default_channel.broker.store
    hurries: list[float] = []

    @contextmanager
    def hurried(seconds: float) -> Iterator[None]:
        hurries.append(seconds)
        yield

    here.transport._loop = object()
    store.hurried = hurried
    message.reject()
    here.transport._loop = None
    del store.hurried
    assert hurries == [0.0]
    assert got(here, dead) == [1]


def test_a_consumer_puts_back_what_is_no_task_as_often_as_it_likes(here: kombu.Connection, broker: Broker) -> None:
    name = queue(here)
    send(here, 1, key=name)
    for _ in range(30):
        message = here.default_channel.basic_get(name)
        message.requeue()
        assert broker.stats(name).ready == 1, "at once"
    message = here.default_channel.basic_get(name)
    assert message.delivery_info["redelivered"] is True
    message.ack()


def test_a_message_that_cannot_be_dead_lettered_now_stays_where_it_is_until_it_can(
    here: kombu.Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, dead = dead_letter_queue(here)
    name = queue(here, x_dead_letter_exchange=exchange)
    send(here, 1, key=name)
    message = here.default_channel.basic_get(name)

    tries = []

    def cut(*_args: Any, **_options: Any) -> None:
        tries.append(broker.stats(name).inflight)
        raise Unavailable("cut", maybe_executed=True)

    with monkeypatch.context() as patch:
        patch.setattr(here.default_channel, "_put", cut)
        message.reject()
        eventually(lambda: len(tries) > 1, "another try")
    assert set(tries) == {1}
    eventually(lambda: broker.stats(name).pending == 0, "it to be dead-lettered")
    assert got(here, dead) == [1]


@pytest.mark.parametrize("exchange", ["nobody-listens", "no-such-exchange"])
def test_a_dead_letter_that_nobody_takes_stays_among_relays_own(
    here: kombu.Connection, broker: Broker, exchange: str
) -> None:
    if exchange == "nobody-listens":
        here.default_channel.exchange_declare(exchange, "topic")
    name = queue(here, x_dead_letter_exchange=exchange)
    send(here, 1, key=name)
    here.default_channel.basic_get(name).reject()
    assert broker.stats(name).dead == 1
    assert broker.requeue(name) == 1
    assert got(here, name) == [1]


def test_a_queue_with_a_time_limit_and_a_dead_letter_exchange_is_a_delay_that_needs_no_consumer(
    here: kombu.Connection,
) -> None:
    exchange, work = dead_letter_queue(here)
    waiting = queue(here, x_dead_letter_exchange=exchange, message_ttl=0.3)
    inbox, began = Inbox(here, kombu.Queue(work), no_ack=True), time.monotonic()
    for number in range(3):
        send(here, number, key=waiting)
    assert inbox.wait(1)[0] == 0
    assert time.monotonic() - began > 0.29, "not before its time"
    assert inbox.wait(3) == [0, 1, 2]
    assert inbox.messages[0].headers["x-death"][0]["reason"] == "expired"


def test_beyond_its_length_a_queue_drops_or_dead_letters_the_oldest(here: kombu.Connection) -> None:
    exchange, dead = dead_letter_queue(here)
    plain, lettered = queue(here, max_length=3), queue(here, max_length=3, x_dead_letter_exchange=exchange)
    for name in (plain, lettered):
        for number in range(7):
            send(here, number, key=name)
        assert here.default_channel.queue_declare(name, passive=True).message_count == 3
        assert got(here, name) == [4, 5, 6]
    assert got(here, dead) == [0, 1, 2, 3]


def test_what_is_beyond_a_queue_s_length_and_cannot_be_dead_lettered_now_stays_where_it_is(
    here: kombu.Connection, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, dead = dead_letter_queue(here)
    name = queue(here, x_max_length=1, x_dead_letter_exchange=exchange)
    send(here, 0, key=name)

    def full(*_args: Any) -> None:
        raise Unavailable("full")

    with monkeypatch.context() as patch:
        patch.setattr(here.default_channel, "dead_letter", full)
        with pytest.raises(Unavailable, match="full"):
            send(here, 1, key=name)
    assert [job.deliveries for job in broker.jobs(name, "ready")] == [0, 0]
    send(here, 2, key=name)
    assert (got(here, dead), got(here, name)) == ([0, 1], [2])


def test_a_message_that_comes_back_more_often_than_the_delivery_limit_is_dead(
    here: kombu.Connection, broker: Broker
) -> None:
    name = queue(here, x_delivery_limit=2)
    send(here, 1, key=name)
    seen = 0
    inbox = Inbox(here, kombu.Queue(name))
    for number in range(1, 4):
        inbox.wait(number)
        seen += 1
        inbox.messages[-1].requeue()
    assert seen == 3
    assert broker.stats(name).dead == 1
    assert broker.stats(name).pending == 0


# what is drained by calls


def test_channels_of_one_connection_that_share_a_queue_get_what_each_has_claimed(here: kombu.Connection) -> None:
    """Over kombu's other transports all goes to the one that consumed last, and to nobody once that has ended."""
    name = queue(here)
    first, second = (Inbox(here, kombu.Queue(name), prefetch=1) for _ in range(2))
    for number in range(3):
        send(here, number, key=name)
    first.drain(lambda: len(first.bodies + second.bodies) == 2, 20.0)
    assert (first.bodies, second.bodies) == ([0], [1])
    second.channel.close()
    assert here.default_channel.basic_get(name, no_ack=True).payload == 1, "what it held, and nothing else"
    first.messages[0].ack()
    assert first.wait(2) == [0, 2]
    assert first.messages[1].delivery_info["redelivered"] is False


@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
def test_what_is_asked_for_is_to_be_acked_also_beside_a_consumer_that_acks_nothing(
    here: kombu.Connection, options: dict[str, Any]
) -> None:
    name = queue(here, **options)
    inbox = Inbox(here, kombu.Queue(name, **options), no_ack=True)
    send(here, 1, key=name)
    inbox.channel.basic_get(name).requeue()
    assert inbox.wait(1) == [1]


def test_a_consumer_that_acks_nothing_goes_on_so_when_another_one_of_its_queue_is_cancelled(
    here: kombu.Connection, broker: Broker
) -> None:
    name, channel, bodies = queue(here), here.default_channel, list[Any]()
    for tag in ("one", "other"):
        channel.basic_consume(name, True, lambda message: bodies.append(message.payload), tag)
    channel.basic_cancel("one")
    send(here, 1, key=name)
    here.drain_events(timeout=20)
    assert bodies == [1]
    assert not broker.stats(name).pending
    channel.basic_cancel("other")
    inbox = Inbox(here, kombu.Queue(name))
    send(here, 2, key=name)
    assert inbox.wait(1) == [2]
    assert broker.stats(name).inflight == 1


def test_of_two_consumers_of_a_queue_the_one_that_is_handed_a_message_decides_whether_it_is_acked(
    here: kombu.Connection, broker: Broker
) -> None:
    """On one channel that is the one that came last, and after its end the other one."""
    channel, messages, name = here.default_channel, list[Any](), queue(here)
    channel.basic_consume(name, True, messages.append, "first")
    channel.basic_consume(name, False, messages.append, "second")
    send(here, 1, key=name)
    here.drain_events(timeout=20)
    messages[0].requeue()
    here.drain_events(timeout=20)
    messages[1].ack()
    channel.basic_cancel("second")
    send(here, 2, key=name)
    here.drain_events(timeout=20)
    assert [message.payload for message in messages] == [1, 1, 2]
    assert (broker.stats(name).pending, broker.stats(name).inflight) == (0, 0)


def test_what_was_claimed_to_be_acked_and_is_handed_to_a_consumer_that_does_not_is_done(
    here: kombu.Connection, broker: Broker
) -> None:
    channel, messages, name = here.default_channel, list[Any](), queue(here)
    channel.basic_consume(name, False, messages.append, "first")
    for number in range(3):
        send(here, number, key=name)
    here.drain_events(timeout=20)
    channel.basic_consume(name, True, messages.append, "second")
    while len(messages) < 3:
        here.drain_events(timeout=20)
    assert broker.stats(name).inflight == 1
    messages[0].ack()
    assert (broker.stats(name).pending, broker.stats(name).inflight) == (0, 0)


def test_a_call_of_drain_events_brings_one_message_and_a_cancel_what_is_on_its_way(here: kombu.Connection) -> None:
    """As over AMQP, where a consumer is sent what its prefetch count allows, until the cancel is confirmed."""
    name = queue(here)
    inbox = Inbox(here, kombu.Queue(name))
    for n in range(3):
        send(here, n, key=name)
    here.drain_events(timeout=10)
    assert inbox.bodies == [0]
    inbox.consumer.cancel()
    assert inbox.bodies == [0, 1, 2]


def test_of_a_consumer_with_a_prefetch_count_nothing_is_on_its_way(here: kombu.Connection, broker: Broker) -> None:
    name = queue(here)
    inbox = Inbox(here, kombu.Queue(name), prefetch=1)
    for n in range(3):
        send(here, n, key=name)
    here.drain_events(timeout=10)
    inbox.messages[0].ack()
    inbox.consumer.cancel()
    assert inbox.bodies == [0]
    assert broker.stats(name).ready == 2


def ready(broker: Broker, name: str) -> list[bytes]:
    """The bodies of what waits, each a digit, in its order."""
    return [job.payload[-1:] for job in broker.jobs(name, "ready")]


def test_a_consumer_that_a_callback_cancels_gets_no_more(here: kombu.Connection, broker: Broker) -> None:
    name = queue(here)
    for n in range(4):
        send(here, n, key=name)
    seen: list[Any] = []

    def one(body: Any, message: Any) -> None:
        seen.append(body)
        message.ack()
        consumer.cancel()

    consumer = kombu.Consumer(here.channel(), [kombu.Queue(name)], callbacks=[one])
    consumer.consume()
    here.drain_events(timeout=10)
    assert seen == [0]
    assert ready(broker, name) == [b"1", b"2", b"3"]
    assert broker.stats(name).counters.get("retried", 0) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_consumer_that_an_error_ends_gets_no_more(
    here: kombu.Connection, broker: Broker, error: type[BaseException]
) -> None:
    name = queue(here)
    for n in range(4):
        send(here, n, key=name)
    inbox = Inbox(here, kombu.Queue(name))
    inbox.consumer.cancel()

    def consume() -> None:
        with inbox.consumer:
            here.drain_events(timeout=10)
            raise error

    with pytest.raises(error):
        consume()
    assert inbox.bodies == [0]
    assert ready(broker, name) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("error", [StopIteration, ValueError])
def test_a_consumer_whose_callback_ends_the_loop_by_an_error_gets_no_more(
    here: kombu.Connection, broker: Broker, error: type[Exception]
) -> None:
    """Also where the loop catches that before it cancels: celery.contrib.migrate ends at its limit so."""
    name = queue(here)
    for n in range(4):
        send(here, n, key=name)
    inbox = Inbox(here, kombu.Queue(name))

    def ends(body: Any, message: Any) -> None:
        if body == 1:
            raise error

    inbox.consumer.register_callback(ends)
    with inbox.consumer, suppress(error):
        while True:
            here.drain_events(timeout=10)
    assert inbox.bodies == [0, 1]
    assert ready(broker, name) == [b"2", b"3"]


def test_a_callback_that_fails_during_a_cancel_keeps_the_rest_from_nobody(
    here: kombu.Connection, broker: Broker
) -> None:
    name = queue(here)
    for n in range(5):
        send(here, n, key=name)

    def fails(body: Any, message: Any) -> None:
        if body == 2:
            raise ValueError(body)
        message.ack()

    channel = here.channel()
    with suppress(ValueError), kombu.Consumer(channel, [kombu.Queue(name)], callbacks=[fails]):
        here.drain_events(timeout=10)
    assert ready(broker, name) == [b"3", b"4"]
    assert name not in channel.consumed


def test_a_simple_queue_takes_one_of_what_others_read_too(here: kombu.Connection, server: Server) -> None:
    name = fresh("q")
    with link(server.url) as there, here.SimpleQueue(name) as mine, there.SimpleQueue(name) as other:
        for n in range(6):
            mine.put(n)
        for n, reader in enumerate((mine, other, mine, other)):
            message = reader.get(timeout=10)
            assert message.payload == n
            message.ack()
        assert mine.qsize() == 2
    for n in (4, 5):
        with here.SimpleQueue(name) as again:
            assert again.get(timeout=10).payload == n


def test_a_channel_that_closes_delivers_nothing_more(here: kombu.Connection, broker: Broker) -> None:
    name = queue(here)
    inbox = Inbox(here, kombu.Queue(name))
    for n in range(3):
        send(here, n, key=name)
    here.drain_events(timeout=10)
    inbox.channel.close()
    assert inbox.bodies == [0]
    assert ready(broker, name) == [b"0", b"1", b"2"]


@pytest.mark.parametrize("no_ack", [True, False])
@pytest.mark.parametrize("prefetch", [None, 10])
def test_kombus_helpers_that_count_messages_lose_none(
    here: kombu.Connection, broker: Broker, prefetch: int | None, no_ack: bool
) -> None:
    name = queue(here)
    for n in range(6):
        send(here, n, key=name)
    channel = here.channel()
    if prefetch:
        channel.basic_qos(0, prefetch, False)
    one, found = kombu.Queue(name)(channel), []
    for body, message in itermessages(here, channel, one, limit=3, timeout=10, no_ack=no_ack):
        found.append(body)
        if not no_ack:
            message.ack()
    channel.close()
    assert found == [0, 1, 2]
    assert got(here, name) == [3, 4, 5]
    assert broker.stats(name).pending == 0


def test_who_listens_first_is_woken(here: kombu.Connection) -> None:
    """The bell is armed before it sleeps, though it was not there when the first look found nothing."""
    inbox = Inbox(here, kombu.Queue(queue(here)))
    with pytest.raises(TimeoutError):
        here.drain_events(timeout=0.01)
    watch = here.transport._watches[inbox.channel, "jobs"]
    assert watch.bell.armed
    assert not watch.hungry


def test_a_recover_hands_back_what_was_not_acked(here: kombu.Connection, broker: Broker) -> None:
    inbox = Inbox(here, kombu.Queue(name := queue(here)))
    for number in range(3):
        send(here, number, key=name)
    inbox.wait(3)
    inbox.messages[1].ack()
    inbox.channel.basic_recover(requeue=True)
    stats = broker.stats(name)
    assert (stats.ready, stats.inflight) == (2, 0)
    assert sorted(inbox.wait(5)) == [0, 0, 1, 2, 2]


def test_a_program_of_kombu_alone_has_nothing_of_celery_imported(server: Server, broker: Broker) -> None:
    program = (
        "import sys, kombu.simple; kombu.Connection(sys.argv[1]).SimpleQueue('alone').put(1)\n"
        "sys.exit(f'{found}' if (found := [name for name in sys.modules if name.split('.')[0] == 'celery']) else 0)"
    )
    subprocess.run([sys.executable, "-c", program, server.url], check=True, timeout=150)
    assert broker.stats("alone").ready == 1


def test_a_program_that_has_little_of_celery_connects_too(server: Server, broker: Broker) -> None:
    """Its package imports its modules as they are asked for."""
    program = "import sys, celery.exceptions, kombu.simple; kombu.Connection(sys.argv[1]).SimpleQueue('little').put(1)"
    subprocess.run([sys.executable, "-c", program, server.url], check=True, timeout=150)
    assert broker.stats("little").ready == 1


def test_a_program_that_ends_without_closing_its_connection_hands_back_what_it_did_not_ack(
    server: Server, broker: Broker
) -> None:
    with link(server.url) as connection, connection.SimpleQueue("left") as left:
        left.put("x")
    program = "import sys, kombu, kombu.simple; kombu.Connection(sys.argv[1]).SimpleQueue('left').get(timeout=10)"
    subprocess.run([sys.executable, "-c", program, server.url], check=True, timeout=60)
    (job,) = broker.claim("left")
    assert job.deliveries == 1, "that was no death"


# queues that end


def pass_time(topo: topology.Topology, *names: str, seconds: int) -> None:
    """So much of these queues' time passes at once."""
    for name in names:
        topo.stored.raw("ZINCRBY", topo.places.ends, -1000 * seconds, name)


def seconds_left(topo: topology.Topology, name: str) -> float:
    return (float(topo.stored.raw("ZSCORE", topo.places.ends, name)) - topo.stored.now_ms()) / 1000


def test_a_queue_ends_when_nobody_used_it_for_its_time(here: kombu.Connection, broker: Broker) -> None:
    attendance = attendance_of(here.default_channel.broker)
    topo = attendance.topology
    used, unused = queue(here, expires=600), queue(here, expires=600)
    inbox = Inbox(here, kombu.Queue(used, expires=600))
    send(here, 1, key=unused)
    pass_time(topo, used, unused, seconds=300)
    attendance._wake.set()  # as it does by itself before half of a queue's time is over
    eventually(lambda: seconds_left(topo, used) > 400, "its consumer uses it")
    pass_time(topo, used, unused, seconds=300)
    attendance._wake.set()  # it has seen that a queue's time is over, and ends it
    eventually(lambda: broker.queues() == [], "the end of the other, whose name is not shown any more either")
    assert topo.terms(unused, fresh=True) is None
    assert broker.stats(unused).pending == 0
    assert topo.terms(used, fresh=True) is not None
    inbox.consumer.cancel()
    attendance.say_goodbye()
    pass_time(topo, used, seconds=600)
    assert used in topo.stored.ended(), "its consumer is gone"
    queue_again = kombu.Queue(used, expires=600)(here.default_channel)
    queue_again.declare()
    upkeep.end(topo, used, topo.terms(used))
    assert topo.terms(used, fresh=True) is not None, "it was used after it was seen to be over"


def test_an_auto_delete_queue_of_jobs_that_names_its_time_has_it_after_its_consumer_left(
    here: kombu.Connection, server: Server
) -> None:
    name = queue(here, auto_delete=True, expires=600)
    inbox = Inbox(here, kombu.Queue(name, auto_delete=True, expires=600))
    inbox.consumer.cancel()
    here.default_channel.attendance.say_goodbye()
    places, (seconds, _micros) = here.default_channel.topology.places, server.cli("TIME")
    assert float(server.cli("ZSCORE", places.ends, name)) > (int(seconds) + 500) * 1000


def test_an_auto_delete_queue_keeps_its_time_while_another_process_consumes(
    here: kombu.Connection, server: Server
) -> None:
    name = queue(here, auto_delete=True)
    topo = here.default_channel.topology
    inbox = Inbox(here, kombu.Queue(name, auto_delete=True))
    server.cli("ZADD", topo.places.consumers(name), "1e15", "another")
    before = seconds_left(topo, name)
    inbox.consumer.cancel()
    here.default_channel.attendance.say_goodbye()
    assert seconds_left(topo, name) > before - 5
    assert before > 30


def test_a_publish_keeps_a_queue_of_jobs_that_expires(here: kombu.Connection) -> None:
    topo = attendance_of(here.default_channel.broker).topology
    name = queue(here, expires=600)
    send(here, 1, key=name)
    for _ in range(3):
        pass_time(topo, name, seconds=500)
        here.default_channel._used[name] -= 500  # when this process last said so
        send(here, 1, key=name)
        assert seconds_left(topo, name) > 400
    pass_time(topo, name, seconds=600)
    assert topo.stored.has_ended(name)


@pytest.mark.parametrize("options", [{"exclusive": True}, {"expires": 60}, BOX], ids=["exclusive", "expires", "box"])
def test_who_only_gets_from_a_queue_keeps_it(here: kombu.Connection, options: dict[str, Any]) -> None:
    topo = attendance_of(here.default_channel.broker).topology
    name = queue(here, **options)
    before = seconds_left(topo, name)
    for _ in range(3):
        pass_time(topo, name, seconds=before / 2)
        here.default_channel._used.clear()  # it was said long ago
        assert here.default_channel.basic_get(name) is None
        assert seconds_left(topo, name) > before - 5


def test_what_could_not_be_told_of_the_use_of_a_queue_is_told_with_the_next_one(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    topo = attendance_of(here.default_channel.broker).topology
    name = queue(here, expires=600)
    pass_time(topo, name, seconds=500)

    def cut_off(*_: Any) -> None:
        raise Unavailable("cut off, for this test")

    with monkeypatch.context() as patch:
        patch.setattr(topo.stored, "use", cut_off)
        with pytest.raises(Unavailable):
            here.default_channel.basic_get(name)
    here.default_channel.basic_get(name)
    assert seconds_left(topo, name) > 400


@pytest.mark.parametrize("by", ["publish", "get"])
def test_a_use_that_could_not_be_told_while_the_server_of_queues_was_away_is_told_with_the_next_one(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Of a cluster, where who uses a queue on another server goes on meanwhile."""
    channel = here.default_channel
    topo = attendance_of(channel.broker).topology
    name = queue(here, expires=600)
    pass_time(topo, name, seconds=500)
    use = partial(send, here, 1, key=name) if by == "publish" else partial(channel.basic_get, name)
    with monkeypatch.context() as patch:
        patch.setattr(topo.outage, "_error", Unavailable("away, for this test"))
        use()
    assert seconds_left(topo, name) < 101
    use()
    assert seconds_left(topo, name) > 400


def test_a_publish_keeps_a_queue_also_on_a_machine_that_has_just_started(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    topo = attendance_of(here.default_channel.broker).topology
    name = queue(here, expires=600)
    pass_time(topo, name, seconds=500)
    monkeypatch.setattr(routing, "time", SimpleNamespace(monotonic=lambda: 1.0))
    send(here, 1, key=name)
    assert seconds_left(topo, name) > 400


def test_an_auto_delete_queue_is_kept_while_it_holds_what_nobody_else_has(
    here: kombu.Connection, broker: Broker
) -> None:
    topo = topology.Topology(broker)
    exchange = fresh("x")
    here.default_channel.exchange_declare(exchange, "fanout")
    copies, work = queue(here, auto_delete=True), queue(here, auto_delete=True)
    here.default_channel.queue_bind(copies, exchange)
    for name in (copies, work):
        send(here, 1, key=name)
    assert topo.stored.ended() == []
    pass_time(topo, copies, work, seconds=60)
    assert set(topo.stored.ended()) == {copies, work}
    for name in (copies, work):
        upkeep.end(topo, name, topo.terms(name))
    assert topo.terms(copies, fresh=True) is None
    assert topo.terms(work, fresh=True) is not None
    assert got(here, work) == [1]
    assert topo.stored.ended() == []
    pass_time(topo, work, seconds=60)
    assert topo.stored.ended() == [work]
    upkeep.end(topo, work, topo.terms(work))
    assert topo.terms(work, fresh=True) is None


def test_a_copy_for_a_consumer_that_is_gone_is_not_stored(here: kombu.Connection, broker: Broker) -> None:
    exchange = fresh("x")
    here.default_channel.exchange_declare(exchange, "fanout")
    name = queue(here, auto_delete=True)
    here.default_channel.queue_bind(name, exchange)
    send(here, 1, exchange)
    assert broker.stats(name).ready == 1
    pass_time(topology.Topology(broker), name, seconds=60)
    send(here, 2, exchange)
    assert broker.stats(name).pending == 0
    assert list(here.default_channel.list_bindings()) == []
