"""Rare troubles of a Dramatiq worker, each of which once lost or stopped something."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq.encoder import JSONEncoder
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import Middleware, SkipMessage

import relay_core
from relay_adapters.dramatiq import RelayBroker
from relay_adapters.dramatiq.gate import Gate
from relay_adapters.dramatiq.line import Line
from relay_adapters.dramatiq.message import RelayMessage
from relay_core.errors import AuthError, PermissionDenied, StoreError, Unavailable
from tests.dramatiq_workers import running, signals_of
from tests.servers import AclServer, Flavour, Server, eventually


@pytest.fixture
def flavour() -> Flavour:
    """What this side does, not the server."""
    return "valkey"


@pytest.fixture(autouse=True)
def _impatient_dramatiq(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries again after three and five seconds."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.1)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.1)


def new_broker(url: str, **options: Any) -> RelayBroker:
    broker = RelayBroker(url, **{"lease": 30.0, **options})
    dramatiq.set_broker(broker)
    broker.declare_queue("default")
    return broker


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = new_broker(server.url)
    yield broker
    broker.close()


def message(*args: Any, queue: str = "default", name: str = "any") -> dramatiq.Message[Any]:
    return dramatiq.Message(queue, name, args, {}, {})


def taken(consumer: Any) -> RelayMessage:
    found = next(consumer)
    assert isinstance(found, RelayMessage)
    return found


class Unprintable(Exception):
    """As one that names a row of a database session that is closed."""

    def __repr__(self) -> str:
        raise RuntimeError("not bound to a session")

    __str__ = __repr__


# a message that cannot be told of as it is


class NoTracebacks:
    """A plugin that fails once a message has one."""

    @relay_core.hookimpl
    def relay_encode_payload(self, payload: bytes, queue: str) -> bytes:
        if b"traceback" in payload:
            raise OSError("the key server is away")
        return payload


@pytest.mark.parametrize(
    ("options", "body", "error", "told"),
    [
        ({}, "", Unprintable(), "Unprintable"),
        ({}, "", ValueError(Unprintable()), "ValueError"),
        ({"max_payload": 2000}, "x" * 1500, ValueError("no money"), "no money"),
        ({"plugins": [NoTracebacks()]}, "", ValueError("no money"), "no money"),
    ],
    ids=["repr", "inner repr", "max_payload", "plugin"],
)
def test_a_failed_message_is_dead_with_its_error_though_its_new_body_or_error_cannot_be_stored(
    server: Server, options: dict[str, Any], body: str, error: Exception, told: str
) -> None:
    broker = new_broker(server.url, **options)

    @dramatiq.actor(max_retries=0)
    def pay(body: str) -> None:
        raise error

    pay.send(body)
    with running(broker, threads=1):
        eventually(lambda: broker.core.stats("default").dead, "it is dead", seconds=10)
    (dead,) = broker.core.dead("default")
    assert dead.reason == "failed"
    assert told in (dead.error or "")
    assert dramatiq.Message.decode(dead.payload).args == (body,)
    broker.close()


class Again(Middleware):
    """Retries once, and sets the options of its own choice."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def after_process_message(
        self, broker: Any, message: Any, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        if exception is not None and not message.options.get("again"):
            message.options.update(self.options, again=True)
            broker.enqueue(message)


def test_an_error_that_cannot_be_printed_is_retried_as_any_other(server: Server) -> None:
    broker = new_broker(server.url, middleware=[Again()])
    tries: list[int] = []

    @dramatiq.actor
    def fail() -> None:
        tries.append(1)
        raise Unprintable

    fail.send()
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    assert len(tries) == 2
    assert broker.core.stats("default").counters["retried"] == 1
    broker.close()


def test_a_message_that_does_not_decode_is_dead_though_the_error_cannot_be_printed(broker: RelayBroker) -> None:
    class Picky(JSONEncoder):
        def decode(self, data: bytes) -> Any:
            raise Unprintable

    broker.enqueue(message())
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(Picky())
    try:
        consumer = broker.consume("default", timeout=50)
        assert next(consumer) is None
        consumer.close()
    finally:
        dramatiq.set_encoder(before)
    assert [job.reason for job in broker.core.dead("default")] == ["undecodable"]


@pytest.mark.parametrize("how", ["ack", "nack"])
def test_what_cannot_be_settled_for_an_unknown_reason_is_given_up_and_comes_again(
    server: Server, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = new_broker(server.url, lease=3.0)
    broker.enqueue(message())
    consumer = broker.consume("default", timeout=30_000)
    held = taken(consumer)
    held.pending = broker.core.operations.nack_of(held.lease.job, "a retry that could not be sent")

    def broken(*args: Any) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(broker.core, "finish", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            getattr(consumer, how)(held)
    assert held.settled
    assert taken(consumer).lease.job.deliveries == 2  # although `held` is still referred to, as by Dramatiq's threads
    consumer.close()
    broker.close()


# a server that refuses for a while


class Refusal:
    """What an administrator does by mistake, and mends."""

    def __init__(self, server: AclServer, how: str = "auth") -> None:
        self.server = server
        self.how = how

    def begin(self) -> None:
        if self.how == "perm":
            self.server.cli("ACL", "SETUSER", self.server.user, "-evalsha")
            return
        if self.how == "auth":
            self.server.cli("ACL", "SETUSER", self.server.user, "off")
        else:
            self.server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        self.server.cli("CLIENT", "KILL", "USER", self.server.user)

    def end(self) -> None:
        self.server.cli("ACL", "LOAD")
        self.server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")


@pytest.fixture
def refusal(acl_server: AclServer) -> Iterator[Refusal]:
    refusal = Refusal(acl_server)
    yield refusal
    refusal.end()


@pytest.fixture
def guarded(acl_server: AclServer) -> Iterator[RelayBroker]:
    """On a server that lets in by password."""
    broker = new_broker(acl_server.url)
    yield broker
    broker.close()


@pytest.mark.parametrize("how", ["auth", "perm", "policy"])
def test_a_worker_goes_on_when_the_server_takes_its_commands_again(
    guarded: RelayBroker, refusal: Refusal, how: str
) -> None:
    refusal.how = how
    ran: list[int] = []
    started, let_go = threading.Event(), threading.Event()

    @dramatiq.actor
    def note(x: int) -> None:
        started.set()
        let_go.wait(30)
        ran.append(x)

    for x in range(4):
        note.send(x)
    with running(guarded, threads=1) as worker:
        assert started.wait(30)
        eventually(lambda: guarded.held() == 2, "as many as it may hold")
        thread = worker.consumers["default"]
        first = thread.consumer
        refusal.begin()
        let_go.set()  # the consumer is to send the ack, and is refused
        eventually(lambda: thread.consumer is not first or not thread.is_alive(), "it was refused")
        refusal.end()
        guarded.join("default", timeout=30_000)
        assert thread.is_alive()
    assert sorted(ran) == [0, 1, 2, 3]


def test_a_message_that_failed_during_a_refusal_is_retried_without_waiting_for_another_message(
    guarded: RelayBroker, refusal: Refusal
) -> None:
    tries: list[int] = []
    seen = signals_of(guarded)

    @dramatiq.actor(min_backoff=1, max_backoff=1)
    def flaky() -> None:
        tries.append(1)
        if len(tries) == 1:
            refusal.begin()
            raise ValueError("first")

    flaky.send()
    with running(guarded, threads=1):
        eventually(lambda: seen.count("before_ack") > 1, "its end is told once more", seconds=10)
        refusal.end()
        guarded.join("default", timeout=30_000)
    assert len(tries) == 2
    assert guarded.core.stats("default").counters["retried"] == 1


def test_the_next_step_of_a_pipeline_is_not_lost_in_a_refusal(guarded: RelayBroker, refusal: Refusal) -> None:
    steps: list[str] = []
    seen = signals_of(guarded)

    @dramatiq.actor
    def first() -> int:
        steps.append("first")
        if len(steps) == 1:
            refusal.begin()
        return 1

    @dramatiq.actor
    def second(x: int) -> None:
        steps.append("second")

    (first.message() | second.message()).run()
    with running(guarded, threads=1):
        eventually(lambda: seen.count("before_ack") > 1, "its end is told once more", seconds=10)
        refusal.end()
        guarded.join("default", timeout=30_000)
    assert steps == ["first", "first", "second"]


@pytest.mark.parametrize(("how", "error"), [("auth", AuthError), ("perm", PermissionDenied)])
def test_who_sends_is_told_of_a_refusal_by_its_name(
    guarded: RelayBroker, refusal: Refusal, how: str, error: type[StoreError]
) -> None:
    refusal.how = how
    refusal.begin()
    with pytest.raises(error):
        guarded.enqueue(message())
    with pytest.raises(error):
        guarded.join("default", timeout=30_000)


@pytest.mark.parametrize("error", [AuthError("refused"), Unavailable("away"), RuntimeError("a bug")])
def test_closing_a_consumer_raises_only_what_dramatiqs_threads_survive(
    broker: RelayBroker, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(2):
        broker.enqueue(message(n))
    consumer = broker.consume("default", prefetch=2)
    taken(consumer)

    def fail(*args: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(broker.core, "release", fail)
        with pytest.raises(ConnectionClosed, match=str(error)):
            consumer.close()
    consumer.close()


# and the rest


def test_a_retry_waits_for_the_eta_that_middleware_sets(server: Server) -> None:
    eta = int(time.time() * 1000) + 3_600_000
    broker = new_broker(server.url, middleware=[Again(eta=eta)])
    seen = signals_of(broker)

    @dramatiq.actor
    def fail() -> None:
        raise ValueError

    fail.send()
    with running(broker, threads=1):
        eventually(lambda: "after_ack" in seen, "it has run")
        assert broker.get_queue_message_counts("default") == (0, 1, 0)
    (job,) = broker.core.jobs("default", "delayed")
    assert job.due_at == pytest.approx(eta / 1000, abs=30)
    broker.close()


def test_a_heartbeat_that_could_not_be_started_is_started_by_the_next_consumer(
    broker: RelayBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError):
            broker.consume("default")
    broker.consume("default").close()
    assert [one.name for one in set(threading.enumerate()) - before] == ["relay-heartbeat"]


class Interrupt(BaseException):
    """As Dramatiq raises it in the midst of a thread that runs for too long, or at a shutdown."""


class InterruptedLock:
    """A lock, after whose n-th release the interrupt comes."""

    def __init__(self, lock: Any, n: int) -> None:
        self.lock = lock
        self.left = n

    def __enter__(self) -> Any:
        return self.lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.lock.__exit__(*error)
        self.left -= 1
        if self.left == 0:
            raise Interrupt


@pytest.mark.parametrize("n", range(1, 5))
def test_an_interrupt_among_the_acks_keeps_none_of_them_from_the_store(server: Server, n: int) -> None:
    with relay_core.Broker(server.url) as core:
        core.enqueue_many("q", [b"1", b"2", b"3"])
        first, *others = core.claim("q", 3)
        line = Line(core, "q", Gate(core.settings))
        line._lock = InterruptedLock(line._lock, n)  # type: ignore[assignment]
        with pytest.raises(Interrupt):
            line.ack(first)
        for job in others:
            line.ack(job)
        stats = core.stats("q")
        assert (stats.inflight, stats.counters["processed"]) == (0, 3)
        assert not line.unsent


def test_a_worker_that_ends_waits_once_for_a_store_that_is_away_and_not_once_for_each_queue(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = new_broker(server.url, lease=2.0, socket_timeout=1.0, retry_for=0.1)
    queues = ("default", "q1", "q2", "q3")
    started, let_go = threading.Event(), threading.Event()

    def busy() -> None:
        started.set()
        let_go.wait(30)

    for queue in queues:
        actor = dramatiq.actor(busy, actor_name=queue, queue_name=queue)
        for _ in range(2):
            actor.send()
    tried: list[str] = []
    release = broker.core.release

    def recorded(jobs: Any) -> Any:
        tried.append("release")
        return release(jobs)

    monkeypatch.setattr(broker.core, "release", recorded)
    worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
    worker.start()
    assert started.wait(30)
    eventually(lambda: broker.held() == 2 * len(queues), "all are prefetched")
    server.pause()
    worker.stop(timeout=1_000)
    server.resume()
    let_go.set()
    assert len(tried) <= 1
    ran = [broker.core.claim(queue, 1, wait=10) for queue in queues]
    assert all(ran), "what was not told of comes back after its lease"
    broker.close()


def test_acks_that_a_worker_could_not_send_when_it_ended_are_sent_when_its_broker_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = new_broker(server.url, socket_timeout=1.0, retry_for=0.1)
    broker.declare_queue("other")
    consumers = [broker.consume(queue, prefetch=2) for queue in ("default", "other")]
    for consumer in consumers:
        for n in range(2):
            broker.enqueue(message(n, queue=consumer.queue_name))
    held = [taken(consumer) for consumer in consumers]
    worker = dramatiq.Worker(broker)
    broker.emit_before("worker_shutdown", worker)
    server.pause()
    for consumer, one in zip(consumers, held, strict=True):
        with pytest.raises(ConnectionClosed):
            consumer.ack(one)
    with monkeypatch.context() as patch:
        for name in ("ack_many", "release"):
            patch.setattr(broker.core, name, None)
        for consumer in consumers:
            consumer.close()
    broker.emit_after("worker_shutdown", worker)
    server.resume()
    for n in range(2):
        broker.enqueue(message(n, queue="later"))
    broker.declare_queue("later")
    later = broker.consume("later", prefetch=2)
    taken(later)
    later.close()
    assert broker.core.stats("later").ready == 1, "who comes after it hands back as ever"
    broker.close()
    with relay_core.Broker(server.url) as core:
        assert [core.stats(one.queue_name).counters["processed"] for one in held] == [1, 1]


def test_a_worker_that_ends_leaves_to_others_what_it_has_not_started(server: Server) -> None:
    let_go, started = threading.Event(), threading.Event()
    ran: list[tuple[str, str]] = []
    old, new = new_broker(server.url), new_broker(server.url)
    for broker, name in ((old, "old"), (new, "new")):

        def note(what: str, name: str = name) -> None:
            ran.append((name, what))

        def long() -> None:
            started.set()
            let_go.wait(60)

        dramatiq.actor(note, broker=broker)
        dramatiq.actor(long, broker=broker)
    old.enqueue(message(name="long"))
    old.enqueue(message("fetched", name="note"))
    worker = dramatiq.Worker(old, worker_threads=1, worker_timeout=100)
    worker.start()
    assert started.wait(30)
    eventually(lambda: old.held() == 2, "one runs, one is fetched")
    stop = threading.Thread(target=worker.stop)
    stop.start()
    try:
        eventually(lambda: old.held() == 1, "what was fetched is handed back")
        for n in range(4):
            new.enqueue(message(f"later {n}", name="note"))
        with running(new):
            eventually(lambda: len(ran) == 5, "the others run elsewhere, while the old worker is still busy")
        assert stop.is_alive()
        assert new.core.stats("default").counters["claimed"] == 1 + 1 + 5, "nor has it claimed any"
    finally:
        let_go.set()
        stop.join(30)
    assert {name for name, _what in ran} == {"new"}
    assert new.core.stats("default").inflight == 0
    with running(old):
        old.enqueue(message("again", name="note"))
        eventually(lambda: ran[-1] == ("old", "again"), "another worker of the same broker claims as ever")
    old.close()
    new.close()


def test_middleware_that_heard_of_a_message_hears_that_it_is_skipped_though_its_lease_was_lost_meanwhile(
    broker: RelayBroker,
) -> None:
    @dramatiq.actor(broker=broker, actor_name="any")
    def work() -> None:
        heard.append("run")

    class Skip(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            if not skipped:
                skipped.append(message)
                message.lease.lost = True  # as a heartbeat finds it
                raise SkipMessage

        def after_skip_message(self, broker: Any, message: Any) -> None:
            broker.core.release([message.lease.job])  # at once, not after its lease

    skipped: list[Any] = []
    heard = signals_of(broker)
    broker.add_middleware(Skip())
    broker.enqueue(message())
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    ours = ("before_process_message", "after_skip_message", "run", "after_process_message")
    assert [name for name in heard if name in ours] == [ours[0], ours[1], ours[0], ours[2], ours[3]]


def test_a_worker_that_has_ended_takes_nothing_of_a_queue_that_is_declared_later(broker: RelayBroker) -> None:
    ran: list[int] = []
    with running(broker, threads=1):
        pass
    dramatiq.actor(ran.append, broker=broker, actor_name="any", queue_name="later")
    for n in range(6):
        broker.enqueue(message(n, queue="later"))
    with running(broker, threads=1):
        broker.join("later", timeout=30_000)
    assert sorted(ran) == list(range(6))
