"""RelayBroker under Dramatiq's own Worker, in this process."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.encoder import Encoder, MessageData
from dramatiq.errors import ConnectionClosed, QueueJoinTimeout, QueueNotFound
from dramatiq.message import get_encoder, set_encoder
from dramatiq.middleware import CurrentMessage, Middleware
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

import relay_core
from relay_adapters.dramatiq import RelayBroker
from relay_core.errors import InvalidArgument
from relay_core.testing import advance
from tests.dramatiq_workers import running, signals_of
from tests.servers import Server, eventually


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = RelayBroker(url=server.url, lease=1.0, max_deliveries=2)
    dramatiq.set_broker(broker)
    yield broker
    broker.close()


def test_messages_run_once_each_and_leave_nothing_in_the_store(broker: RelayBroker) -> None:
    ran: list[int] = []

    @dramatiq.actor
    def note(x: int) -> None:
        ran.append(x)

    with running(broker):
        for x in range(200):
            note.send(x)
        broker.join("default", timeout=30_000)
    assert sorted(ran) == list(range(200))
    assert broker.get_queue_message_counts("default") == (0, 0, 0)
    assert broker.core.stats("default").counters["processed"] == 200
    assert broker.core.audit("default", repair=False).clean


def test_declaring_a_queue_twice_emits_its_signals_once_and_does_no_io() -> None:
    broker = RelayBroker(url="relay://127.0.0.1:1/0")  # nothing listens there
    seen = signals_of(broker)
    broker.declare_queue("mail")
    broker.declare_queue("mail")
    assert seen == ["before_declare_queue", "after_declare_queue"]
    assert broker.get_declared_queues() == {"mail"}
    assert broker.get_declared_delay_queues() == set()


def test_a_queue_name_that_the_store_cannot_take_is_refused_when_it_is_declared() -> None:
    broker = RelayBroker(url="relay://127.0.0.1:1/0")
    with pytest.raises(InvalidArgument, match="255"):
        broker.declare_queue("q" * 300)
    assert broker.get_declared_queues() == set()


def test_a_delay_waits_in_the_store_and_the_delivered_message_is_to_run_at_once(broker: RelayBroker) -> None:
    ran: list[tuple[float, dict[str, Any], str]] = []
    broker.add_middleware(CurrentMessage())

    @dramatiq.actor
    def note() -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        ran.append((time.monotonic(), message.options, message.queue_name))

    with running(broker) as worker:
        started = time.monotonic()
        sent = note.send_with_options(delay=3_600_400)
        assert broker.get_queue_message_counts("default") == (0, 1, 0)
        assert list(worker.consumers) == ["default"]
        advance(broker.core, 3600, "default")
        broker.join("default", timeout=30_000)
    assert sent.queue_name == "default"
    assert sent.options["eta"] >= sent.message_timestamp + 3_600_400
    [(at, options, queue_name)] = ran
    assert at - started >= 0.4
    assert "eta" not in options, "the worker would have waited for it"
    assert queue_name == "default"
    assert broker.core.stats("default").counters["enqueued"] == 1, "the worker parked it, and sent it anew"


@pytest.mark.parametrize("delay", [math.nan, math.inf])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "in a batch"])
def test_a_delay_that_is_no_time_is_refused(broker: RelayBroker, delay: float, together: bool) -> None:
    @dramatiq.actor
    def note() -> None: ...

    refused = pytest.raises(InvalidArgument, match=f"delay must be a finite number of seconds, got {delay}")
    with broker.batch() if together else nullcontext(), refused:
        note.send_with_options(delay=delay)  # type: ignore[arg-type]
    assert broker.get_queue_message_counts("default") == (0, 0, 0)


def test_a_message_whose_retry_has_a_delay_that_is_no_time_is_kept_among_the_dead(broker: RelayBroker) -> None:
    ran: list[int] = []

    @dramatiq.actor
    def fail() -> None:
        ran.append(1)
        raise dramatiq.Retry(delay=math.nan)  # type: ignore[arg-type]

    fail.send()
    with running(broker):
        eventually(lambda: broker.get_queue_message_counts("default") == (0, 0, 1), "it is dead")
    (job,) = broker.core.dead("default")
    assert "cannot be retried" in (job.error or "")
    assert ran == [1]


def test_an_eta_that_is_no_time_is_none(broker: RelayBroker) -> None:
    @dramatiq.actor
    def note() -> None: ...

    note.send_with_options(eta=math.nan)
    assert broker.get_queue_message_counts("default") == (1, 0, 0)


def test_an_eta_that_the_user_set_waits_in_the_store_too(broker: RelayBroker) -> None:
    ran = threading.Event()

    @dramatiq.actor
    def note() -> None:
        ran.set()

    note.send_with_options(eta=int(time.time() * 1000) + 3_600_000)
    assert broker.get_queue_message_counts("default") == (0, 1, 0)
    with running(broker):
        assert not ran.is_set()
        advance(broker.core, 3600, "default")
        assert ran.wait(30)


def test_a_delayed_message_that_a_redis_broker_returned_is_sent_to_the_queue_that_workers_read(
    broker: RelayBroker, server: Server
) -> None:
    ran = threading.Event()

    @dramatiq.actor
    def note() -> None:
        ran.set()

    client = redis.Redis(unix_socket_path=str(server.socket))
    kept = RedisBroker(client=client, namespace="old").enqueue(note.message(), delay=1).encode()
    client.close()
    message = dramatiq.Message.decode(kept)
    assert message.queue_name == "default.DQ"
    assert broker.enqueue(message).queue_name == "default"
    with running(broker):
        assert ran.wait(30)


def test_a_queue_that_is_declared_keeps_its_name_whatever_that_ends_with(broker: RelayBroker) -> None:
    @dramatiq.actor(queue_name="mail.DQ")
    def note() -> None: ...

    assert note.send().queue_name == "mail.DQ"
    assert broker.get_queue_message_counts("mail.DQ") == (1, 0, 0)


@pytest.mark.parametrize("eta", [None, "tomorrow", 0, -5.5])
def test_an_eta_that_is_none_or_past_or_no_number_means_now(broker: RelayBroker, eta: Any) -> None:
    ran = threading.Event()

    @dramatiq.actor
    def note() -> None:
        ran.set()

    note.send_with_options(eta=eta)
    with running(broker):
        assert ran.wait(30)


def test_broker_priority_orders_in_the_store_higher_first(broker: RelayBroker) -> None:
    ran: list[str] = []

    @dramatiq.actor
    def note(name: str) -> None:
        ran.append(name)

    @dramatiq.actor(broker_priority=5)
    def urgent(name: str) -> None:
        ran.append(name)

    note.send("plain")
    urgent.send("actor")
    note.send_with_options(args=("message",), broker_priority=255)
    urgent.send_with_options(args=("lowered",), broker_priority=1)
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    assert ran == ["message", "actor", "lowered", "plain"]


def test_a_priority_that_is_no_number_is_refused_with_its_value(broker: RelayBroker) -> None:
    @dramatiq.actor
    def note() -> None: ...

    with pytest.raises(InvalidArgument, match="-1"):
        note.send_with_options(broker_priority=-1)
    with pytest.raises(InvalidArgument, match="high"):
        note.send_with_options(broker_priority="high")


def test_a_failing_message_is_retried_in_place_with_its_count_and_traceback(broker: RelayBroker) -> None:
    tries: list[dict[str, Any]] = []
    broker.add_middleware(CurrentMessage())

    @dramatiq.actor(min_backoff=1, max_backoff=2)
    def flaky() -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        tries.append(dict(message.options))
        if len(tries) < 4:
            raise ValueError(f"try {len(tries)}")

    sent = flaky.send()
    with running(broker):
        broker.join("default", timeout=30_000)
    assert [options.get("retries", 0) for options in tries] == [0, 1, 2, 3]
    assert "ValueError: try 3" in tries[3]["traceback"]
    assert {options["relay_job_id"] for options in tries} == {sent.options["relay_job_id"]}
    counters = broker.core.stats("default").counters
    assert (counters["enqueued"], counters["retried"], counters["processed"]) == (1, 3, 1)


def test_a_retry_emits_the_signals_of_an_enqueue_and_an_ack_as_ever(broker: RelayBroker) -> None:
    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
    def fail() -> None:
        raise ValueError("no")

    seen = signals_of(broker)
    fail.send()
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    per_message = [name for name in seen if name.split("_", 1)[1] in ("enqueue", "process_message", "ack", "nack")]
    assert per_message == [
        "before_enqueue", "after_enqueue",
        "before_process_message", "after_process_message", "before_enqueue", "after_enqueue", "before_ack", "after_ack",
        "before_process_message", "after_process_message", "before_nack", "after_nack",
    ]  # fmt: skip


def test_more_retries_than_relays_own_policy_allows_are_up_to_dramatiq(server: Server) -> None:
    policy = relay_core.RetryPolicy(max_retries=1)
    broker = RelayBroker(url=server.url, retry=policy)
    dramatiq.set_broker(broker)
    tries: list[int] = []

    @dramatiq.actor(max_retries=5, min_backoff=1, max_backoff=1)
    def fail() -> None:
        tries.append(1)
        raise ValueError("no")

    fail.send()
    with running(broker):
        broker.join("default", timeout=30_000)
    assert len(tries) == 6
    broker.close()


def test_used_up_retries_end_in_dead_with_the_reason_error_and_traceback(broker: RelayBroker) -> None:
    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
    def fail(x: int) -> None:
        raise ValueError(f"no {x}")

    fail.send(7)
    with running(broker):
        broker.join("default", timeout=30_000)
    assert broker.get_queue_message_counts("default") == (0, 0, 1)
    [dead] = broker.core.dead("default")
    assert dead.reason == "failed"
    assert dead.error is not None
    assert dead.error.startswith("ValueError('no 7')\nTraceback")
    message = dramatiq.Message.decode(dead.payload)
    assert message.options["retries"] == 2
    assert "ValueError: no 7" in message.options["traceback"]
    summary = broker.core.plugins.describe(dead)
    assert summary is not None
    assert (summary.name, summary.args, summary.retries) == ("fail", "7", 2)


def test_a_message_that_a_middleware_rejects_goes_to_dead_as_rejected(broker: RelayBroker) -> None:
    class Reject(Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
            message.fail()

    broker.add_middleware(Reject())

    @dramatiq.actor
    def note() -> None: ...

    note.send()
    with running(broker):
        broker.join("default", timeout=30_000)
    assert [job.reason for job in broker.core.dead("default")] == ["rejected"]


def test_a_message_for_an_unknown_actor_goes_to_dead(broker: RelayBroker) -> None:
    broker.declare_queue("default")
    message = broker.enqueue(dramatiq.Message("default", "nobody", (), {}, {}))
    with running(broker):
        broker.join("default", timeout=30_000)
    [dead] = broker.core.dead("default")
    assert dead.id == message.options["relay_job_id"]
    assert "ActorNotFound" in (dead.error or "")


def test_a_body_that_does_not_decode_goes_to_dead_and_its_neighbours_run(broker: RelayBroker) -> None:
    ran: list[int] = []

    @dramatiq.actor
    def note(x: int) -> None:
        ran.append(x)

    note.send(1)
    broker.core.enqueue("default", b"\xff not a message", headers={"relay_adapter": "dramatiq"})
    broker.core.enqueue("default", b'{"actor_name": "note"}')
    note.send(2)
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    assert ran == [1, 2]
    assert [job.reason for job in broker.core.dead("default")] == ["undecodable", "undecodable"]


def test_an_encoder_may_make_text(broker: RelayBroker) -> None:
    class Text(Encoder):
        def encode(self, data: MessageData) -> bytes:
            return json.dumps(data, ensure_ascii=False)  # type: ignore[return-value]

        def decode(self, data: bytes) -> MessageData:
            return json.loads(data)  # type: ignore[no-any-return]

    ran: list[str] = []

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def note(x: str) -> None:
        ran.append(x)
        raise ValueError

    before = get_encoder()
    set_encoder(Text())
    try:
        note.send("é")
        dramatiq.group([note.message("ü")]).run()
        with running(broker):
            broker.join("default", timeout=30_000)
    finally:
        set_encoder(before)
    assert sorted(ran) == ["é", "é", "ü", "ü"]
    assert [json.loads(job.payload)["options"]["retries"] for job in broker.core.dead("default")] == [2, 2]


def test_a_message_that_killed_its_workers_fails_through_the_middleware(broker: RelayBroker, server: Server) -> None:
    backend = StubBackend()
    broker.add_middleware(Results(backend=backend))  # type: ignore[no-untyped-call]
    told = threading.Event()

    @dramatiq.actor
    def on_failure(message: dict[str, Any], error: dict[str, str]) -> None:
        assert error["type"] == "WorkerLost"
        told.set()

    @dramatiq.actor(store_results=True, on_failure="on_failure", queue_name="risky")
    def deadly() -> None:
        raise AssertionError("its workers are gone")

    sent = deadly.send()
    gone = relay_core.Broker(server.url, lease=0.1)
    for _ in range(2):  # two workers that die with it
        assert len(gone.claim("risky", wait=5)) == 1
    seen = signals_of(broker)
    with running(broker):
        eventually(lambda: broker.get_queue_message_counts("risky")[2] == 1, "the message goes to dead")
        with pytest.raises(ResultFailure, match="WorkerLost"):
            sent.get_result(backend=backend, block=True, timeout=30_000)
        assert told.wait(30)
    assert [name for name in seen if name.endswith("nack")] == ["before_nack", "after_nack"]
    assert [job.reason for job in broker.core.dead("risky")] == ["max_deliveries"]
    gone.close()


def test_a_result_backend_that_is_away_as_a_message_goes_to_dead_is_told_later(
    broker: RelayBroker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(StubBackend):
        away, asked = True, 0

        def store_exception(self, *args: Any) -> None:
            self.asked += 1
            if self.away:
                raise ConnectionError("no backend")
            super().store_exception(*args)  # type: ignore[no-untyped-call]

    monkeypatch.setattr("relay_core.operations.burials.LOOK_EVERY", 0.1)
    backend = Away()
    broker.add_middleware(Results(backend=backend))  # type: ignore[no-untyped-call]

    @dramatiq.actor(store_results=True, queue_name="risky")
    def deadly() -> None:
        raise AssertionError("its workers are gone")

    sent = deadly.send()
    with relay_core.Broker(server.url, lease=0.1) as gone:
        for _ in range(2):  # two workers that die with it
            assert len(gone.claim("risky", wait=5)) == 1
    seen = signals_of(broker)
    with running(broker):
        eventually(lambda: backend.asked, "the backend to be asked")
        advance(broker.core, 600, "risky")
        eventually(lambda: backend.asked == 2, "it to be asked again")
        backend.away = False
        advance(broker.core, 600, "risky")
        with pytest.raises(ResultFailure, match="WorkerLost"):
            sent.get_result(backend=backend, block=True, timeout=30_000)
        noted = broker.core.settings.keys("risky").untold
        eventually(lambda: not broker.core.store.raw("ZCARD", noted), "no note is left")
    assert [name for name in seen if name.endswith("nack")] == ["before_nack", "after_nack"]


def test_join_counts_what_is_delayed_and_what_runs(broker: RelayBroker) -> None:
    started, let_go = threading.Event(), threading.Event()

    @dramatiq.actor
    def slow() -> None:
        started.set()
        let_go.wait(60)

    slow.send_with_options(delay=60_000)
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=50)
    broker.flush("default")
    broker.join("default", timeout=50)
    slow.send()
    with running(broker):
        assert started.wait(30)
        with pytest.raises(QueueJoinTimeout):
            broker.join("default", timeout=50)
        let_go.set()
        broker.join("default", timeout=30_000)


def test_flush_all_drops_ready_delayed_and_dead_of_every_queue(broker: RelayBroker) -> None:
    @dramatiq.actor(queue_name="one", max_retries=0)
    def one() -> None:
        raise ValueError("no")

    @dramatiq.actor(queue_name="two")
    def two() -> None: ...

    one.send()
    with running(broker):
        broker.join("one", timeout=30_000)
    one.send()
    two.send()
    two.send_with_options(delay=60_000)
    assert broker.get_queue_message_counts("one") == (1, 0, 1)
    broker.flush_all()
    assert broker.get_queue_message_counts("one") == (0, 0, 0)
    assert broker.get_queue_message_counts("two") == (0, 0, 0)


def test_a_queue_that_was_not_declared_can_be_neither_consumed_nor_joined(broker: RelayBroker) -> None:
    with pytest.raises(QueueNotFound):
        broker.consume("nowhere")
    with pytest.raises(QueueNotFound):
        broker.join("nowhere", timeout=10)


def test_a_store_that_is_away_is_a_connection_error_of_dramatiqs() -> None:
    broker = RelayBroker(url="relay://127.0.0.1:1/0", retry_for=0, connect_timeout=0.2)
    broker.declare_queue("default")
    with pytest.raises(ConnectionClosed):
        broker.enqueue(dramatiq.Message("default", "any", (), {}, {}))
    with pytest.raises(ConnectionClosed):
        next(broker.consume("default", timeout=50))
    for call in (broker.get_queue_message_counts, broker.flush, lambda queue: broker.join(queue, timeout=50)):
        with pytest.raises(ConnectionClosed):
            call("default")


def test_leases_are_kept_while_the_worker_is_paused(broker: RelayBroker, server: Server) -> None:
    ran: list[int] = []
    started, let_go = threading.Event(), threading.Event()

    @dramatiq.actor
    def slow(x: int) -> None:
        started.set()
        let_go.wait(60)
        ran.append(x)

    for x in range(4):
        slow.send(x)
    rival = relay_core.Broker(server.url)
    with running(broker, threads=1) as worker:  # one runs, one is prefetched
        assert started.wait(30)
        eventually(lambda: broker.core.stats("default").inflight == 2, "one runs, one is prefetched")
        pausing = threading.Thread(target=worker.pause)
        pausing.start()
        assert len(rival.claim("default", 2)) == 2
        assert not rival.claim("default", 2, wait=2.5), "a lease of 1 s ended under a paused worker"
        let_go.set()
        pausing.join()
        worker.resume()
        eventually(lambda: len(ran) == 2, "both ran")
    rival.close()


def test_a_message_whose_lease_was_lost_before_it_started_is_not_run(server: Server) -> None:
    ran: list[int] = []
    backend = StubBackend()
    broker = RelayBroker(url=server.url, lease=3.0)
    dramatiq.set_broker(broker)
    broker.add_middleware(Results(backend=backend))  # type: ignore[no-untyped-call]
    started, let_go = threading.Event(), threading.Event()

    @dramatiq.actor(store_results=True)
    def note(x: int) -> None:
        ran.append(x)
        started.set()
        let_go.wait(60)

    first, second = note.send(0), note.send(1)
    with running(broker, threads=1) as worker:
        assert started.wait(30)
        eventually(lambda: broker.core.stats("default").inflight == 2, "the second is prefetched")
        # the store takes it away, as it does from a process that slept
        assert broker.core.cancel("default", second.options["relay_job_id"]) == "inflight"
        owners = broker.core.settings.keys("default").owners
        server.cli("HSET", owners, second.options["relay_job_id"], "2:99:other 0 h")
        line = worker.consumers["default"].consumer._line
        eventually(lambda: any(lease.lost for lease in line.leases()), "a heartbeat to find out")
        let_go.set()
        first.get_result(backend=backend, block=True, timeout=30_000)
    assert ran == [0]
    with pytest.raises(dramatiq.results.ResultMissing):
        second.get_result(backend=backend)
    broker.close()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("host", "write it into url: relay://user:password@host:port/db"),
        ("heartbeat_timeout", "it is lease here, in seconds"),
        ("dead_message_ttl", "it is keep_dead here, in seconds"),
        ("namespace", "it is prefix here"),
        ("requeue_deadline", "leave it out"),
    ],
)
def test_an_option_of_the_redis_broker_is_told_its_counterpart(option: str, said: str) -> None:
    with pytest.raises(TypeError, match=rf"^RelayBroker has no option '{option}' of RedisBroker; {said}"):
        RelayBroker(**{option: 1})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("max_priority", "leave it out: broker_priority goes from 0 to 9"),
        ("confirm_delivery", "leave it out: a send returns when the store has the message"),
        ("connection_attempts", "commands are repeated for retry_for seconds"),
        ("ssl_options", "write relays:// in url"),
    ],
)
def test_an_option_of_the_rabbitmq_broker_is_told_its_counterpart(option: str, said: str) -> None:
    with pytest.raises(TypeError, match=rf"^RelayBroker has no option '{option}' of RabbitmqBroker; {said}"):
        RelayBroker(**{option: 1})


def test_an_unknown_option_is_told_the_nearest_one() -> None:
    for given, near in (("leese", "lease"), ("metrics_adr", "metrics_addr"), ("max_deliverys", "max_deliveries")):
        with pytest.raises(TypeError, match=rf"^RelayBroker has no option '{given}'; did you mean '{near}'\?$"):
            RelayBroker(**{given: 1})
    with pytest.raises(TypeError, match=r"no option 'encoding'; it has .* middleware, plugins, prefix,"):
        RelayBroker(encoding="utf-8")
    with pytest.raises(TypeError, match=r"no option 'ssl_ca_certs'; write it as ssl=\{'ssl_ca_certs': ...\}"):
        RelayBroker(ssl_ca_certs="x")
    with pytest.raises(TypeError, match="plugins must be a list"):
        RelayBroker(plugins=7)  # type: ignore[arg-type]


def test_two_brokers_in_one_process_keep_apart(server: Server) -> None:
    one = RelayBroker(url=server.url, prefix="one")
    two = RelayBroker(url=server.url, prefix="two")
    ran: list[str] = []

    def add(broker: RelayBroker, name: str) -> Any:
        @dramatiq.actor(broker=broker)
        def note() -> None:
            ran.append(name)

        return note

    of_one, of_two = add(one, "one"), add(two, "two")
    with running(one), running(two):
        for _ in range(20):
            of_one.send()
            of_two.send()
        one.join("default", timeout=30_000)
        two.join("default", timeout=30_000)
    assert (ran.count("one"), ran.count("two")) == (20, 20)
    one.close()
    two.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork has no children of a fork")
def test_a_child_of_a_fork_sends_and_works_on_its_own_connections(broker: RelayBroker) -> None:
    @dramatiq.actor
    def note() -> None: ...

    note.send()
    broker.declare_queue("child")
    with running(broker, queues={"default"}):
        broker.join("default", timeout=30_000)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for _ in range(10):
                    note.send_with_options(delay=60_000)
                broker.core.enqueue("child", dramatiq.Message("child", "note", (), {}, {}).encode())
                consumer = broker.consume("child", timeout=5_000)
                message = next(consumer)
                assert message is not None
                consumer.ack(message)
                consumer.close()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        for _ in range(10):
            note.send_with_options(delay=60_000)
        assert os.waitpid(pid, 0)[1] == 0
    assert broker.get_queue_message_counts("default") == (0, 20, 0)
    assert broker.core.stats("child").counters["processed"] == 1


def test_nothing_is_lost_when_the_store_is_cut_between_a_failure_and_its_retry(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.1)
    broker = RelayBroker(url=server.url, lease=5, socket_timeout=1.0, retry_for=0.1)
    dramatiq.set_broker(broker)
    tries: list[int] = []
    cut = threading.Event()

    @dramatiq.actor(min_backoff=1, max_backoff=1)
    def flaky() -> None:
        tries.append(1)
        if len(tries) == 1:
            server.pause()
            cut.set()
            raise ValueError("first")

    flaky.send()
    with running(broker, threads=1) as worker:
        assert cut.wait(30)
        message = eventually_pending(worker)
        server.resume()
        broker.join("default", timeout=30_000)
    assert message.pending is None
    assert len(tries) == 2
    assert broker.core.stats("default").counters["retried"] == 1
    broker.close()


def eventually_pending(worker: dramatiq.Worker) -> Any:
    """The message whose retry could not be sent."""
    import gc

    from relay_adapters.dramatiq.message import RelayMessage

    found: list[RelayMessage] = []

    def look() -> bool:
        found[:] = [x for x in gc.get_objects() if isinstance(x, RelayMessage) and x.pending is not None]
        return bool(found)

    eventually(look, "a retry could not be sent")
    return found[0]


def test_an_actor_that_enqueues_its_own_message_by_hand_makes_a_new_job(broker: RelayBroker) -> None:
    ids: list[str] = []
    broker.add_middleware(CurrentMessage())

    @dramatiq.actor
    def again() -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        ids.append(message.options["relay_job_id"])
        if len(ids) == 1:
            broker.enqueue(message)

    again.send()
    with running(broker):
        broker.join("default", timeout=30_000)
    assert len(set(ids)) == 2
    assert broker.core.stats("default").counters["processed"] == 2
