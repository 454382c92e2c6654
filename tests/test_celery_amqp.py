"""What programs that were written for RabbitMQ ask of kombu's channels, beside what all of kombu's transports do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import kombu
import pytest
from amqp.exceptions import ChannelError

from relay_adapters.celery.errors import MailboxesAway
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.receiving import settling
from relay_adapters.celery.sending import upkeep
from relay_adapters.celery.sending.sweeper import Sweeper
from relay_core import Broker
from relay_core.errors import Unavailable
from tests.celery_links import BOX, Inbox, fresh, got, link, send
from tests.servers import Server, eventually


@pytest.fixture(params=["redis"])
def flavour(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def here(server: Server) -> Iterator[kombu.Connection]:
    with link(server.url) as connection:
        yield connection


def queue(connection: kombu.Connection, **options: Any) -> str:
    """A new queue of these options of kombu.Queue."""
    name = fresh("q")
    kombu.Queue(name, **options)(connection.default_channel).declare()
    return name


# acks


@pytest.mark.parametrize("options", [{}, BOX], ids=["jobs", "mailbox"])
@pytest.mark.parametrize("consumed", [True, False], ids=["consumed", "got"])
def test_an_ack_of_multiple_messages_is_of_all_that_the_channel_was_given_before(
    here: kombu.Connection, options: dict[str, Any], consumed: bool
) -> None:
    name = queue(here, **options)
    for number in range(4):
        send(here, number, key=name)
    if consumed:
        inbox = Inbox(here, kombu.Queue(name, **options), prefetch=4)
        inbox.wait(4)
        channel, messages = inbox.channel, inbox.messages
    else:
        channel = here.channel()
        messages = [channel.basic_get(name) for _ in range(4)]
    messages[1].ack()
    messages[2].ack(multiple=True)
    messages[2].channel.basic_ack(messages[2].delivery_tag, multiple=True)  # of none that is left
    channel.close()
    assert got(here, name) == [3]


# dead letters


def test_a_dead_letter_says_when_it_died_and_by_which_time_limit_in_the_types_of_amqp(here: kombu.Connection) -> None:
    dead = queue(here)
    name = queue(here, queue_arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
    began = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(seconds=5)
    send(here, 1, key=name, expiration=60)
    here.default_channel.basic_get(name).reject()
    letter = here.default_channel.basic_get(dead)
    (death,) = letter.headers["x-death"]
    assert began < death["time"] < began + timedelta(seconds=60), "naive, and UTC"
    assert death["original-expiration"] == "60000"
    assert "expiration" not in letter.properties
    letter.reject()


def test_a_message_with_a_time_limit_of_its_own_leaves_a_queue_that_nobody_consumes(here: kombu.Connection) -> None:
    work = queue(here)
    waiting = queue(here, queue_arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": work})
    for seconds in (0.2, 0.1):
        send(here, seconds, key=waiting, expiration=seconds)
    send(here, "stays", key=waiting)
    inbox = Inbox(here, kombu.Queue(work), no_ack=True)
    assert inbox.wait(2) == [0.2, 0.1], "the first one first, as on RabbitMQ"
    (death,) = inbox.messages[0].headers["x-death"]
    assert (death["queue"], death["reason"], death["original-expiration"]) == (waiting, "expired", "200")
    assert got(here, waiting) == ["stays"]


def test_such_messages_wait_for_the_workers_of_a_queue_that_has_some(here: kombu.Connection, broker: Broker) -> None:
    """They see for themselves whether a message's time is over, and nobody reads what waits for them."""
    dead = queue(here)
    name = queue(here, queue_arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
    send(here, 1, key=name)
    inbox = Inbox(here, kombu.Queue(name), prefetch=1)
    inbox.wait(1)
    send(here, 2, key=name, expiration=0.001)
    topology = inbox.channel.topology
    terms = topology.terms(name, fresh=True)
    assert terms.limited
    assert Sweeper(topology).sweep(name, terms) >= 1
    assert broker.stats(name).ready == 1
    over = broker.stats(name).now + 0.001
    eventually(lambda: broker.stats(name).now > over, "a millisecond to pass")
    inbox.messages[0].ack()
    inbox.quiet()
    assert got(here, dead) == [2]


@pytest.fixture
def boxed(here: kombu.Connection) -> tuple[str, str]:
    """(a mailbox, the exchange that it is bound to)"""
    exchange, box = fresh("x"), fresh("box")
    kombu.Queue(box, kombu.Exchange(exchange, "fanout"), **BOX)(here.default_channel).declare()
    return box, exchange


def test_a_dead_letter_may_go_to_a_mailbox_from_a_queue_that_nobody_consumes(
    here: kombu.Connection, boxed: tuple[str, str]
) -> None:
    box, exchange = boxed
    name = queue(here, queue_arguments={"x-dead-letter-exchange": exchange, "x-message-ttl": 0})
    send(here, 1, key=name)
    time.sleep(0.01)
    topology = here.default_channel.topology
    Sweeper(topology).sweep(name, topology.terms(name))
    assert got(here, box) == [1]


def test_a_dead_letter_may_go_to_a_mailbox_when_its_channel_is_closed(
    here: kombu.Connection, boxed: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    box, exchange = boxed
    name = queue(here, queue_arguments={"x-dead-letter-exchange": exchange})
    send(here, 1, key=name)
    channel = here.channel()
    message = channel.basic_get(name)
    monkeypatch.setattr(settling, "running_tags", lambda: {message.delivery_tag})
    channel.close()
    message.reject()
    assert got(here, box) == [1]


def test_a_dead_letter_waits_for_mailboxes_that_are_away(
    here: kombu.Connection, boxed: tuple[str, str], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise MailboxesAway("away")

    box, exchange = boxed
    name = queue(here, queue_arguments={"x-dead-letter-exchange": exchange, "x-message-ttl": 0})
    send(here, 1, key=name)
    time.sleep(0.01)
    topology = here.default_channel.topology
    with monkeypatch.context() as patched:
        patched.setattr(Sweeper, "_to_boxes", away)
        with pytest.raises(Unavailable):
            Sweeper(topology).sweep(name, topology.terms(name))
    assert broker.stats(name).ready == 1, "handed back, uncounted"
    Sweeper(topology).sweep(name, topology.terms(name))
    assert got(here, box) == [1]


# messages that nobody takes


def test_a_mandatory_message_that_reaches_no_queue_is_returned(here: kombu.Connection, broker: Broker) -> None:
    exchange, name, returned = fresh("x"), queue(here), list[Any]()
    channel = here.channel()
    channel.exchange_declare(exchange, "topic")
    channel.queue_bind(name, exchange, "to.#")
    producer = kombu.Producer(channel, on_return=lambda *what: returned.append(what))
    producer.publish(1, exchange=exchange, routing_key="to.it", mandatory=True)
    producer.publish(2, exchange="", routing_key=name, mandatory=True)
    producer.publish(3, exchange=exchange, routing_key="nowhere")
    assert not returned
    gone = fresh("gone")
    producer.publish(4, exchange=exchange, routing_key="nowhere", mandatory=True, headers={"n": 4})
    producer.publish(5, exchange="", routing_key=gone, mandatory=True)
    assert [(error.reply_code, where, key, message.payload) for error, where, key, message in returned] == [
        (312, exchange, "nowhere", 4), (312, "", gone, 5),
    ]  # fmt: skip
    assert returned[0][3].headers == {"n": 4}
    assert broker.stats(gone).pending == 0
    assert got(here, name) == [1, 2]


def test_a_mandatory_message_that_reaches_no_queue_is_an_error_where_nobody_waits_for_its_return(
    here: kombu.Connection,
) -> None:
    with pytest.raises(ChannelError, match="NO_ROUTE"):
        send(here, 1, key=fresh("gone"), mandatory=True, retry=True)


def test_a_mandatory_message_whose_only_mailbox_has_vanished_is_returned(
    here: kombu.Connection, server: Server
) -> None:
    exchange, names, returned = fresh("x"), [fresh("box"), fresh("box")], list[Any]()
    for name in names:
        kombu.Queue(name, kombu.Exchange(exchange, "fanout"), **BOX)(here.default_channel).declare()
    producer = kombu.Producer(here.channel(), on_return=lambda *what: returned.append(what))
    vanish = [here.default_channel.topology.places.box(name) for name in names]
    server.cli("DEL", vanish[0])
    producer.publish(1, exchange=exchange, mandatory=True)
    assert not returned
    assert got(here, names[1]) == [1]
    server.cli("DEL", vanish[1])
    producer.publish(2, exchange=exchange, mandatory=True)
    assert [(error.reply_code, message.payload) for error, _exchange, _key, message in returned] == [(312, 2)]


def test_a_message_whose_only_mailbox_has_vanished_reaches_the_alternate_exchange(
    here: kombu.Connection, server: Server
) -> None:
    exchange, other, name, box = fresh("x"), fresh("other"), queue(here), fresh("box")
    here.default_channel.exchange_declare(other, "fanout")
    here.default_channel.queue_bind(name, other)
    here.default_channel.exchange_declare(exchange, "fanout", arguments={"alternate-exchange": other})
    kombu.Queue(box, **BOX)(here.default_channel).declare()
    here.default_channel.queue_bind(box, exchange)
    server.cli("DEL", here.default_channel.topology.places.box(box))
    send(here, 1, exchange)
    assert got(here, name) == [1]


def test_a_mandatory_message_whose_only_queue_ends_just_then_is_returned(here: kombu.Connection) -> None:
    exchange, name, returned = fresh("x"), fresh("copies"), list[Any]()
    kombu.Queue(name, kombu.Exchange(exchange, "fanout"), auto_delete=True)(here.default_channel).declare()
    producer = kombu.Producer(here.channel(), on_return=lambda *what: returned.append(what))
    producer.publish(1, exchange=exchange, mandatory=True)
    assert not returned
    topology = here.default_channel.topology
    topology.stored.raw("ZINCRBY", topology.places.ends, -60_001, name)
    producer.publish(2, exchange=exchange, mandatory=True)
    assert topology.terms(name, fresh=True) is None
    assert [(error.reply_code, message.payload) for error, _exchange, _key, message in returned] == [(312, 2)]


def test_a_mandatory_message_may_reach_the_alternate_exchange(here: kombu.Connection) -> None:
    exchange, other, name = fresh("x"), fresh("other"), queue(here)
    here.default_channel.exchange_declare(other, "fanout")
    here.default_channel.queue_bind(name, other)
    here.default_channel.exchange_declare(exchange, "direct", arguments={"alternate-exchange": other})
    send(here, 1, exchange, "nowhere", mandatory=True)
    assert got(here, name) == [1]


# queues


def test_an_exclusive_queue_ends_with_what_it_holds(here: kombu.Connection, broker: Broker) -> None:
    """As one for replies to a client that is gone."""
    topology, names = here.default_channel.topology, [queue(here, exclusive=True), fresh("raw")]
    here.default_channel.queue_declare(names[1], exclusive=True)
    for name in names:
        send(here, 1, key=name)
        upkeep.end(topology, name, topology.terms(name))
        assert topology.terms(name, fresh=True) is not None, "it has a minute from its last use"
        topology.stored.raw("ZINCRBY", topology.places.ends, -60_001, name)
        upkeep.end(topology, name, topology.terms(name))
        assert topology.terms(name, fresh=True) is None
        assert broker.stats(name).pending == 0


def test_a_queue_that_ends_by_itself_becomes_exclusive_by_a_later_declaration(
    here: kombu.Connection, broker: Broker
) -> None:
    """As where who sends there has declared it first. It is no reason for another queue to end with what it holds."""
    topology, names = here.default_channel.topology, [queue(here, auto_delete=True), queue(here)]
    for name in names:
        kombu.Queue(name, exclusive=True)(here.default_channel).declare()
        kombu.Queue(name)(here.default_channel).declare()
        send(here, 1, key=name)
    assert [topology.terms(name, fresh=True) for name in names] == [Terms(auto_delete=True, exclusive=True), Terms()]
    topology.stored.raw("ZINCRBY", topology.places.ends, -60_001, names[0])
    assert topology.stored.ended() == names[:1]
    assert upkeep.end(topology, names[0], topology.terms(names[0]))
    assert [broker.stats(name).pending for name in names] == [0, 1]


def test_messages_of_a_quorum_queue_tell_how_often_they_were_delivered_before(
    here: kombu.Connection, broker: Broker
) -> None:
    name, plain = queue(here, queue_arguments={"x-queue-type": "quorum"}), queue(here)
    for each in (name, plain):
        kombu.Queue(each)(here.default_channel).declare()  # which says nothing of its type
        send(here, 1, key=each)
    told = []
    for _ in range(3):
        message = here.default_channel.basic_get(name)
        told.append(message.headers.get("x-delivery-count"))
        message.requeue()
    assert told == [None, 1, 2]
    here.default_channel.basic_get(plain).requeue()
    assert here.default_channel.basic_get(plain).headers == {}


def test_a_queue_of_which_others_said_more_is_believed_while_the_server_of_queues_is_away(
    here: kombu.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    quorum = {"x-queue-type": "quorum", "x-dead-letter-exchange": "amq.fanout"}
    topology, name = here.default_channel.topology, queue(here, queue_arguments=quorum)
    declare = kombu.Queue(name)(here.default_channel).declare
    declare()
    monkeypatch.setattr(topology.outage, "_error", Unavailable("away"))
    for method in ("declare_queue", "terms", "use"):
        monkeypatch.setattr(topology.stored, method, None)
    declare()
    send(here, 1, key=name, expiration=60)
    send(here, 2, key=name, expiration=60)
    assert got(here, name) == [1, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"x-single-active-consumer": False}, {"x-delivery-limit": -1}, {"x-consumer-timeout": 3_600_000},
        {"x-cancel-on-ha-failover": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)  # fmt: skip
def test_arguments_that_ask_for_what_is_so_anyway_are_taken(here: kombu.Connection, arguments: dict[str, Any]) -> None:
    name = queue(here, queue_arguments=arguments)
    assert here.default_channel.topology.terms(name) == Terms()


# exchanges


def test_what_relay_has_not_of_exchanges_is_refused_with_what_to_do_instead(here: kombu.Connection) -> None:
    source, destination = (kombu.Exchange(fresh("x"), "topic")(here.default_channel) for _ in range(2))
    with pytest.raises(NotImplementedError, match=rf"bind the queues of '{destination.name}' to '{source.name}', too"):
        destination.bind_to(source, routing_key="#")
    delayed = kombu.Exchange(fresh("x"), "x-delayed-message", arguments={"x-delayed-type": "direct"})
    with pytest.raises(
        kombu.exceptions.ChannelError, match=r"'x-delayed-message' is not supported.*by countdown or eta"
    ):
        delayed(here.default_channel).declare()
