"""Stock middleware, callbacks, compositions, results and rate limiters on RelayBroker, as on Dramatiq's own brokers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AgeLimit, AsyncIO, Callbacks, CurrentMessage, GroupCallbacks, Pipelines, Retries
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.rate_limits.backends import RedisBackend as LimitsInRedis
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend as ResultsInRedis

from relay_adapters.dramatiq import RelayBroker
from tests.dramatiq_workers import running, signals_of
from tests.servers import Server


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = RelayBroker(url=server.url, lease=2.0)
    dramatiq.set_broker(broker)
    yield broker
    broker.close()


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    client = redis.Redis(unix_socket_path=str(server.socket))
    yield client
    client.close()


def finish(broker: dramatiq.Broker, threads: int = 2) -> None:
    """Run all that is queued, and all that comes of it."""
    with running(broker, threads=threads) as worker:
        broker.join("default", timeout=30_000)
        worker.join()


# signals


def success() -> None: ...


def failure() -> None:
    raise ValueError("no")


def skipped() -> None: ...


class SkipThem(dramatiq.Middleware):
    def before_process_message(self, broker: Any, message: Any) -> None:
        if message.actor_name == "skipped":
            raise dramatiq.middleware.SkipMessage


@pytest.mark.parametrize("work", [success, failure, skipped])
def test_the_signals_of_a_message_come_in_the_order_in_which_a_redis_broker_emits_them(
    work: Callable[[], None], broker: RelayBroker, client: redis.Redis
) -> None:
    stock = RedisBroker(client=client)  # type: ignore[no-untyped-call]
    seen = []
    for one in (stock, broker):
        one.add_middleware(SkipThem())
        dramatiq.actor(work, broker=one, max_retries=0)
        names = signals_of(one)
        one.enqueue(dramatiq.Message("default", work.__name__, (), {}, {}))
        finish(one, threads=1)
        seen.append([name for name in names if not name.endswith(("_boot", "_shutdown")) and "declare" not in name])
    assert seen[0] == seen[1]
    assert seen[1][:2] == ["before_enqueue", "after_enqueue"]


def test_the_signals_of_declaring_and_of_a_worker_are_those_of_a_redis_broker_but_for_delay_queues(
    broker: RelayBroker, client: redis.Redis
) -> None:
    stock = RedisBroker(client=client)  # type: ignore[no-untyped-call]
    seen = []
    for one in (stock, broker):
        names = signals_of(one)
        dramatiq.actor(success, broker=one)
        finish(one, threads=1)
        seen.append(sorted(name for name in names if "delay_queue" not in name))
    # a RedisBroker has a second consumer thread per queue, for its delayed messages
    once = ["before_consumer_thread_shutdown", "after_consumer_thread_boot"]
    for name in {name for name in seen[0] if "consumer_thread" in name} | set(once):
        while seen[0].count(name) > seen[1].count(name):
            seen[0].remove(name)
    assert seen[0] == seen[1]
    assert "after_worker_boot" in seen[1]


def test_a_message_that_middleware_puts_in_the_place_of_another_is_the_one_that_runs(broker: RelayBroker) -> None:
    ran: list[str] = []

    class Decrypt(dramatiq.Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            message._message = message.copy(args=("plain",))  # Dramatiq offers no other way

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
    def work(text: str) -> None:
        ran.append(text)
        raise ValueError("no")

    broker.add_middleware(Decrypt())
    work.send("secret")
    finish(broker)
    assert ran == ["plain", "plain"]
    [letter] = broker.core.dead("default")
    assert dramatiq.Message.decode(letter.payload).args == ("plain",)


# retries, as the user configures them


def test_a_retries_middleware_that_the_user_made_is_the_one_that_decides(server: Server) -> None:
    broker = RelayBroker(url=server.url, middleware=[Retries(max_retries=2, min_backoff=1, max_backoff=1)])
    tries: list[int] = []

    @dramatiq.actor(broker=broker)
    def fail() -> None:
        tries.append(1)
        raise ValueError("no")

    fail.send()
    finish(broker)
    assert len(tries) == 3
    assert broker.core.stats("default").counters["retried"] == 2
    broker.close()


def test_without_a_retries_middleware_a_failure_is_acked_as_dramatiq_does(server: Server) -> None:
    broker = RelayBroker(url=server.url, middleware=[])
    tries: list[int] = []

    @dramatiq.actor(broker=broker)
    def fail() -> None:
        tries.append(1)
        raise ValueError("no")

    fail.send()
    finish(broker)
    assert (len(tries), broker.get_queue_message_counts("default")) == (1, (0, 0, 0))
    broker.close()


class Expected(Exception):
    pass


@pytest.mark.parametrize(
    ("options", "message", "error", "tries"),
    [
        ({"max_retries": 1}, {}, ValueError, 2),
        ({"max_retries": 5}, {"max_retries": 1}, ValueError, 2),
        ({"max_retries": 5, "throws": Expected}, {}, Expected, 1),
        ({"max_retries": 0, "retry_when": lambda n, error: n < 2}, {}, ValueError, 3),
        ({"max_retries": 5, "retry_when": lambda n, error: n < 2, "throws": Expected}, {}, Expected, 1),
        ({"max_retries": 1}, {"max_retries": 0}, ValueError, 1),
    ],
    ids=["actor", "message over actor", "throws", "retry_when over max", "throws over retry_when", "message says none"],
)
def test_who_decides_about_a_retry_is_as_dramatiq_says(
    broker: RelayBroker, options: dict[str, Any], message: dict[str, Any], error: type[Exception], tries: int
) -> None:
    ran: list[int] = []

    @dramatiq.actor(min_backoff=1, max_backoff=1, **options)
    def fail() -> None:
        ran.append(1)
        raise error("no")

    fail.send_with_options(**message)
    finish(broker)
    assert len(ran) == tries
    (dead,) = broker.core.dead("default")
    assert dead.reason == "failed"
    assert error.__name__ in (dead.error or "")


def test_retry_with_a_delay_waits_in_the_store_for_just_so_long(broker: RelayBroker) -> None:
    at: list[float] = []

    @dramatiq.actor(max_retries=1, min_backoff=60_000)
    def again() -> None:
        at.append(time.monotonic())
        if len(at) == 1:
            raise dramatiq.Retry("later", delay=300)

    again.send()
    finish(broker)
    assert len(at) == 2
    assert at[1] - at[0] >= 0.3


def test_on_failure_is_sent_at_each_failure_and_on_retry_exhausted_at_the_last(broker: RelayBroker) -> None:
    told: list[str] = []

    @dramatiq.actor
    def exhausted(message: dict[str, Any], info: dict[str, int]) -> None:
        told.append(f"exhausted after {info['retries']} of {info['max_retries']}")

    @dramatiq.actor
    def failed(message: dict[str, Any], error: dict[str, str]) -> None:
        told.append(f"{message['actor_name']} failed: {error['type']}")

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1, on_retry_exhausted="exhausted", on_failure="failed")
    def fail() -> None:
        raise ValueError("no")

    fail.send()
    finish(broker)
    assert sorted(told) == ["exhausted after 1 of 1", "fail failed: ValueError", "fail failed: ValueError"]


def test_a_message_past_its_age_is_not_run_and_goes_to_dead(broker: RelayBroker) -> None:
    ran: list[int] = []

    @dramatiq.actor(max_age=100)
    def late() -> None:
        ran.append(1)

    assert any(isinstance(one, AgeLimit) for one in broker.middleware)
    late.send_with_options(delay=200)
    finish(broker)
    assert ran == []
    assert [job.reason for job in broker.core.dead("default")] == ["rejected"]


# what follows a message


def test_callbacks_pipelines_with_a_delay_and_groups_run_to_their_end(broker: RelayBroker, client: redis.Redis) -> None:
    results = ResultsInRedis(client=client)
    broker.add_middleware(Results(backend=results))  # type: ignore[no-untyped-call]
    broker.add_middleware(GroupCallbacks(LimitsInRedis(client=client)))
    assert {Callbacks, Pipelines} <= {type(one) for one in broker.middleware}
    done: list[Any] = []

    @dramatiq.actor(store_results=True)
    def add(x: int, y: int) -> int:
        return x + y

    @dramatiq.actor
    def after(*args: Any) -> None:
        done.append(args)

    started = time.monotonic()
    pipe = add.message(1, 2) | add.message_with_options(args=(10,), delay=300) | add.message(100)
    group = dramatiq.group([add.message(x, x) for x in range(5)])
    group.add_completion_callback(after.message("group"))
    add.message_with_options(args=(1, 1), on_success="after")
    with running(broker):
        pipe.run()
        group.run()
        broker.enqueue(add.message_with_options(args=(1, 1), on_success="after"))
        assert pipe.get_result(block=True, timeout=30_000) == 113
        assert time.monotonic() - started >= 0.3
        assert sorted(group.get_results(block=True, timeout=30_000)) == [0, 2, 4, 6, 8]
        broker.join("default", timeout=30_000)
    assert ("group",) in done
    assert next(args for args in done if args != ("group",))[1] == 2


def test_async_actors_and_the_current_message(broker: RelayBroker) -> None:
    broker.add_middleware(AsyncIO())
    broker.add_middleware(CurrentMessage())
    seen: list[Any] = []

    @dramatiq.actor
    async def note(x: int) -> None:
        await asyncio.sleep(0.01)
        message = CurrentMessage.get_current_message()
        assert message is not None
        seen.append((x, message.args[0]))

    for x in range(5):
        note.send(x)
    finish(broker)
    assert sorted(seen) == [(x, x) for x in range(5)]


def test_a_time_limit_ends_a_message_that_takes_too_long(broker: RelayBroker) -> None:
    @dramatiq.actor(time_limit=50, max_retries=0)
    def slow() -> None:
        for _ in range(100):
            time.sleep(0.05)

    slow.send()
    with running(broker, threads=1):
        broker.emit_after("process_boot")  # starts the thread that watches the limits, as the command line does
        broker.join("default", timeout=30_000)
    assert [(job.error or "").split("(")[0] for job in broker.core.dead("default")] == ["TimeLimitExceeded"]


def test_a_shutdown_interrupts_who_asked_for_it_and_the_message_is_retried_later(broker: RelayBroker) -> None:
    started = threading.Event()

    @dramatiq.actor(notify_shutdown=True, min_backoff=60_000)
    def long() -> None:
        started.set()
        for _ in range(400):
            time.sleep(0.05)

    long.send()
    with running(broker, threads=1):
        assert started.wait(30)
    assert broker.get_queue_message_counts("default") == (0, 1, 0)
    (job,) = broker.core.jobs("default", "delayed")
    assert (job.error or "").splitlines()[-1].endswith("Shutdown")


def test_a_rate_limiter_holds_back_what_would_run_at_once(broker: RelayBroker, client: redis.Redis) -> None:
    mutex = ConcurrentRateLimiter(LimitsInRedis(client=client), "one-at-a-time", limit=1)
    now, most, ran = 0, 0, 0
    lock = threading.Lock()

    @dramatiq.actor(min_backoff=10, max_backoff=30, max_retries=1000)
    def alone() -> None:
        nonlocal now, most, ran
        with mutex.acquire():
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.01)
            with lock:
                now -= 1
                ran += 1

    for _ in range(10):
        alone.send()
    finish(broker, threads=4)
    assert (ran, most) == (10, 1)
    assert broker.core.stats("default").counters["enqueued"] == 10, "a message that was held back is the same job"


def test_actor_priority_orders_what_one_worker_has_fetched_lower_first(broker: RelayBroker) -> None:
    ran: list[str] = []
    started, let_go = threading.Event(), threading.Event()

    @dramatiq.actor(priority=0)
    def first() -> None:
        started.set()
        let_go.wait(60)

    @dramatiq.actor(priority=10)
    def later(x: int) -> None:
        ran.append(f"later {x}")

    @dramatiq.actor(priority=1)
    def sooner(x: int) -> None:
        ran.append(f"sooner {x}")

    first.send()
    with running(broker, threads=1) as worker:
        assert started.wait(30)
        worker.consumers["default"].consumer.prefetch = 7  # it asks for more than one thread's two
        for x in range(3):
            later.send(x)
        for x in range(3):
            sooner.send(x)
        deadline = time.monotonic() + 10
        while worker.work_queue.qsize() < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        let_go.set()
        broker.join("default", timeout=30_000)
    assert ran == ["sooner 0", "sooner 1", "sooner 2", "later 0", "later 1", "later 2"]


def test_it_is_built_as_django_dramatiq_builds_a_broker(server: Server) -> None:
    options = {"url": server.url, "lease": 3.0, "max_deliveries": 7}
    middleware = [AgeLimit(), Retries(max_retries=3)]
    broker = RelayBroker(middleware=middleware, **options)
    assert broker.middleware == middleware
    assert (broker.core.settings.lease, broker.core.settings.max_deliveries) == (3.0, 7)
    broker.close()
