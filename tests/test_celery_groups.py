"""The tasks of a group are stored together, and none of them later than `apply_async` returns."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, group
from kombu import Exchange, Queue
from kombu.exceptions import EncodeError, OperationalError

from relay_adapters.celery import groups
from relay_adapters.celery.batching import _Entry
from relay_adapters.celery.publishing import Publishing
from relay_core import Broker, JobSpec
from relay_core.errors import Unavailable
from tests.celery_client import app_of, broker, cut, flavour, server, store_of  # noqa: F401 (fixtures)
from tests.celery_workers import CeleryWorker, client_of, lines, results_of
from tests.servers import Server, eventually


@pytest.fixture
def app(server: Server, tmp_path: Path) -> Iterator[Celery]:
    app = app_of(server.url, tmp_path, results=results_of(server))
    app.send_task("warm-up", queue="other")
    yield app
    app.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    """However slow the machine is, no group here takes so long that it is not stored together."""
    before = groups.SECONDS
    monkeypatch.setattr(groups, "SECONDS", 60.0)
    return before


def keys(broker: Broker, queue: str = "celery") -> list[Any]:
    """The arguments of the tasks that wait, in the order in which they will be run."""
    found = [broker.plugins.describe(job) for job in broker.jobs(queue, "ready")]
    return [summary.args.strip("[](),") for summary in found if summary is not None and summary.args]


def pay(app: Celery, n: Any, **options: Any) -> Any:
    return app.signature("pay", [n], **options)


def first(app: Celery) -> list[Any]:
    """Tasks of another queue: those that a group begins with are sent at once, before it is known how quickly the
    others are made."""
    return [app.signature("lead", [n], queue="lead") for n in range(2)]


def calls(server: Server, sending: Callable[[], Any]) -> int:
    """How many scripts were run for that."""
    server.cli("CONFIG", "RESETSTAT")
    sending()
    return int(server.info("commandstats")["cmdstat_evalsha"].split(",")[0].removeprefix("calls="))


def test_a_group_is_stored_in_few_round_trips_and_in_its_order(app: Celery, server: Server, broker: Broker) -> None:
    results: list[Any] = []
    few = calls(server, lambda: results.append(group(pay(app, n) for n in range(100)).apply_async()))
    assert few <= 100 // 10
    assert [job.id for job in broker.jobs("celery", "ready")] == [result.id for result in results[0]]
    assert keys(broker) == [str(n) for n in range(100)]


def test_so_are_chunks_and_the_header_of_a_chord(app: Celery, server: Server, broker: Broker) -> None:
    @app.task(name="pay")
    def paid(n: int) -> None: ...

    assert calls(server, lambda: paid.chunks(((n,) for n in range(200)), 2).apply_async()) <= 100 // 10
    assert broker.stats("celery").ready == 100
    assert calls(server, lambda: chord([paid.s(n) for n in range(100)], paid.si(-1)).apply_async()) <= 100 // 10
    assert broker.stats("celery").ready == 200


def test_tasks_of_several_queues_and_those_that_wait_are_part_of_it(app: Celery, broker: Broker) -> None:
    group(
        [pay(app, 1), pay(app, 2, queue="other"), pay(app, 3, countdown=60), pay(app, 4, priority=5)]
    ).apply_async()  # fmt: skip
    assert keys(broker) == ["4", "1"]
    assert [job.state for job in broker.jobs("celery", "delayed")] == ["delayed"]
    assert broker.stats("other").ready == 2


def test_a_queue_of_bounded_length_stays_within_it(app: Celery, broker: Broker) -> None:
    with app.connection_for_write() as connection:
        Queue("short", queue_arguments={"x-max-length": 5})(connection.default_channel).declare()
    app.amqp.queues.add(Queue("short", queue_arguments={"x-max-length": 5}))
    group(pay(app, n, queue="short") for n in range(20)).apply_async()
    assert keys(broker, "short") == [str(n) for n in range(15, 20)]


def test_what_else_is_sent_meanwhile_is_stored_at_once(app: Celery, broker: Broker) -> None:
    def members() -> Iterator[Any]:
        for n in range(3):
            yield pay(app, n)
            app.send_task("another", queue="another")
            assert broker.stats("another").ready == n + 1

    group(members()).apply_async()
    assert broker.stats("celery").ready == 3


def test_a_group_of_many_starts_to_run_while_it_is_being_sent(app: Celery, broker: Broker) -> None:
    seen: list[int] = []

    def members(many: int, text: str = "") -> Iterator[Any]:
        for n in range(many):
            yield pay(app, f"{n}{text}")
            seen.append(broker.stats("celery").ready)

    group(members(2 * groups.MESSAGES + 10)).apply_async()
    assert set(seen) == {0, 1, 1 + groups.MESSAGES, 1 + 2 * groups.MESSAGES}
    assert broker.purge("celery") == 2 * groups.MESSAGES + 10
    seen.clear()
    group(members(12, "x" * (groups.BYTES // 4))).apply_async()
    assert set(seen) == {0, 1, 5, 9}


def test_of_a_group_that_takes_long_in_all_none_is_kept_back(
    app: Celery, broker: Broker, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "SECONDS", patience)
    monkeypatch.setattr(groups, "SLOW", 60.0)
    seen: list[int] = []

    def members() -> Iterator[Any]:
        for n in range(6):
            yield pay(app, n)
            seen.append(broker.stats("celery").ready)
            time.sleep(patience)

    group(members()).apply_async()
    assert seen[-1] >= 3
    assert broker.stats("celery").ready == 6


def test_what_makes_a_group_slowly_may_wait_for_what_it_has_made(app: Celery, broker: Broker) -> None:
    """As in Celery, which takes the tasks of a group from a generator, one ahead of what it sends."""
    seen: list[int] = []

    def members() -> Iterator[Any]:
        for n in range(6):
            seen.append(broker.stats("celery").ready)
            time.sleep(2 * groups.SLOW)
            yield pay(app, n)

    chord(members(), app.signature("pay", [-1])).apply_async()
    assert seen == [0, 0, 1, 1, 1, 2], "which is what it sees with kombu's Redis transport"
    assert keys(broker) == [str(n) for n in range(6)]


def test_one_that_becomes_slow_keeps_none_back_from_then_on(app: Celery, broker: Broker) -> None:
    seen: list[int] = []

    def members() -> Iterator[Any]:
        for n in range(12):
            seen.append(broker.stats("celery").ready)
            if n == 6:
                time.sleep(2 * groups.SLOW)
            yield pay(app, n)

    group(members()).apply_async()
    assert seen[6] == 1, "the first one was sent by itself, and the others together"
    assert seen[9] >= 6
    assert keys(broker) == [str(n) for n in range(12)]


def test_a_group_whose_answers_are_lost_is_stored_once(app: Celery, broker: Broker) -> None:
    with cut(store_of(app), 2, after=1) as lost:
        group(pay(app, n) for n in range(20)).apply_async()
    assert lost == [0]
    assert keys(broker) == [str(n) for n in range(20)]


def test_so_is_one_of_which_a_task_is_cut_off_between_its_queues(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = Exchange("both", "fanout")
    with app.connection_for_write() as connection:
        for name in ("one", "two"):
            Queue(name, exchange)(connection.default_channel).declare()
    app.amqp.queues.add(Queue("one", exchange))
    put, cuts = Publishing._put, ["two", "two"]

    def cutting(channel: Any, queue: str, *args: Any, **options: Any) -> None:
        if cuts and queue == cuts[-1]:
            cuts.pop()
            raise Unavailable("cut", maybe_executed=True)
        put(channel, queue, *args, **options)

    monkeypatch.setattr(Publishing, "_put", cutting)
    group([*first(app), *(pay(app, n, queue="one") for n in range(3))]).apply_async()
    assert cuts == []
    assert [keys(broker, name) for name in ("one", "two")] == [["0", "1", "2"]] * 2


def test_so_is_one_that_is_cut_off_on_its_way(app: Celery, broker: Broker) -> None:
    def members() -> Iterator[Any]:
        for n in range(groups.MESSAGES + 20):
            yield pay(app, n)

    with cut(store_of(app), 1, after=1) as lost:
        group(members()).apply_async()
    assert lost == [0]
    assert broker.stats("celery").ready == groups.MESSAGES + 20
    assert not broker.audit("celery").findings


def test_a_group_that_cannot_be_stored_says_so_in_kombus_words(app: Celery, broker: Broker) -> None:
    with cut(store_of(app), 99, after=1), pytest.raises(OperationalError, match="cut"):
        group(pay(app, n) for n in range(20)).apply_async()
    with cut(store_of(app), 1, after=1) as lost, pytest.raises(OperationalError, match="cut"):
        group(pay(app, n) for n in range(20)).apply_async(retry=False)
    assert lost == [0]
    # and the next is another one
    broker.purge("celery")
    group(pay(app, n) for n in range(3)).apply_async()
    assert broker.stats("celery").ready == 3


def test_of_a_group_of_which_one_cannot_be_sent_those_before_it_were(app: Celery, broker: Broker) -> None:
    with pytest.raises(EncodeError):
        group([*first(app), pay(app, 1), pay(app, object()), pay(app, 3)]).apply_async()
    assert keys(broker) == ["1"]
    app.send_task("pay", [4])
    assert keys(broker) == ["1", "4"]
    leave = EncodeError("left")

    def members() -> Iterator[Any]:
        yield from first(app)
        for n in (5, 6, 7):
            yield pay(app, n)
        raise leave

    with pytest.raises(EncodeError, match="left"):
        group(members()).apply_async()
    assert keys(broker)[:3] == ["1", "4", "5"]


def test_a_queue_that_was_not_reached_is_not_taken_for_one_that_may_have_been(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [0], task_id="z", queue="second")
    with cut(store_of(app), 1, after=2) as lost:
        many = [*first(app), pay(app, 1, queue="first"), pay(app, 2, queue="second", task_id="z")]
        group(many).apply_async()
    assert lost == [0]
    assert {job.id for job in broker.jobs("second", "ready")} == {"z", "z~1"}
    assert keys(broker, "first") == ["1"]


@pytest.mark.parametrize(("stored", "known"), [(True, False), (False, False), (False, True)])
def test_tasks_of_one_id_in_a_group_are_as_many_after_a_cut(
    app: Celery, broker: Broker, stored: bool, known: bool
) -> None:
    with cut(store_of(app), 1, stored=stored, known=known, after=2) as lost:
        group([*first(app), *(pay(app, n, task_id="same") for n in range(3))]).apply_async()
    assert lost == [0]
    assert sorted(job.id for job in broker.jobs("celery", "ready")) == ["same", "same~1", "same~2"]
    assert sorted(keys(broker)) == ["0", "1", "2"]


def test_what_a_group_waits_for_is_counted_from_when_it_is_sent() -> None:
    eta = datetime.now(timezone.utc) + timedelta(seconds=30)
    for late, wait in ((eta, 30.0), (datetime.now(timezone.utc), None)):
        message = {"headers": {"task": "pay", "eta": late.isoformat()}, "properties": {}}
        now = _Entry("q", JobSpec(b"x", delay=60.0), message, None).now()
        assert now.delay == (None if wait is None else pytest.approx(wait, abs=5.0))


def test_ids_that_are_taken_are_other_tasks(app: Celery, broker: Broker) -> None:
    for _ in range(2):
        group([pay(app, n, task_id=f"t{n}") for n in range(2)]).apply_async()
    assert {job.id for job in broker.jobs("celery", "ready")} == {"t0", "t1", "t0~1", "t1~1"}


@pytest.mark.since("kombu", "5.7")
def test_a_batch_of_the_user_takes_a_group_in(app: Celery, broker: Broker) -> None:
    with app.producer_or_acquire() as producer, producer.batch():
        group(pay(app, n) for n in range(3)).apply_async(producer=producer)
        assert broker.stats("celery").ready == 0
    assert broker.stats("celery").ready == 3


def test_a_group_whose_broker_dies_on_the_way_goes_on_with_the_next(tmp_path: Path) -> None:
    with Server("valkey", tcp=True) as first, Server("valkey", tcp=True) as second:
        app = app_of(f"{first.url};{second.url}", tmp_path)
        app.send_task("warm-up", queue="other")

        def members() -> Iterator[Any]:
            for n in range(groups.MESSAGES + 100):
                if n == groups.MESSAGES + 50:
                    with Broker(first.url) as broker:
                        assert broker.stats("celery").ready == 1 + groups.MESSAGES
                    first.kill()
                yield pay(app, n)

        group(members()).apply_async()
        with Broker(second.url) as broker:
            assert keys(broker) == [str(n) for n in range(1 + groups.MESSAGES, 100 + groups.MESSAGES)]
        app.close()


def test_a_group_may_have_to_go_to_a_broker_of_another_kind(tmp_path: Path, redis_server: Server) -> None:
    with Server("valkey", tcp=True) as first:
        app = app_of(f"{first.url};redis://127.0.0.1:{redis_server.port}/0", tmp_path)
        app.send_task("warm-up", queue="other")

        def members() -> Iterator[Any]:
            for n in range(6):
                yield pay(app, n)
                if n == 4:
                    first.kill()

        group(members()).apply_async()
        assert redis_server.cli("LLEN", "celery") >= 1
        app.close()


def test_groups_over_other_transports_are_left_alone(app: Celery, tmp_path: Path) -> None:
    other = client_of(f"memory://{uuid.uuid4().hex}", tmp_path)
    seen: list[int] = []

    def members() -> Iterator[Any]:
        for n in range(3):
            yield pay(other, n)
            with other.connection_for_read() as connection:
                seen.append(connection.default_channel._size("celery"))

    group(members()).apply_async()
    assert seen[-1] >= 1


def test_a_task_that_sends_a_chord_has_it_run(server: Server, app: Celery, tmp_path: Path) -> None:
    with CeleryWorker(server.url, tmp_path, "-P", "prefork", "-c", "2", results=results_of(server)):
        add = app.signature("tests.celery_app.add", [1, 1])
        tally = app.signature("tests.celery_app.run")
        chord([add] * 250, tally).apply_async()
        eventually(lambda: lines(tmp_path), "the body to run")
        assert lines(tmp_path)[0].startswith(str([2] * 250))
