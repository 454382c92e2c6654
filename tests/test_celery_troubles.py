"""Rare troubles of a Celery worker or client, each of which once lost, doubled or stopped something."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery
from celery.signals import worker_shutting_down
from celery.worker.request import Request as Stock

from relay_adapters.celery.holding import inhand
from relay_adapters.celery.holding.heartbeat import Heartbeat
from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.messages.tags import new_tag
from relay_adapters.celery.outcomes import burial
from relay_adapters.celery.workers import worker
from relay_adapters.celery.workers.request import Request
from relay_core import Broker, Job, NotYet, Verdict, hookimpl
from relay_core.connection import forks
from relay_core.errors import Unavailable
from relay_core.job import Options
from tests.celery_links import Inbox, Loop, fresh, link, send
from tests.celery_workers import CeleryWorker, client_of, lines
from tests.forking import child_of, code_of
from tests.proxy import Proxy, to_port
from tests.servers import AclServer, Server, eventually


@pytest.fixture
def flavour() -> str:
    """What the client does, not the server."""
    return "valkey"


@pytest.fixture
def app(tcp_server: Server, tmp_path: Path) -> Iterator[Celery]:
    app = client_of(tcp_server.url, tmp_path, broker_transport_options={"client_name": fresh("troubles")})
    yield app
    app.close()


@pytest.fixture
def store(tcp_server: Server) -> Iterator[Broker]:
    with Broker(tcp_server.url) as broker:
        yield broker


def arguments(store: Broker) -> list[Any]:
    """Of the tasks that wait, in their order."""
    return [json.loads(job.payload.partition(b"\n")[2])[0] for job in store.jobs("celery", "ready")]


def test_what_replaces_a_task_is_stored_though_its_publish_was_cut_off_and_the_task_is_done(
    tcp_server: Server, store: Broker, tmp_path: Path
) -> None:
    with Proxy(to_port(tcp_server.port)) as proxy:
        app = client_of(proxy.url, tmp_path)
        app.send_task("replaced", task_id="t")
        store.ack(store.claim("celery")[0])  # acked as it starts, as most are
        proxy.cut_request(b"the-next")
        app.send_task("the-next", task_id="t", replaced_task_nesting=1)
        assert proxy.pending == 0
        app.close()
    assert store.stats("celery").ready == 1
    assert store.claim("celery")[0].deliveries == 1


@pytest.mark.since("kombu", "5.7")
def test_a_batch_that_is_flushed_again_stores_each_task_once_whatever_its_id(
    app: Celery, store: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue, cut = Broker.enqueue, [True]

    def cut_off(self: Broker, queue: str, payload: bytes, **options: Any) -> Any:
        if cut:
            cut.pop()
            raise Unavailable("cut off")
        return enqueue(self, queue, payload, **options)

    app.send_task("pay", [0], task_id="taken")
    with app.producer_or_acquire() as producer, producer.batch() as batch:
        for n, id in enumerate((None, None, "taken", None), 1):
            app.send_task("pay", [n], task_id=id, producer=producer)
        monkeypatch.setattr(Broker, "enqueue", cut_off)
        with pytest.raises(Unavailable):
            batch.flush()
        batch.flush()
    assert sorted(arguments(store)) == [[0], [1], [2], [3], [4]]


def test_a_reject_while_the_server_is_away_is_made_up_for(tmp_path: Path) -> None:
    options = {"appendonly": "yes", "appendfsync": "no"}
    with Server("valkey", tcp=True, options=options) as server, link(server.url, retry_for=0.2) as here:
        name = fresh("q")
        inbox = Inbox(here, kombu.Queue(name))
        send(here, 1, key=name)
        inbox.wait(1)
        server.kill()
        inbox.messages[0].reject(requeue=True)
        server.start()
        with Broker(server.url) as broker:
            eventually(lambda: broker.stats(name).ready + broker.stats(name).delayed == 1, "the message to come back")
        # its thread has the answer a moment after the store shows it
        eventually(lambda: inbox.channel.leases.holding == 0, "the lease to be given up")


class Unshowable(Exception):
    """As of an object that is detached from its database session."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize("requeue", [True, False])
def test_a_message_whose_failure_cannot_be_told_ends_all_the_same(tcp_server: Server, requeue: bool) -> None:
    with link(tcp_server.url) as here, Broker(tcp_server.url) as broker:
        name = fresh("q")
        inbox = Inbox(here, kombu.Queue(name))
        send(here, 1, key=name)
        inbox.wait(1)
        held = inbox.channel.leases.get(inbox.messages[0].delivery_tag)
        held.cause = Unshowable()
        inbox.messages[0].reject(requeue=requeue)
        assert broker.stats(name).inflight == 0
        found = [*broker.jobs(name, "ready"), *broker.jobs(name, "delayed"), *broker.dead(name)]
        assert [job.error for job in found] == ["Unshowable (its repr raises RuntimeError)"]


def test_a_worker_outlives_a_password_that_is_wrong_for_a_while(acl_server: AclServer, tmp_path: Path) -> None:
    name, right = acl_server.user, acl_server.password
    with (
        client_of(acl_server.url, tmp_path) as client,
        CeleryWorker(acl_server.url, tmp_path, "-P", "solo") as running,
    ):
        acl_server.cli("ACL", "SETUSER", name, "resetpass", ">another")
        acl_server.cli("CLIENT", "KILL", "USER", name)
        eventually(lambda: running.logged("wrong or missing user name or password"), "the login to be refused")
        acl_server.cli("ACL", "SETUSER", name, "resetpass", f">{right}")
        client.send_task("tests.celery_app.run", ["after"])
        eventually(lambda: lines(tmp_path, start="after"), "the worker to go on")
        assert not running.logged("Frequent restarts")


@pytest.mark.parametrize("flags", [("-P", "solo"), ("-P", "prefork", "-c", "1"), ("-P", "threads", "-c", "1")])
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_worker_outlives_rights_that_are_missing_for_a_while(
    acl_server: AclServer, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with (
        client_of(acl_server.url, tmp_path) as client,
        CeleryWorker(acl_server.url, tmp_path, *flags) as running,
    ):
        acl_server.cli("ACL", "SETUSER", acl_server.user, "-evalsha")
        told = "(?s)broker lost.*allow it in the user's ACL"  # some versions of Celery have it in the traceback
        eventually(lambda: re.search(told, running.text) or running.process.poll() is not None, "the refusal")
        assert running.process.poll() is None
        acl_server.cli("ACL", "SETUSER", acl_server.user, "+evalsha")
        client.send_task("tests.celery_app.run", ["after"])
        eventually(lambda: lines(tmp_path, start="after"), "the worker to go on")


@pytest.mark.parametrize("flags", [("-P", "solo"), ("-P", "gevent", "-c", "2")], ids=["solo", "gevent"])
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_worker_that_lacks_rights_tries_ever_more_seldom_and_ends_at_once(
    acl_server: AclServer, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Its connections are taken, and end by its first claim."""
    with CeleryWorker(acl_server.url, tmp_path, *flags) as running:
        acl_server.cli("ACL", "SETUSER", acl_server.user, "-evalsha")
        eventually(lambda: running.logged("next try in 6 s: "), "its third try")
        tries = [line for line in running.text.splitlines() if "broker lost" in line]
        told = [line for line in running.text.splitlines() if "the broker refuses what this worker needs" in line]
        assert [re.findall(r"next try in (\d+) s: ", line) for line in told] == [["2"], ["4"], ["6"]]
        assert len(tries) in (2, 3)  # Celery says so afterwards
        assert running.stop() == 0


@pytest.mark.parametrize("flags", [("-P", "solo"), ("-P", "prefork", "-c", "1"), ("-P", "threads", "-c", "1")])
def test_a_worker_outlives_a_server_that_may_evict_jobs_for_a_while(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """As after a failover to a replica whose configuration is not the primary's."""
    with (
        Server("valkey", tcp=True) as server,
        client_of(server.url, tmp_path) as client,
        CeleryWorker(server.url, tmp_path, *flags) as running,
    ):
        server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        server.cli("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        refused = "broker lost.*set it to noeviction|Cannot connect.*set it to noeviction"
        eventually(lambda: re.search(refused, running.text) or running.process.poll() is not None, "the refusal")
        assert running.process.poll() is None
        server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
        client.send_task("tests.celery_app.run", ["after"])
        eventually(lambda: lines(tmp_path, start="after"), "the worker to go on")


class Own(Stock):  # type: ignore[misc]
    """A class for the requests of a task, as users have them."""


def test_a_request_class_of_the_users_is_relays_too(tcp_server: Server, tmp_path: Path, store: Broker) -> None:
    made = worker._derived(lambda base, *_args, **_options: base)(Own, None, None)
    assert issubclass(made, Own)
    assert issubclass(made, Request)
    flags = ("-P", "solo", "--include", "tests.celery_own_request")
    with client_of(tcp_server.url, tmp_path) as client, CeleryWorker(tcp_server.url, tmp_path, *flags):
        client.send_task("tests.celery_own_request.task", ["x"])
        eventually(lambda: len(lines(tmp_path, "accepted")) == 2, "its second run")
    assert store.stats("celery").counters["enqueued"] == 1, "its retry was a move of its job"


@pytest.mark.parametrize("workers", ["solo", "threads", "tests.celery_patches:Pool"])
def test_what_replaces_the_tracer_before_celery_loads_its_consumer_traces_tasks(
    tcp_server: Server, tmp_path: Path, workers: str
) -> None:
    """Sentry's and other agents, where they begin in `worker_init`; celery-aio-pool."""
    own = ":" in workers
    flags = ("-P", workers, "--include", "tests.celery_patches") if not own else ("--include", "tests.celery_patches")
    conf = {"worker_pool": workers} if own else {}
    with client_of(tcp_server.url, tmp_path) as client, CeleryWorker(tcp_server.url, tmp_path, *flags, conf=conf):
        sent = client.send_task("tests.celery_app.run", ["x"])
        eventually(lambda: lines(tmp_path, start="x"), "its run")
    assert lines(tmp_path, "traced-by-agent") == [sent.id]
    assert lines(tmp_path, "traced-by-pool") == ([sent.id] if own else [])


def test_a_slow_result_backend_holds_up_none_of_relays_threads(monkeypatch: pytest.MonkeyPatch, store: Broker) -> None:
    told, slow = [], threading.Event()

    def fail(job: Job, why: str, is_ours: Callable[[], bool]) -> None:
        slow.wait(30)
        told.append((job.id, why, threading.current_thread().name))

    monkeypatch.setattr(burial, "fail", fail)
    options = Options(headers={burial.HEADER: burial.ADAPTER})
    job = Job("id", "q", b"", 0.0, 0.0, 0, 5, 0, "5:5:a", 0.0, 0.0, options)
    began = time.monotonic()
    plugin = burial.Burial()
    plugin.broker = store
    with pytest.raises(NotYet):
        plugin.relay_job_dead(job, "max_deliveries", "gone", False)
    assert time.monotonic() - began < 15
    slow.set()
    eventually(lambda: told, "the backend to be told")
    assert told == [("id", "gone", "relay-celery-results")]


def test_a_child_of_a_fork_waits_for_no_lock_of_another_thread_of_its_parent() -> None:
    lock, held, done = forks.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(30)

    threading.Thread(target=hold).start()
    held.wait(30)

    def take() -> bool:
        signal.alarm(20)
        with lock:
            return True

    code = code_of(child_of(take))
    done.set()
    assert code == 0


def test_a_suspect_that_celery_does_not_start_lets_others_through_after_a_while(store: Broker) -> None:
    leases = Leases(store)
    store.enqueue("q", b"")
    job = store.claim("q")[0]
    leases.add(tag := new_tag(job), job)
    assert leases.apart.take(tag, lambda: None)
    leases.apart._deadline -= 10 * store.settings.lease
    assert leases.apart.shut, "it was not delivered yet"
    held = leases.get(tag)
    assert held is not None
    held.task = True
    assert not leases.apart.shut
    leases.hand_back([tag])


class Watcher:
    """Notes the moves that found their lease lost."""

    def __init__(self) -> None:
        self.lost: list[str] = []

    @hookimpl
    def relay_lease_lost(self, move: str) -> None:
        self.lost.append(move)


@pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.LOST])
def test_a_heartbeat_that_crosses_a_retry_takes_no_lease_for_lost(
    tcp_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, verdict: Verdict
) -> None:
    watcher = Watcher()
    with Broker(tcp_server.url, plugins=[watcher]) as broker:
        leases, finish = Leases(broker), broker.finish
        broker.enqueue("q", b"")
        (job,) = broker.claim("q")
        leases.add(tag := new_tag(job), job)
        if verdict is Verdict.LOST:
            broker.release(job)

        def crossed(*args: Any) -> Any:
            answer = finish(*args)
            leases.heartbeat.extend()
            return answer

        monkeypatch.setattr(broker, "finish", crossed)
        assert inhand.put_back(broker, leases, job, b"", 60.0)
        held = leases.get(tag)
        assert held is not None
        assert held.moved is (verdict is Verdict.DONE)
        assert watcher.lost == ([] if verdict is Verdict.DONE else ["nack"])
        assert ("while it was held" in caplog.text) is False
        if verdict is Verdict.LOST:
            leases.heartbeat.extend()
            assert watcher.lost == ["nack", "extend"]
        leases.pop(tag)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("looping", [True, False])
def test_a_heartbeat_that_crosses_an_ack_takes_no_lease_for_lost(
    tcp_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, looping: bool
) -> None:
    """Under an event loop it is held until the reply is there, and not at all else."""
    watcher = Watcher()
    with Broker(tcp_server.url, plugins=[watcher]) as broker:
        leases = Leases(broker)
        broker.enqueue("q", b"")
        (job,) = broker.claim("q")
        leases.add(tag := new_tag(job), job)
        extend = leases.heartbeat._keeper.extend

        def crossed(jobs: Any) -> Any:
            leases.ack_later(tag) if looping else leases.pop(tag)
            broker.ack(job)
            return extend(jobs)

        monkeypatch.setattr(leases.heartbeat._keeper, "extend", crossed)
        assert leases.heartbeat.extend() is None
        assert watcher.lost == []
        assert "while it was held" not in caplog.text
        leases.pop(tag)


@pytest.mark.parametrize("lease", [None, "lease", [], ["q", "id", "no token", 0, 0, {}, "id", 0]], ids=str)
def test_what_is_no_lease_makes_no_task_the_next_try_of_another(lease: Any) -> None:
    """It is a property of a message, and anybody may have written that."""
    assert inhand.retried(lease, ["q"], {"id": "id", "retries": 1}) is None


def test_a_suspect_whose_task_ended_its_delivery_wakes_who_waits_for_it(store: Broker) -> None:
    leases, woken = Leases(store), list[bool]()
    store.enqueue("q", b"")
    job = store.claim("q")[0]
    leases.add(tag := new_tag(job), job)
    assert leases.apart.take(tag, lambda: woken.append(leases.apart.shut))
    leases.moving(job, True)  # as its retry does
    assert not leases.ack_later(tag)
    assert woken == [False]
    store.ack(job)


@pytest.mark.usefixtures("by_hand")
def test_a_heartbeat_that_comes_late_says_so(
    store: Broker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases(store)
    store.enqueue("q", b"")
    job = store.claim("q")[0]
    leases.add(tag := new_tag(job), job)
    leases.heartbeat._next -= store.settings.lease
    leases.heartbeat.work()
    assert "s late" in caplog.text
    leases.hand_back([tag])


@pytest.mark.usefixtures("by_hand")
def test_a_server_that_is_away_from_held_leases_is_told_of_once_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"appendonly": "yes", "appendfsync": "no"}
    with Server("valkey", options=kept) as server, Broker(server.url, retry_for=0) as broker:
        leases = Leases(broker)
        broker.enqueue("q", b"")
        job = broker.claim("q")[0]
        leases.add(tag := new_tag(job), job)

        def beat() -> None:
            leases.heartbeat._next = time.monotonic()
            leases.heartbeat.work()

        for told in (1, 2):
            server.kill()
            for _ in range(3):
                beat()
            assert caplog.text.count("leases could not be extended") == told
            server.start()
            beat()
        leases.hand_back([tag])


def test_the_thread_that_keeps_the_leases_outlives_what_a_hook_raises(
    store: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases, goes_on, work = Leases(store), threading.Event(), Heartbeat.work

    def raises(self: Heartbeat) -> float:
        monkeypatch.setattr(Heartbeat, "work", lambda self: goes_on.set() or work(self))  # type: ignore[func-returns-value]
        raise SystemExit(3)

    monkeypatch.setattr(Heartbeat, "work", raises)
    store.enqueue("q", b"")
    job = store.claim("q")[0]
    leases.add(tag := new_tag(job), job)
    assert goes_on.wait(30)
    leases.hand_back([tag])


def test_a_sleeping_loop_hears_at_once_that_a_signal_tells_its_worker_to_stop(
    tcp_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python goes on with an interrupted sleep, once the signal's handler has run."""
    asleep, turned, late = threading.Event(), threading.Event(), list[bool]()
    with link(tcp_server.url) as connection:
        loop = Loop(connection, 1)

        def interrupt() -> None:
            assert asleep.wait(30)
            os.kill(os.getpid(), signal.SIGUSR1)
            if not turned.wait(10):
                late.append(True)
                connection.transport._wake_loop()

        def told(*_: Any) -> None:
            worker_shutting_down.send(sender="w@here", sig="SIGTERM", how="Warm", exitcode=0)

        def poll(timeout: float) -> Any:
            found = stock(timeout)
            if found or timeout < 0.5:
                return found
            asleep.set()  # nothing else wakes it any more
            return stock(600.0)

        stock = loop.hub.poller.poll
        monkeypatch.setattr(loop.hub.poller, "poll", poll)
        before, thread = signal.signal(signal.SIGUSR1, told), threading.Thread(target=interrupt)
        thread.start()
        try:
            while not asleep.is_set():
                next(loop.turns)
        finally:
            turned.set()
            thread.join(30)
            signal.signal(signal.SIGUSR1, before)
    assert not late
