"""Who waits for a task that went to dead, or was revoked, hears of it, though its result backend or its worker was away
then."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import kombu
import pytest
from celery import chord
from celery.events.state import State
from celery.result import AsyncResult
from celery.utils.nodenames import gethostname
from kombu.asynchronous.hub import Hub

from relay_adapters import telling
from relay_adapters.celery.outcomes import announcing, burial
from relay_adapters.celery.outcomes.unstarted import stores_errors
from relay_core import Broker, Job, NotYet
from relay_core.testing import advance
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines, results_of
from tests.forking import child_of, code_of
from tests.servers import Server, eventually
from tests.test_celery_bad_messages import LENIENT, NO_MESSAGE, NO_TASK

# Celery's own backend, in the test's process, and redis-py 8
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

QUEUE = "graves"


class Site:
    """A server for the broker and one for the results. Each task of the queue has one delivery."""

    def __init__(self, server: Server, results: Server, folder: Path) -> None:
        self.server, self.results, self.folder = server, results, folder
        self.app = client_of(server.url, folder, results_of(results))
        self.broker = Broker(server.url)

    def worker(self, name: str, pool: str, conf: dict[str, Any]) -> CeleryWorker:
        return CeleryWorker(
            self.server.url, self.folder, *POOLS[pool], name=name, results=results_of(self.results), conf=conf,
            options={"max_deliveries": 1, "retry": {"max_retries": 0}},
        )  # fmt: skip

    def send(self) -> tuple[AsyncResult[Any], AsyncResult[Any]]:
        """A task whose only delivery ends without an answer, and the chord that waits for it."""
        mourned = self.app.signature("tests.celery_app.mourn", queue="celery", ignore_result=True)
        body = self.app.signature("tests.celery_app.count", queue="celery")
        head = self.app.signature("tests.celery_app.add", (1, 1), queue=QUEUE, link_error=mourned)
        whole = chord([head])(body)
        with Broker(self.server.url, lease=0.1) as dying:
            assert dying.claim(QUEUE)
            eventually(lambda: not dying.store.raw("ZCOUNT", self.leases, time.time() * 1000, "inf"), "its lease's end")
        return whole.parent.results[0], whole

    @property
    def leases(self) -> bytes:
        return self.broker.settings.keys(QUEUE).leases

    def noted(self) -> int:
        return int(self.broker.store.raw("ZCARD", self.broker.settings.keys(QUEUE).untold))

    def consume(self, worker: CeleryWorker) -> None:
        """Have a worker find the task dead."""
        self.app.control.add_consumer(QUEUE)
        eventually(lambda: self.broker.stats(QUEUE).dead == 1, "the burial")

    def runs(self, key: str) -> float:
        """Seconds that a task takes to run, whose result nobody asked for."""
        began = time.monotonic()
        self.app.send_task("tests.celery_app.run", (key,), queue="celery", ignore_result=True)
        eventually(lambda: lines(self.folder, start=f"{key} "), f"{key} to run")
        return time.monotonic() - began

    def pass_time(self) -> None:
        advance(self.broker, 600, QUEUE)

    def is_known(self, result: AsyncResult[Any], whole: AsyncResult[Any]) -> None:
        eventually(lambda: result.state == "FAILURE", "the result to be a failure", 60)
        eventually(lambda: whole.state == "FAILURE", "the chord to fail")
        eventually(lambda: lines(self.folder, "mourned"), "the error link")
        assert "delivered 1 times" in str(result.result)
        eventually(lambda: not self.noted(), "no note is left")
        assert len(lines(self.folder, "mourned")) == 1


def kept() -> Server:
    """It knows its chords still when it is back."""
    return Server("redis", tcp=True, options={"appendonly": "yes", "appendfsync": "always"})


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Server("valkey", tcp=True) as server, kept() as results:
        site = Site(server, results, tmp_path)
        yield site
        site.app.close()
        site.broker.close()


PATIENT = {"result_backend_always_retry": True}
IMPATIENT = {"result_backend_transport_options": {"retry_policy": {"max_retries": 1, "interval_max": 0.1}}}


@pytest.mark.parametrize(
    ("pool", "conf"),
    [
        pytest.param("prefork", {}, id="prefork"),
        pytest.param("solo", PATIENT, id="solo-always_retry"),
        pytest.param("gevent", {}, id="gevent"),
        pytest.param("threads", IMPATIENT, id="threads-retry_policy"),
    ],
)
def test_a_result_backend_that_is_away_at_a_burial_is_told_of_it_when_it_is_back(
    site: Site, pool: str, conf: dict[str, Any]
) -> None:
    with site.worker("w", pool, conf) as worker:
        dead = site.send()
        site.results.kill()
        site.consume(worker)
        assert max(site.runs(key) for key in ("r0", "r1", "r2")) < 10
        if conf is not PATIENT:
            eventually(lambda: worker.logged("its result backend is told of it later"), "the backend to be asked", 60)
        assert site.noted() == 1
        assert site.runs("r3") < 10
        site.results.start()
        site.pass_time()
        site.is_known(*dead)
        assert worker.process.poll() is None


@pytest.mark.parametrize("conf", [{}, PATIENT], ids=["", "always_retry"])
@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_result_backend_that_is_away_at_the_last_reject_holds_up_no_worker_and_is_told_when_it_is_back(
    site: Site, pool: str, conf: dict[str, Any]
) -> None:
    with site.worker("w", pool, conf) as worker:
        site.results.kill()
        result = site.app.send_task("tests.celery_app.refuse", ("no", True), queue="celery")
        eventually(lambda: site.broker.stats("celery").dead == 1, "the message to go to dead")
        assert max(site.runs(key) for key in ("r0", "r1")) < 10
        site.results.start()
        eventually(lambda: result.state == "FAILURE", "the result to be a failure")
        assert worker.process.poll() is None


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
@pytest.mark.parametrize(
    ("leave", "come_back"), [(Server.kill, Server.start), (Server.pause, Server.resume)], ids=["away", "silent"]
)
def test_a_task_is_revoked_though_its_result_backend_is_away_which_hears_of_it_later(
    site: Site, pool: str, leave: Callable[[Server], None], come_back: Callable[[Server], None]
) -> None:
    with site.worker("w", pool, {}) as worker:
        late = [site.app.signature("tests.celery_app.run", (key,), queue="celery") for key in ("a", "b")]
        results = [task.apply_async(countdown=3600) for task in late]
        leave(site.results)
        site.app.control.revoke([result.id for result in results])
        eventually(lambda: site.broker.stats("celery").delayed == 0, "them to be taken out")
        if leave is Server.kill:
            assert site.runs("r0") < 10  # Celery itself waits for one that is silent
        come_back(site.results)
        eventually(lambda: [result.state for result in results] == ["REVOKED"] * 2, "their results")
        assert worker.process.poll() is None


def test_a_worker_that_is_killed_while_it_tells_a_result_backend_has_told_nobody(site: Site) -> None:
    """The backend answers nothing: so the worker dies as it has the burial in hand, and not before or after."""
    with site.worker("first", "prefork", {}) as worker:
        dead = site.send()
        site.results.pause()
        site.consume(worker)
        assert site.runs("r0") < 10
        assert site.noted() == 1
        worker.kill()
    site.results.resume()
    assert dead[0].state == "PENDING"
    with site.worker("second", "prefork", {}) as worker:
        site.consume(worker)
        assert site.noted() == 1
        site.pass_time()
        site.is_known(*dead)


def test_a_message_that_no_client_has_written_is_told_of_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its backend can do nothing with some of their ids, and will not tomorrow."""
    with kept() as results:
        app = client_of("memory://", tmp_path, results_of(results))
        monkeypatch.setattr("celery.current_app", SimpleNamespace(_get_current_object=lambda: app))
        desk = Desk(lambda job, is_ours: burial.fail(job, "gone", is_ours))
        payloads = {**NO_MESSAGE, **NO_TASK, **LENIENT}
        for name, payload in payloads.items():
            desk.take(name, payload)
        eventually(lambda: len(desk.heard) == len(payloads), "all to be told of")
        app.close()


def test_monitors_hear_of_a_burial(site: Site) -> None:
    """One that began after the task was received lists it by its name, too."""
    result, _ = site.send()
    events: list[dict[str, Any]] = []
    with (
        site.app.connection_for_read() as connection,
        site.worker("finder", "prefork", {"worker_send_task_events": True}),
    ):
        receiver = site.app.events.Receiver(connection, handlers={"task-failed": events.append})
        with kombu.Consumer(connection, [receiver.queue], callbacks=[receiver._receive], no_ack=True):
            site.app.control.add_consumer(QUEUE)
            while not events:
                connection.drain_events(timeout=20)
    state = State()
    state.event(events[0])
    shown = state.tasks[result.id]
    assert (shown.name, shown.args, shown.state) == ("tests.celery_app.add", "(1, 1)", "FAILURE")
    assert "delivered 1 times" in shown.exception
    assert events[0]["hostname"] == f"finder@{gethostname()}"


class Dispatcher:
    """An event dispatcher that notes in which thread it sends, and raises if it is to."""

    enabled = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.sent: list[tuple[str, int]] = []

    def send(self, type: str, **_fields: Any) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append((type, threading.get_ident()))


class Consuming:
    """What a worker's consumer has of it."""

    def __init__(self, dispatcher: Dispatcher, hub: Hub | None) -> None:
        self.event_dispatcher, self.hub = dispatcher, hub


Begin = Callable[[Dispatcher, "Hub | None"], None]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Has a worker of this process begin, which ends with the test."""
    begun: list[Consuming] = []

    def begin(dispatcher: Dispatcher, hub: Hub | None) -> None:
        begun.append(Consuming(dispatcher, hub))
        announcing.begin(begun[-1])

    yield begin
    for consumer in begun:
        announcing.end(consumer)
    assert announcing.dispatcher() is None


TOLD = {"id": "t1", "task": "tests.celery_app.add"}


def test_a_dispatcher_that_fails_spares_a_burial_its_repetition(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, begin: Begin
) -> None:
    """By then its result is stored and its callbacks are sent."""
    with Server("redis", tcp=True) as server, Broker(server.url) as broker:
        app = client_of(server.url, tmp_path, results_of(server))
        monkeypatch.setattr("celery.current_app", SimpleNamespace(_get_current_object=lambda: app))
        seen: list[Any] = []

        @app.task(name="buried", shared=False, on_failure=lambda *_: seen.append("on_failure"))
        def pay() -> None:
            """It is buried before it runs."""

        result = pay.apply_async(queue=QUEUE)
        (job,) = broker.claim(QUEUE)
        begin(Dispatcher(RuntimeError("release unlocked lock")), None)
        burial.fail(job, "gone", lambda: True)
        assert (result.state, seen) == ("FAILURE", ["on_failure"])
        assert "release unlocked lock" in caplog.text
        app.close()


def test_events_of_a_worker_with_a_loop_are_sent_by_the_thread_of_its_loop(begin: Begin) -> None:
    """Celery's buffer of them is not for two: what one thread adds as the other sends would be gone."""
    events, hub = Dispatcher(), Hub()
    begin(events, hub)
    other = threading.Thread(target=announcing.announce, args=(events, "task-failed", None, TOLD))
    other.start()
    other.join()
    assert events.sent == []
    hub.run_once()
    assert events.sent == [("task-failed", threading.get_ident())]
    hub.close()


def test_a_child_sends_no_events_in_the_name_of_its_parents_worker(begin: Begin) -> None:
    begin(Dispatcher(), None)
    assert announcing.dispatcher() is not None
    assert code_of(child_of(lambda: announcing.dispatcher() is None)) == 0


@pytest.mark.parametrize("deliveries", [1, 2])
def test_the_on_failure_of_a_buried_task_sees_how_it_was_delivered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deliveries: int
) -> None:
    with Server("redis", tcp=True) as server, Broker(server.url) as broker:
        app = client_of(server.url, tmp_path, results_of(server))
        monkeypatch.setattr("celery.current_app", SimpleNamespace(_get_current_object=lambda: app))
        seen: list[Any] = []

        @app.task(bind=True, name="buried", shared=False, on_failure=lambda *_: seen.append(pay.request.delivery_info))
        def pay(self: Any) -> None:
            """It is buried before it runs."""

        pay.apply_async(queue=QUEUE, priority=3)
        for last in range(deliveries, 0, -1):
            (job,) = broker.claim(QUEUE)
            if last > 1:
                broker.nack(job, "again", delay=0)
        burial.fail(job, "gone", lambda: True)
        assert seen == [{"exchange": "", "routing_key": QUEUE, "priority": 3, "redelivered": deliveries > 1}]
        app.close()


@pytest.mark.parametrize("end", ["done", "another's", "no results"])
def test_a_buried_task_fails_unless_it_was_done_or_another_process_tells_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    """Of one that was done only the answer was lost. Where nobody keeps results, nobody can say that it was."""
    with Server("redis", tcp=True) as server, Broker(server.url) as broker:
        app = client_of(server.url, tmp_path, None if end == "no results" else results_of(server))
        monkeypatch.setattr("celery.current_app", SimpleNamespace(_get_current_object=lambda: app))
        failed: list[str] = []

        def on_failure(self: Any, error: Exception, id: str, *_: Any) -> None:
            failed.append(f"{id} {self.request.id}")
            raise SystemExit("by the task's own on_failure")

        @app.task(name="buried", shared=False, on_failure=on_failure)
        def task() -> None:
            """It is buried before it runs."""

        result = task.apply_async(queue=QUEUE)
        if end == "done":
            app.backend.store_result(result.id, 1, "SUCCESS")
        (job,) = broker.claim(QUEUE)
        with pytest.raises(NotYet) if end == "another's" else nullcontext():
            burial.fail(job, "gone", lambda: end != "another's")
        assert failed == ([f"{result.id} {result.id}"] if end == "no results" else [])
        assert task.request.id is None
        if end != "no results":
            assert result.state == ("SUCCESS" if end == "done" else "PENDING")
        app.close()


@pytest.mark.parametrize(
    ("ignore", "known", "stored"),
    [
        (False, None, True), (True, None, False), (True, {}, False), (True, {"errors": 1}, True),
        (False, {"ignores": 1}, True), (None, {"ignores": 1}, False), (None, {"ignores": 1, "errors": 1}, True),
        (None, {}, True), (None, None, True),
    ],
)  # fmt: skip
def test_the_result_of_a_buried_task_that_ignores_its_own_is_stored_where_it_stores_errors_all_the_same(
    ignore: bool | None, known: dict[str, Any] | None, stored: bool
) -> None:
    """Of one that this process does not know nobody says so; a client that does not know it sends None."""
    task = None
    if known is not None:
        task = SimpleNamespace(store_errors_even_if_ignored="errors" in known, ignore_result="ignores" in known)
    assert stores_errors(task, {"ignore_result": ignore}) is stored


@pytest.mark.parametrize("how", [{"compression": "gzip"}, {"compression": "zlib", "serializer": "pickle"}, {}], ids=str)
def test_the_chord_of_a_buried_task_hears_of_it_however_it_was_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: dict[str, Any]
) -> None:
    with Server("redis", tcp=True) as server, Broker(server.url) as broker:
        app = client_of(server.url, tmp_path, results_of(server), accept_content=["json", "pickle"])
        monkeypatch.setattr("celery.current_app", SimpleNamespace(_get_current_object=lambda: app))
        whole = chord([app.signature("tests.nobody", queue=QUEUE, **how)])(app.signature("tests.nobody", queue="later"))
        (job,) = broker.claim(QUEUE)
        burial.fail(job, "gone", lambda: True)
        assert whole.state == "FAILURE"
        app.close()


class Desk:
    """A broker that hears of what a teller has done. What that does is given."""

    def __init__(self, tell: Callable[[Job, Callable[[], bool]], None]) -> None:
        self.heard: list[str] = []
        self.tell, self.teller = tell, telling.Teller("celery", "task")

    def told(self, job: Job) -> bool:
        self.heard.append(job.id)
        return True

    def take(self, id: str, payload: bytes = b"") -> None:
        job = Job(id, "q", payload, 0.0, 0.0, 0, 1, 0, "1:1:a", 0.0, 0.0)
        with pytest.raises(NotYet):
            self.teller.take(cast(Broker, self), job, partial(self.tell, job))


def test_a_broker_hears_of_a_burial_once_its_backend_was_told_and_not_of_one_that_was_not() -> None:
    asked: list[str] = []

    def tell(job: Job, _is_ours: Callable[[], bool]) -> None:
        asked.append(job.id)
        match job.id:
            case "away":
                raise ConnectionError("no backend")
            case "never":
                raise NotImplementedError("a backend that cannot do it, today or tomorrow")
            case "exit":
                raise SystemExit("a callback")

    desk = Desk(tell)
    for id in ("away", "never", "exit", "fine"):
        desk.take(id)
    eventually(lambda: len(asked) == 4 and "fine" in desk.heard, "all to be asked")
    assert desk.heard == ["never", "fine"]
    desk.take("away")  # when it is handed out again
    eventually(lambda: asked.count("away") == 2, "it to be asked again")


def test_a_burial_that_is_in_hand_is_not_taken_twice() -> None:
    asked, go = [], threading.Event()

    def tell(job: Job, _is_ours: Callable[[], bool]) -> None:
        asked.append(job.id)
        go.wait(30)

    desk = Desk(tell)
    for id in ("one", "two", "one", "two"):
        desk.take(id)
    go.set()
    eventually(lambda: len(desk.heard) == 2, "both to be told")
    desk.take("three")
    eventually(lambda: len(desk.heard) == 3, "the thread to be free")
    assert asked == ["one", "two", "three"]


def test_a_burial_that_the_thread_takes_up_at_once_is_told_of() -> None:
    asked = threading.Event()

    class Quick(queue.SimpleQueue[Any]):
        def put(self, *args: Any) -> None:
            super().put(*args)
            asked.wait(0.5)

    desk = Desk(lambda job, _is_ours: asked.set() if job.id == "second" else None)
    desk.teller._queue = Quick()
    desk.take("first")  # which begins the thread
    eventually(lambda: desk.heard and not desk.teller._until, "the first to be told of")
    desk.take("second")
    eventually(lambda: desk.heard == ["first", "second"], "the second to be told of")
    assert asked.is_set()


def test_what_waited_too_long_is_left_to_others_unless_it_was_handed_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, begun, go = [], threading.Event(), threading.Event()

    def tell(job: Job, is_ours: Callable[[], bool]) -> None:
        assert is_ours()
        begun.set()
        go.wait(30)
        asked.append((job.id, is_ours()))

    desk = Desk(tell)
    desk.take("first")
    assert begun.wait(30)
    monkeypatch.setattr(telling, "_OURS", 0.0)
    for id in ("first", "late", "renewed"):
        desk.take(id)
    monkeypatch.setattr(telling, "_OURS", 60.0)
    desk.take("renewed")
    go.set()
    eventually(lambda: ("renewed", True) in asked, "the last one")
    assert asked == [("first", False), ("renewed", True)]


def test_what_no_note_is_kept_of_is_told_again_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer it fails, the less often; what comes meanwhile is told at once."""
    monkeypatch.setattr(telling, "_SOONEST", 0.02)
    asked: list[str] = []

    def tell(name: str, until: int, _is_ours: Callable[[], bool]) -> None:
        asked.append(name)
        if asked.count(name) < until:
            raise ConnectionError("no backend")

    teller = telling.Teller("celery", "task")
    for name, until in (("old", 4), ("older", 3), ("new", 1)):
        teller.tell(name, partial(tell, name, until), 20)
    assert asked.count("new") == 1
    eventually(lambda: len(asked) == 8, "all to be told")
    assert not teller._later
