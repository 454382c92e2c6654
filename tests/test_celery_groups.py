"""The tasks of a group are stored together, and none of them later than `apply_async` returns."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.signals import after_task_publish, before_task_publish
from kombu import Exchange, Queue
from kombu.exceptions import EncodeError, OperationalError

from relay_adapters.celery.queues.topology import Topology
from relay_adapters.celery.sending import groups
from relay_adapters.celery.sending.batching import _Entry
from relay_adapters.celery.sending.publishing import Publishing
from relay_core import Broker, JobSpec, hookimpl
from relay_core.commands import NewJob
from relay_core.errors import InvalidArgument, Unavailable
from relay_core.operations.enqueueing import Placed
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
    @app.task(name="pay", shared=False)
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
    assert set(seen) == {0, groups.MESSAGES, 2 * groups.MESSAGES}
    assert broker.purge("celery") == 2 * groups.MESSAGES + 10
    seen.clear()
    group(members(12, "x" * (groups.BYTES // 4))).apply_async()
    assert set(seen) == {0, 4, 8}


def test_what_makes_a_group_may_wait_for_what_it_has_made(
    app: Celery, broker: Broker, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Celery, which takes the tasks of a chord from a generator three ahead of what it sends."""
    monkeypatch.setattr(groups, "SECONDS", patience)

    def wait_for(many: int) -> None:
        eventually(lambda: broker.stats("celery").ready >= many, "those before it to be stored")

    def members() -> Iterator[Any]:
        for n in range(30):
            if n % 10 == 5:
                wait_for(n - 3)
            yield pay(app, n)

    chord(members(), app.signature("pay", [-1])).apply_async()
    assert keys(broker) == [str(n) for n in range(30)]


def test_of_a_group_that_takes_long_in_all_none_is_kept_back(
    app: Celery, broker: Broker, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no other thread comes to its turn."""
    monkeypatch.setattr(groups, "SECONDS", patience)
    monkeypatch.setattr(groups.Gathered, "flush_old", lambda gathered: None)
    seen: list[int] = []

    def members() -> Iterator[Any]:
        for n in range(6):
            yield pay(app, n)
            seen.append(broker.stats("celery").ready)
            time.sleep(patience)

    group(members()).apply_async()
    assert seen[-1] >= 3
    assert broker.stats("celery").ready == 6


@pytest.mark.parametrize("leave", [False, True])
def test_what_another_thread_could_not_store_is_the_groups_own_to_store(
    app: Celery, broker: Broker, patience: float, monkeypatch: pytest.MonkeyPatch, leave: bool
) -> None:
    monkeypatch.setattr(groups, "SECONDS", patience)
    gathered: list[groups.Gathered] = []
    mind = groups._minder.mind
    monkeypatch.setattr(groups._minder, "mind", lambda one: (gathered.append(one), mind(one)))
    left = EncodeError("left")

    def members() -> Iterator[Any]:
        for n in range(6):
            if n == 2:  # the first was sent: of more, the group's own thread may find that they have waited long enough
                eventually(lambda: gathered[0]._not_before, "the other thread to have failed")
            if n == 5 and leave:
                raise left
            yield pay(app, n)

    with cut(store_of(app), 1) as lost:
        if leave:
            with pytest.raises(EncodeError, match="left"):
                group(members()).apply_async()
        else:
            group(members()).apply_async()
    assert lost == [0]
    assert keys(broker) == [str(n) for n in range(4 if leave else 6)]


def test_what_was_taken_is_seen_to_in_time_too(
    app: Celery, broker: Broker, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task whose id another has gets one of its own; that try fails at first, and the generator waits for it."""
    monkeypatch.setattr(groups, "SECONDS", patience)
    app.send_task("pay", [0], task_id="a")
    put, cuts = Publishing._put, ["a"]

    def cutting(channel: Any, queue: str, message: Any, *args: Any, **options: Any) -> None:
        if options.get("taken") and cuts:
            cuts.pop()
            raise Unavailable("cut", maybe_executed=False)
        put(channel, queue, message, *args, **options)

    monkeypatch.setattr(Publishing, "_put", cutting)

    def members() -> Iterator[Any]:
        yield pay(app, 1, task_id="a")
        yield pay(app, 2, task_id="b")
        yield pay(app, 3, task_id="c")
        eventually(lambda: broker.show("celery", "a~1"), "the first to be stored under another id")

    group(members()).apply_async()
    assert cuts == []
    assert broker.stats("celery").ready == 4


def test_its_thread_ends_when_there_is_nothing_to_see_to(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_IDLE", 0.01)
    for many in (3, 6):
        group(pay(app, n) for n in range(3)).apply_async()
        assert broker.stats("celery").ready == many
        eventually(lambda: groups._minder._thread is None, "the thread to end")


def test_a_group_for_which_no_thread_can_be_started_is_stored_by_its_own(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(groups._minder, "_thread", None)
        patch.setattr(groups.threading.Thread, "start", refuse)
        group(pay(app, n) for n in range(3)).apply_async()
    assert broker.stats("celery").ready == 3


def test_a_child_of_a_fork_has_a_thread_of_its_own(server: Server, tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from celery import Celery, group\n"
        "from relay_core import Broker\n"
        "from tests.servers import eventually\n"
        "app = Celery(broker=sys.argv[1])\n"
        "app.send_task('warm-up', queue='other')\n"
        "broker = Broker(sys.argv[1])\n"
        "def members():\n"
        "    queue = f'q{os.getpid()}'\n"
        "    for n in range(5):\n"
        "        yield app.signature('pay', [n], queue=queue)\n"
        "    eventually(lambda: broker.stats(queue).ready >= 3, 'those before it to be stored', 10)\n"
        "group(members()).apply_async()\n"
        "pid = os.fork()\n"
        "group(members()).apply_async()\n"
        "sys.exit(0 if pid == 0 else os.waitpid(pid, 0)[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, server.url], check=True, timeout=60)
    with Broker(server.url) as broker:
        assert sorted(broker.stats(queue).ready for queue in broker.queues()) == [1, 5, 10]


def test_a_group_whose_answers_are_lost_is_stored_once(app: Celery, broker: Broker) -> None:
    with cut(store_of(app), 2) as lost:
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
    group(pay(app, n, queue="one") for n in range(3)).apply_async()
    assert cuts == []
    assert [keys(broker, name) for name in ("one", "two")] == [["0", "1", "2"]] * 2


def test_so_is_one_that_is_cut_off_on_its_way(app: Celery, broker: Broker) -> None:
    def members() -> Iterator[Any]:
        for n in range(groups.MESSAGES + 20):
            yield pay(app, n)

    with cut(store_of(app), 1) as lost:
        group(members()).apply_async()
    assert lost == [0]
    assert broker.stats("celery").ready == groups.MESSAGES + 20
    assert not broker.audit("celery").findings


def test_a_group_that_cannot_be_stored_says_so_in_kombus_words(app: Celery, broker: Broker) -> None:
    with cut(store_of(app), 99), pytest.raises(OperationalError, match="cut"):
        group(pay(app, n) for n in range(20)).apply_async()
    with cut(store_of(app), 1) as lost, pytest.raises(OperationalError, match="cut"):
        group(pay(app, n) for n in range(20)).apply_async(retry=False)
    assert lost == [0]
    # and the next is another one
    broker.purge("celery")
    group(pay(app, n) for n in range(3)).apply_async()
    assert broker.stats("celery").ready == 3


def test_of_a_group_of_which_one_cannot_be_sent_those_before_it_were(app: Celery, broker: Broker) -> None:
    with pytest.raises(EncodeError):
        group([pay(app, 1), pay(app, object()), pay(app, 3)]).apply_async()
    assert keys(broker) == ["1"]
    app.send_task("pay", [4])
    assert keys(broker) == ["1", "4"]
    leave = EncodeError("left")

    def members() -> Iterator[Any]:
        for n in (5, 6, 7):
            yield pay(app, n)
        raise leave

    with pytest.raises(EncodeError, match="left"):
        group(members()).apply_async()
    assert keys(broker)[:3] == ["1", "4", "5"]


def test_of_a_group_of_which_one_is_too_large_those_before_it_were_sent(server: Server, tmp_path: Path) -> None:
    told: list[str] = []

    def tell(headers: Any = None, **_: Any) -> None:
        told.append(headers["id"])

    # before the app sends anything: a Celery before 5.7 does not call who connects later, once another one died
    after_task_publish.connect(tell)
    app = client_of(server.url, tmp_path, broker_transport_options={"max_payload": 2000})
    app.send_task("warm-up", queue="other")
    told.clear()
    many = [pay(app, "x" * 2000 if n == 3 else n, task_id=f"t{n}") for n in range(6)]
    with pytest.raises(InvalidArgument, match="max_payload"):
        group(many).apply_async()
    after_task_publish.disconnect(tell)
    assert told == ["t0", "t1", "t2"]
    with Broker(server.url) as broker:
        assert [job.id for job in broker.jobs("celery", "ready")] == told
    app.close()


def test_a_time_limit_in_a_flush_leaves_what_was_sent_stored_and_once(app: Celery, broker: Broker) -> None:
    class Limit(Exception):
        """A soft time limit."""

    store = store_of(app)
    run, strikes = store.run, ["before", "after"]

    def struck(command: Any) -> Any:
        if not command.durable:
            return run(command)
        when = strikes.pop()
        store.run = run
        if when == "after":
            run(command)
        raise Limit

    for many in (5, 10):
        store.run = struck
        with pytest.raises(Limit):
            group(pay(app, n) for n in range(5)).apply_async()
        assert len(keys(broker)) == many


def test_plugins_add_their_headers_as_each_task_is_published(server: Server, tmp_path: Path) -> None:
    current: list[str] = []

    class Adds:
        @hookimpl
        def relay_add_headers(self, queue: str, payload: bytes, headers: Any) -> dict[str, str]:
            return {"now": current[-1] if current else "none"}

    def begin(headers: Any = None, **_: Any) -> None:
        current.append(headers["id"])

    def end(**_: Any) -> None:
        current.clear()

    before_task_publish.connect(begin)
    after_task_publish.connect(end)
    app = client_of(server.url, tmp_path, broker_transport_options={"plugins": [Adds()]})
    app.send_task("warm-up", queue="other")
    group(pay(app, n) for n in range(5)).apply_async()
    before_task_publish.disconnect(begin)
    after_task_publish.disconnect(end)
    with Broker(server.url) as broker:
        jobs = broker.jobs("celery", "ready")
        assert [job.options.headers["now"] for job in jobs] == [job.id for job in jobs]
    app.close()


def test_a_group_within_a_group_comes_after_what_was_sent_before_it(app: Celery, broker: Broker) -> None:
    inner = chain(group(pay(app, n) for n in (2, 3)), pay(app, 9))
    group([pay(app, 0), pay(app, 1), inner, pay(app, 4)]).apply_async()
    assert keys(broker) == [str(n) for n in range(5)]


def test_groups_that_end_in_another_order_than_they_began_keep_nothing_back(app: Celery, broker: Broker) -> None:
    """As those of greenlets may."""
    with app.producer_or_acquire() as producer:
        one, two = (groups._gathering(groups.Gathered(producer, app.conf, {})) for _ in range(2))
        for block in (one, two):
            block.__enter__()
        for block in (one, two):
            block.__exit__(None, None, None)
        app.send_task("pay", [1], producer=producer)
    assert keys(broker) == ["1"]


def test_what_a_child_sends_that_was_forked_in_the_middle_is_stored_and_the_parents_once(
    server: Server, tmp_path: Path
) -> None:
    script = (
        "import os, sys\n"
        "from celery import Celery, group\n"
        "app = Celery(broker=sys.argv[1])\n"
        "app.send_task('warm-up', queue='other')\n"
        "def members():\n"
        "    for n in range(6):\n"
        "        if n == 4 and (pid := os.fork()):\n"
        "            assert os.waitpid(pid, 0)[1] == 0\n"
        "        yield app.signature('pay', [n], task_id=f'{os.getpid()}-{n}')\n"
        "    if not pid:\n"
        "        app.send_task('pay', ['child'], producer=producer)\n"
        "with app.producer_or_acquire() as producer:\n"
        "    group(members()).apply_async(producer=producer)\n"
    )
    subprocess.run([sys.executable, "-c", script, server.url], check=True, timeout=60)
    with Broker(server.url) as broker:
        ids = [job.id for job in broker.jobs("celery", "ready")]
        parent = next(id for id in ids if id.endswith("-0")).split("-")[0]
        # Celery had the third and the fourth task in hand, and so each of the two sends them
        assert sorted(id for id in ids if id.startswith(parent)) == [
            f"{parent}-0", f"{parent}-1", f"{parent}-2", f"{parent}-2~1", f"{parent}-3", f"{parent}-3~1",
            f"{parent}-4", f"{parent}-5",
        ]  # fmt: skip
        assert "'child'" in keys(broker)


def test_an_outage_of_what_was_gathered_marks_no_task_that_was_not_sent(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tasks of one id the second finds the batch full, and its flush is cut."""
    monkeypatch.setattr(groups, "MESSAGES", 3)
    ids = ["a", "same", "b", "same", "c"]
    with cut(store_of(app), 1) as lost:
        group(pay(app, n, task_id=id) for n, id in enumerate(ids)).apply_async()
    assert lost == [0]
    assert sorted(job.id for job in broker.jobs("celery", "ready")) == ["a", "b", "c", "same", "same~1"]


def test_a_queue_that_was_not_reached_is_not_taken_for_one_that_may_have_been(app: Celery, broker: Broker) -> None:
    app.send_task("pay", [0], task_id="z", queue="second")
    with cut(store_of(app), 1) as lost:
        many = [pay(app, 1, queue="first"), pay(app, 2, queue="second", task_id="z")]
        group(many).apply_async()
    assert lost == [0]
    assert {job.id for job in broker.jobs("second", "ready")} == {"z", "z~1"}
    assert keys(broker, "first") == ["1"]


@pytest.mark.parametrize(("stored", "known"), [(True, False), (False, False), (False, True)])
def test_tasks_of_one_id_in_a_group_are_as_many_after_a_cut(
    app: Celery, broker: Broker, stored: bool, known: bool
) -> None:
    with cut(store_of(app), 1, stored=stored, known=known) as lost:
        group(pay(app, n, task_id="same") for n in range(3)).apply_async()
    assert lost == [0]
    assert sorted(job.id for job in broker.jobs("celery", "ready")) == ["same", "same~1", "same~2"]
    assert sorted(keys(broker)) == ["0", "1", "2"]


def test_what_a_group_waits_for_is_counted_from_when_it_is_sent() -> None:
    eta = datetime.now(timezone.utc) + timedelta(seconds=30)
    for late, wait in ((eta, 30.0), (datetime.now(timezone.utc), None)):
        message = {"headers": {"task": "pay", "eta": late.isoformat()}, "properties": {}}
        placed = Placed("q", NewJob("id", "+60000", "", b""), JobSpec(b"x", delay=60.0))
        now = _Entry("q", placed, message, None).now()
        assert now.spec.delay == (None if wait is None else pytest.approx(wait, abs=5.0))
        assert now.job.due == (f"+{round(now.spec.delay * 1000)}" if now.spec.delay else "")


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
                        assert broker.stats("celery").ready == groups.MESSAGES
                    first.kill()
                yield pay(app, n)

        group(members()).apply_async()
        with Broker(second.url) as broker:
            assert keys(broker) == [str(n) for n in range(groups.MESSAGES, 100 + groups.MESSAGES)]
        app.close()


def test_what_a_publish_asks_beside_changes_no_order(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terms of its queue could not be read, and Celery tries again: nothing of that task was sent by then."""
    stock, reads = Topology.terms, itertools.count()

    def away(topology: Topology, queue: str, **options: Any) -> Any:
        if next(reads) == 3:
            raise Unavailable("away", maybe_executed=True)
        return stock(topology, queue, **options)

    monkeypatch.setattr(Topology, "terms", away)
    group(pay(app, n) for n in range(9)).apply_async()
    assert next(reads) > 9
    assert keys(broker) == [str(n) for n in range(9)]


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
