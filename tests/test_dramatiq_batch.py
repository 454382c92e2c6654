"""Messages that are stored together: `with broker.batch():`, and groups."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import pytest
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import GroupCallbacks, Middleware
from dramatiq.rate_limits.backends import StubBackend as StubLimits
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from relay_adapters.dramatiq import RelayBroker, batch
from relay_core import Broker, JobSpec
from relay_core.errors import InvalidArgument, StoreError
from tests.dramatiq_workers import running, signals_of
from tests.proxy import Proxy, to_socket
from tests.servers import Server


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, nothing here takes so long that it is not stored together."""
    monkeypatch.setattr(batch, "SECONDS", 60.0)


@pytest.fixture
def broker(server: Server) -> Iterator[RelayBroker]:
    broker = RelayBroker(url=server.url)
    dramatiq.set_broker(broker)
    yield broker
    broker.close()


@pytest.fixture(autouse=True)
def _scripts_are_loaded(server: Server) -> None:
    """A script that the server does not know is sent twice."""
    with Broker(server.url) as core:
        core.enqueue_many("warm-up", [b"1", b"2"])


@pytest.fixture
def note(broker: RelayBroker) -> dramatiq.Actor[[Any], None]:
    @dramatiq.actor(max_retries=0)
    def note(x: Any) -> None:
        pass

    return note


@contextmanager
def through_a_proxy(server: Server, **options: Any) -> Iterator[tuple[Proxy, RelayBroker, Any]]:
    """A broker whose connections can be cut, and an actor on it."""
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        broker = RelayBroker(url=proxy.url, **options)
        dramatiq.set_broker(broker)

        @dramatiq.actor
        def note(x: Any) -> None:
            pass

        yield proxy, broker, note
        broker.close()


def scripts_run(server: Server) -> int:
    line = server.info("commandstats").get("cmdstat_evalsha", "calls=0,")
    return int(line.partition("calls=")[2].partition(",")[0])


def waiting(broker: RelayBroker, queue: str = "default") -> list[Any]:
    """The arguments of what is in the queue, in the order in which it will be claimed."""
    return [dramatiq.Message.decode(job.payload).args[0] for job in broker.core.claim(queue, 200)]


def test_what_is_sent_in_a_block_is_stored_in_one_round_trip_as_it_ends(
    server: Server, broker: RelayBroker, note: Any
) -> None:
    note.send("first")  # registers the queue
    before = scripts_run(server)
    with broker.batch():
        for n in range(100):
            note.send(n)
        assert scripts_run(server) == before
    assert scripts_run(server) == before + 1
    assert waiting(broker) == ["first", *range(100)]


def test_a_block_is_stored_by_200_messages_and_by_a_mebibyte(server: Server, broker: RelayBroker, note: Any) -> None:
    note.send("first")
    before = scripts_run(server)
    with broker.batch():
        for n in range(batch.MESSAGES + 1):
            note.send(n)
        assert broker.get_queue_message_counts("default")[0] == batch.MESSAGES + 1
        note.send("x" * batch.BYTES)
        note.send("last")
        assert broker.get_queue_message_counts("default")[0] == batch.MESSAGES + 3
    assert broker.get_queue_message_counts("default")[0] == batch.MESSAGES + 4
    assert scripts_run(server) - before < 10


def test_what_waited_for_long_is_stored_when_the_next_one_is_sent(
    broker: RelayBroker, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "SECONDS", 0.0)
    with broker.batch():
        note.send(1)
        note.send(2)
        assert broker.get_queue_message_counts("default")[0] == 1


def test_a_group_is_stored_in_one_round_trip_and_runs_to_its_callbacks(server: Server, broker: RelayBroker) -> None:
    broker.add_middleware(Results(backend=StubBackend()))
    broker.add_middleware(GroupCallbacks(StubLimits()))
    called = threading.Event()

    @dramatiq.actor(store_results=True)
    def double(n: int) -> int:
        return 2 * n

    @dramatiq.actor
    def done() -> None:
        called.set()

    double.send(0)
    before = scripts_run(server)
    group = dramatiq.group(
        [*(double.message(n) for n in range(50)), double.message(1) | double.message(), double.message(3)]
    )
    group.add_completion_callback(done.message())
    assert group.run() is group
    assert scripts_run(server) == before + 1
    with running(broker):
        assert list(group.get_results(block=True, timeout=30_000)) == [*range(0, 100, 2), 4, 6]
        assert called.wait(30)


def test_groups_in_a_group_are_stored_with_it(server: Server, broker: RelayBroker, note: Any) -> None:
    note.send("first")
    before = scripts_run(server)
    inner = [dramatiq.group([note.message(n), note.message(-n)]) for n in range(1, 4)]
    dramatiq.group([*inner, note.message(0)]).run()
    assert scripts_run(server) == before + 1
    assert waiting(broker) == ["first", 1, -1, 2, -2, 3, -3, 0]


def test_a_delayed_group_waits_from_when_it_was_sent(broker: RelayBroker, note: Any) -> None:
    dramatiq.group([note.message(n) for n in range(3)]).run(delay=86_400_000)
    jobs = broker.core.jobs("default", "delayed")
    assert len(jobs) == 3
    assert all(86_390 < (job.due_at or 0) - (job.created_at or 0) <= 86_400 for job in jobs)


def test_groups_of_other_brokers_run_as_ever() -> None:
    from dramatiq.brokers.stub import StubBroker

    RelayBroker(url="relay://127.0.0.1:1/0")  # nothing listens there
    stub = StubBroker()

    @dramatiq.actor(broker=stub)
    def other(x: int) -> None:
        pass

    dramatiq.group([other.message(n) for n in range(3)], broker=stub).run()
    assert stub.queues["default"].qsize() == 3


def test_middleware_hears_of_a_message_when_it_is_stored(broker: RelayBroker, note: Any) -> None:
    counts: list[int] = []

    class Count(Middleware):
        def after_enqueue(self, broker: Any, message: Any, delay: Any) -> None:
            counts.append(broker.get_queue_message_counts("default")[0])

    broker.add_middleware(Count())
    seen = signals_of(broker)
    with broker.batch():
        note.send(1)
        note.send(2)
        assert seen == ["before_enqueue"] * 2
    assert seen == ["before_enqueue"] * 2 + ["after_enqueue"] * 2
    assert counts == [2, 2]


def test_what_middleware_sends_of_what_was_stored_is_stored_too(broker: RelayBroker, note: Any) -> None:
    class Follow(Middleware):
        def after_enqueue(self, broker: Any, message: Any, delay: Any) -> None:
            if message.args[0] > 0:
                note.send(message.args[0] - 1)

    broker.add_middleware(Follow())
    with broker.batch():
        note.send(3)
    assert waiting(broker) == [3, 2, 1, 0]


def test_a_block_that_ends_by_an_error_stores_what_was_sent(broker: RelayBroker, note: Any) -> None:
    def send_and_raise(x: int, error: type[BaseException]) -> None:
        with broker.batch():
            note.send(x)
            raise error

    for x, error in enumerate((KeyError, KeyboardInterrupt)):
        with pytest.raises(error):
            send_and_raise(x, error)
    assert waiting(broker) == [0, 1]


def test_what_cannot_be_stored_is_refused_as_it_is_sent_and_the_others_are_stored(server: Server) -> None:
    broker = RelayBroker(url=server.url, max_payload=1000)
    dramatiq.set_broker(broker)

    @dramatiq.actor
    def note(x: Any) -> None:
        pass

    with broker.batch():
        note.send(1)
        with pytest.raises(InvalidArgument):
            note.send("x" * 1000)
        with pytest.raises(InvalidArgument):
            note.send_with_options(args=(2,), broker_priority="high")
        note.send(3)
    assert waiting(broker) == [1, 3]
    broker.close()


def test_a_queue_that_the_server_refuses_leaves_the_others_alone(server: Server, broker: RelayBroker) -> None:
    @dramatiq.actor(queue_name="bad")
    def bad(x: int) -> None:
        pass

    @dramatiq.actor(queue_name="good")
    def good(x: int) -> None:
        pass

    server.cli("SET", broker.core.settings.keys("bad").jobs.decode(), "no hash")
    with pytest.raises(StoreError), broker.batch():  # noqa: PT012
        bad.send(1)
        good.send(2)
    assert waiting(broker, "good") == [2]


@pytest.mark.parametrize("fault", ["cut_reply", "cut_request"])
def test_a_connection_that_is_cut_stores_each_message_once(server: Server, fault: str) -> None:
    with through_a_proxy(server) as (proxy, broker, note):
        note.send("first")
        getattr(proxy, fault)(b"EVALSHA")
        with broker.batch():
            for n in range(10):
                note.send(n)
        assert proxy.pending == 0
        assert waiting(broker) == ["first", *range(10)]


def test_what_a_full_batch_could_not_store_is_stored_later_and_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MESSAGES", 3)
    with through_a_proxy(server, retry_for=0.0) as (proxy, broker, note):
        note.send("first")
        with broker.batch():
            for n in range(3):
                note.send(n)
            proxy.cut_reply(b"EVALSHA")
            with pytest.raises(ConnectionClosed):
                note.send("refused")
            # its reply was lost: they are stored, and run meanwhile
            jobs = broker.core.claim("default", 10)
            assert len(jobs) == 4
            broker.core.ack_many(jobs)
            note.send("last")
        assert waiting(broker) == ["last"]


def test_a_server_that_is_away_is_told_at_the_end(server: Server) -> None:
    with through_a_proxy(server, retry_for=0.0) as (proxy, broker, note):
        seen = signals_of(broker)
        proxy.refuse()
        with pytest.raises(ConnectionClosed), broker.batch():
            note.send(1)
        assert seen == ["before_enqueue"]
        proxy.refuse(False)
        note.send(2)
        assert waiting(broker) == [2]


def test_a_message_whose_follow_up_group_cannot_be_stored_runs_again(server: Server, broker: RelayBroker) -> None:
    runs: list[int] = []

    @dramatiq.actor(queue_name="after")
    def after(x: int) -> None:
        pass

    @dramatiq.actor(max_retries=0)
    def work() -> None:
        runs.append(1)
        if len(runs) == 2:
            server.cli("DEL", taken)

    class FollowUp(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            dramatiq.group([after.message(1), after.message(2)]).run()

    taken = broker.core.settings.keys("after").jobs.decode()
    server.cli("SET", taken, "no hash")
    broker.add_middleware(FollowUp())
    work.send()
    with running(broker, queues={"default"}):
        broker.join("default", timeout=30_000)
    assert len(runs) == 2
    assert waiting(broker, "after") == [1, 2]


def test_other_threads_and_tasks_are_no_part_of_a_block(broker: RelayBroker, note: Any) -> None:
    def stored() -> int:
        return broker.get_queue_message_counts("default")[0]

    async def beside(sent: asyncio.Event, go_on: asyncio.Event) -> None:
        with broker.batch():
            note.send("in the block")
            sent.set()
            await go_on.wait()

    async def main() -> None:
        sent, go_on = asyncio.Event(), asyncio.Event()
        block = asyncio.create_task(beside(sent, go_on))
        await sent.wait()
        note.send("beside it")
        assert stored() == before + 1
        go_on.set()
        await block
        assert stored() == before + 2

    with broker.batch():
        note.send(1)
        thread = threading.Thread(target=lambda: note.send(2))
        thread.start()
        thread.join()
        assert stored() == 1
    before = stored()
    asyncio.run(main())


def test_a_block_may_end_in_another_context_than_it_began(broker: RelayBroker, note: Any) -> None:
    """As what a web framework hands to threads does."""
    block = broker.batch()
    contextvars.copy_context().run(block.__enter__)
    contextvars.copy_context().run(block.__exit__, None, None, None)
    note.send(1)
    assert broker.get_queue_message_counts("default")[0] == 1


def test_who_took_over_the_context_of_a_block_that_is_over_sends_at_once(broker: RelayBroker, note: Any) -> None:
    with broker.batch():
        context = contextvars.copy_context()
    context.run(note.send, 1)
    assert broker.get_queue_message_counts("default")[0] == 1


def test_what_a_thread_sends_as_its_block_ends_elsewhere_is_not_taken(broker: RelayBroker, note: Any) -> None:
    block = batch.Batch(broker)
    block.close()
    assert not block.add(note.message(1), None, JobSpec(b"1"))


def test_a_retry_in_a_block_is_no_part_of_it(broker: RelayBroker) -> None:
    runs: list[int] = []

    @dramatiq.actor(max_retries=3, min_backoff=1, max_backoff=1)
    def flaky() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError

    class Around(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            with broker.batch():
                if exception is not None:
                    broker.enqueue(message, delay=1)

    retries = next(i for i in broker.middleware if type(i).__name__ == "Retries")
    broker.middleware.remove(retries)
    broker.add_middleware(Around())
    flaky.send()
    with running(broker):
        broker.join("default", timeout=30_000)
    assert len(runs) == 2
    assert broker.core.stats("default").counters["retried"] == 1


def test_a_child_that_was_forked_in_a_block_sends_at_once_and_the_parent_stores_its_own(
    broker: RelayBroker, note: Any
) -> None:
    note.send("first")
    fork = multiprocessing.get_context("fork")
    with broker.batch():
        note.send("parent")
        child = fork.Process(target=lambda: note.send("child"))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert broker.get_queue_message_counts("default")[0] == 2
    assert waiting(broker) == ["first", "child", "parent"]


def test_an_interrupt_in_the_middle_of_the_last_flush_leaves_what_was_sent_stored_once(
    broker: RelayBroker, note: Any
) -> None:
    note.send("first")
    run, strikes = broker.core.store.run, ["before", "after"]

    def struck(command: Any) -> Any:
        when = strikes.pop()
        broker.core.store.run = run  # type: ignore[method-assign]
        if when == "after":
            run(command)
        raise KeyboardInterrupt

    for x in (1, 2):
        broker.core.store.run = struck  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt), broker.batch():
            note.send(x)
    assert waiting(broker) == ["first", 1, 2]
