"""The tools around Celery, the real ones, against a real worker on relay: Flower, beat with redbeat, OpenTelemetry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.connection import resolve_aliases
from kombu.exceptions import ChannelError

from relay_adapters.celery.kombu_alias import NAMES
from relay_core import Broker
from tests.celery_workers import ROOT, CeleryWorker, client_of, lines, results_of
from tests.command_line import Cli
from tests.servers import Server, eventually, free_port

pytestmark = pytest.mark.slow


class Site:
    """A server, and a worker that sends events."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder, self.results = server, folder, results_of(server)
        self.broker = Broker(server.url)
        self.app: Celery = client_of(server.url, folder, self.results)
        self.worker = CeleryWorker(server.url, folder, "-P", "solo", "-E", name="tools", results=self.results)

    def close(self) -> None:
        self.worker.kill()
        self.app.close()
        self.broker.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Server("redis") as server:
        site = Site(server, tmp_path_factory.mktemp("tools"))
        yield site
        site.close()


def run_celery(site: Site, *arguments: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sysconfig.get_path("scripts"), "celery")), "-A", "tests.celery_app", *arguments]
    own = {"APP_URL": site.server.url, "APP_FOLDER": str(site.folder), "APP_RESULTS": site.results, **environment}
    with open(site.folder / log, "ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, stdout=file, stderr=file)


class Flower:
    """Flower's own process, asked by HTTP."""

    def __init__(self, site: Site) -> None:
        self.port = free_port()
        arguments = ("flower", "--address=127.0.0.1", f"--port={self.port}")
        self.process = run_celery(site, *arguments, log="flower.log", FLOWER_UNAUTHENTICATED_API="true")

    def get(self, path: str, body: Any = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data=data, timeout=10) as answer:
            return str(answer.read().decode())

    def json(self, path: str, body: Any = None) -> Any:
        return json.loads(self.get(path, body))


@pytest.fixture(scope="module")
def flower(site: Site) -> Iterator[Flower]:
    flower = Flower(site)
    eventually(lambda: flower.get("/healthcheck") == "OK", "start of Flower")
    yield flower
    flower.process.send_signal(signal.SIGTERM)
    flower.process.wait(20)


def test_flower_shows_workers_tasks_and_queue_lengths(site: Site, flower: Flower) -> None:
    eventually(lambda: any("tools@" in name for name in flower.json("/api/workers?refresh=1")), "its worker")
    sent = flower.json("/api/task/apply/tests.celery_app.add", {"args": [2, 3]})
    assert sent["result"] == 5
    eventually(lambda: flower.json(f"/api/task/info/{sent['task-id']}")["state"] == "SUCCESS", "the task's events")
    site.broker.pause("celery")
    try:
        for n in range(3):
            site.app.send_task("tests.celery_app.add", (n, n))
        site.app.send_task("tests.celery_app.add", (9, 9), countdown=3600)
        (queue,) = flower.json("/api/queues/length")["active_queues"]
        assert queue == {
            "name": "celery", "messages": 4, "messages_ready": 3, "messages_delayed": 1,
            "messages_unacknowledged": 0, "messages_dead": 0,
        }  # fmt: skip
        page = flower.get("/broker")
        assert "celery" in page
        assert "relay+unix" in page
    finally:
        site.broker.resume("celery")
        site.broker.purge("celery", ("delayed",))
    eventually(lambda: not site.broker.stats("celery").ready, "the worker to take what waits")


def test_celery_exporter_counts_what_waits_and_who_consumes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its module, which is on no package index, and what that asks a connection."""
    for name in NAMES:  # as it was before, afterwards
        monkeypatch.setitem(resolve_aliases, name, name)
    module = types.ModuleType("src.exporter")
    monkeypatch.setitem(sys.modules, "src.exporter", module)
    with site.app.connection() as connection:
        assert connection.transport.driver_name == "relay-queue"
        assert connection.info()["transport"] == "relay", "a project's own module of that name"
    vars(module).update(dict.fromkeys(("Exporter", "queue_length", "rabbitmq_queue_length")))
    site.broker.pause("celery")
    try:
        result = site.app.send_task("tests.celery_app.add", (1, 1))
        with site.app.connection() as connection:
            channel = connection.default_channel
            assert connection.info()["transport"] == "amqp"
            found = channel.queue_declare(queue="celery", passive=True)
            assert (found.message_count, found.consumer_count) == (1, 1)
            with pytest.raises(ChannelError) as refused:
                channel.queue_declare(queue="nowhere", passive=True)
            assert "NOT_FOUND" in refused.value.message
    finally:
        site.broker.resume("celery")
    assert result.get(timeout=20) == 2


def test_flower_controls_a_worker(site: Site, flower: Flower) -> None:
    (name,) = [name for name in flower.json("/api/workers?refresh=1") if name.startswith("tools@")]
    flower.get(f"/api/worker/queue/add-consumer/{name}?queue=extra", {})
    try:
        site.app.send_task("tests.celery_app.run", ("by flower",), queue="extra")
        eventually(lambda: lines(site.folder, start="by flower"), "a task of the added queue")
    finally:
        flower.get(f"/api/worker/queue/cancel-consumer/{name}?queue=extra", {})
    site.broker.pause("celery")
    result = site.app.send_task("tests.celery_app.run", ("revoked",))
    flower.get(f"/api/task/revoke/{result.id}", {})
    # it is taken out of the queue; a worker that was told to go on before it was told of the revoke could run it first
    eventually(lambda: result.state == "REVOKED", "the revoke")
    site.broker.resume("celery")


def test_dead_tasks_are_listed_and_requeued_by_their_name(site: Site) -> None:
    cli = Cli(site.server.url)
    for n in range(3):
        site.app.send_task("tests.celery_app.refuse", (f"no use {n}", False))
    eventually(lambda: site.broker.stats("celery").dead == 3, "the dead")
    of_task = ("--queue", "celery", "--task", "tests.celery_app.refuse")
    listed = cli.json("dlq", "ls", *of_task)["jobs"]
    assert [job["task"] for job in listed] == ["tests.celery_app.refuse"] * 3
    table = cli.run("dlq", "ls", *of_task).stdout
    assert all(f"refuse ('no use {n}', False)" in table for n in range(3)), table
    assert cli.json("dlq", "ls", "--queue", "celery", "--task", "tests.celery_app.run")["jobs"] == []
    assert cli.json("dlq", "requeue", *of_task)["requeued"] == 3
    eventually(lambda: len(lines(site.folder, start="no use")) == 6, "each ran once more")
    eventually(lambda: site.broker.stats("celery").dead == 3, "they are dead again")
    assert cli.json("dlq", "purge", *of_task, "--yes")["purged"] == 3


def test_redbeat_sends_what_is_due(site: Site) -> None:
    database = f"unix://{site.server.socket}?db=2"
    conf = {
        "redbeat_redis_url": database,
        "beat_max_loop_interval": 1,
        "redbeat_lock_timeout": 3600,  # else 5 s, and it ends once the machine gives it no time for so long
        "beat_schedule": {"often": {"task": "tests.celery_app.run", "schedule": 0.5, "args": ["redbeat"]}},
    }
    arguments = ("beat", "-S", "redbeat.RedBeatScheduler", "--pidfile=", "-l", "INFO")
    beat = run_celery(site, *arguments, log="beat.log", APP_CONF=json.dumps(conf))
    try:
        eventually(lambda: len(lines(site.folder, start="redbeat ")) >= 2, "two runs")
    finally:
        beat.send_signal(signal.SIGTERM)
        beat.wait(20)


def test_opentelemetry_carries_its_context_in_the_messages_headers(site: Site) -> None:
    code = """
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
CeleryInstrumentor().instrument()

from celery.contrib.testing.worker import start_worker
from tests.celery_app import app, run

app.conf.task_default_queue = "traced"
with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
    run.delay("traced").get(timeout=20, disable_sync_subtasks=False)
sent, ran = sorted(spans.get_finished_spans(), key=lambda span: span.kind.name, reverse=True)
assert (sent.kind.name, ran.kind.name) == ("PRODUCER", "CONSUMER"), (sent, ran)
assert sent.context.trace_id == ran.context.trace_id
"""
    own = {"APP_URL": site.server.url, "APP_FOLDER": str(site.folder), "APP_RESULTS": site.results}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
