"""Celery workers and Dramatiq processes show themselves: `/metrics` by one setting, the roster, runs of handlers."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from celery import Celery, signals
from celery.worker import state as worker_state
from dramatiq.middleware import Middleware, SkipMessage

from relay_adapters.dramatiq import RelayBroker
from relay_core import Broker, Job, hookimpl
from relay_core.errors import InvalidArgument
from tests.celery_workers import STARTS, CeleryWorker
from tests.dramatiq_workers import running
from tests.scraping import Scrape, scrape_url
from tests.servers import Server, eventually, free_port

CELERY_APP = """
import json, os, time
from pathlib import Path
from celery import Celery

app = Celery("site", broker=os.environ["SITE_URL"])
app.conf.update(broker_transport_options={"metrics_addr": os.environ["SITE_METRICS"], "metrics_tasks": 3})
app.conf.update(json.loads(os.environ.get("SITE_CONF", "{}")))

@app.task(name="fine")
def fine(): pass

@app.task(name="fail")
def fail(): raise ValueError("no")

@app.task(name="parent")
def parent(): app.send_task("fine", queue="celery")

@app.task(name="again", bind=True, acks_late=True)
def again(self):
    if self.request.retries < 2:
        raise self.retry(countdown=0)

@app.task(name="slow", acks_late=True)
def slow(folder):
    Path(folder, "started").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
"""

DRAMATIQ_APP = """
import os, time
from pathlib import Path
import dramatiq
from relay_adapters.dramatiq import RelayBroker

broker = RelayBroker(url=os.environ["SITE_URL"], metrics_addr=os.environ["SITE_METRICS"], metrics_tasks=3)
dramatiq.set_broker(broker)

@dramatiq.actor
def fine(): time.sleep(0.02)

@dramatiq.actor(max_retries=0)
def fail(): raise ValueError("no")

@dramatiq.actor
def slow(folder):
    Path(folder, f"started-{os.getpid()}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
"""

ROOT = Path(__file__).parent.parent


class Process:
    """A framework's own command, in a session of its own, with its log in a file."""

    def __init__(self, folder: Path, command: list[str], url: str, metrics: str, **more: str) -> None:
        self.log = folder / f"{command[0]}-{time.monotonic_ns()}.log"
        script = str(Path(sysconfig.get_path("scripts"), command[0]))
        environment = {
            **os.environ,
            "SITE_URL": url,
            "SITE_METRICS": metrics,
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            **more,
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [script, *command[1:]], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def said(self, text: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return text in self.log.read_text()


@pytest.fixture(scope="module")
def store() -> Iterator[Server]:
    with Server("valkey") as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "celery_site.py").write_text(CELERY_APP)
    (folder / "dramatiq_site.py").write_text(DRAMATIQ_APP)
    return folder


@pytest.fixture
def core(store: Server) -> Iterator[Broker]:
    store.reset()
    with Broker(store.url) as broker:
        yield broker


def faces(core: Broker) -> list[str]:
    return [info.face for info in core.workers()]


# --- Celery


def celery_worker(folder: Path, store: Server, address: str, name: str, **more: str) -> Process:
    command = ["celery", "-A", "celery_site", "worker", "-c", "2", "-n", f"{name}@%h", "-l", "info"]
    command += ["--without-mingle", "--without-gossip"]
    return Process(folder, command, store.url, address, **more)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_late_acked_task_that_retries_loses_no_lease(store: Server, core: Broker, folder: Path, pool: str) -> None:
    port = free_port()
    app = Celery(broker=store.url, set_as_current=False)
    with celery_worker(folder, store, f"127.0.0.1:{port}", "one", SITE_CONF=json.dumps({"worker_pool": pool})):
        for _ in range(3):
            app.send_task("again")
        eventually(lambda: core.stats("celery").counters.get("processed") == 3, "all to be done", 60)
        assert core.stats("celery").counters["retried"] == 6
        scrape = scrape_url(f"http://127.0.0.1:{port}/metrics")
        assert scrape("relay_jobs_claimed_total", queue="celery", task="again") == 9
        assert not [name for name, _labels in scrape.samples if name == "relay_leases_lost_total"]
    app.close()


def test_a_celery_worker_serves_metrics_of_all_its_children_until_they_have_drained(
    store: Server, core: Broker, folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    app = Celery(broker=store.url, set_as_current=False)
    with celery_worker(folder, store, f"127.0.0.1:{port}", "one") as worker:
        eventually(lambda: faces(core) == ["celery"], "the worker in the roster", 60)
        for task in ("fine", "fine", "fail", "parent"):
            app.send_task(task)

        def done() -> bool:
            tasks = ("fine", "fail", "parent")
            return [scrape_url(url)("relay_job_run_seconds_count", queue="celery", task=t) for t in tasks] == [3, 1, 1]

        eventually(done, "all runs are seen by the main process")
        assert app.control.broadcast("ping", reply=True, limit=1, timeout=10)
        scrape = scrape_url(url)
        assert scrape("relay_jobs_processed_total", queue="celery", task="fine") == 3
        assert scrape("relay_job_runs_failed_total", queue="celery", task="fail") == 1, "which Celery acks all the same"
        assert scrape("relay_job_runs_failed_total", queue="celery", task="fine") == 0
        assert scrape("relay_jobs_enqueued_total", queue="celery") is None, "a child of the pool enqueued it"
        assert core.stats("celery").counters["enqueued"] == 5, "which the store, and so the exporter, has counted"
        assert {dict(labels).get("queue", "celery") for _name, labels in scrape.samples} == {"celery"}
        (info,) = core.workers()
        assert (info.queues, info.concurrency, info.pid) == (("celery",), 2, worker.process.pid)

        with celery_worker(folder, store, f"127.0.0.1:{port}", "two") as second:
            eventually(lambda: second.said("no metrics: cannot listen on 127.0.0.1:"), "the port is taken", 60)
            eventually(lambda: faces(core) == ["celery", "celery"], "it works all the same")
            os.killpg(second.process.pid, signal.SIGKILL)

        app.send_task("slow", [str(tmp_path)])
        eventually((tmp_path / "started").exists, "a task runs")
        worker.process.send_signal(signal.SIGTERM)
        eventually(lambda: worker.said("Warm shutdown"), "the worker is told to stop")
        assert scrape_url(url)("relay_jobs_claimed_total", queue="celery", task="other") == 1
        (tmp_path / "go").touch()
        assert worker.process.wait(30) == 0
        with pytest.raises(OSError):
            scrape_url(url)
        assert worker.process.pid not in [info.pid for info in core.workers()]


@pytest.mark.parametrize("conf", STARTS)
def test_in_multiprocess_mode_the_children_of_a_celery_worker_count_what_their_tasks_enqueue(
    store: Server, core: Broker, folder: Path, tmp_path: Path, conf: Mapping[str, Any]
) -> None:
    port = free_port()
    app = Celery(broker=store.url, set_as_current=False)
    more = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "SITE_CONF": json.dumps(conf)}
    with celery_worker(folder, store, f"127.0.0.1:{port}", "many", **more):
        for _ in range(4):
            app.send_task("parent")

        def counted() -> bool:
            scrape = scrape_url(f"http://127.0.0.1:{port}/metrics")
            done = sum(scrape("relay_jobs_processed_total", queue="celery", task=t) or 0 for t in ("parent", "fine"))
            return (done, scrape("relay_jobs_enqueued_total", queue="celery")) == (8, 4)

        eventually(counted, "the enqueues of the children", 60)


class Controller:
    """What Celery's signals tell of a worker."""

    concurrency = 1


class Consumer:
    """And of what consumes for it."""

    task_consumer = None

    def __init__(self, app: Celery) -> None:
        self.connection, self.controller = app.connection_for_read(), Controller()


def started(store: Server, **options: Any) -> tuple[Controller, Consumer]:
    consumer = Consumer(Celery(broker=store.url, broker_transport_options=options, set_as_current=False))
    consumer.connection.connect()
    signals.worker_ready.send(sender=consumer)
    return consumer.controller, consumer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics_addr": "nowhere"}, "no metrics: broker_transport_options: metrics address must be host:port"),
        ({"metrics_addr": ":0", "metrics_tasks": -1}, "no metrics: broker_transport_options: tasks must be"),
    ],
)
def test_a_wrong_setting_is_an_error_in_the_log_of_a_celery_worker_which_works(
    store: Server, core: Broker, options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    controller, _consumer = started(store, **options)
    eventually(lambda: faces(core) == ["celery"], "the worker in the roster")
    assert said in caplog.text
    signals.worker_shutdown.send(sender=controller)
    assert core.workers() == []


def test_what_metrics_lack_is_said_once_in_the_log_of_a_celery_worker_which_works(
    store: Server, core: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [one for one in sys.modules if one.startswith("relay_core.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    controller, _consumer = started(store, metrics_addr=":0")
    eventually(lambda: faces(core) == ["celery"], "the worker in the roster")
    (record,) = [record for record in caplog.records if "no metrics" in record.getMessage()]
    assert record.getMessage().count("pip install 'relay-queue[metrics]'") == 1
    signals.worker_shutdown.send(sender=controller)


def test_the_endpoint_of_a_celery_worker_ends_with_the_worker_and_not_only_with_its_process(
    store: Server, core: Broker
) -> None:
    port = free_port()
    controller, _consumer = started(store, metrics_addr=str(port))
    assert "relay_build_info" in scrape_url(f"http://127.0.0.1:{port}/metrics").names()
    signals.worker_shutdown.send(sender=controller)
    with pytest.raises(OSError):
        scrape_url(f"http://127.0.0.1:{port}/metrics")


def test_a_task_that_was_acked_as_it_started_is_in_the_hands_of_its_celery_worker(store: Server, core: Broker) -> None:
    """It holds no lease."""
    request = Controller()
    worker_state.reserved_requests.add(request)
    try:
        controller, _consumer = started(store)
        eventually(lambda: [info.inflight for info in core.workers()] == [1], "the roster to say so")
        signals.worker_shutdown.send(sender=controller)
    finally:
        worker_state.reserved_requests.discard(request)


def test_a_celery_worker_that_is_shut_down_cold_is_off_the_roster_at_once(
    store: Server, core: Broker, tmp_path: Path
) -> None:
    """Celery sends no signal then."""
    with CeleryWorker(store.url, tmp_path, "-P", "solo") as worker:
        eventually(lambda: faces(core) == ["celery"], "the worker in the roster")
        worker.send(signal.SIGQUIT)
        worker.process.wait(30)
        assert core.workers() == []


def test_without_the_setting_a_celery_worker_serves_nothing_and_the_signal_of_another_broker_is_not_heard(
    store: Server, core: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        controller, _consumer = started(store)
    assert "metrics" not in caplog.text
    signals.worker_shutdown.send(sender=controller)
    signals.worker_ready.send(sender=Consumer(Celery(broker="memory://", set_as_current=False)))
    assert core.workers() == []


# --- Dramatiq


@pytest.mark.since("dramatiq", "2.0")  # before, its own middleware has all processes count together
def test_dramatiq_s_processes_serve_metrics_each_on_a_port_until_they_have_drained(
    store: Server, core: Broker, folder: Path, tmp_path: Path
) -> None:
    low = free_port(2)
    urls = [f"http://127.0.0.1:{port}/metrics" for port in (low, low + 1)]
    command = ["dramatiq", "dramatiq_site", "--processes", "2", "--threads", "2", "--worker-shutdown-timeout", "30000"]
    sender = RelayBroker(url=store.url)
    actors = {
        name: dramatiq.actor(lambda *_: None, actor_name=name, broker=sender) for name in ("fine", "fail", "slow")
    }

    def total(name: str, **labels: str) -> float:
        return sum(scrape_url(url)(name, **labels) or 0 for url in urls)

    with Process(folder, command, store.url, f"127.0.0.1:{low}-{low + 1}") as workers:
        eventually(lambda: faces(core) == ["dramatiq"] * 2, "both processes in the roster", 60)
        for _ in range(20):
            actors["fine"].send()
        actors["fail"].send()
        eventually(lambda: core.stats("default").pending == 0, "all messages")
        eventually(lambda: total("relay_jobs_processed_total", queue="default", task="fine") == 20, "their counts")
        assert total("relay_job_run_seconds_count", queue="default", task="fine") == 20
        assert total("relay_job_run_seconds_sum", queue="default", task="fine") >= 0.4
        assert total("relay_jobs_dead_total", queue="default", task="fail") == 1
        assert total("relay_job_runs_failed_total", queue="default", task="fail") == 1
        assert scrape_url(urls[0])("relay_queue_depth", queue="default", state="dlq") == 1
        infos = core.workers()
        assert {(info.queues, info.concurrency) for info in infos} == {(("default",), 2)}
        assert len({info.pid for info in infos}) == 2

        for _ in range(8):  # more than one process prefetches
            actors["slow"].send(str(tmp_path))
        eventually(lambda: len(list(tmp_path.glob("started-*"))) == 2, "messages run in both processes")
        workers.process.send_signal(signal.SIGTERM)
        eventually(lambda: workers.said("Shutting down"), "the workers are told to stop")
        assert total("relay_jobs_claimed_total", queue="default", task="slow") >= 2
        (tmp_path / "go").touch()
        assert workers.process.wait(40) == 0
        for url in urls:
            with pytest.raises(OSError):
                scrape_url(url)
    assert core.workers() == []
    sender.close()


class Runs:
    """Notes what is told of runs."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @hookimpl
    def relay_run_started(self, job: Job) -> None:
        self.notes.append("started")

    @hookimpl
    def relay_run_ended(self, job: Job, seconds: float, error: BaseException | None) -> None:
        assert seconds >= 0
        self.notes.append(f"ended {error!r}")

    @hookimpl
    def relay_job_acked(self, job: Job) -> None:
        self.notes.append("acked")


class Skipping(Middleware):
    def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
        if message.actor_name == "skipped":
            raise SkipMessage("not today")


def test_runs_of_actors_are_told_whatever_they_end_in(store: Server, core: Broker) -> None:
    runs = Runs()
    broker = RelayBroker(url=store.url, plugins=[runs])
    broker.add_middleware(Skipping())

    def raises(error: BaseException | None) -> Any:
        def run() -> None:
            if error is not None:
                raise error

        return run

    outcomes = {"fine": None, "failing": ValueError("no"), "skipping": SkipMessage("in the middle"), "skipped": None}
    actors = [
        dramatiq.actor(raises(error), actor_name=name, broker=broker, max_retries=0) for name, error in outcomes.items()
    ]
    expected = [
        ["started", "ended None", "acked"],
        ["started", "ended ValueError('no')"],
        ["started", "ended None", "acked"],
        ["acked"],
    ]
    with running(broker, threads=1):
        for actor, notes in zip(actors, expected, strict=True):
            actor.send()
            eventually(lambda notes=notes: len(runs.notes) >= len(notes), f"{actor.actor_name} is done")
            eventually(lambda: core.stats("default").pending == 0, "nothing is left")
            eventually(lambda: runs.notes, "notes")
            assert runs.notes == notes
            runs.notes.clear()
    assert broker._monitoring._began == {}
    broker.close()


def test_a_port_in_use_does_not_stop_a_dramatiq_worker(
    store: Server, core: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        broker = RelayBroker(url=store.url, metrics_addr=address)
        actor = dramatiq.actor(lambda: None, actor_name="fine", broker=broker)
        actor.send()
        with running(broker):
            broker.join("default", timeout=30_000)
        broker.close()
    assert f"no metrics: cannot listen on {address}: " in caplog.text
    assert core.stats("default").counters["processed"] == 1


def test_an_address_that_cannot_be_read_is_refused_when_a_relay_broker_is_made(store: Server) -> None:
    with pytest.raises(InvalidArgument, match="metrics address must be host:port"):
        RelayBroker(url=store.url, metrics_addr="nowhere")


def test_a_dramatiq_worker_is_on_the_roster_while_it_runs_and_serves_where_it_is_told(
    store: Server, core: Broker
) -> None:
    port = free_port()
    broker = RelayBroker(url=store.url, metrics_addr=str(port))
    actor = dramatiq.actor(lambda: None, actor_name="fine", broker=broker, queue_name="mail")
    seen: list[Scrape] = []

    class Late(Middleware):
        def before_worker_shutdown(self, _broker: dramatiq.Broker, _worker: dramatiq.Worker) -> None:
            seen.append(scrape_url(f"http://127.0.0.1:{port}/metrics"))

    broker.add_middleware(Late())
    with running(broker, threads=3):
        eventually(lambda: faces(core) == ["dramatiq"], "the first beat")
        assert [(info.queues, info.concurrency) for info in core.workers()] == [(("mail",), 3)]
        actor.send()
        broker.join("mail", timeout=30_000)
    assert core.workers() == []
    assert seen[0]("relay_jobs_enqueued_total", queue="mail") == 1
    assert seen[0]("relay_jobs_claimed_total", queue="mail") == 1
    with pytest.raises(OSError):
        scrape_url(f"http://127.0.0.1:{port}/metrics")
    broker.close()
