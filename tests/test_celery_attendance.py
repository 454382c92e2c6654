"""What a process tells the store of the queues that it consumes from: who was there, and who has gone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import kombu
import pytest

from relay_adapters.celery.sending import deadletters, upkeep
from relay_adapters.celery.sending.deadletters import SWEEP
from relay_core import Broker
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import RelayError, Unavailable
from tests.celery_links import BOX, Inbox, fresh, got, link, send
from tests.servers import Server, eventually


@pytest.fixture
def channel(server: Server) -> Any:
    with kombu.Connection(server.url) as connection:
        yield connection.channel()


def leaves(monkeypatch: pytest.MonkeyPatch, channel: Any, before: Callable[[], None]) -> None:
    """Call `before` before the channel's store is told that a consumer has left."""
    run = channel.attendance._run

    def hooked(command: Any) -> Any:
        if command.script.name.endswith("leave"):
            before()
        return run(command)

    monkeypatch.setattr(channel.attendance, "_run", hooked)


def consume_for_a_moment(channel: Any) -> None:
    queue = kombu.Queue("box", durable=False, auto_delete=True, expires=10, message_ttl=5)
    with kombu.Consumer(channel, [queue], no_ack=True):
        pass


def test_a_channel_forgets_the_queue_of_a_consumer_that_ended(channel: Any) -> None:
    """A monitor that asks workers again and again has a queue for each answer."""
    consume_for_a_moment(channel)
    assert channel._receivers == {}


def test_a_queue_whose_consumer_is_just_being_signed_off_is_unused(
    channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held_up() -> None:
        begun.set()
        assert go_on.wait(30)

    leaves(monkeypatch, channel, held_up)
    consume_for_a_moment(channel)
    assert begun.wait(30)  # the thread is on its way to tell the store
    answers: list[Any] = []
    deleting = threading.Thread(target=lambda: answers.append(channel.queue_delete("box", if_unused=True)))
    deleting.start()
    deleting.join(0.2)
    go_on.set()
    deleting.join(30)
    assert answers == [0]


def test_a_consumer_that_could_not_be_signed_off_is_signed_off_later(
    channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def cut_off_once() -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            raise Unavailable("cut off, for this test")

    leaves(monkeypatch, channel, cut_off_once)
    consume_for_a_moment(channel)
    eventually(lambda: len(tries) == 2, "the second goodbye")
    eventually(lambda: channel.queue_delete("box", if_unused=True) == 0, "nobody is there")


def test_a_queue_that_is_there_is_not_declared_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with link(server.url) as connection:
        channel: Any = connection.channel()
        revived: list[str] = []
        monkeypatch.setattr(channel.topology.own, "revive", revived.extend)
        with kombu.Consumer(channel, [kombu.Queue("there")]):
            channel.attendance.touch()
            assert not revived
            channel.topology.stored.delete_queue("there", "")
            channel.attendance.touch()
            assert revived == ["there"]


def test_a_server_that_is_away_is_asked_ever_less_often_and_the_log_says_so_once(
    channel: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attendance, pauses, away = channel.attendance, list[float](), [True]
    stock = attendance.failed

    def failed(error: RelayError) -> float:
        pauses.append(stock(error))
        attendance._wake.set()  # nobody waits for it here
        return pauses[-1]

    def cut_off() -> None:
        if away[0]:
            raise Unavailable("cut off, for this test")

    def told() -> None:
        """The thread has nothing left to do. It would see so when it turns for the next time."""
        eventually(lambda: attendance._wake.set() or attendance._thread is None, "the store to be told")

    monkeypatch.setattr(attendance, "failed", failed)
    leaves(monkeypatch, channel, cut_off)
    with caplog.at_level(logging.WARNING, "relay.celery"):
        consume_for_a_moment(channel)
        eventually(lambda: len(pauses) > 6, "seven tries")
        assert pauses[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]
        assert len([record for record in caplog.records if "cut off" in record.getMessage()]) == 1
        away[0] = False
        told()
        away[0], before = True, len(pauses)
        consume_for_a_moment(channel)
        eventually(lambda: len(pauses) > before, "another try")
        assert pauses[before] == 1.0
        away[0] = False
    told()


def test_what_the_store_has_forgotten_by_itself_is_not_told(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attendance = channel.attendance

    def cut_off() -> None:
        raise Unavailable("cut off, for this test")

    leaves(monkeypatch, channel, cut_off)
    consume_for_a_moment(channel)
    eventually(lambda: attendance._failures, "a goodbye that failed")
    with attendance._lock:
        (gone,) = attendance._left.values()
        assert 10 < gone.until - time.monotonic() <= 60
        gone.until = 0.0
    attendance._wake.set()
    eventually(lambda: attendance._thread is None, "the thread to end")
    assert not attendance._left


def test_a_consumer_that_could_not_begin_is_not_attended_to(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attendance, run = channel.attendance, channel.attendance._run

    def cut_off(command: Any) -> Any:
        if command.script.name.endswith("touch"):
            raise Unavailable("cut off, for this test")
        return run(command)

    monkeypatch.setattr(attendance, "_run", cut_off)
    for queue in (kombu.Queue("jobs"), kombu.Queue("box", **BOX)):
        with pytest.raises(Unavailable, match="cut off"):
            kombu.Consumer(channel, [queue]).consume()
        assert not attendance._attended
        assert not channel.boxes
    monkeypatch.setattr(attendance, "_run", run)
    with kombu.Consumer(channel, [kombu.Queue("jobs")]):
        monkeypatch.setattr(attendance, "_run", cut_off)
        with pytest.raises(Unavailable, match="cut off"):
            channel.basic_consume("jobs", False, print, "second")
        assert list(attendance._attended) == ["jobs"], "its first consumer goes on"
        monkeypatch.setattr(attendance, "_run", run)


def test_the_thread_outlives_whatever_a_hook_raises(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def chores(_ended: int, _limited: int) -> float:
        turns.append(len(turns))
        if len(turns) == 1:
            raise SystemExit("by a hook")
        return 60.0

    monkeypatch.setattr(channel.attendance, "_chores", chores)
    with kombu.Consumer(channel, [kombu.Queue("q")]):
        channel.attendance._wake.set()
        eventually(lambda: len(turns) >= 1, "the first turn")
        channel.attendance._wake.set()
        eventually(lambda: len(turns) >= 2, "another turn", 10)


# what has to be looked after


class Delays:
    """Queues that move their messages to `out` when they expire, and who looks after them."""

    def __init__(self, connection: kombu.Connection) -> None:
        self.connection = connection
        self.channel: Any = connection.default_channel
        kombu.Queue("out", kombu.Exchange("dlx"), routing_key="k")(self.channel).declare()
        self.broker: Broker = self.channel.broker
        self.upkeep = upkeep.Upkeep(self.channel.topology)

    def make(self, name: str, ttl: float | None = 0.001) -> str:
        arguments = {"x-dead-letter-exchange": "dlx", "x-dead-letter-routing-key": "k"}
        kombu.Queue(name, message_ttl=ttl, queue_arguments=arguments)(self.channel).declare()
        return name

    def fill(self, name: str, numbers: Iterable[int], **options: Any) -> None:
        """Messages, which expire at once."""
        for number in numbers:
            send(self.connection, number, key=name, **options)
        before = self.channel.topology.stored.now_ms()
        eventually(lambda: self.channel.topology.stored.now_ms() > before + 1, "they expire")

    def turn(self) -> float:
        topology = self.channel.topology
        return self.upkeep.turn(len(topology.stored.ended()), topology.stored.raw("SCARD", topology.places.limited))

    @property
    def moved(self) -> int:
        return self.broker.stats("out").ready


@pytest.fixture
def delays(server: Server) -> Iterator[Delays]:
    with link(server.url) as connection:
        yield Delays(connection)


def test_many_messages_that_expire_at_once_are_moved_some_at_a_time_and_in_order(delays: Delays) -> None:
    """In between the thread tells that its process lives: else its queues would end, with the tasks in them."""
    delays.fill(delays.make("delay"), range(2 * SWEEP + 50))
    moved, turns = 0, 0
    while moved < 2 * SWEEP + 50:
        pause = delays.turn()
        turns += 1
        assert delays.moved - moved <= SWEEP
        moved = delays.moved
        if moved < 2 * SWEEP + 50:
            assert pause == pytest.approx(upkeep.AGAIN)
    assert turns >= 3
    assert got(delays.connection, "out") == list(range(2 * SWEEP + 50))


def test_a_sweep_whose_time_is_over_leaves_the_rest_as_it_is(delays: Delays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadletters, "SWEEP_FOR", 0.0)
    delays.fill(delays.make("delay"), range(5))
    assert delays.turn() == pytest.approx(upkeep.AGAIN)
    assert got(delays.connection, "out") == [0]
    left = delays.broker.stats("delay")
    assert (left.ready, left.inflight) == (4, 0)
    eventually(lambda: delays.turn() and delays.moved == 4, "they are moved, too")
    assert got(delays.connection, "out") == [1, 2, 3, 4]


def test_what_has_come_to_the_head_since_it_was_looked_at_keeps_its_time(
    delays: Delays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process has moved what was over."""
    send(delays.connection, 1, key=delays.make("delay", ttl=600))
    monkeypatch.setattr(deadletters.DeadLetters, "_over", lambda *_: (1, None))
    assert delays.turn() == pytest.approx(upkeep.AGAIN)
    assert [(job.state, job.deliveries) for job in delays.broker.jobs("delay", "ready")] == [("ready", 0)]


def test_however_long_a_server_is_full_no_message_of_a_delay_goes_to_dead_for_it(
    delays: Delays, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "REREAD", 0.0)
    delays.fill(delays.make("delay"), range(3))
    server.cli("CONFIG", "SET", "maxmemory", "1")
    for _ in range(6):  # deliveries, and a message has five
        with pytest.raises(Unavailable, match="maxmemory"), delays.broker.store.hurried(0.0):
            delays.turn()
    assert [(job.state, job.deliveries) for job in delays.broker.jobs("delay", "ready")] == [("ready", 0)] * 3
    server.cli("CONFIG", "SET", "maxmemory", "0")
    delays.turn()
    assert got(delays.connection, "out") == [0, 1, 2]


def test_a_turn_whose_time_is_over_leaves_the_other_queues_to_the_next(
    delays: Delays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LONGEST", 0.0)
    for name in ("a", "b", "c"):
        delays.fill(delays.make(name), range(1))
    for number in (1, 2, 3):
        delays.turn()
        assert delays.moved == number
    delays.channel.queue_delete("out")
    for name in ("d", "e"):
        kombu.Queue(name, expires=0.001)(delays.channel).declare()
    eventually(lambda: len(delays.channel.topology.stored.ended()) == 2, "their time is over")
    assert delays.turn() == pytest.approx(upkeep.AGAIN)
    assert len(delays.channel.topology.stored.ended()) == 1


def test_what_is_no_message_does_not_keep_the_others_from_being_moved(delays: Delays) -> None:
    delays.broker.enqueue(delays.make("delay"), b"no message")
    delays.fill("delay", range(2))
    eventually(lambda: delays.turn() and delays.moved == 2, "they are moved")
    assert delays.broker.dead("delay")[0].reason == "undecodable"


def test_of_what_is_no_message_nobody_can_tell_whether_it_expires_and_it_holds_up_no_other(delays: Delays) -> None:
    """Where only messages have time limits. Perhaps another process can read it: it stays as it is."""
    delays.make("delay", ttl=None)
    delays.broker.enqueue("delay", b"no message", id="first")
    delays.fill("delay", range(2), expiration=0.001)
    delays.broker.enqueue("delay", b"no message", id="second")
    delays.fill("delay", range(2, 4), expiration=0.001)
    send(delays.connection, 4, key="delay")
    delays.fill("delay", [5], expiration=0.001)
    eventually(lambda: delays.turn() and delays.moved == 4, "they are moved")
    assert got(delays.connection, "out") == [0, 1, 2, 3]
    assert delays.turn() > 1
    left = delays.broker.jobs("delay", "ready")
    assert [(job.id, job.deliveries) for job in left[:2]] == [("first", 0), ("second", 0)]
    assert len(left) == 4, "nor does a message expire behind one that does not, as on RabbitMQ"
    assert got(delays.connection, "delay") == [4]
    assert [dead.reason for dead in delays.broker.dead("delay")] == ["undecodable"] * 2, "by whom it is handed to"


@pytest.mark.parametrize("before", [deadletters._PAGE, 3 * deadletters._PAGE, MAX_BATCH - 2])
def test_however_many_of_them_are_in_front_they_hold_up_no_other(delays: Delays, before: int) -> None:
    delays.make("delay", ttl=None)
    riddles = [job.id for job in delays.broker.enqueue_many("delay", [b"no message"] * before)]
    delays.fill("delay", range(30), expiration=0.001)
    eventually(lambda: delays.turn() and delays.moved == 30, "they are moved")
    assert got(delays.connection, "out") == [*range(30)]
    left = delays.broker.jobs("delay", "ready", limit=before + 1)
    assert [(job.id, job.deliveries) for job in left] == [(id, 0) for id in riddles]


def test_where_they_are_more_than_a_claim_takes_that_is_said(delays: Delays, caplog: pytest.LogCaptureFixture) -> None:
    name = delays.make(fresh("delay"), ttl=None)
    delays.broker.enqueue_many(name, [b"no message"] * MAX_BATCH)
    delays.fill(name, [0], expiration=0.001)
    assert delays.turn() > 1, "nor is all of it read again soon"
    assert delays.moved == 0
    assert f"the first 200 messages of queue {name!r}" in caplog.text


def test_where_a_limit_of_the_queue_lets_none_but_these_be_claimed_they_are_not_again_and_again(delays: Delays) -> None:
    name = delays.make(fresh("delay"), ttl=None)
    delays.broker.limit(name, max_inflight=2)
    delays.broker.enqueue_many(name, [b"no message"] * 3)
    delays.fill(name, [0], expiration=0.001)
    over = delays.broker.stats(name).now + 0.001
    eventually(lambda: delays.broker.stats(name).now > over, "a millisecond to pass")
    assert delays.turn() >= 1
    assert delays.broker.stats(name).counters["claimed"] == 2
    delays.broker.limit(name)
    eventually(lambda: delays.turn() and delays.moved == 1, "it is moved once it may be")


def test_a_task_that_has_come_to_the_head_since_it_was_looked_at_stays_for_its_worker(
    delays: Delays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has nowhere to go: its worker stores its result as REVOKED."""
    name, looked = fresh("delay"), deadletters.DeadLetters._over
    kombu.Queue(name, message_ttl=0.001)(delays.channel).declare()

    def taken_meanwhile(channel: Any, *args: Any) -> Any:
        found = looked(channel, *args)
        if found[0]:
            head, _task = delays.broker.jobs(name, "ready")
            assert delays.broker.cancel(name, head.id) == "ready"
        return found

    monkeypatch.setattr(deadletters.DeadLetters, "_over", taken_meanwhile)
    send(delays.connection, "no task", key=name)
    send(delays.connection, [[], {}, {}], key=name, headers={"task": "t", "id": "its-id"})
    before = delays.channel.topology.stored.now_ms()
    eventually(lambda: delays.channel.topology.stored.now_ms() > before + 1, "they expire")
    delays.channel.sweep(name, delays.channel.topology.terms(name))
    (left,) = delays.broker.jobs(name, "ready")
    assert left.deliveries == 0


@pytest.mark.parametrize("name", ["other", "delay"], ids=["another queue", "other terms"])
def test_a_queue_that_takes_the_place_of_another_one_is_looked_after(
    delays: Delays, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As many as before have to be, which is all that is told without asking."""
    monkeypatch.setattr(upkeep, "REREAD", 0.1)
    delays.make("delay", ttl=600)
    assert delays.turn() < 1
    delays.channel.queue_delete("delay")
    delays.fill(delays.make(name), range(1))
    eventually(lambda: delays.turn() and delays.moved == 1, "it is moved")


def test_queues_whose_time_is_over_end_one_page_after_the_other(delays: Delays) -> None:
    topology, many = delays.channel.topology, 2 * upkeep.PAGE + 10
    for number in range(many):
        kombu.Queue(f"q{number}", expires=0.001)(delays.channel).declare()
    eventually(lambda: len(topology.stored.ended(many)) == many, "their time is over")
    while left := len(topology.stored.ended(many)):
        pause = delays.turn()
        ended = left - len(topology.stored.ended(many))
        assert 0 < ended <= upkeep.PAGE
        if left > ended:
            assert pause == pytest.approx(upkeep.AGAIN)
    assert delays.turn() > 1


def test_two_apps_of_one_process_attend_to_one_mailbox_apart(server: Server, broker: Broker) -> None:
    """Their brokers have other options, or other spellings of the URL."""
    box = kombu.Queue("box", kombu.Exchange("news", type="fanout"), **BOX)
    with link(server.url) as staying, link(server.url) as going:
        first = Inbox(staying, box)
        send(staying, 1, "news")
        first.wait(1)
        second = Inbox(going, box)
        attendances = [inbox.channel.attendance for inbox in (first, second)]
        consumers = attendances[0].topology.places.consumers("box")
        assert len(broker.store.raw("ZRANGE", consumers, 0, -1)) == 2
        assert not second.quiet(), "the other one has had it"
        second.consumer.cancel()
        attendances[1].say_goodbye()
        assert broker.store.raw("ZRANGE", consumers, 0, -1) == [attendances[0].consumer.encode()]
        send(staying, 2, "news")
        assert first.wait(2) == [1, 2]


# queues whose users could not say that they live


def pass_by(channel: Any, seconds: float) -> None:
    """As if so much time had passed in which nobody told the store anything."""
    places, raw = channel.topology.places, channel.topology.stored.raw
    for queue in raw("ZRANGE", places.ends, 0, -1):
        raw("ZINCRBY", places.ends, -seconds * 1000, queue)
    for field in ("amq.told", "amq.spared"):
        if raw("HEXISTS", places.versions, field):
            raw("HINCRBY", places.versions, field, round(-seconds * 1000))


@pytest.mark.parametrize("options", [{"exclusive": True}, {"expires": 60}, {"auto_delete": True}], ids=repr)
def test_the_first_process_back_after_an_outage_ends_no_queue_of_another(server: Server, options: Any) -> None:
    """Nobody could say that he lives. Who can again may not be the first."""
    with link(server.url) as first, link(server.url) as other:
        queue = kombu.Queue("theirs", kombu.Exchange("news", "fanout"), **options)
        queue(other.default_channel).declare()
        send(other, 1, "news")
        attendance = Inbox(first, kombu.Queue("q")).channel.attendance
        attendance.turn()
        pass_by(first.default_channel, 61)
        attendance.turn()
        pass_by(first.default_channel, 20)
        attendance.turn()
        inbox = Inbox(other, queue)
        assert inbox.wait(1) == [1]
        inbox.messages[0].ack()


def test_an_outage_after_the_outage_ends_no_queue_of_a_process_that_was_not_back_in_between(server: Server) -> None:
    with link(server.url) as first, link(server.url) as other:
        kombu.Queue("theirs", exclusive=True)(other.default_channel).declare()
        send(other, 1, key="theirs")
        attendance = Inbox(first, kombu.Queue("q")).channel.attendance
        for _ in range(5):
            attendance.turn()
            pass_by(first.default_channel, 31)
        attendance.turn()
        assert got(other, "theirs") == [1]


def test_a_process_that_could_not_tell_the_store_ends_no_queue_of_others_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could not either, and a queue may have less time than tells an outage from a silence."""
    with link(server.url) as first, link(server.url) as other:
        kombu.Queue("theirs", expires=5)(other.default_channel).declare()
        send(other, 1, key="theirs")
        attendance = Inbox(first, kombu.Queue("q")).channel.attendance
        attendance.turn()

        def cut_off(_command: Any) -> Any:
            raise Unavailable("cut off, for this test")

        with monkeypatch.context() as patch:
            patch.setattr(attendance.topology.broker.store, "run", cut_off)
            with pytest.raises(Unavailable):
                attendance.turn()
        pass_by(first.default_channel, 6)
        attendance.turn()
        attendance.turn()
        assert got(other, "theirs") == [1]


def test_a_queue_whose_user_does_not_come_back_after_an_outage_ends(server: Server, broker: Broker) -> None:
    with link(server.url) as first, link(server.url) as other:
        kombu.Queue("theirs", exclusive=True)(other.default_channel).declare()
        send(other, 1, key="theirs")
        channel = Inbox(first, kombu.Queue("q")).channel
        channel.attendance.turn()
        pass_by(channel, 61)
        for _ in range(3):
            channel.attendance.turn()
            assert broker.stats("theirs").ready == 1
            pass_by(channel, 20)
        channel.attendance.turn()
        assert channel.topology.terms("theirs", fresh=True) is None
        assert broker.stats("theirs").pending == 0


def test_the_first_publish_after_an_outage_reaches_those_that_could_not_say_that_they_live(
    server: Server, broker: Broker
) -> None:
    """One that nobody consumes still ends by what is published, where no process consumes anything."""
    with link(server.url) as sender, link(server.url) as other:
        kombu.Queue("copies", kombu.Exchange("news", "fanout"), auto_delete=True)(other.default_channel).declare()
        channel: Any = sender.default_channel
        send(sender, 0, "news")
        with kombu.Consumer(other.channel(), [kombu.Queue("q")]):
            pass  # somebody was there
        pass_by(channel, 61)
        for number in range(1, 4):
            send(sender, number, "news")
            assert broker.stats("copies").ready == number + 1
            pass_by(channel, 20)
        send(sender, 4, "news")
        assert broker.stats("copies").pending == 0
        assert channel.topology.terms("copies", fresh=True) is None


def test_a_queue_that_nobody_consumes_ends_by_what_is_published_from_time_to_time(
    server: Server, broker: Broker
) -> None:
    """More seldom than tells an outage from a silence, where no process consumes anything."""
    with link(server.url) as sender, link(server.url) as other:
        exchange = kombu.Exchange("news", "fanout")
        queue = kombu.Queue("copies", exchange, auto_delete=True)(other.default_channel)
        with kombu.Consumer(other.channel(), [kombu.Queue("q")]):
            pass  # somebody was there
        for seconds, kept in ((61, 1), (31, 2)):
            queue.declare()
            pass_by(sender.default_channel, 61)
            for number in range(kept):
                send(sender, number, "news")
                assert broker.stats("copies").ready == number + 1
                pass_by(sender.default_channel, seconds)
            send(sender, kept, "news")
            assert broker.stats("copies").pending == 0
            assert sender.default_channel.topology.terms("copies", fresh=True) is None


def test_a_copy_goes_to_a_queue_that_is_kept_for_what_it_holds(server: Server) -> None:
    """As who publishes it finds out only after its time."""
    with link(server.url) as here:
        queue = kombu.Queue("kept", kombu.Exchange("news", "fanout"), auto_delete=True)(here.default_channel)
        queue.declare()
        queue.bind_to("amq.direct", routing_key="kept")
        send(here, 1, "amq.direct", "kept")
        pass_by(here.default_channel, 61)
        send(here, 2, "news")
        assert got(here, "kept") == [1, 2]
