"""The recorder counts each move of its process once and nothing else; depths are read at scrape time."""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from relay_core import Broker, Job, JobSpec, JobSummary, StoredJob, hookimpl
from relay_core.connection import SyncStore
from relay_core.errors import InvalidArgument, LeaseLost, RelayError, Unavailable
from relay_core.job import Arrival
from relay_core.metrics import (
    LATENCY_BUCKETS,
    BuildCollector,
    DepthCollector,
    MetricsServer,
    Recorder,
    parse_address,
    reading,
    recorder,
)
from relay_core.worker import Worker
from tests.proxy import Proxy, to_socket
from tests.scraping import Scrape, scrape_registry, scrape_url
from tests.servers import Server, eventually, free_port
from tests.test_observation import Recording, a_day


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: what differs between servers is tested below the metrics."""
    return str(request.param)


@pytest.fixture
def counts() -> Recorder:
    return Recorder()


@pytest.fixture
def broker(server: Server, counts: Recorder) -> Iterator[Broker]:
    with Broker(server.url, plugins=[counts], retry_for=1.0) as broker:
        yield broker


def counted(recorder: Recorder) -> dict[str, float]:
    return scrape_registry(recorder.registry).counts()


def make_due(server: Server, broker: Broker, queue: str, key: str) -> None:
    """All delayed jobs are due (`delayed`), or all leases are over (`leases`), as if the time had passed."""
    keys = broker.settings.keys(queue)
    for id in server.cli("ZRANGE", getattr(keys, key), 0, -1):
        server.cli("ZADD", getattr(keys, key), 1, id)
    server.cli("HSET", keys.config, "due", 1)


# --- exact counts


def test_each_transition_is_counted_once(server: Server, broker: Broker, counts: Recorder) -> None:
    expected: dict[str, float] = {}

    def now(**changes: float) -> None:
        for name, by in changes.items():
            full = f"relay_{name} mail"
            expected[full] = expected.get(full, 0) + by
        assert counted(counts) == expected

    broker.enqueue_many("mail", [b"1", b"2", b"3"])
    now(jobs_enqueued_total=3)
    broker.enqueue("mail", b"4", dedup_key="k", delay=3600)
    now(jobs_enqueued_total=1)
    broker.enqueue("mail", b"4", dedup_key="k")
    now(jobs_deduplicated_total=1)
    one, two = broker.claim("mail", 2)
    now(jobs_claimed_total=2, job_wait_seconds_count=2)
    broker.ack(one)
    now(jobs_processed_total=1, job_latency_seconds_count=1)
    broker.nack(two, "no", delay=0)
    now(jobs_retried_total=1)
    three, two = broker.claim("mail", 2)
    now(jobs_claimed_total=2, job_wait_seconds_count=1)  # a retry has waited for its time, not for a worker
    broker.nack(two, "no", dead=True)
    now(jobs_dead_total=1)
    make_due(server, broker, "mail", "leases")
    (again,) = broker.claim("mail")
    now(jobs_reaped_total=1, jobs_claimed_total=1)
    broker.extend([three])
    now(leases_lost_total=1)
    with pytest.raises(LeaseLost):
        broker.ack(three)
    now(leases_lost_total=1)
    broker.finish("mail", acks=[again], count=0)
    now(jobs_processed_total=1, job_latency_seconds_count=1)
    make_due(server, broker, "mail", "delayed")
    assert broker.promote("mail") == 1
    now(jobs_promoted_total=1)
    assert broker.requeue("mail") == 1
    assert broker.purge("mail") == 2
    now()


def test_a_poison_job_that_a_claim_buries_is_counted_as_dead(server: Server, broker: Broker, counts: Recorder) -> None:
    broker.enqueue("mail", b"x", max_deliveries=1)
    broker.claim("mail")
    make_due(server, broker, "mail", "leases")
    assert broker.reap("mail") == 1
    assert counted(counts) == {
        "relay_jobs_enqueued_total mail": 1,
        "relay_jobs_claimed_total mail": 1,
        "relay_job_wait_seconds_count mail": 1,
        "relay_jobs_reaped_total mail": 1,
        "relay_jobs_dead_total mail": 1,
    }


def test_what_did_not_happen_is_not_counted(server: Server, broker: Broker, counts: Recorder) -> None:
    broker.enqueue("mail", b"x", id="mine")
    (job,) = broker.claim("mail")
    broker.ack(job)
    before = counted(counts)
    assert broker.claim("mail") == []  # an empty claim
    broker.ack_many([job])  # an ack that was done already
    assert broker.claim(["mail", "post"], wait=0.01) == []
    broker.enqueue_many("mail", [])
    for failing in (
        lambda: broker.enqueue("mail", b"x", priority=10),
        lambda: broker.enqueue("", b"x"),
        lambda: broker.enqueue("mail", "text"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RelayError):
            failing()
    broker.pause("mail")
    assert broker.claim("mail").limited == "paused"
    broker.stats("mail")
    broker.audit("mail")
    assert counted(counts) == before


def test_a_duplicate_enqueue_counts_as_that_only(broker: Broker, counts: Recorder) -> None:
    for _ in range(3):
        broker.enqueue("mail", b"x", id="same")
    assert counted(counts) == {"relay_jobs_enqueued_total mail": 1, "relay_jobs_deduplicated_total mail": 2}


def test_a_script_that_failed_or_was_refused_counts_nothing(server: Server, counts: Recorder) -> None:
    with Broker(server.url, plugins=[counts], retry_for=0.0) as broker:
        fail_in_all_ways(server, broker, counts)


def fail_in_all_ways(server: Server, broker: Broker, counts: Recorder) -> None:
    broker.enqueue("mail", b"x")
    (job,) = broker.claim("mail")
    before = counted(counts)
    server.cli("HSET", broker.settings.keys("mail").config, "v", 99)
    with pytest.raises(RelayError, match="layout"):
        broker.enqueue("mail", b"x")
    with pytest.raises(RelayError, match="layout"):
        broker.claim("mail")
    server.cli("HSET", broker.settings.keys("mail").config, "v", 1)
    server.cli("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(RelayError):
        broker.enqueue("mail", b"x")
    server.cli("CONFIG", "SET", "maxmemory", "0")
    server.kill()
    for move in (lambda: broker.ack(job), lambda: broker.claim("mail"), lambda: broker.enqueue("mail", b"x")):
        with pytest.raises(Unavailable):
            move()
    server.start()
    assert counted(counts) == before


def test_a_move_whose_reply_was_lost_is_never_counted_twice(server: Server, counts: Recorder) -> None:
    with Broker(server.url) as broker:
        a_day(broker)  # all scripts are loaded: the replies that are lost below are those of moves
        broker.enqueue("q", b"x")
        broker.ack(broker.claim("q")[0])
    with Proxy(to_socket(server.socket), unix=True) as proxy, Broker(proxy.url, plugins=[counts]) as broker:
        for _ in range(2):
            proxy.cut_reply(b"EVALSHA")
            broker.enqueue("mail", b"x")
        proxy.cut_reply(b"EVALSHA")
        one, two = broker.claim("mail", 2)
        assert counted(counts) == {
            "relay_jobs_enqueued_total mail": 2,
            "relay_jobs_claimed_total mail": 2,
            "relay_job_wait_seconds_count mail": 2,
        }
        before = counted(counts)
        proxy.cut_reply(b"EVALSHA")
        broker.ack(one)
        proxy.cut_reply(b"EVALSHA")
        broker.nack(two, "no", dead=True)
        assert proxy.pending == 0
        # "an earlier send did it", said the store of the ack, and does not tell whose: its own counters are exact. That
        # a job is dead somebody has to be told
        assert counted(counts) == {**before, "relay_jobs_dead_total mail": 1}
        stored = broker.stats("mail").counters
        assert (stored["processed"], stored["dead"]) == (1, 1)


def test_with_a_recorder_and_without_one_the_same_bytes_are_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    counts = Recorder(tasks=10)
    for plugins in ((), (counts,)):
        server.cli("FLUSHALL")
        server.cli("SCRIPT", "FLUSH")
        numbers, nonces = itertools.count(), itertools.count()
        monkeypatch.setattr("relay_core.validation.new_id", lambda n=numbers: f"id{next(n)}")
        monkeypatch.setattr("relay_core.operations.claiming.new_nonce", lambda n=nonces: f"n{next(n)}")
        with Recording(server) as proxy, Broker(proxy.url, plugins=plugins) as broker:
            a_day(broker)
            sent.append(proxy.sent)
    assert sent[0] == sent[1]
    assert sent[0].count(b"EVALSHA") > 8
    assert counted(counts)["relay_jobs_enqueued_total q"] == 2


# --- times


def value(scrape: Scrape, name: str, **labels: str) -> float:
    found = scrape(name, **labels)
    assert found is not None, name
    return found


def test_latency_goes_from_creation_to_ack_and_wait_to_the_claim(broker: Broker, counts: Recorder) -> None:
    broker.enqueue("mail", b"x")
    time.sleep(0.06)
    (job,) = broker.claim("mail")
    time.sleep(0.06)
    broker.ack(job)
    scrape = scrape_registry(counts.registry)
    latency = value(scrape, "relay_job_latency_seconds_sum", queue="mail")
    wait = value(scrape, "relay_job_wait_seconds_sum", queue="mail")
    assert 0.05 <= wait <= latency - 0.05
    assert value(scrape, "relay_job_latency_seconds_bucket", queue="mail", le="0.1") == 0
    assert value(scrape, "relay_job_latency_seconds_bucket", queue="mail", le="600.0") == 1


def test_the_buckets_go_from_a_millisecond_past_five_minutes() -> None:
    assert LATENCY_BUCKETS[0] == 0.001
    assert LATENCY_BUCKETS[-1] > 300
    assert list(LATENCY_BUCKETS) == sorted(LATENCY_BUCKETS)


@pytest.mark.parametrize("how", ["delay", "at"])
def test_a_job_that_was_to_wait_has_waited_for_a_worker_only_since_it_was_due(
    broker: Broker, counts: Recorder, how: str
) -> None:
    at = time.time() + 0.3
    broker.enqueue("mail", b"x", **({"delay": 0.3} if how == "delay" else {"at": at}))
    (job,) = broker.claim("mail", wait=30)
    due = job.created_at + 0.3 if how == "delay" else max(job.created_at, round(at, 3))
    assert job.ready_at == pytest.approx(due, abs=0.0011)
    wait = value(scrape_registry(counts.registry), "relay_job_wait_seconds_sum", queue="mail")
    assert wait == pytest.approx(max(0.0, job.claimed_at - job.ready_at), abs=1e-6)
    assert wait <= job.claimed_at - job.created_at


def test_the_oldest_ready_job_is_ready_since_it_was_due(server: Server, broker: Broker) -> None:
    broker.enqueue("mail", b"x", delay=0.2, headers={"trap": '"delay_ms":99999999,"at_ms":1'})
    eventually(lambda: broker.promote("mail"), "the job is due")
    stats = broker.stats("mail")
    created = broker.jobs("mail", "ready")[0].created_at
    assert stats.oldest_at is not None
    assert created is not None
    assert stats.oldest_at - created == pytest.approx(0.2, abs=0.001)


def test_a_job_that_was_due_before_it_was_enqueued_is_ready_since_it_was_enqueued(broker: Broker) -> None:
    broker.enqueue("mail", b"x", at=time.time() - 3600)
    assert broker.stats("mail").oldest_at == broker.jobs("mail", "ready")[0].created_at


def test_the_oldest_ready_job_is_the_oldest_of_all_priorities(broker: Broker) -> None:
    broker.adopt([Arrival("mail", str(n), b"", priority=n, created_at=1e9 + abs(n - 4)) for n in range(10)])
    stats = broker.stats("mail")
    assert (stats.oldest_at, stats.patient_at) == (1e9, 1e9)


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_run_is_how_long_the_handler_ran_whatever_became_of_it(broker: Broker, counts: Recorder, kind: str) -> None:
    ended = threading.Semaphore(0)

    def plain(job: Job) -> None:
        ended.release()
        time.sleep(0.05)
        if job.payload == b"fail":
            raise ValueError("no")

    async def coroutine(job: Job) -> None:
        plain(job)

    broker.enqueue_many("mail", [b"fail", b"fine"])
    worker = Worker(broker, plain if kind == "thread" else coroutine, ["mail"])
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert ended.acquire(timeout=30)
    assert ended.acquire(timeout=30)
    worker.stop()
    thread.join(30)
    scrape = scrape_registry(counts.registry)
    assert value(scrape, "relay_job_run_seconds_count", queue="mail") == 2
    assert 0.1 <= value(scrape, "relay_job_run_seconds_sum", queue="mail") < 10
    assert value(scrape, "relay_job_runs_failed_total", queue="mail") == 1
    assert value(scrape, "relay_jobs_retried_total", queue="mail") == 1


# --- labels


class Describer:
    @hookimpl
    def relay_describe_job(self, job: Job | StoredJob) -> JobSummary | None:
        return JobSummary(job.payload.decode()) if job.payload else None


def test_without_asking_for_it_there_is_no_task_label(broker: Broker, counts: Recorder) -> None:
    broker.enqueue("mail", b"x")
    broker.ack(broker.claim("mail")[0])
    labels = {name for _metric, labels in scrape_registry(counts.registry).samples for name, _value in labels}
    assert labels == {"queue", "le"}


def test_the_first_names_of_tasks_get_a_label_and_the_others_share_one(server: Server) -> None:
    with Broker(server.url, plugins=[Describer()]) as broker:
        counts = Recorder(tasks=2, plugins=broker.plugins)
        broker.plugins.register(counts)
        broker.enqueue_many("mail", [b"send", b"render", b"third", b"fourth", b"send", b""])
        broker.ack_many(broker.claim("mail", 10))
    scrape = scrape_registry(counts.registry)
    for metric in ("relay_jobs_claimed_total", "relay_jobs_processed_total", "relay_job_latency_seconds_count"):
        found = {task: scrape(metric, queue="mail", task=task) for task in ("send", "render", "third", "other")}
        assert found == {"send": 2, "render": 1, "third": None, "other": 3}
    assert scrape("relay_jobs_enqueued_total", queue="mail") == 6
    labels = {name for _metric, labels in scrape.samples for name, _value in labels}
    assert labels == {"queue", "task", "le"}
    assert "job" not in labels


def test_installed_adapters_name_the_tasks_where_no_plugins_are_given(server: Server) -> None:
    counts = Recorder(tasks=5)
    message = b'{"actor_name": "send", "args": [], "kwargs": {}, "options": {}, "message_id": "1"}'
    with Broker(server.url, plugins=[counts]) as broker:
        broker.enqueue("mail", message, headers={"relay_adapter": "dramatiq"})
        broker.claim("mail")
    assert scrape_registry(counts.registry)("relay_jobs_claimed_total", queue="mail", task="send") == 1


def test_more_queues_than_there_are_labels_for_share_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MAX_QUEUES", 2)
    counts = Recorder()
    with Broker(server.url, plugins=[counts]) as broker:
        for queue in ("a", "b", "c", "d", "a"):
            broker.enqueue(queue, b"x")
    assert counted(counts) == {
        "relay_jobs_enqueued_total a": 2,
        "relay_jobs_enqueued_total b": 1,
        "relay_jobs_enqueued_total other": 2,
    }


def test_queues_in_which_a_framework_talks_to_itself_are_not_counted(broker: Broker, counts: Recorder) -> None:
    for queue in ("f00.reply.celery.pidbox", "celeryev.f00", "celery"):
        broker.enqueue(queue, b"x")
        broker.ack(broker.claim(queue)[0])
    assert {name.split(" ")[1] for name in counted(counts)} == {"celery"}


@pytest.mark.parametrize("tasks", [-1, True, "5", 10_001])
def test_a_number_of_tasks_that_is_none_is_refused(tasks: object) -> None:
    with pytest.raises(InvalidArgument, match="tasks must be a whole number"):
        Recorder(tasks=tasks)  # type: ignore[arg-type]


# --- registries


def test_each_recorder_has_a_registry_of_its_own_and_the_global_one_has_nothing(server: Server) -> None:
    one, two = Recorder(), Recorder()
    with Broker(server.url, plugins=[one]) as first, Broker(server.url, plugins=[two]) as second:
        first.enqueue("mail", b"x")
        second.claim("mail")
    assert counted(one) == {"relay_jobs_enqueued_total mail": 1}
    assert counted(two) == {"relay_jobs_claimed_total mail": 1, "relay_job_wait_seconds_count mail": 1}
    assert not any(metric.name.startswith("relay") for metric in REGISTRY.collect())


def test_a_child_of_a_fork_counts_anew_even_if_a_scrape_held_the_locks(broker: Broker, counts: Recorder) -> None:
    broker.enqueue("mail", b"x")
    before = counts.registry
    holding, go = threading.Event(), threading.Event()

    def hold() -> None:
        # what another thread of the parent may be doing at the moment of the fork: a lock that the child inherits
        metric = counts._made.counters["relay_jobs_enqueued"].labels("mail")
        with metric._value._lock, counts._made.counters["relay_jobs_enqueued"]._lock:
            holding.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(30)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            broker.enqueue("mail", b"y")
            broker.enqueue("mail", b"z")
            os.write(write, repr((counted(counts), counts.registry is before)).encode())
        finally:
            os._exit(0)
    os.close(write)
    go.set()
    thread.join(30)
    os.waitpid(child, 0)
    told = os.read(read, 10_000).decode()
    os.close(read)
    assert told == repr(({"relay_jobs_enqueued_total mail": 2.0}, False))
    assert counted(counts) == {"relay_jobs_enqueued_total mail": 1}
    assert counts.registry is before


MULTIPROCESS = """
import logging, os, sys, urllib.request
from relay_core import Broker
from relay_core.metrics import MetricsServer
logging.basicConfig()
with Broker(sys.argv[1]) as broker:
    serving = MetricsServer("127.0.0.1:0", broker, [])
    serving.start()
    broker.enqueue("mail", b"parent")
    for _ in range(2):
        child = os.fork()
        if not child:
            with Broker(sys.argv[1]) as own:
                MetricsServer(f"127.0.0.1:{serving.port}", own, []).start()
                own.enqueue("mail", b"child")
                own.ack(own.claim("mail")[0])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    sys.stdout.write(urllib.request.urlopen(f"http://127.0.0.1:{serving.port}/metrics").read().decode())
    serving.stop()
"""


def test_in_multiprocess_mode_one_scrape_sums_all_processes(server: Server, tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
        command = [sys.executable, "-c", MULTIPROCESS, server.url]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    missing = run()
    assert missing.returncode == 1
    assert "is not a folder; make it, empty, before the start" in missing.stderr
    (tmp_path / "metrics").mkdir()
    found = run()
    assert found.returncode == 0, found.stderr
    scrape = Scrape(found.stdout)
    assert scrape("relay_jobs_enqueued_total", queue="mail") == 3
    assert scrape("relay_jobs_processed_total", queue="mail") == 2
    assert scrape("relay_job_latency_seconds_count", queue="mail") == 2
    assert "relay_build_info" in scrape.names()
    assert found.stderr.count("counting for whoever serves PROMETHEUS_MULTIPROC_DIR") == 2, "one port for all"


def test_a_multiprocess_folder_that_cannot_be_written_to_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/proc/self/task")  # not even root may
    with pytest.raises(InvalidArgument, match="PROMETHEUS_MULTIPROC_DIR='/proc/self/task' cannot be written to: "):
        Recorder()


# --- depths


def test_depths_are_read_at_scrape_time(broker: Broker) -> None:
    registry = CollectorRegistry()
    registry.register(DepthCollector(broker, ["mail", "post"]))

    def depths(queue: str) -> dict[str, float | None]:
        scrape = scrape_registry(registry)
        return {s: scrape("relay_queue_depth", queue=queue, state=s) for s in ("ready", "inflight", "delayed", "dlq")}

    assert depths("mail") == {"ready": 0, "inflight": 0, "delayed": 0, "dlq": 0}
    broker.enqueue_many("mail", [b"1", b"2", b"3", b"4", b"5", JobSpec(b"6", delay=3600)])
    one, _two = broker.claim("mail", 2)
    assert depths("mail") == {"ready": 3, "inflight": 2, "delayed": 1, "dlq": 0}
    broker.nack(one, "no", dead=True)
    assert depths("mail") == {"ready": 3, "inflight": 1, "delayed": 1, "dlq": 1}
    assert depths("post") == {"ready": 0, "inflight": 0, "delayed": 0, "dlq": 0}


def test_the_queues_of_a_collector_may_be_told_at_each_scrape(broker: Broker) -> None:
    queues = ["a"]
    registry = CollectorRegistry()
    registry.register(DepthCollector(broker, lambda: queues))
    assert scrape_registry(registry)("relay_queue_depth", queue="b", state="ready") is None
    queues.append("b")
    assert scrape_registry(registry)("relay_queue_depth", queue="b", state="ready") == 0


def test_a_queue_that_cannot_be_read_is_left_out_and_the_others_are_not(
    server: Server, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.enqueue("mail", b"x")
    server.cli("HSET", broker.settings.keys("new").config, "v", 99)
    registry = CollectorRegistry()
    registry.register(DepthCollector(broker, ["mail", "new"]))
    scrape = scrape_registry(registry)
    assert scrape("relay_queue_depth", queue="mail", state="ready") == 1
    assert {dict(labels)["queue"] for _name, labels in scrape.samples} == {"mail"}
    assert "1 queues are left out of this scrape (new ...)" in caplog.text


def test_while_the_server_is_away_depths_are_left_out_and_it_is_asked_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[float] = []
    run_many = SyncStore.run_many

    def counting(store: SyncStore, commands: Sequence[Any]) -> list[Any]:
        asked.append(store.settings.retry_for)
        return run_many(store, commands)

    monkeypatch.setattr(SyncStore, "run_many", counting)
    registry = CollectorRegistry()
    with Broker(server.url, retry_for=3600.0) as patient:
        patient.enqueue("mail", b"x")
        registry.register(DepthCollector(patient, [f"q{n}" for n in range(450)]))
        assert len(scrape_registry(registry).samples) == 4 * 450
        assert len(asked) == 5
        server.kill()
        asked.clear()
        assert scrape_registry(registry).samples == {}
        assert asked == [1.0], "one pipeline, for a second, though the broker itself is patient"
        assert "450 queues are left out" in caplog.text
        server.start()
        assert len(scrape_registry(registry).samples) == 4 * 450


def test_a_server_that_hangs_holds_a_scrape_for_a_short_time_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PATIENCE", 0.1)
    registry = CollectorRegistry()
    with Broker(server.url, socket_timeout=60.0, retry_for=60.0) as broker:
        registry.register(DepthCollector(broker, ["mail"]))
        assert scrape_registry(registry).samples
        server.pause()
        try:
            assert scrape_registry(registry).samples == {}
        finally:
            server.resume()


def test_registering_a_depth_collector_needs_no_server() -> None:
    registry = CollectorRegistry()
    with Broker(f"relay://127.0.0.1:{free_port()}", retry_for=3600.0) as broker:
        registry.register(DepthCollector(broker, ["mail"]))
        with pytest.raises(ValueError, match="relay_queue_depth"):
            registry.register(DepthCollector(broker, ["mail"]))


# --- the endpoint of a process


@pytest.mark.parametrize(
    ("address", "host", "ports"),
    [
        ("127.0.0.1:9100", "127.0.0.1", range(9100, 9101)),
        ("9100", "127.0.0.1", range(9100, 9101)),
        (":9100", "127.0.0.1", range(9100, 9101)),
        ("0.0.0.0:9100-9103", "0.0.0.0", range(9100, 9104)),
        ("[::1]:9100", "::1", range(9100, 9101)),
        ("metrics.internal:0", "metrics.internal", range(1)),
    ],
)
def test_an_address_is_loopback_unless_it_says_otherwise(address: str, host: str, ports: range) -> None:
    assert parse_address(address) == (host, ports)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "a:b:1", "h:65536", "h:9-8", "h:1-2000", "h:-1", "h:1.5", None, 9100]
)
def test_an_address_that_cannot_be_read_is_refused_and_shown(address: str) -> None:
    with pytest.raises(InvalidArgument, match="metrics address must be host:port"):
        parse_address(address)


def test_a_worker_s_endpoint_lives_until_its_last_job_has_ended(server: Server) -> None:
    started, go = threading.Event(), threading.Event()

    def handler(job: Job) -> None:
        started.set()
        go.wait(30)

    with Broker(server.url) as broker:
        worker = Worker(broker, handler, ["mail"], metrics_addr=f"127.0.0.1:{free_port()}", metrics_tasks=1)
        assert worker._metrics is not None
        broker.enqueue("mail", b"x")
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert started.wait(30)
        url = f"http://127.0.0.1:{worker._metrics.port}/metrics"
        worker.stop()
        scrape = scrape_url(url)
        assert scrape("relay_jobs_claimed_total", queue="mail", task="other") == 1
        assert scrape("relay_jobs_processed_total", queue="mail", task="other") is None
        assert scrape("relay_queue_depth", queue="mail", state="inflight") == 1
        seen: list[Scrape] = []

        class Late:
            @hookimpl
            def relay_worker_stopped(self) -> None:
                seen.append(scrape_url(url))

        broker.plugins.register(Late())
        go.set()
        thread.join(30)
        assert seen[0]("relay_jobs_processed_total", queue="mail", task="other") == 1
        assert seen[0]("relay_job_run_seconds_count", queue="mail", task="other") == 1
        with pytest.raises(OSError):
            scrape_url(url)
        assert not broker.plugins.wants("relay_run_ended"), "the recorder is gone with its worker"


def test_a_port_in_use_is_logged_and_the_worker_works_without_metrics(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with Broker(server.url) as broker:
        first = MetricsServer("127.0.0.1:0", broker, ["mail"])
        first.start()
        taken = f"127.0.0.1:{first.port}"
        worker: Worker
        worker = Worker(broker, lambda job: worker.stop(), ["mail"], metrics_addr=taken)
        broker.enqueue("mail", b"x")
        assert worker.run() == 1
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert record.name == "relay.metrics"
        assert f"no metrics: cannot listen on {taken}: " in record.getMessage()
        assert "in use" in record.getMessage()
        assert scrape_url(f"http://{taken}/metrics")("relay_jobs_processed_total", queue="mail") == 1
        first.stop()


def test_of_a_range_of_ports_the_first_free_one_is_taken(server: Server) -> None:
    with Broker(server.url) as broker:
        low = free_port(21)
        servers = [MetricsServer(f"127.0.0.1:{low}-{low + 20}", broker, ["mail"]) for _ in range(2)]
        for one in servers:
            one.start()
        assert low <= servers[0].port < servers[1].port <= low + 20
        for one in servers:
            scrape_url(f"http://127.0.0.1:{one.port}/metrics")
            one.stop()


def test_the_versions_are_told() -> None:
    registry = CollectorRegistry()
    registry.register(BuildCollector())
    ((_name, labels),) = scrape_registry(registry).samples
    assert dict(labels)["python"] == ".".join(map(str, sys.version_info[:3]))
    assert dict(labels)["version"]


def test_the_example_in_the_documentation_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parent.parent / "docs" / "metrics.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(example.replace("relay://localhost:6379/0", server.url), str(page), "exec"), {})
    shown = Scrape(capsys.readouterr().out)
    assert shown("relay_jobs_enqueued_total", queue="mail") == 1
    assert shown("relay_queue_depth", queue="mail", state="ready") == 1
