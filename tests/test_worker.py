"""The worker: in threads of the test, and as processes that are stopped and killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from relay_core import Broker, Job, JobSpec, RetryPolicy, hookimpl
from relay_core.errors import InvalidArgument, LayoutError
from relay_core.testing import drain
from relay_core.worker import Reject, Retry, Worker
from relay_core.worker.held import Heartbeat, Held
from relay_core.worker.news import News
from relay_core.worker.pools import LoopPool
from tests.command_line import finished, spawn
from tests.servers import Server, eventually, free_port

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: what differs between servers is tested below the worker."""
    return str(request.param)


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry_for=2.0) as broker:
        yield broker


class Running:
    """A worker on a thread of its own."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ended(self, seconds: float = 30.0) -> int:
        """Wait for the end: how many jobs were acked. Raises what `run` raised."""
        self._thread.join(seconds)
        assert not self.alive, f"the worker still runs after {seconds:g} s"
        if self.error is not None:
            raise self.error
        return self.worker.processed


@contextmanager
def running(broker: Broker, handler: Callable[[Job], Any], *queues: str, **options: Any) -> Iterator[Running]:
    """A worker that is stopped at the end, if need be without waiting for its handlers."""
    thread = Running(Worker(broker, handler, queues or ("mail",), **options))
    try:
        yield thread
    finally:
        thread.worker.stop()
        thread.worker.stop()
        thread._thread.join(30)


def processed(broker: Broker, queue: str = "mail") -> int:
    return broker.stats(queue).counters.get("processed", 0)


def has_processed(broker: Broker, count: int, queue: str = "mail") -> None:
    eventually(lambda: processed(broker, queue) == count, f"{count} processed jobs in {queue}")


class Gate:
    """A handler that holds each job until it is opened, and counts how many it holds."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.started: list[Job] = []
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def __call__(self, job: Job) -> None:
        with self._lock:
            self.started.append(job)
            self._now += 1
            self.most = max(self.most, self._now)
        assert self.opened.wait(60)
        with self._lock:
            self._now -= 1

    def wait_for(self, count: int) -> None:
        eventually(lambda: len(self.started) >= count, f"{count} started jobs")


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


# --- handlers


def test_a_plain_handler_gets_each_job_once_and_returning_acks_it(broker: Broker) -> None:
    seen: list[bytes] = []
    bodies = [b"%d" % i for i in range(500)]
    broker.enqueue_many("mail", bodies)
    with running(broker, lambda job: seen.append(job.payload)) as worker:
        has_processed(broker, 500)
        worker.worker.stop()
        assert worker.ended() == 500
    assert seen == bodies
    assert broker.stats("mail").pending == 0


class AsyncObject:
    def __init__(self, meet: Callable[[Job], Any]) -> None:
        self._meet = meet

    async def __call__(self, job: Job) -> None:
        await self._meet(job)


@pytest.mark.parametrize("kind", ["function", "object"])
def test_async_handlers_run_together_on_one_loop(kind: str, broker: Broker) -> None:
    loops: set[int] = set()
    arrived: list[Job] = []

    async def meet(job: Job) -> None:
        loops.add(id(asyncio.get_running_loop()))
        arrived.append(job)
        while len(arrived) < 5:  # none ends before all have begun
            await asyncio.sleep(0.01)

    broker.enqueue_many("mail", [b""] * 5)
    with running(broker, meet if kind == "function" else AsyncObject(meet), concurrency=5):
        has_processed(broker, 5)
    assert len(loops) == 1


def test_no_more_handlers_run_at_a_time_than_concurrency_says(broker: Broker, gate: Gate) -> None:
    broker.enqueue_many("mail", [b""] * 10)
    with running(broker, gate, concurrency=3, prefetch=4):
        gate.wait_for(3)
        eventually(lambda: broker.stats("mail").inflight == 7, "three that run and four prefetched")
        gate.opened.set()
        has_processed(broker, 10)
    assert gate.most == 3


def test_no_more_async_handlers_run_at_a_time_than_concurrency_says(broker: Broker) -> None:
    now, most = 0, 0

    async def handle(job: Job) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1

    broker.enqueue_many("mail", [b""] * 30)
    with running(broker, handle, concurrency=3):
        has_processed(broker, 30)
    assert most == 3


def test_short_jobs_are_claimed_and_acked_in_batches(server: Server, broker: Broker) -> None:
    broker.enqueue_many("mail", [b""] * 2000)
    server.cli("CONFIG", "RESETSTAT")
    with running(broker, lambda job: None):
        has_processed(broker, 2000)
    scripts = int(server.info("commandstats")["cmdstat_evalsha"].split(",")[0].partition("=")[2])
    assert scripts < 1000  # one by one they would be 2000, and stats asked by this test are among them


def test_without_prefetch_nothing_is_held_beyond_what_runs(broker: Broker, gate: Gate) -> None:
    broker.enqueue_many("mail", [b""] * 3)
    with running(broker, gate, prefetch=0):
        gate.wait_for(1)
        stats = broker.stats("mail")
        assert (stats.inflight, stats.ready) == (1, 2)
        gate.opened.set()
        has_processed(broker, 3)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_handler_that_raises_has_its_job_retried_and_the_worker_goes_on(server: Server, error: BaseException) -> None:
    def handle(job: Job) -> None:
        if job.payload == b"bad" and job.retries < 2:
            raise error

    with Broker(server.url, retry=RetryPolicy(base=0.01, jitter=False)) as broker:
        broker.enqueue_many("mail", [b"bad", b"good"])
        with running(broker, handle):
            has_processed(broker, 2)
        assert broker.stats("mail").counters["retried"] == 2


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("end", "code"),
    [(None, 0), (SystemExit(), 0), (SystemExit(3), 3), (SystemExit("no"), 1), (ValueError("no"), 1)],
    ids=repr,
)
def test_a_handler_that_comes_back_in_a_child_that_it_forked_ends_the_child(
    broker: Broker, end: BaseException | None, code: int
) -> None:
    codes: list[int] = []

    def handle(job: Job) -> None:
        child = os.fork()
        if child == 0:
            if end is not None:
                raise end
            return
        try:
            eventually(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), "its end")
        finally:
            os.kill(child, signal.SIGKILL)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    broker.enqueue("mail", b"")
    with running(broker, handle):
        eventually(lambda: broker.stats("mail").counters["processed"] == 1, "the job's end")
    assert codes == [code]
    assert broker.stats("mail").counters.get("retried", 0) == 0


def test_an_async_handler_that_raises_has_its_job_retried(server: Server) -> None:
    async def handle(job: Job) -> None:
        if not job.retries:
            raise ValueError("no")

    with Broker(server.url, retry=RetryPolicy(base=0.01, jitter=False)) as broker:
        broker.enqueue("mail", b"")
        with running(broker, handle):
            has_processed(broker, 1)
        assert broker.stats("mail").counters["retried"] == 1


async def _async(job: Job) -> None:
    raise AssertionError("nobody runs it")


async def _forgets(job: Job) -> Any:
    return _async(job)


async def _async_generator(job: Job) -> AsyncIterator[None]:
    yield


def _generator(job: Job) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (lambda job: _async(job), "returned a coroutine, which has not run; make it an async function"),
        (lambda job: _generator(job), "returned a generator, which has not run; take out its yield"),
        (lambda job: _async_generator(job), "returned an async_generator, which has not run"),
        (_forgets, "handler _forgets returned a coroutine"),
    ],
)
def test_a_handler_that_leaves_its_work_to_nobody_has_failed(
    handler: Callable[[Job], Any], said: str, server: Server
) -> None:
    with Broker(server.url, retry=RetryPolicy(max_retries=0)) as broker:
        broker.enqueue("mail", b"")
        with running(broker, handler):
            eventually(lambda: broker.stats("mail").dead == 1, "a dead job")
        (dead,) = broker.dead("mail")
        assert said in dead.error
        broker.requeue("mail")
        ((_job, error),) = drain(broker, handler, "mail").dead
        assert said in str(error)


class _Generates:
    def __call__(self, job: Job) -> Iterator[None]:
        yield


@pytest.mark.parametrize("handler", [_generator, _async_generator, _Generates(), partial(_generator)])
def test_a_generator_function_is_refused_as_a_handler(handler: Callable[[Job], Any]) -> None:
    broker = Broker("relay://127.0.0.1:1/0")
    with pytest.raises(InvalidArgument, match=r"generator function: calling it runs nothing of it; take out its yield"):
        Worker(broker, handler, ["mail"])
    with pytest.raises(InvalidArgument, match="generator function"):
        drain(broker, handler, "mail")


async def _exits() -> None:
    raise SystemExit(3)


async def _in_a_task() -> None:
    await asyncio.wait_for(_exits(), 30)


async def _cancelled() -> None:
    asyncio.current_task().cancel()  # type: ignore[union-attr] - as a library does with what it gave up
    await asyncio.sleep(30)


async def _stops_the_loop() -> None:
    asyncio.get_running_loop().stop()
    raise ValueError("no")


@pytest.mark.parametrize("fail", [_exits, _in_a_task, _cancelled, _stops_the_loop])
def test_an_async_handler_whose_tasks_end_otherwise_has_its_job_retried_and_the_worker_goes_on(
    server: Server, fail: Callable[[], Any]
) -> None:
    async def handle(job: Job) -> None:
        if job.payload == b"bad" and job.retries < 2:
            await fail()

    with Broker(server.url, retry=RetryPolicy(base=0.01, jitter=False)) as broker:
        broker.enqueue_many("mail", [b"bad", b"good"])
        with running(broker, handle):
            has_processed(broker, 2)
        assert broker.stats("mail").counters["retried"] == 2


def test_a_job_whose_retries_are_used_up_is_dead_with_its_last_error(broker: Broker) -> None:
    def handle(job: Job) -> None:
        raise ValueError(f"failure {job.retries}")

    broker.enqueue("mail", b"", max_retries=1, retry=RetryPolicy(base=0))
    with running(broker, handle):
        eventually(lambda: broker.dead("mail"), "a dead job")
    (dead,) = broker.dead("mail")
    assert (dead.reason, dead.error, dead.retries) == ("max_retries", "ValueError('failure 1')", 1)


def test_retry_says_when_the_job_runs_again(broker: Broker) -> None:
    def handle(job: Job) -> None:
        raise Retry("the other side is down", delay=3600)

    broker.enqueue("mail", b"")
    with running(broker, handle):
        eventually(lambda: broker.stats("mail").delayed == 1, "the retry")
    (waiting,) = broker.jobs("mail", "delayed")
    assert waiting.due_at is not None
    assert waiting.failed_at is not None
    assert waiting.due_at - waiting.failed_at == pytest.approx(3600, abs=0.01)
    assert "the other side is down" in str(waiting.error)


def test_reject_sends_the_job_to_dead_with_its_reason(broker: Broker) -> None:
    def handle(job: Job) -> None:
        raise Reject("not for me", **({"reason": "unknown_kind"} if job.payload else {}))

    broker.enqueue_many("mail", [b"", b"named"])
    with running(broker, handle):
        eventually(lambda: broker.stats("mail").dead == 2, "both dead")
    found = {job.payload: (job.reason, job.error) for job in broker.dead("mail")}
    assert found == {b"": ("rejected", "Reject('not for me')"), b"named": ("unknown_kind", "Reject('not for me')")}


class Unshowable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "error",
    [
        Retry(delay=-1),
        Retry(delay=math.nan),
        Retry(delay="soon"),  # type: ignore[arg-type]
        Unshowable(),
    ],
    ids=["negative", "nan", "text", "unshowable"],
)
def test_a_handler_that_fails_in_a_way_that_cannot_be_told_costs_only_its_own_retry(
    error: Exception, server: Server
) -> None:
    def handle(job: Job) -> None:
        if job.payload == b"bad" and not job.retries:
            raise error

    with Broker(server.url, retry=RetryPolicy(base=0)) as broker:
        broker.enqueue_many("mail", [b"bad", b"good"])
        with running(broker, handle) as worker:
            has_processed(broker, 2)
            assert worker.alive
        assert broker.stats("mail").counters["retried"] == 1


def test_a_reason_that_is_no_text_still_ends_in_dead(broker: Broker) -> None:
    def handle(job: Job) -> None:
        raise Reject("no", reason=7)  # type: ignore[arg-type]

    broker.enqueue("mail", b"")
    with running(broker, handle):
        eventually(lambda: broker.dead("mail"), "a dead job")
    assert broker.dead("mail")[0].reason == "7"


# --- leases


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_the_heartbeat_keeps_jobs_that_run_and_jobs_that_wait_for_many_leases(kind: str, server: Server) -> None:
    lease = 2.0
    seen: list[tuple[bytes, int]] = []

    def handle(job: Job) -> None:
        seen.append((job.payload, job.deliveries))
        if job.payload == b"long":
            time.sleep(3 * lease)  # the passing of time is what is tested

    async def handle_async(job: Job) -> None:
        seen.append((job.payload, job.deliveries))
        if job.payload == b"long":
            await asyncio.sleep(3 * lease)

    with Broker(server.url, lease=lease) as broker, Broker(server.url, lease=lease) as rival:
        broker.enqueue_many("mail", [b"long", b"prefetched", b"prefetched too"])
        with running(broker, handle if kind == "plain" else handle_async, prefetch=5) as worker:
            eventually(lambda: broker.stats("mail").inflight == 3, "all jobs claimed")
            while processed(broker) < 3 and worker.alive:
                assert rival.claim("mail", wait=0.1) == []
        assert seen == [(b"long", 1), (b"prefetched", 1), (b"prefetched too", 1)]
        assert "reaped" not in broker.stats("mail").counters


def test_the_heartbeat_outlives_what_is_no_error_of_the_server(
    server: Server, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = []

    def beat(self: Heartbeat) -> None:
        beats.append(1)
        if len(beats) == 1:
            raise MemoryError
        original(self)

    original = Heartbeat.beat
    monkeypatch.setattr(Heartbeat, "beat", beat)
    with Broker(server.url, lease=3.0) as broker:
        broker.enqueue("mail", b"")
        with running(broker, gate):
            gate.wait_for(1)
            eventually(lambda: len(beats) > 5, "the heartbeat to go on")
            gate.opened.set()
            has_processed(broker, 1)
    assert len(gate.started) == 1


def test_a_hook_that_raises_systemexit_ends_no_thread(broker: Broker) -> None:
    class Exits:
        @hookimpl
        def relay_run_started(self, job: Job) -> None:
            raise SystemExit(3)

    broker.plugins.register(Exits())
    broker.enqueue_many("mail", [b"1", b"2", b"3"])
    with running(broker, lambda job: None):
        has_processed(broker, 3)


def test_a_hook_that_is_asked_and_raises_systemexit_costs_only_its_own_job(broker: Broker) -> None:
    class Exits:
        @hookimpl
        def relay_decode_payload(self, payload: bytes) -> bytes:
            return sys.exit("no such key") if payload == b"spoiled" else payload

        @hookimpl
        def relay_retry_delay(self) -> float:
            sys.exit("no such policy")

    def handler(job: Job) -> None:
        if job.payload == b"fails" and not job.retries:
            raise ValueError("once")

    broker.plugins.register(Exits())
    broker.enqueue_many("mail", [b"fails", b"spoiled", b"good"])
    with running(broker, handler):
        has_processed(broker, 2)
    assert [(job.payload, job.reason) for job in broker.dead("mail")] == [(b"spoiled", "undecodable")]


@pytest.mark.timeout(30)
def test_news_may_be_told_by_a_signals_handler_whatever_line_it_interrupts() -> None:
    """An event's lock would not allow that: the interrupted thread holds it at some of its lines."""
    news, lines = News(), set()

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        line = frame.f_code, frame.f_lineno
        if event == "line" and line not in lines:
            lines.add(line)
            sys.settrace(None)
            news.tell()
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        news.forget()
        news.wait(0.001)
    finally:
        sys.settrace(before)
    assert len(lines) > 2


def test_a_job_whose_lease_was_lost_while_it_ran_is_neither_acked_nor_counted(server: Server) -> None:
    gate = Gate()
    with Broker(server.url, lease=1.0) as broker:
        broker.enqueue("mail", b"")
        with running(broker, gate) as worker:
            gate.wait_for(1)
            keys = broker.settings.keys("mail")
            server.cli("ZADD", keys.leases, 1, gate.started[0].id)  # as if its heartbeats had not come through
            server.cli("HSET", keys.config, "due", 1)
            with Broker(server.url) as rival:
                (again,) = rival.claim("mail", wait=10)
                assert again.deliveries == 2
                gate.opened.set()
                worker.worker.stop()
                assert worker.ended() == 0
                rival.ack(again)
        assert processed(broker) == 1


# --- stopping


def test_a_stop_finishes_what_runs_and_hands_back_what_was_prefetched_uncounted(broker: Broker, gate: Gate) -> None:
    broker.enqueue_many("mail", [b"%d" % i for i in range(5)])
    with running(broker, gate, prefetch=3) as worker:
        gate.wait_for(1)
        eventually(lambda: broker.stats("mail").inflight == 4, "prefetched jobs")
        worker.worker.stop()
        eventually(lambda: broker.stats("mail").inflight == 1, "the release of what was prefetched")
        assert worker.alive
        gate.opened.set()
        assert worker.ended() == 1
    jobs = broker.claim("mail", count=10)
    assert [(job.payload, job.deliveries) for job in jobs] == [(b"%d" % i, 1) for i in range(1, 5)]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_when_the_grace_runs_out_what_runs_is_handed_back(kind: str, broker: Broker, gate: Gate) -> None:
    cancelled = threading.Event()
    begun = threading.Event()

    async def endless(job: Job) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def plain(job: Job) -> None:
        begun.set()
        gate(job)

    broker.enqueue("mail", b"")
    with running(broker, plain if kind == "plain" else endless, grace=0.2) as worker:
        assert begun.wait(30)
        worker.worker.stop()
        assert worker.ended(10) == 0
    (job,) = broker.claim("mail")
    assert job.deliveries == 1
    assert kind == "plain" or cancelled.wait(10)


def test_the_second_stop_hands_back_at_once(broker: Broker, gate: Gate) -> None:
    broker.enqueue("mail", b"")
    with running(broker, gate, grace=3600) as worker:
        gate.wait_for(1)
        worker.worker.stop()
        worker.worker.stop()
        assert worker.ended(10) == 0
    assert broker.stats("mail").ready == 1


def test_an_idle_worker_stops_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_core.operations.settings._MAX_BLOCK", 300.0)  # so long would it wait for a wake-up
    with Broker(server.url, lease=3600) as broker, running(broker, print) as worker:
        eventually(lambda: server.info("clients")["blocked_clients"] == "1", "a blocked worker")
        worker.worker.stop()
        worker.ended(30)


def test_an_idle_worker_whose_server_is_away_stops_all_the_same(server: Server) -> None:
    with Broker(server.url, retry_for=3600) as broker, running(broker, print) as worker:
        eventually(lambda: server.info("clients")["blocked_clients"] == "1", "a blocked worker")
        server.kill()
        eventually(lambda: worker.worker._asked is not None, "that it tries to reach it")
        worker.worker.stop()
        worker.ended(30)


def test_what_has_run_is_acked_though_the_server_is_away_at_the_stop(server: Server, gate: Gate) -> None:
    with Broker(server.url, lease=60, retry_for=600, socket_timeout=0.3) as broker, running(broker, gate) as worker:
        broker.enqueue("mail", b"")
        gate.wait_for(1)
        server.pause()
        gate.opened.set()
        eventually(lambda: len(worker.worker._held) == 0, "the job to end")
        worker.worker.stop()
        eventually(lambda: 60 < worker.worker._until - time.monotonic() < 601, "the patience for its ack")
        server.resume()
        worker.ended(30)
        assert worker.worker.processed == 1
        assert broker.stats("mail").pending == 0


def test_a_server_that_was_away_at_the_first_stop_is_asked_at_the_second(server: Server, gate: Gate) -> None:
    with Broker(server.url, lease=60, retry_for=1, socket_timeout=0.3) as broker, running(broker, gate) as worker:
        broker.enqueue("mail", b"")
        gate.wait_for(1)
        server.pause()
        worker.worker.stop()
        eventually(lambda: worker.worker._away, "that it is found away")
        server.resume()
        eventually(lambda: not worker.worker._away, "that to be the past")
        worker.worker.stop()
        worker.ended(30)
        assert (broker.stats("mail").ready, broker.stats("mail").inflight) == (1, 0)


def test_the_log_says_what_a_stop_waits_for_and_what_was_handed_back(
    broker: Broker, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    broker.enqueue_many("mail", [b"0", b"1", b"2"])
    with caplog.at_level(logging.INFO, "relay.worker"), running(broker, gate, prefetch=2) as worker:
        eventually(lambda: broker.stats("mail").inflight == 3, "prefetched jobs")
        gate.wait_for(1)
        worker.worker.stop()
        eventually(lambda: broker.stats("mail").inflight == 1, "the release of what was prefetched")
        eventually(lambda: "stopping: 1 job runs, up to 30 s; stop again to hand it back" in caplog.text, "the log")
        worker.worker.stop()
        worker.ended(30)
    assert [r.message for r in caplog.records if "handed back" in r.message] == [
        "2 jobs handed back",
        "1 job handed back",
    ]


# --- limits and queues


def test_a_pause_holds_for_a_worker_and_a_resume_wakes_it(server: Server, broker: Broker) -> None:
    seen: list[bytes] = []
    broker.pause("mail")
    with running(broker, lambda job: seen.append(job.payload)):
        broker.enqueue("mail", b"waits")
        eventually(lambda: server.info("clients")["blocked_clients"] == "1", "a blocked worker")
        assert (seen, broker.stats("mail").ready) == ([], 1)
        broker.resume("mail")
        has_processed(broker, 1)


def test_a_rate_limit_holds_for_a_worker(broker: Broker) -> None:
    times: list[float] = []  # by the server's clock, whenever the handlers came to run
    broker.limit("mail", rate=5, burst=1)
    broker.enqueue_many("mail", [b""] * 5)
    with running(broker, lambda job: times.append(job.claimed_at), concurrency=4):
        has_processed(broker, 5)
    assert max(times) - min(times) > 0.79


def test_max_inflight_holds_for_workers_together(server: Server, broker: Broker, gate: Gate) -> None:
    broker.limit("mail", max_inflight=2)
    broker.enqueue_many("mail", [b""] * 6)
    with Broker(server.url) as other, running(broker, gate, concurrency=4), running(other, gate, concurrency=4):
        gate.wait_for(2)
        assert broker.stats("mail").inflight == 2
        gate.opened.set()
        has_processed(broker, 6)
    assert gate.most == 2


def test_queues_are_served_in_their_order(broker: Broker) -> None:
    seen: list[str] = []
    broker.enqueue_many("low", [b""] * 3)
    broker.enqueue_many("high", [b""] * 3)
    broker.enqueue_many("unserved", [b""])
    with running(broker, lambda job: seen.append(job.queue), "high", "low", "high", prefetch=0):
        has_processed(broker, 3, "low")
    assert seen == ["high"] * 3 + ["low"] * 3
    assert broker.stats("unserved").ready == 1


def test_jobs_run_by_priority_and_not_before_they_are_due(broker: Broker) -> None:
    seen: list[Job] = []
    broker.enqueue_many("mail", [JobSpec(b"low"), JobSpec(b"high", priority=9), JobSpec(b"later", delay=0.5)])
    with running(broker, seen.append, prefetch=0):
        has_processed(broker, 3)
    assert [job.payload for job in seen] == [b"high", b"low", b"later"]
    assert seen[-1].claimed_at - seen[-1].created_at >= 0.499


# --- bad settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"queues": []}, r"queues must be a list of at least one name, got \[\]"),
        ({"queues": repeat("mail", 0)}, r"queues must be a list of at least one name, got repeat\('mail', 0\)"),
        ({"queues": "mail"}, "queues must be a list of at least one name, got 'mail'"),
        ({"queues": ["mail", ""]}, "queue name must not be empty"),
        ({"queues": [b"mail"]}, "queue name must be"),
        ({"queues": 7}, "queues must be a name or a list of names, got 7"),
        ({"metrics_tasks": -1}, "metrics_tasks must be a whole number from 0"),
        ({"handler": "tasks:f"}, "handler must be a function that takes a Job, got 'tasks:f'"),
        ({"concurrency": 0}, "concurrency must be a whole number from 1"),
        ({"concurrency": 1.5}, "concurrency must be a whole number"),
        ({"grace": -1}, "grace must be between"),
        ({"grace": math.nan}, "grace must be a finite number"),
        ({"prefetch": -1}, "prefetch must be a whole number"),
        ({"metrics_addr": "localhost"}, "metrics address must be host:port, .* got 'localhost'"),
        ({"metrics_addr": "localhost:99999"}, "metrics address must be host:port, .* got 'localhost:99999'"),
        ({"metrics_addr": "localhost:http"}, "metrics address must be host:port"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_when_the_worker_is_made(settings: dict[str, Any], said: str) -> None:
    broker = Broker("relay://127.0.0.1:1/0")
    with pytest.raises(InvalidArgument, match=said):
        Worker(broker, **({"handler": print, "queues": ["mail"]} | settings))


def test_metrics_without_the_package_that_they_need_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "relay_core.metrics", None)
    with pytest.raises(InvalidArgument, match=r"needs prometheus-client .*pip install 'relay-queue\[metrics\]'"):
        Worker(Broker("relay://127.0.0.1:1/0"), print, ["mail"], metrics_addr="127.0.0.1:0")


def test_a_store_of_a_newer_layout_ends_the_worker_once_what_runs_has_ended(server: Server) -> None:
    gate = Gate()

    def handle(job: Job) -> None:
        gate(job)
        if job.payload != b"good":
            raise Reject if job.payload == b"odd" else ValueError("no luck")

    with Broker(server.url, retry=RetryPolicy(base=3600, ceiling=3600, jitter=False)) as broker:
        broker.enqueue_many("mail", [b"good", b"bad", b"odd"])
        with running(broker, handle, concurrency=3) as worker:
            gate.wait_for(3)
            config = broker.settings.keys("mail").config
            server.cli("HSET", config, "v", 99)
            gate.opened.set()
            with pytest.raises(LayoutError):
                worker.ended()
            assert worker.worker.processed == 1
        server.cli("HSET", config, "v", 1)
        assert processed(broker) == 1
        assert [job.error for job in broker.jobs("mail", "delayed")] == ["ValueError('no luck')"]
        assert [job.reason for job in broker.dead("mail")] == ["rejected"]
        assert broker.stats("mail").inflight == 0
        assert broker.audit("mail").clean


# --- metrics


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text: str = reply.read().decode()
        return text


def test_the_metrics_are_served_until_the_last_batch_is_in_them(server: Server, gate: Gate) -> None:
    port = free_port()
    scrapes: list[str] = []

    class LastLook:
        @hookimpl
        def relay_worker_stopped(self) -> None:
            scrapes.append(scrape(port))

    with Broker(server.url, plugins=[LastLook()]) as broker:
        broker.enqueue("mail", b"")
        with running(broker, gate, metrics_addr=f"127.0.0.1:{port}") as worker:
            gate.wait_for(1)
            assert 'relay_queue_depth{queue="mail",state="inflight"} 1.0' in scrape(port)
            worker.worker.stop()  # it drains, and serves on
            assert 'relay_jobs_claimed_total{queue="mail"} 1.0' in scrape(port)
            gate.opened.set()
            worker.ended()
        (last,) = scrapes
        assert 'relay_jobs_processed_total{queue="mail"} 1.0' in last
        assert 'relay_queue_depth{queue="mail",state="inflight"} 0.0' in last
        with pytest.raises(OSError):
            scrape(port)
        assert not broker.plugins.wants("relay_job_acked")  # its recorder went with it


def test_a_metrics_port_in_use_is_logged_and_the_worker_works(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        broker.enqueue("mail", b"")
        with running(broker, lambda job: None, metrics_addr=address) as worker:
            has_processed(broker, 1)
            worker.worker.stop()
            assert worker.ended() == 1
        assert f"no metrics: cannot listen on {address}" in caplog.text


# --- the server goes away


def test_a_worker_goes_on_when_its_server_was_killed_and_started_again() -> None:
    gate = Gate()
    with (
        Server("valkey", options={"appendonly": "yes", "appendfsync": "always"}) as server,
        Broker(server.url, lease=5.0, retry_for=20.0) as broker,
    ):
        broker.enqueue("mail", b"held")
        with running(broker, gate, prefetch=0):
            gate.wait_for(1)
            server.kill()
            server.start()
            broker.enqueue("mail", b"new")
            gate.opened.set()
            has_processed(broker, 2)
        assert [(job.payload, job.deliveries) for job in gate.started] == [(b"held", 1), (b"new", 1)]
        assert broker.audit("mail").clean


def test_an_idle_worker_hears_of_work_on_a_server_that_was_started_again() -> None:
    with (
        Server("valkey", options={"appendonly": "yes"}) as server,
        Broker(server.url, retry_for=20.0) as broker,
        running(broker, lambda job: None),
    ):
        eventually(lambda: server.info("clients")["blocked_clients"] == "1", "a blocked worker")
        server.kill()
        server.start()
        broker.enqueue("mail", b"")
        has_processed(broker, 1)


def test_a_job_that_ends_during_a_heartbeat_has_lost_no_lease(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Note:
        @hookimpl
        def relay_lease_lost(self, id: str) -> None:
            told.append(id)

    held = Held()
    with Broker(broker.url.safe(), plugins=[Note()]) as mine:
        broker.enqueue_many("mail", [JobSpec(b"", id="ended"), JobSpec(b"", id="lost"), JobSpec(b"", id="held")])
        jobs = mine.claim("mail", 3)
        for job in jobs:
            held.add(job)
        broker.release(jobs[1])  # by nobody here
        everything = Held.all

        def all_of(held: Held) -> list[Job]:
            found = everything(held)
            held.drop(jobs[0])
            mine.ack(jobs[0])
            return found

        monkeypatch.setattr(Held, "all", all_of)
        Heartbeat(mine, held).beat()
    assert told == ["lost"]
    assert [held.holds(job) for job in jobs] == [False, False, True]


def test_the_event_loop_of_async_handlers_is_closed_at_the_end(broker: Broker) -> None:
    """A process may run many workers, one after the other: each loop has three descriptors."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def handle(_job: Job) -> None:
        loops.append(asyncio.get_running_loop())

    broker.enqueue("mail", b"")
    with running(broker, handle):
        has_processed(broker, 1)
    (loop,) = loops
    eventually(loop.is_closed, "the end of the loop")


def test_a_pool_whose_loop_a_handler_stops_as_it_is_closed_ends(broker: Broker) -> None:
    async def handle(_job: Job) -> None: ...

    pool = LoopPool(handle, 1, Held(), lambda _outcome: None, broker.plugins)
    pool._closing = True
    pool._loop.call_soon_threadsafe(pool._loop.stop)
    eventually(pool._loop.is_closed, "the end of the loop")
    pool.close()


# --- processes


class Processes:
    """Starts `relay worker` processes, and ends those that still run after the test."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self._all: list[subprocess.Popen[str]] = []

    def start(self, handler: str, *options: str) -> subprocess.Popen[str]:
        made = spawn("worker", f"tests.worker_handlers:{handler}", "-q", "mail", *options, url=self.url, cwd=ROOT)
        self._all.append(made)
        return made

    def ledger(self) -> list[str]:
        path = self.folder / "ledger"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, *lines: str) -> None:
        eventually(lambda: set(lines) <= set(self.ledger()), f"{lines} in the ledger")

    def go(self) -> None:
        (self.folder / "go").touch()

    def close(self) -> None:
        for process in self._all:
            with contextlib.suppress(OSError):
                process.kill()
            process.communicate()


@pytest.fixture
def processes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    monkeypatch.setenv("RELAY_TEST_FOLDER", str(tmp_path))
    processes = Processes(server.url, tmp_path)
    yield processes
    processes.close()


@pytest.mark.parametrize("handler", ["hold", "hold_async"])
def test_sigterm_finishes_what_runs_and_hands_back_the_rest_uncounted(
    handler: str, processes: Processes, broker: Broker
) -> None:
    broker.enqueue_many("mail", [b"%d" % i for i in range(5)])
    worker = processes.start(handler, "-c", "2", "--prefetch", "2")
    processes.wait_for("start 0 1", "start 1 1")
    eventually(lambda: broker.stats("mail").inflight == 4, "prefetched jobs")
    worker.send_signal(signal.SIGTERM)
    eventually(lambda: broker.stats("mail").inflight == 2, "the release of what was prefetched")
    processes.go()
    code, _out, err = finished(worker)
    assert (code, processed(broker)) == (0, 2), err
    assert sorted(processes.ledger()) == ["end 0 1", "end 1 1", "start 0 1", "start 1 1"]
    assert [(job.payload, job.deliveries) for job in broker.claim("mail", count=9)] == [(b"2", 1), (b"3", 1), (b"4", 1)]


@pytest.mark.parametrize("handler", ["hold", "hold_async"])
def test_after_sigterm_what_outlasts_the_grace_is_handed_back(
    handler: str, processes: Processes, broker: Broker
) -> None:
    broker.enqueue("mail", b"0")
    worker = processes.start(handler, "--grace", "0.3")
    processes.wait_for("start 0 1")
    worker.send_signal(signal.SIGTERM)
    code, _out, err = finished(worker)
    assert code == 0, err
    assert processes.ledger() == ["start 0 1"]
    assert [job.deliveries for job in broker.claim("mail")] == [1]


@contextmanager
def hangups(what: signal.Handlers) -> Iterator[None]:
    """What SIGHUP does to a process that is started meanwhile."""
    ours = signal.signal(signal.SIGHUP, what)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, ours)


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_closes_stops_a_worker_as_sigterm_does(
    again: signal.Signals, processes: Processes, broker: Broker
) -> None:
    """It may say so twice, or after a SIGTERM, as systemd's SendSIGHUP= does: that is no second signal."""
    broker.enqueue_many("mail", [b"0", b"1"])
    with hangups(signal.SIG_DFL):  # these tests may run under nohup
        worker = processes.start("hold", "--grace", "3600", "--prefetch", "1")
    processes.wait_for("start 0 1")
    worker.send_signal(again)
    eventually(lambda: broker.stats("mail").ready == 1, "the release of what was prefetched")
    worker.send_signal(signal.SIGHUP)
    processes.go()
    code, _out, err = finished(worker)
    assert (code, processed(broker)) == (0, 1), err
    assert processes.ledger() == ["start 0 1", "end 0 1"]


def test_a_worker_that_is_to_outlive_its_terminal_does(processes: Processes, broker: Broker) -> None:
    broker.enqueue("mail", b"0")
    with hangups(signal.SIG_IGN):  # as nohup has it
        worker = processes.start("hold")
    processes.wait_for("start 0 1")
    worker.send_signal(signal.SIGHUP)
    broker.enqueue("mail", b"1")
    processes.go()
    processes.wait_for("end 0 1", "end 1 1")
    worker.send_signal(signal.SIGTERM)
    code, _out, err = finished(worker)
    assert (code, processed(broker)) == (0, 2), err


def test_an_application_keeps_its_own_handler_of_sighup(broker: Broker) -> None:
    worker = Worker(broker, lambda _job: os.kill(os.getpid(), signal.SIGHUP), ["mail"])

    def reload(_number: int, _frame: FrameType | None) -> None:
        worker.stop()

    broker.enqueue("mail", b"0")
    before = signal.signal(signal.SIGHUP, reload)
    try:
        assert worker.run() == 1
        assert signal.getsignal(signal.SIGHUP) is reload
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_hands_back_at_once(number: signal.Signals, processes: Processes, broker: Broker) -> None:
    broker.enqueue_many("mail", [b"0", b"1"])
    worker = processes.start("hold", "--grace", "3600", "--prefetch", "1")
    processes.wait_for("start 0 1")
    worker.send_signal(number)
    # the first was heard when the prefetched job is back
    eventually(lambda: broker.stats("mail").ready == 1, "the release of what was prefetched")
    worker.send_signal(number)
    finished(worker)
    assert [(job.payload, job.deliveries) for job in broker.claim("mail", count=9)] == [(b"0", 1), (b"1", 1)]


def test_a_second_signal_ends_a_worker_whose_server_does_not_answer(server: Server) -> None:
    """However long a reply may take."""
    code = (
        "import signal, sys; from relay_core import Broker; from relay_core.worker import Worker;"
        "signal.signal(signal.SIGINT, signal.SIG_IGN);"  # after its end, and while Python ends
        "Worker(Broker(sys.argv[1], retry_for=3600, socket_timeout=3600), print, ['mail']).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url], cwd=ROOT)
    try:
        eventually(lambda: server.info("clients")["blocked_clients"] == "1", "a blocked worker")
        server.pause()

        def ended() -> bool:
            process.send_signal(signal.SIGINT)
            return process.poll() is not None

        eventually(ended, "its end")
        assert process.returncode == 0
    finally:
        server.resume()
        process.kill()
        process.wait()


def test_the_options_of_a_worker_say_when_its_failed_jobs_run_again(processes: Processes, broker: Broker) -> None:
    broker.enqueue("mail", b"0")
    processes.start("fail", "--max-retries", "2", "--retry-base", "1h", "--retry-ceiling", "1ms")
    eventually(lambda: broker.stats("mail").dead == 1, "a dead job")
    assert [(job.reason, job.retries) for job in broker.dead("mail")] == [("max_retries", 2)]
    assert len(processes.ledger()) == 3
    code, _out, err = finished(processes.start("fail", "--max-retries", "-1"))
    assert code == 2
    assert "max_retries must be a whole number of at least 0, got '-1'" in err


def test_the_jobs_of_a_killed_worker_run_elsewhere_once_their_leases_are_over(
    processes: Processes, server: Server
) -> None:
    lease = 1.0
    seen: list[tuple[bytes, int]] = []
    with Broker(server.url, lease=lease) as broker:
        broker.enqueue_many("mail", [b"0", b"1", b"2"])
        doomed = processes.start("hold", "--lease", str(lease), "--prefetch", "2")
        processes.wait_for("start 0 1")
        eventually(lambda: broker.stats("mail").inflight == 3, "prefetched jobs")
        with running(broker, lambda job: seen.append((job.payload, job.deliveries))):
            eventually(lambda: int(server.info("clients")["blocked_clients"]) >= 1, "a waiting worker")
            doomed.kill()
            has_processed(broker, 3)
        assert sorted(seen) == [(b"0", 2), (b"1", 2), (b"2", 2)]
        assert broker.audit("mail").clean


def test_a_job_that_kills_its_process_is_dead_after_max_deliveries_and_others_run(
    processes: Processes, server: Server
) -> None:
    with Broker(server.url, lease=0.5, max_deliveries=2) as broker:
        broker.enqueue_many("mail", [b"poison", b"good"])
        worker: subprocess.Popen[str] | None = None

        def over() -> bool:
            nonlocal worker
            if worker is None or worker.poll() is not None:
                worker = processes.start("die", "--lease", "0.5", "--max-deliveries", "2")
            return broker.stats("mail").pending == 0

        eventually(over, "an empty queue", 60)
        (dead,) = broker.dead("mail")
        assert (dead.payload, dead.reason, dead.deliveries) == (b"poison", "max_deliveries", 2)
        assert [line for line in processes.ledger() if "poison" in line] == ["start poison 1", "start poison 2"]
        assert processed(broker) == 1


def test_two_processes_share_a_queue_and_run_each_job_once(processes: Processes, broker: Broker) -> None:
    processes.go()
    processes.start("hold", "-c", "2")
    processes.start("hold_async", "-c", "10")
    broker.enqueue_many("mail", [b"%d" % i for i in range(200)])
    has_processed(broker, 200)
    assert sorted(processes.ledger()) == sorted(f"{event} {i} 1" for i in range(200) for event in ("start", "end"))
