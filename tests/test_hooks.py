"""Every hook of relay_core/hooks.py: when it fires, with what, and when it does not.

The first word after `test_` is the hook's name, and a test here holds that each hook has one.
"""

from __future__ import annotations

import ast
import asyncio
import contextvars
import dataclasses
import inspect
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest

import relay_adapters
from relay_core import AsyncBroker, Broker, Job, JobSpec, JobSummary, RetryPolicy, StoredJob, hookimpl, hooks, plugins
from relay_core.errors import LeaseLost, PluginError
from relay_core.plugins import Plugins
from relay_core.worker import Worker
from tests.servers import Server

NAMES = sorted(name for name in vars(hooks) if name.startswith("relay_"))
DOCS = Path(__file__).parent.parent / "docs" / "hooks.md"


def impl(name: str, function: Callable[..., Any], **options: Any) -> object:
    """A plugin with one hook: `function` under that hook's name, marked with these options."""

    class Plugin:
        pass

    plugin = Plugin()
    function.__name__ = name
    setattr(plugin, name, hookimpl(function, **options))
    return plugin


class Notebook:
    """A plugin that notes every call of a notify hook: `notes` is a list of (name, arguments)."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.threads: set[int] = set()

    def _note(self, name: str, **arguments: Any) -> None:
        self.threads.add(threading.get_ident())
        self.notes.append((name.removeprefix("relay_"), arguments))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """What was noted since the last time."""
        found, self.notes = self.notes, []
        return found

    def names(self) -> list[str]:
        return [name for name, _arguments in self.take()]

    @hookimpl
    def relay_job_enqueued(self, queue: str, id: str, delay: float, headers: Mapping[str, str]) -> None:
        self._note("relay_job_enqueued", queue=queue, id=id, delay=delay, headers=headers)

    @hookimpl
    def relay_job_deduplicated(self, queue: str, id: str, dedup_key: str | None) -> None:
        self._note("relay_job_deduplicated", queue=queue, id=id, dedup_key=dedup_key)

    @hookimpl
    def relay_job_claimed(self, job: Job) -> None:
        self._note("relay_job_claimed", job=job)

    @hookimpl
    def relay_job_acked(self, job: Job, latency: float) -> None:
        self._note("relay_job_acked", job=job, latency=latency)

    @hookimpl
    def relay_job_retried(self, job: Job, delay: float, error: str | None) -> None:
        self._note("relay_job_retried", job=job, delay=delay, error=error)

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None) -> None:
        self._note("relay_job_dead", job=job, reason=reason, error=error)

    @hookimpl
    def relay_jobs_reaped(self, queue: str, count: int) -> None:
        self._note("relay_jobs_reaped", queue=queue, count=count)

    @hookimpl
    def relay_jobs_promoted(self, queue: str, count: int) -> None:
        self._note("relay_jobs_promoted", queue=queue, count=count)

    @hookimpl
    def relay_lease_lost(self, queue: str, id: str, move: str) -> None:
        self._note("relay_lease_lost", queue=queue, id=id, move=move)

    @hookimpl
    def relay_run_started(self, job: Job) -> None:
        self._note("relay_run_started", job=job)

    @hookimpl
    def relay_run_ended(self, job: Job, seconds: float, error: BaseException | None) -> None:
        self._note("relay_run_ended", job=job, seconds=seconds, error=error)

    @hookimpl
    def relay_worker_started(self, worker: str, queues: tuple[str, ...], concurrency: int) -> None:
        self._note("relay_worker_started", worker=worker, queues=queues, concurrency=concurrency)

    @hookimpl
    def relay_worker_stopped(self, worker: str, queues: tuple[str, ...], processed: int) -> None:
        self._note("relay_worker_stopped", worker=worker, queues=queues, processed=processed)


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def broker(server: Server, notebook: Notebook) -> Iterator[Broker]:
    with Broker(server.url, plugins=[notebook], retry_for=1.0) as broker:
        yield broker


def expire(server: Server, broker: Broker, queue: str = "mail") -> None:
    """All leases of the queue are over, as if the time had passed."""
    keys = broker.settings.keys(queue)
    for id in server.cli("ZRANGE", keys.leases, 0, -1):
        server.cli("ZADD", keys.leases, 1, id)
    server.cli("HSET", keys.config, "due", 1)


def make_due(server: Server, broker: Broker, queue: str = "mail") -> None:
    """All delayed jobs of the queue are due, as if the time had passed."""
    keys = broker.settings.keys(queue)
    for id in server.cli("ZRANGE", keys.delayed, 0, -1):
        server.cli("ZADD", keys.delayed, 1, id)
    server.cli("HSET", keys.config, "due", 1)


# --- notify


def test_relay_job_enqueued_says_queue_id_and_delay(broker: Broker, notebook: Notebook) -> None:
    now = broker.enqueue("mail", b"").id
    later = broker.enqueue("mail", b"", delay=60).id
    at = broker.enqueue("mail", b"", at=time.time() + 3600).id
    past = broker.enqueue("mail", b"", at=1).id
    notes = notebook.take()
    assert [name for name, _ in notes] == ["job_enqueued"] * 4
    assert [(note["queue"], note["id"]) for _, note in notes] == [("mail", id) for id in (now, later, at, past)]
    delays = [note["delay"] for _, note in notes]
    assert (delays[0], delays[1], delays[3]) == (0.0, 60, 0.0)
    assert 3590 < delays[2] <= 3600


def test_relay_job_enqueued_fires_for_each_job_of_a_batch_and_for_none_that_was_refused(
    broker: Broker, notebook: Notebook
) -> None:
    sent = broker.enqueue_many("mail", [b"%d" % i for i in range(450)])
    assert [note["id"] for _, note in notebook.take()] == [answer.id for answer in sent]
    with pytest.raises(ValueError):
        broker.enqueue_many("mail", [b"good", JobSpec(b"", priority=11)])
    assert notebook.take() == []


def test_relay_job_enqueued_does_not_fire_when_the_server_refuses(
    server: Server, broker: Broker, notebook: Notebook
) -> None:
    server.cli("HSET", broker.settings.keys("mail").config, "v", 99)
    with pytest.raises(Exception, match="layout"):
        broker.enqueue("mail", b"")
    assert notebook.take() == []


def test_relay_job_deduplicated_names_the_job_that_is_there(broker: Broker, notebook: Notebook) -> None:
    first = broker.enqueue("mail", b"", dedup_key="key").id
    broker.enqueue("mail", b"", id="mine")
    notebook.take()
    assert broker.enqueue("mail", b"", dedup_key="key").duplicate
    assert broker.enqueue("mail", b"", id="mine").duplicate
    assert notebook.take() == [
        ("job_deduplicated", {"queue": "mail", "id": first, "dedup_key": "key"}),
        ("job_deduplicated", {"queue": "mail", "id": "mine", "dedup_key": None}),
    ]


def test_relay_job_claimed_gets_the_job_as_the_caller_does(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue_many("mail", [b"1", b"2"])
    notebook.take()
    jobs = broker.claim("mail", count=5)
    assert notebook.take() == [("job_claimed", {"job": job}) for job in jobs]
    assert broker.claim("mail") == []
    assert notebook.take() == []  # an empty claim is no event


def test_relay_job_claimed_also_fires_for_the_claim_of_a_finish(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue("mail", b"")
    notebook.take()
    broker.finish("mail", count=1)
    assert notebook.names() == ["job_claimed"]


def test_relay_job_acked_tells_the_time_since_the_enqueue(server: Server, broker: Broker, notebook: Notebook) -> None:
    broker.enqueue_many("mail", [b"1", b"2", b"3"])
    jobs = broker.claim("mail", count=3)
    aged = [dataclasses.replace(job, created_at=job.created_at - 10) for job in jobs]
    notebook.take()
    broker.ack(aged[0])
    broker.ack_many(aged[1:2])
    broker.finish("mail", acks=aged[2:])
    notes = notebook.take()
    assert [(name, note["job"]) for name, note in notes] == [("job_acked", job) for job in aged]
    assert all(10 <= note["latency"] < 40 for _, note in notes)


def test_relay_job_acked_fires_once_for_a_job_that_is_acked_twice(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue("mail", b"")
    (job,) = broker.claim("mail")
    notebook.take()
    broker.ack(job)
    broker.ack(job)  # answered with "already done"
    assert notebook.names() == ["job_acked"]


def test_relay_job_retried_tells_delay_and_error(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue_many("mail", [b"1", b"2"])
    one, two = broker.claim("mail", count=2)
    notebook.take()
    broker.nack(one, ValueError("no"), delay=2.5)
    broker.finish("mail", nacks=[(two, broker.operations.nack_of(two, delay=1))])
    broker.nack(one, ValueError("no"), delay=2.5)  # a second time is no event
    assert notebook.take() == [
        ("job_retried", {"job": one, "delay": 2.5, "error": "ValueError('no')"}),
        ("job_retried", {"job": two, "delay": 1.0, "error": None}),
    ]


def test_relay_job_dead_tells_reason_and_error(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue("mail", b"1", max_retries=0)
    broker.enqueue("mail", b"2")
    broker.enqueue("mail", b"3")
    used_up, rejected, named = broker.claim("mail", count=3)
    notebook.take()
    broker.nack(used_up, "failed")
    broker.nack(rejected, dead=True)
    broker.finish("mail", nacks=[(named, broker.operations.nack_of(named, "late", dead=True, reason="expired"))])
    assert notebook.take() == [
        ("job_dead", {"job": used_up, "reason": "max_retries", "error": "failed"}),
        ("job_dead", {"job": rejected, "reason": "rejected", "error": None}),
        ("job_dead", {"job": named, "reason": "expired", "error": "late"}),
    ]


@pytest.mark.parametrize("move", ["claim", "reap"])
def test_relay_job_dead_fires_where_the_last_delivery_is_found_to_be_lost(
    move: str, server: Server, broker: Broker, notebook: Notebook
) -> None:
    id = broker.enqueue("mail", b"poison", max_deliveries=1).id
    broker.claim("mail")
    expire(server, broker)
    notebook.take()
    _ = broker.claim("mail") if move == "claim" else broker.reap("mail")
    (_reaped, (name, note)) = notebook.take()
    assert (name, note["job"].id, note["job"].payload, note["reason"]) == ("job_dead", id, b"poison", "max_deliveries")
    assert "1 times without an answer" in note["error"]


def test_relay_job_dead_fires_for_what_does_not_decode_and_claimed_does_not(
    server: Server, broker: Broker, notebook: Notebook
) -> None:
    id = broker.enqueue("mail", b"").id
    server.cli("HSET", broker.settings.keys("mail").jobs, id, b"garbage")
    notebook.take()
    broker.claim("mail")
    ((name, note),) = notebook.take()
    assert (name, note["job"].id, note["reason"]) == ("job_dead", id, "undecodable")


@pytest.mark.parametrize("move", ["claim", "reap"])
def test_relay_jobs_reaped_counts_the_leases_that_were_over(
    move: str, server: Server, broker: Broker, notebook: Notebook
) -> None:
    broker.enqueue_many("mail", [b"1", b"2"])
    broker.claim("mail", count=2)
    notebook.take()
    broker.reap("mail")
    assert notebook.take() == []  # a reap that finds nothing is no event
    expire(server, broker)
    _ = broker.claim("mail", count=2) if move == "claim" else broker.reap("mail")
    assert notebook.take()[0] == ("jobs_reaped", {"queue": "mail", "count": 2})


@pytest.mark.parametrize("move", ["claim", "promote"])
def test_relay_jobs_promoted_counts_the_jobs_that_were_due(
    move: str, server: Server, broker: Broker, notebook: Notebook
) -> None:
    broker.enqueue_many("mail", [JobSpec(b"1", delay=60), JobSpec(b"2", delay=60)])
    notebook.take()
    broker.promote("mail")
    assert notebook.take() == []  # nothing was due
    make_due(server, broker)
    _ = broker.claim("mail", count=2) if move == "claim" else broker.promote("mail")
    assert notebook.take()[0] == ("jobs_promoted", {"queue": "mail", "count": 2})


def test_relay_lease_lost_names_the_move_that_changed_nothing(
    server: Server, broker: Broker, notebook: Notebook
) -> None:
    broker.enqueue("mail", b"")
    (job,) = broker.claim("mail")
    expire(server, broker)
    (again,) = broker.claim("mail")
    notebook.take()
    for act in (broker.ack, broker.nack):
        with pytest.raises(LeaseLost):
            act(job)
    broker.extend(job)
    broker.release(job)
    broker.ack_many([job])
    broker.finish("mail", acks=[job], nacks=[(job, broker.operations.nack_of(job))])
    moves = ["ack", "nack", "extend", "release", "ack", "ack", "nack"]
    assert notebook.take() == [("lease_lost", {"queue": "mail", "id": job.id, "move": move}) for move in moves]
    broker.ack(again)


def run_one(broker: Broker, **options: Any) -> Worker:
    """A worker that has run what is ready and stopped."""
    seen = threading.Semaphore(0)
    worker = Worker(broker, lambda job: seen.release(), ["mail", "post"], **options)
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert seen.acquire(timeout=30)
    worker.stop()
    thread.join(30)
    assert not thread.is_alive()
    return worker


def test_relay_job_enqueued_tells_the_headers_that_were_stored(server: Server, notebook: Notebook) -> None:
    with Broker(server.url, plugins=[notebook, impl("relay_add_headers", lambda: {"b": "2"})]) as broker:
        broker.enqueue_many("mail", [JobSpec(b"", headers={"a": "1"}), b""])
        told = [note["headers"] for _, note in notebook.take()]
        assert told == [{"a": "1", "b": "2"}, {"b": "2"}]
        assert [dict(job.headers) for job in broker.claim("mail", 2)] == told


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_relay_run_started_fires_where_the_handler_runs(broker: Broker, notebook: Notebook, kind: str) -> None:
    running = contextvars.ContextVar[str]("running", default="nothing")
    seen: list[object] = []
    worker: Worker

    def look() -> None:
        seen.extend((running.get(), threading.get_ident()))
        worker.stop()

    def plain(job: Job) -> None:
        look()

    async def coroutine(job: Job) -> None:
        look()

    def started(job: Job) -> None:
        running.set(job.id)
        seen.append(threading.get_ident())

    broker.plugins.register(impl("relay_run_started", started))
    id = broker.enqueue("mail", b"").id
    worker = Worker(broker, plain if kind == "thread" else coroutine, ["mail"])
    worker.run()
    hook_thread, found, handler_thread = seen
    assert (found, handler_thread) == (id, hook_thread)
    assert running.get() == "nothing"
    names = [name for name, _ in notebook.take()]
    assert names[-5:] == ["job_claimed", "run_started", "run_ended", "job_acked", "worker_stopped"]


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_relay_run_ended_tells_how_long_it_ran_and_what_it_raised(
    broker: Broker, notebook: Notebook, kind: str
) -> None:
    worker: Worker

    def plain(job: Job) -> None:
        worker.stop()
        time.sleep(0.02)
        raise ValueError("no")

    async def coroutine(job: Job) -> None:
        plain(job)

    broker.enqueue("mail", b"")
    worker = Worker(broker, plain if kind == "thread" else coroutine, ["mail"])
    worker.run()
    notes = notebook.take()
    (ended,) = [note for name, note in notes if name == "run_ended"]
    assert 0.02 <= ended["seconds"] < 10
    assert repr(ended["error"]) == "ValueError('no')"
    assert [name for name, _ in notes][-4:] == ["run_started", "run_ended", "job_retried", "worker_stopped"]


def test_relay_run_ended_fires_for_a_coroutine_that_the_end_of_the_worker_cancels(
    broker: Broker, notebook: Notebook
) -> None:
    worker: Worker

    async def endless(job: Job) -> None:
        worker.stop()
        worker.stop()
        await asyncio.sleep(3600)

    broker.enqueue("mail", b"")
    worker = Worker(broker, endless, ["mail"])
    worker.run()
    notes = notebook.take()
    (ended,) = [note for name, note in notes if name == "run_ended"]
    assert isinstance(ended["error"], asyncio.CancelledError)
    assert broker.stats("mail").ready == 1


def test_relay_worker_started_fires_before_the_first_claim(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue("mail", b"")
    notebook.take()
    worker = run_one(broker, concurrency=3)
    names = notebook.notes
    assert names[0] == ("worker_started", {"worker": worker.name, "queues": ("mail", "post"), "concurrency": 3})
    assert re.fullmatch(r".+:\d+:[0-9a-f]+", worker.name)
    assert [name for name, _ in names].index("job_claimed") == 1


def test_relay_worker_stopped_fires_last_and_counts_what_was_acked(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue("mail", b"")
    notebook.take()
    worker = run_one(broker)
    names = notebook.take()
    assert names[-1] == ("worker_stopped", {"worker": worker.name, "queues": ("mail", "post"), "processed": 1})
    assert [name for name, _ in names] == [
        *("worker_started", "job_claimed", "run_started", "run_ended", "job_acked", "worker_stopped")
    ]


def test_moves_without_a_hook_fire_nothing(server: Server, broker: Broker, notebook: Notebook) -> None:
    broker.enqueue_many("mail", [b"1", b"2"])
    one, two = broker.claim("mail", count=2)
    notebook.take()
    broker.extend([one, two])
    broker.release(one)
    broker.stats("mail")
    broker.pause("mail")
    assert broker.claim("mail").limited == "paused"
    broker.resume("mail")
    broker.jobs("mail", "ready")
    broker.cancel("mail", one.id)
    broker.purge("mail")
    broker.audit("mail")
    assert notebook.take() == []


def test_hooks_fire_on_the_thread_that_made_the_move(broker: Broker, notebook: Notebook) -> None:
    thread = threading.Thread(target=lambda: broker.enqueue("mail", b""))
    thread.start()
    thread.join()
    assert notebook.threads == {thread.ident}


def test_an_async_broker_fires_the_same_hooks(server: Server, notebook: Notebook) -> None:
    async def live() -> None:
        async with AsyncBroker(server.url, plugins=[notebook]) as broker:
            await broker.enqueue("mail", b"", dedup_key="k")
            await broker.enqueue("mail", b"", dedup_key="k")
            (job,) = await broker.claim("mail")
            await broker.nack(job, delay=0)
            (job,) = await broker.claim("mail")
            await broker.nack(job, dead=True)
            await broker.requeue("mail")
            (job,) = await broker.claim("mail")
            await broker.ack(job)

    asyncio.run(live())
    assert notebook.names() == [
        *("job_enqueued", "job_deduplicated", "job_claimed", "job_retried"),
        *("job_claimed", "job_dead", "job_claimed", "job_acked"),
    ]


# --- decide


def test_relay_retry_delay_decides_when_a_failed_job_runs_again(server: Server) -> None:
    asked: list[tuple[str, str, float]] = []

    def decide(job: Job, error: BaseException | str | None, delay: float) -> float:
        asked.append((job.id, repr(error), delay))
        return delay + 100

    policy = RetryPolicy(base=7, jitter=False)
    with Broker(server.url, plugins=[impl("relay_retry_delay", decide)], retry=policy) as broker:
        id = broker.enqueue("mail", b"").id
        (job,) = broker.claim("mail")
        broker.nack(job, ValueError("no"))
        assert asked == [(id, "ValueError('no')", 7.0)]
        (waiting,) = broker.jobs("mail", "delayed")
        assert waiting.due_at is not None
        assert waiting.failed_at is not None
        assert waiting.due_at - waiting.failed_at == pytest.approx(107, abs=0.01)


def test_relay_retry_delay_is_not_asked_when_the_caller_says_a_delay(server: Server, notebook: Notebook) -> None:
    def decide(job: Job) -> float:
        raise AssertionError("not to be called")

    with Broker(server.url, plugins=[impl("relay_retry_delay", decide), notebook]) as broker:
        broker.enqueue("mail", b"")
        (job,) = broker.claim("mail")
        broker.nack(job, delay=3)
        assert notebook.take()[-1][1]["delay"] == 3


@pytest.mark.parametrize("answer", [-1, float("nan"), float("inf"), "soon", True, 1e30, [1]], ids=str)
def test_relay_retry_delay_with_a_nonsense_answer_is_logged_and_passed_over(
    answer: Any, server: Server, notebook: Notebook, caplog: pytest.LogCaptureFixture
) -> None:
    good = impl("relay_retry_delay", lambda job: 5)
    bad = impl("relay_retry_delay", lambda job: answer)
    with Broker(server.url, plugins=[good, bad, notebook]) as broker:  # the last one is asked first
        broker.enqueue("mail", b"")
        (job,) = broker.claim("mail")
        broker.nack(job)
        assert notebook.take()[-1] == ("job_retried", {"job": job, "delay": 5.0, "error": None})
    assert "relay_retry_delay: delay must be" in caplog.text


def test_relay_route_job_names_the_queue_that_a_job_goes_to(server: Server, notebook: Notebook) -> None:
    def route(queue: str, payload: bytes, headers: Mapping[str, str]) -> str | None:
        assert queue == "mail"
        return headers.get("to") or ("big" if len(payload) > 5 else None)

    with Broker(server.url, plugins=[impl("relay_route_job", route), notebook]) as broker:
        broker.enqueue_many("mail", [b"small", b"larger", JobSpec(b"", headers={"to": "post"})])
        assert [note["queue"] for _, note in notebook.take()] == ["mail", "big", "post"]
        assert broker.queues() == ["big", "mail", "post"]
        assert [job.payload for job in broker.claim("big")] == [b"larger"]


def test_relay_route_job_that_raises_or_names_no_queue_reaches_the_caller_and_stores_nothing(server: Server) -> None:
    def refuse(queue: str) -> str:
        if queue == "mail":
            raise PermissionError("not you")
        return ""

    with Broker(server.url, plugins=[impl("relay_route_job", refuse)]) as broker:
        with pytest.raises(PermissionError, match="not you"):
            broker.enqueue("mail", b"")
        with pytest.raises(ValueError, match="queue name must not be empty"):
            broker.enqueue("post", b"")
    assert server.cli("KEYS", "*") == []


# --- transform


class Wrap:
    """Puts its letter around a payload, and takes it off again."""

    def __init__(self, letter: bytes) -> None:
        self.letter = letter

    @hookimpl
    def relay_encode_payload(self, payload: bytes, queue: str) -> bytes | None:
        return None if queue == "plain" else self.letter + payload + self.letter

    @hookimpl
    def relay_decode_payload(self, payload: bytes, queue: str) -> bytes | None:
        if queue == "plain":
            return None
        assert payload[:1] == payload[-1:] == self.letter, "undone in the wrong order"
        return payload[1:-1]


def stored_payload(server: Server, broker: Broker, queue: str, id: str) -> bytes:
    """The payload as it lies in the store."""
    record: bytes = server.cli("HGET", broker.settings.keys(queue).jobs, id)
    return record.partition(b"\n")[2]


def test_relay_add_headers_sees_the_payload_and_what_others_added(server: Server) -> None:
    shown: list[tuple[str, bytes, dict[str, str]]] = []

    def first(queue: str, payload: bytes, headers: Mapping[str, str]) -> dict[str, str]:
        shown.append((queue, payload, dict(headers)))
        return {"a": "first", "b": "first"}

    def second(headers: Mapping[str, str]) -> dict[str, str]:
        return {"b": "second", "c": headers["a"]}

    # the one registered last is called first
    plugins = [Wrap(b"x"), impl("relay_add_headers", second), impl("relay_add_headers", first)]
    with Broker(server.url, plugins=[*plugins, impl("relay_add_headers", lambda: None)]) as broker:
        broker.enqueue("mail", b"body", headers={"mine": "kept"})
        (job,) = broker.claim("mail")
        assert dict(job.headers) == {"mine": "kept", "a": "first", "b": "second", "c": "first"}
        assert shown == [("mail", b"body", {"mine": "kept"})]
        broker.nack(job, delay=0)
        (job,) = broker.claim("mail")
        broker.nack(job, dead=True)
        broker.requeue("mail")
        (job,) = broker.claim("mail")
        assert job.headers["c"] == "first", "headers survive a retry, the dead and a requeue"
        assert len(shown) == 1


@pytest.mark.parametrize(
    ("answer", "said"), [("text", "must return a mapping, got str"), ({"a": 1}, "headers must map str to str")]
)
def test_relay_add_headers_that_gives_nonsense_or_raises_reaches_the_caller(
    server: Server, answer: object, said: str
) -> None:
    with (
        Broker(server.url, plugins=[impl("relay_add_headers", lambda: answer)]) as broker,
        pytest.raises((PluginError, ValueError), match=said),
    ):
        broker.enqueue("mail", b"")
    with (
        Broker(server.url, plugins=[impl("relay_add_headers", lambda: {}["no context"])]) as broker,
        pytest.raises(KeyError, match="no context"),
    ):
        broker.enqueue("mail", b"")
    assert server.cli("KEYS", "*") == []


def test_relay_add_headers_is_not_shown_headers_that_are_refused(server: Server) -> None:
    shown: list[object] = []
    with (
        Broker(server.url, plugins=[impl("relay_add_headers", lambda headers: shown.append(headers))]) as broker,
        pytest.raises(ValueError, match="headers must map"),
    ):
        broker.enqueue("mail", b"", headers={"a": 1})
    assert shown == []


def test_relay_encode_payload_is_a_chain_and_none_leaves_the_bytes(server: Server) -> None:
    with Broker(server.url, plugins=[Wrap(b"a"), Wrap(b"b")]) as broker:
        id = broker.enqueue("mail", b"body").id
        assert stored_payload(server, broker, "mail", id) == b"abbodyba"
        id = broker.enqueue("plain", b"body").id
        assert stored_payload(server, broker, "plain", id) == b"body"


def test_relay_encode_payload_also_holds_for_the_new_payload_of_a_nack(server: Server) -> None:
    with Broker(server.url, plugins=[Wrap(b"a")]) as broker:
        id = broker.enqueue("mail", b"body").id
        (job,) = broker.claim("mail")
        broker.nack(job, delay=0, payload=b"other")
        assert stored_payload(server, broker, "mail", id) == b"aothera"
        assert [job.payload for job in broker.claim("mail")] == [b"other"]


def test_relay_encode_payload_that_raises_or_gives_no_bytes_reaches_the_caller(server: Server) -> None:
    def broken(payload: bytes) -> Any:
        if payload == b"raise":
            raise KeyError("no key")
        return "text"

    with Broker(server.url, plugins=[impl("relay_encode_payload", broken)]) as broker:
        with pytest.raises(KeyError, match="no key"):
            broker.enqueue("mail", b"raise")
        with pytest.raises(PluginError, match="relay_encode_payload must return bytes, got str"):
            broker.enqueue("mail", b"")
    assert server.cli("KEYS", "*") == []


def test_relay_decode_payload_undoes_the_chain_in_the_reverse_order(server: Server) -> None:
    with Broker(server.url, plugins=[Wrap(b"a"), Wrap(b"b")]) as broker:
        broker.enqueue("mail", b"body")
        assert [dead.payload for dead in broker.jobs("mail", "ready")] == [b"body"]
        (job,) = broker.claim("mail")
        assert job.payload == b"body"
        broker.nack(job, dead=True)
        assert [dead.payload for dead in broker.dead("mail")] == [b"body"]


def test_relay_decode_payload_that_raises_spoils_one_job_of_a_batch(server: Server, notebook: Notebook) -> None:
    with Broker(server.url) as plain:
        plain.enqueue("mail", b"never wrapped")
    with Broker(server.url, plugins=[Wrap(b"a"), notebook]) as broker:
        broker.enqueue("mail", b"body")
        assert [job.payload for job in broker.claim("mail", count=5)] == [b"body"]
        assert [dead.reason for dead in broker.dead("mail")] == ["undecodable"]


# --- describe and register


def test_relay_describe_job_gives_the_first_answer_for_claimed_and_stored_jobs(server: Server) -> None:
    def know(job: Job | StoredJob) -> JobSummary | None:
        return JobSummary(job.payload.decode()) if job.payload.startswith(b"known") else None

    other = impl("relay_describe_job", lambda job: JobSummary("fallback"), trylast=True)
    with Broker(server.url, plugins=[impl("relay_describe_job", know), other]) as broker:
        broker.enqueue_many("mail", [b"known by name", b"strange"])
        stored = broker.jobs("mail", "ready")
        claimed = broker.claim("mail", count=2)
        for jobs in (stored, claimed):
            assert [broker.plugins.describe(job) for job in jobs] == [
                JobSummary("known by name"),
                JobSummary("fallback"),
            ]


def test_relay_describe_job_that_raises_is_passed_over(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def broken(job: Job) -> JobSummary:
        raise KeyError("strange payload")

    with Broker(server.url, plugins=[impl("relay_describe_job", broken)]) as broker:
        broker.enqueue("mail", b"")
        assert broker.plugins.describe(broker.claim("mail")[0]) is None
    assert "relay_describe_job raised" in caplog.text


def test_relay_register_adapter_may_name_the_queues_in_which_a_framework_talks_to_itself() -> None:
    def adapt(register: Callable[..., None]) -> None:
        register("mine", "my framework", internal=("*.talk", "events.*"))

    found = Plugins([impl("relay_register_adapter", adapt)], installed=False)
    internal = [name for name in ("a.talk", "events.a", "mail", "a.talks", "A.TALK") if found.is_internal(name)]
    assert internal == ["a.talk", "events.a"]
    assert not Plugins(installed=False).is_internal("a.talk")
    installed = Plugins()
    assert installed.is_internal("celery@host.celery.pidbox")
    assert installed.is_internal("f00.reply.celery.pidbox")
    assert not installed.is_internal("celery")


def test_relay_register_adapter_is_called_once_per_broker_and_makes_a_framework_known() -> None:
    calls: list[int] = []

    def register_it(register: Callable[[str, str], None]) -> None:
        calls.append(1)
        register("mine", "my own framework")

    plugin = impl("relay_register_adapter", register_it)
    for expected in (1, 2):
        found = Plugins([plugin])
        assert found.adapters["mine"] == "my own framework"
        assert len(calls) == expected
    assert "mine" not in Plugins().adapters


def test_relay_register_commands_adds_to_a_click_group_and_is_isolated(caplog: pytest.LogCaptureFixture) -> None:
    def add(group: click.Group) -> None:
        group.add_command(click.Command("mine"))

    def broken(group: click.Group) -> None:
        raise RuntimeError("no command")

    group = click.Group("relay")
    found = Plugins([impl("relay_register_commands", add), impl("relay_register_commands", broken)], installed=False)
    found.register_commands(group)
    assert list(group.commands) == ["mine"]
    assert "no command" in caplog.text


# --- isolation

HEARD = ("relay_route_job", "relay_add_headers", "relay_encode_payload", "relay_decode_payload")
"""What these raise reaches the caller."""

NOTIFY = [name for name in NAMES if name not in HEARD]


class Saboteur:
    """Raises in every hook whose errors must not matter."""

    def __init__(self) -> None:
        for name in NOTIFY:

            def broken(*_: Any, hook: str = name) -> None:
                raise RuntimeError(f"sabotage in {hook}")

            broken.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
            setattr(self, name, hookimpl(broken))


def test_a_plugin_that_raises_everywhere_changes_nothing_and_is_logged(
    server: Server, notebook: Notebook, caplog: pytest.LogCaptureFixture
) -> None:
    with Broker(server.url, plugins=[notebook, Saboteur()]) as broker:  # the saboteur is called first
        broker.enqueue("mail", b"", dedup_key="k")
        broker.enqueue("mail", b"", dedup_key="k")
        (job,) = broker.claim("mail")
        broker.nack(job, "failed")
        make_due(server, broker)
        (job,) = broker.claim("mail")
        expire(server, broker)
        (again,) = broker.claim("mail")
        broker.extend(job)
        broker.ack(again)
        broker.enqueue("mail", b"")
        (job,) = broker.claim("mail")
        broker.nack(job, dead=True)
        assert broker.plugins.describe(job) is None
        broker.enqueue("mail", b"")
        run_one(broker)
    names = set(notebook.names())
    assert names == {name.removeprefix("relay_") for name in NOTIFY} - {
        "retry_delay",
        "describe_job",
        "register_adapter",
        "register_commands",
    }
    for name in set(NOTIFY) - {"relay_register_commands"}:
        assert f"sabotage in {name}" in caplog.text
    assert {record.name for record in caplog.records if "sabotage" in (record.exc_text or "")} == {"relay.plugins"}


def test_a_broker_without_plugins_sends_the_same_commands_as_one_with(server: Server, notebook: Notebook) -> None:
    def commands_of(plugins: list[object]) -> dict[str, str]:
        server.reset()
        server.cli("CONFIG", "RESETSTAT")
        with Broker(server.url, plugins=plugins) as broker:
            broker.enqueue("mail", b"1")
            broker.enqueue("mail", b"2", delay=3600)
            (job,) = broker.claim("mail")
            broker.nack(job, dead=True)
            broker.requeue("mail")
            broker.finish("mail", count=1)
        found = server.info("commandstats")
        counts = {name: value.split(",")[0] for name, value in found.items()}
        return {name: n for name, n in counts.items() if "config" not in name and "flushall" not in name}

    commands_of([])  # whichever scripts the server did not know are loaded now
    assert commands_of([]) == commands_of([notebook, Saboteur()])


# --- registration


def test_a_misspelt_hook_is_refused_and_named() -> None:
    with pytest.raises(PluginError, match=r"relay_job_aked.*see relay_core/hooks.py for the names"):
        Plugins([impl("relay_job_aked", lambda job: None)])


def test_a_parameter_that_the_hook_has_not_is_refused_and_named() -> None:
    with pytest.raises(PluginError, match="jobb"):
        Plugins([impl("relay_job_acked", lambda jobb: None)])


def test_an_async_implementation_is_refused() -> None:
    class Async:
        @hookimpl
        async def relay_job_acked(self, job: Job) -> None: ...

    with pytest.raises(PluginError, match="relay_job_acked is an async function, and would never be awaited"):
        Plugins([Async()])


def test_what_would_never_run_is_refused() -> None:
    class Lazy:
        @hookimpl
        def relay_job_acked(self, job: Job) -> Iterator[None]:
            yield

    class AsyncLazy:
        @hookimpl
        async def relay_job_acked(self, job: Job) -> AsyncIterator[None]:
            yield

    class Unmarked:
        @hookimpl
        def relay_job_dead(self, job: Job) -> None: ...

        def relay_job_acked(self, job: Job) -> None: ...

    for lazy in (Lazy(), AsyncLazy()):
        with pytest.raises(PluginError, match="relay_job_acked is a generator, and its body would never run"):
            Plugins([lazy])
    with pytest.raises(PluginError, match="relay_job_acked is not marked with hookimpl, and would never be called"):
        Plugins([Unmarked()])
    with pytest.raises(PluginError, match="is a method, and needs an instance; give that in place of its class"):
        Plugins([Notebook])
    for nothing in (object(), "audit_log"):
        with pytest.raises(PluginError, match="has no hooks: mark its functions with hookimpl"):
            Plugins([nothing])


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper"])
def test_a_wrapper_is_refused(option: str) -> None:
    def around(job: Job) -> Iterator[None]:
        yield

    with pytest.raises(PluginError, match="relay_job_acked is a wrapper; relay calls plain hooks only"):
        Plugins([impl("relay_job_acked", around, **{option: True})])


def test_a_plugin_given_twice_is_refused() -> None:
    plugin = Notebook()
    with pytest.raises(PluginError, match="cannot be registered"):
        Plugins([plugin, plugin])


def test_the_log_names_a_plugin_by_its_class_or_module(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        @hookimpl
        def relay_job_acked(self) -> None:
            raise RuntimeError

    plugins = Plugins([Broken(), Broken()], installed=False)
    plugins.notify("relay_job_acked", job=None, latency=0.0)
    first = f"{__name__}.{Broken.__qualname__}"
    assert [record.args for record in caplog.records] == [(name, "relay_job_acked") for name in (f"{first}#2", first)]


def test_a_route_that_is_no_text_is_refused(server: Server) -> None:
    plugin = impl("relay_route_job", lambda queue: 7)
    said = r"plugin .*impl.<locals>.Plugin: relay_route_job must return a queue's name or None, got int"
    with Broker(server.url, plugins=[plugin]) as broker, pytest.raises(PluginError, match=said):
        broker.enqueue("q", b"")


def test_what_was_refused_is_not_registered() -> None:
    found = Plugins(installed=False)
    bad = impl("relay_job_aked", lambda job: None)
    with pytest.raises(PluginError):
        found.register(bad)
    found.register(impl("relay_job_acked", lambda job: None))  # the bad one does not stand in its way
    found.notify("relay_job_acked", job=None, latency=0.0)


def test_a_broker_with_a_bad_plugin_is_not_made() -> None:
    with pytest.raises(PluginError):
        Broker("relay://127.0.0.1:1/0", plugins=[impl("relay_job_aked", lambda job: None)])


def test_an_unregistered_plugin_is_not_called_any_more(broker: Broker, notebook: Notebook) -> None:
    broker.enqueue("mail", b"")
    broker.plugins.unregister(notebook)
    broker.enqueue("mail", b"")
    assert notebook.names() == ["job_enqueued"]
    assert not broker.plugins.wants("relay_job_acked")


def test_a_plugin_that_is_not_registered_cannot_be_unregistered(notebook: Notebook) -> None:
    with pytest.raises(PluginError, match="cannot be unregistered: it is not registered here"):
        Plugins().unregister(notebook)


def test_a_plugin_that_comes_later_may_bring_an_adapter_too() -> None:
    found = Plugins(installed=False)
    found.register(impl("relay_register_adapter", lambda register: register("late", "L", internal=("late.*",))))
    assert found.adapters == {"late": "L"}
    assert found.is_internal("late.one")


def test_each_broker_has_plugins_of_its_own(server: Server, notebook: Notebook) -> None:
    with Broker(server.url, plugins=[notebook]) as one, Broker(server.url) as other:
        other.enqueue("mail", b"")
        assert notebook.take() == []
        one.enqueue("mail", b"")
        assert notebook.names() == ["job_enqueued"]


def test_a_module_can_be_a_plugin() -> None:
    import types

    module = types.ModuleType("mine")
    calls: list[str] = []
    module.relay_job_enqueued = hookimpl(lambda queue: calls.append(queue))  # type: ignore[attr-defined]
    Plugins([module]).notify("relay_job_enqueued", queue="mail", id="1", delay=0.0)
    assert calls == ["mail"]


def test_plugins_are_called_last_registered_first_but_for_tryfirst_and_trylast() -> None:
    calls: list[str] = []

    def named(name: str, **options: bool) -> object:
        return impl("relay_job_enqueued", lambda queue: calls.append(name), **options)

    Plugins(
        [named("first", tryfirst=True), named("one"), named("two"), named("last", trylast=True), named("three")]
    ).notify("relay_job_enqueued", queue="mail", id="1", delay=0.0)
    assert calls == ["first", "three", "two", "one", "last"]


def test_the_first_answer_wins_and_the_rest_are_not_asked() -> None:
    asked: list[str] = []

    def answering(name: str, answer: str | None, **options: bool) -> object:
        def route(queue: str) -> str | None:
            asked.append(name)
            return answer

        return impl("relay_route_job", route, **options)

    found = Plugins([answering("c", "c"), answering("b", "b"), answering("a", None, tryfirst=True)], installed=False)
    assert found.route("mail", b"", {}) == "b"
    assert asked == ["a", "b"]


# --- entry points


def entry_points_are(monkeypatch: pytest.MonkeyPatch, *entries: EntryPoint) -> None:
    monkeypatch.setattr(plugins, "_entry_points", lambda: entries)


def test_installed_plugins_are_loaded_from_the_entry_point_group(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points_are(monkeypatch, EntryPoint("mine", "tests.hook_plugin", "relay"))
    assert Plugins().adapters == {"from_entry_point": "found by its entry point"}
    assert Plugins(installed=False).adapters == {}
    entry_points_are(monkeypatch, EntryPoint("mine", "tests.hook_plugin:an_object", "relay"))
    assert Plugins().adapters == {"from_object": "found by its entry point"}


def test_an_installed_plugin_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points_are(monkeypatch, EntryPoint("mine", "no.such.module", "relay"))
    with pytest.raises(PluginError, match=r"plugin 'mine' \(no.such.module\) cannot be imported: ModuleNotFoundError"):
        Plugins()


def test_the_adapters_are_installed_as_plugins() -> None:
    assert set(Plugins().adapters) == {"celery", "dramatiq"}


# --- the documents


def specs() -> dict[str, ast.FunctionDef]:
    """The hookspecs as they are written."""
    tree = ast.parse(Path(str(hooks.__file__)).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMES)
def test_each_hook_has_a_docstring_and_a_test_that_is_named_after_it(name: str) -> None:
    assert ast.get_docstring(specs()[name])
    assert any(test.startswith(f"test_{name}_") for test in globals())


def test_whoever_tells_of_an_event_tells_all_that_its_hook_promises() -> None:
    told: list[tuple[str, int, str, set[str | None]]] = []
    for path in (*Path(hooks.__file__).parent.rglob("*.py"), *Path(relay_adapters.__path__[0]).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(func=ast.Attribute(attr="notify"), args=[ast.Constant(value=str(name))]):
                    told.append((path.name, call.lineno, name, {given.arg for given in call.keywords}))
    assert len(told) > 15
    assert not [one for one in told if one[3] != set(inspect.signature(getattr(hooks, one[2])).parameters)]


@pytest.mark.parametrize("name", NAMES)
def test_each_hook_stands_in_the_documentation_with_its_parameters(name: str) -> None:
    spec = getattr(hooks, name)
    arguments = ", ".join(inspect.signature(spec).parameters)
    heading = f"### `{name}({arguments})`"
    sections = re.split(r"(?m)^(?=#{2,3} )", DOCS.read_text())
    section = next((text for text in sections if text.startswith(heading)), None)
    assert section is not None, f"docs/hooks.md lacks the heading {heading}"
    first = (inspect.getdoc(spec) or "").partition("\n")[0]
    assert first in " ".join(section.split()), f"docs/hooks.md does not say of {name}: {first}"


def test_the_documentation_names_no_hook_that_is_not_there() -> None:
    assert sorted(set(re.findall(r"(?m)^### `(\w+)", DOCS.read_text()))) == NAMES
    assert set(
        re.findall(
            r"\brelay_(?:job|jobs|lease|run|worker|retry|route|add|encode|decode|describe|register)\w*",
            DOCS.read_text(),
        )
    ) <= set(NAMES)


def test_the_example_in_the_documentation_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for example in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(compile(example.replace("relay://localhost:6379/0", server.url), str(DOCS), "exec"), {})
    assert "mail" in capsys.readouterr().out
