"""relay_core.testing: the private server, queues drained in line, time that passes at once, and the assertions."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay_core import Broker, Job, JobSpec, RetryPolicy
from relay_core.errors import InvalidArgument
from relay_core.testing import (
    Drained,
    NotDrained,
    PrivateServer,
    advance,
    assert_dead,
    assert_enqueued,
    assert_nothing_enqueued,
    drain,
    enqueued,
)
from relay_core.worker import Reject, Retry
from tests.forking import child_of, code_of
from tests.servers import Server, eventually


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry=RetryPolicy(max_retries=3, base=60.0)) as broker:
        yield broker


# --- time


def test_time_passes_for_delayed_jobs_leases_dead_jobs_dedup_keys_and_limits(broker: Broker) -> None:
    broker.enqueue("q", b"later", delay=3600)
    advance(broker, 3599)
    assert broker.claim("q") == []
    advance(broker, 2, "q")
    (job,) = broker.claim("q")
    assert job.payload == b"later"
    advance(broker, 20)
    (again,) = broker.claim("q")
    assert (again.id, again.deliveries) == (job.id, 2), "its lease was over"
    broker.nack(again, "no", dead=True)
    advance(broker, 8 * 86_400)
    broker.reap("q")
    assert broker.stats("q").dead == 0, "it was kept long enough"
    broker.enqueue("q", b"x", dedup_key="k", dedup_for=3600)
    assert broker.enqueue("q", b"x", dedup_key="k", dedup_for=3600).duplicate
    advance(broker, 3600)
    assert not broker.enqueue("q", b"x", dedup_key="k", dedup_for=3600).duplicate
    broker.limit("q", rate=0.01, burst=1)
    assert len(broker.claim("q", count=5)) == 1
    advance(broker, 14)
    assert broker.claim("q").limited == "rate"
    advance(broker, 100, leases=False)
    assert len(broker.claim("q", count=5)) == 1
    assert broker.audit("q").clean


def test_leases_can_be_left_alone_and_a_waiting_worker_sees_what_fell_due(broker: Broker, server: Server) -> None:
    broker.enqueue_many("q", [b"held", JobSpec(b"later", delay=3600)])
    (held,) = broker.claim("q")
    advance(broker, 3600, leases=False)
    assert [job.payload for job in broker.claim("q", wait=5.0)] == [b"later"]
    broker.ack(held)


def test_thousands_of_jobs_keep_their_order(broker: Broker) -> None:
    broker.enqueue_many("q", [JobSpec(b"%d" % n, delay=100 + n / 1000) for n in range(3500)])
    advance(broker, 110)
    broker.promote("q")
    found = enqueued(broker, "q")
    assert [job.payload for job in found] == [b"%d" % n for n in range(3500)]
    assert {job.state for job in found} == {"ready", "delayed"}


# --- drain


def test_a_queue_is_drained_with_delays_priorities_retries_and_what_handlers_enqueue(broker: Broker) -> None:
    ran: list[bytes] = []

    def handler(job: Job) -> None:
        ran.append(job.payload)
        if job.payload == b"first":
            broker.enqueue("other", b"child", delay=600)
        if job.payload == b"flaky" and job.retries < 2:
            raise Retry("again", delay=3600)

    broker.enqueue_many("q", [b"low", JobSpec(b"first", priority=9), JobSpec(b"flaky", delay=86_400)])
    began = time.monotonic()
    done = drain(broker, handler, ["q", "other"])
    assert ran == [b"first", b"low", b"child", b"flaky", b"flaky", b"flaky"]
    assert [job.payload for job in done.done] == [b"first", b"low", b"child", b"flaky"]
    assert [(job.payload, str(error)) for job, error in done.retried] == [(b"flaky", "again")] * 2
    assert (done.dead, done.runs) == ([], 6)
    assert time.monotonic() - began < 30, "a day and two hours have passed"
    assert_nothing_enqueued(broker)


def test_failures_end_as_they_do_in_a_worker(broker: Broker) -> None:
    def handler(job: Job) -> None:
        raise Reject("never", reason="spam") if job.payload == b"bad" else ValueError("boom")

    broker.enqueue_many("q", [b"bad", JobSpec(b"worse", max_retries=2)])
    done = drain(broker, handler, "q")
    assert [job.payload for job, _error in done.retried] == [b"worse", b"worse"]
    assert [(job.payload, repr(error)) for job, error in done.dead] == [
        (b"bad", "Reject('never')"), (b"worse", "ValueError('boom')"),
    ]  # fmt: skip
    assert_dead(broker, "q", b"bad", reason="spam", error="never", count=1)
    assert_dead(broker, "q", b"worse", reason="max_retries", error="boom", count=1)


def test_an_error_can_be_raised_after_its_job_is_nacked(broker: Broker) -> None:
    broker.enqueue("q", b"x")

    def handler(job: Job) -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        drain(broker, handler, "q", raise_errors=True)
    assert_enqueued(broker, "q", b"x", delayed=True, count=1)


def test_an_interrupted_handler_s_job_goes_back_uncounted(broker: Broker) -> None:
    broker.enqueue("q", b"x")

    def handler(job: Job) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drain(broker, handler, "q")
    assert broker.claim("q")[0].deliveries == 1


def test_async_handlers_are_drained_too(broker: Broker) -> None:
    ran = []

    async def handler(job: Job) -> None:
        ran.append(job.payload)
        if job.deliveries == 1:
            raise RuntimeError("once")

    broker.enqueue_many("q", [b"a", b"b"])
    assert drain(broker, handler, "q").runs == 4
    assert ran == [b"a", b"b", b"a", b"b"] or sorted(ran) == [b"a", b"a", b"b", b"b"]


def test_an_async_handler_is_refused_where_a_loop_runs_and_drained_from_there_by_a_thread(broker: Broker) -> None:
    async def handler(job: Job) -> None:
        pass

    async def test() -> Drained:
        with pytest.raises(InvalidArgument, match=r"await asyncio\.to_thread\(drain, "):
            drain(broker, handler, "q")
        return await asyncio.to_thread(drain, broker, handler, "q")

    broker.enqueue("q", b"x")
    assert [job.retries for job in asyncio.run(test()).done] == [0]


@pytest.mark.parametrize(
    ("how", "raises", "ends_as"),
    [
        ("ack", False, ["done"]),
        ("ack", True, ["lost"]),
        ("nack", False, ["lost", "done"]),
        ("nack", True, ["lost", "done"]),
        ("release", False, ["lost", "done"]),
        ("release", True, ["lost", "done"]),
    ],
)
def test_a_job_that_its_handler_ended_by_itself_is_left_alone_as_in_a_worker(
    broker: Broker, how: str, raises: bool, ends_as: list[str]
) -> None:
    runs = []

    def handler(job: Job) -> None:
        runs.append(job)
        if len(runs) == 1:
            getattr(broker, how)(job)
            if raises:
                raise ValueError("after that")

    broker.enqueue("q", b"x")
    drained = drain(broker, handler, "q", limit=5)
    assert [name for name in ("lost", "done", "retried", "dead") if getattr(drained, name)] == ends_as
    assert drained.runs == len(runs) == len(ends_as)
    assert_nothing_enqueued(broker)


@pytest.mark.parametrize("error", [Retry("soon", delay=-1), SystemExit(3), asyncio.CancelledError()], ids=repr)
def test_whatever_a_worker_takes_for_a_failure_is_one_here(broker: Broker, error: BaseException) -> None:
    def handler(job: Job) -> None:
        if job.deliveries == 1:
            raise error

    broker.enqueue("q", b"x")
    drained = drain(broker, handler, "q")
    assert ([raised for _job, raised in drained.retried], len(drained.done)) == ([error], 1)


def test_what_cannot_be_drained_says_why(broker: Broker) -> None:
    assert drain(broker, lambda job: None, "q") == Drained()
    broker.enqueue_many("q", [b"a", b"b"])
    broker.pause("q")
    with pytest.raises(NotDrained, match="paused"):
        drain(broker, lambda job: None, "q")
    broker.resume("q")
    broker.limit("q", max_inflight=1)
    held = broker.claim("q")
    with pytest.raises(NotDrained, match="max_inflight"):
        drain(broker, lambda job: None, "q")
    broker.release(held)
    broker.limit("q", rate=0.01, burst=1)
    assert drain(broker, lambda job: None, "q").runs == 2, "a rate limit does not hold it up"
    broker.limit("q")
    broker.enqueue("q", b"a")
    with pytest.raises(NotDrained, match="10 jobs"):
        drain(broker, lambda job: broker.enqueue("q", b"a") and None, "q", limit=10)
    assert_enqueued(broker, "q", count=1)


# --- assertions


def test_assertions_find_jobs_by_all_that_describes_them(broker: Broker) -> None:
    broker.enqueue_many("q", [JobSpec(b'{"to": "ann"}', headers={"lang": "fr", "v": "1"}), JobSpec(b"later", delay=60)])
    assert_enqueued(broker, "q", b"later", delayed=True)
    (found,) = assert_enqueued(broker, "q", as_json={"to": "ann"}, headers={"lang": "fr"}, delayed=False, count=1)
    assert found.options.headers["v"] == "1"
    assert len(assert_enqueued(broker, "q")) == 2
    assert_enqueued(broker, "q", where=lambda job: job.priority == 0, count=2)
    assert_enqueued(broker, "q", b"nothing", count=0)
    assert_nothing_enqueued(broker, "other")


@pytest.mark.parametrize(
    "options",
    [
        {"payload": b"x"}, {"as_json": {"to": "bob"}}, {"headers": {"lang": "de"}},
        {"delayed": False, "payload": b"later"}, {"task": "send"}, {"count": 3}, {"where": lambda job: False},
    ],
)  # fmt: skip
def test_a_failed_assertion_lists_what_is_there(broker: Broker, options: dict[str, object]) -> None:
    broker.enqueue_many("q", [JobSpec(b'{"to": "ann"}', headers={"lang": "fr"}), JobSpec(b"later", delay=60)])
    with pytest.raises(AssertionError) as caught:
        assert_enqueued(broker, "q", **options)  # type: ignore[arg-type]
    assert "b'later'" in str(caught.value)
    assert "'lang': 'fr'" in str(caught.value)
    assert "found" in str(caught.value)


def test_the_other_assertions_fail_with_a_list_too(broker: Broker) -> None:
    with pytest.raises(AssertionError, match="none at all"):
        assert_enqueued(broker, "q")
    broker.enqueue_many("q", [b"job%d" % n for n in range(30)])
    with pytest.raises(AssertionError, match=r"(?s)'q' is not empty.*job0.*and 10 more"):
        assert_nothing_enqueued(broker)
    broker.nack(broker.claim("q")[0], "boom", dead=True)
    with pytest.raises(
        AssertionError, match=r"expected at least 1 dead job with reason 'x', found 0.*\n.*rejected: boom"
    ):
        assert_dead(broker, "q", reason="x")
    with pytest.raises(AssertionError, match="found 1"):
        assert_dead(broker, "q", error="boom", count=2)


# --- the private server and its fixtures


def test_a_private_server_is_alone_and_ends_with_its_block() -> None:
    with PrivateServer() as one, PrivateServer() as two:
        with Broker(one.url) as first, Broker(two.url) as second:
            first.enqueue("q", b"x")
            assert second.queues() == []
            one.clear()
            assert first.queues() == []
        folder = Path(one.url.removeprefix("relay+unix://").partition("?")[0])
        code_of(child_of(one.close))
        with Broker(one.url) as first:
            first.enqueue("q", b"still there")
    assert not folder.exists()
    one.close()


CONFTEST = 'pytest_plugins = ["relay_core.testing.fixtures"]\n'
USER_TESTS = """
from relay_core.testing import assert_nothing_enqueued, drain

def test_one(relay_broker, relay_server):
    relay_broker.enqueue("q", b"left behind")
    open("urls", "a").write(relay_server.url + "\\n")

def test_two(relay_broker, relay_server):
    assert_nothing_enqueued(relay_broker)
    open("urls", "a").write(relay_server.url + "\\n")
"""


def run_pytest(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_fixtures_give_each_test_an_empty_server_of_the_session(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(USER_TESTS)
    result = run_pytest(tmp_path)
    assert "2 passed" in result.stdout, result.stdout + result.stderr
    (url,) = set((tmp_path / "urls").read_text().split())
    socket = Path(url.removeprefix("relay+unix://").partition("?")[0])
    eventually(lambda: not socket.exists(), "its server is gone")


def test_pytest_is_not_touched_where_nobody_asks(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import sys\ndef test_it():\n    assert 'relay_core' not in sys.modules\n")
    result = run_pytest(tmp_path)
    assert "1 passed" in result.stdout, result.stdout + result.stderr
    assert "relay_broker" not in run_pytest(tmp_path, "--fixtures").stdout


def test_the_server_of_a_session_that_is_killed_ends_too(tmp_path: Path) -> None:
    code = "from relay_core.testing import PrivateServer; print(PrivateServer().url, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    process.kill()
    process.communicate()

    def gone() -> bool:
        try:
            with Broker(url, retry_for=0.0) as broker:
                broker.queues()
        except Exception:
            return True
        return False

    eventually(gone, "its server is gone")
