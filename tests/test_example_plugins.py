"""examples/plugins: compression, encryption with a change of keys, the audit log, and traces through every face."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from relay_adapters.dramatiq import RelayBroker
from relay_core import AsyncBroker, Broker, Job, JobSpec, RetryPolicy
from relay_core.worker import Worker
from tests.dramatiq_workers import running
from tests.servers import Server, eventually

FOLDER = Path(__file__).parent.parent / "examples" / "plugins"
sys.path.insert(0, str(FOLDER))

import audit_log  # noqa: E402
import payload_compression as compression  # noqa: E402
import payload_encryption as encryption  # noqa: E402
from audit_log import AuditLog  # noqa: E402
from payload_compression import Compression  # noqa: E402
from payload_encryption import CannotDecrypt, Encryption  # noqa: E402
from tracing import Tracing  # noqa: E402

sys.path.remove(str(FOLDER))

KEY, OTHER = bytes(range(32)), bytes(range(32, 64))
TEXT = b"To whom it may concern. " * 500
NOISE = random.Random(1).randbytes(5000)


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: plugins know nothing of servers."""
    return str(request.param)


def stored(server: Server, broker: Broker, queue: str = "mail") -> list[bytes]:
    """The payloads of a queue as they lie in the store."""
    keys = broker.settings.keys(queue)
    return [server.cli("HGET", keys.jobs, id).partition(b"\n")[2] for id in server.cli("HKEYS", keys.jobs)]


def through(server: Server, plugins: list[object], payload: bytes) -> tuple[bytes, bytes]:
    """A payload as it lies in the store, and as it comes out."""
    server.reset()
    with Broker(server.url, plugins=plugins) as broker:
        broker.enqueue("mail", payload)
        (inside,) = stored(server, broker)
        (job,) = broker.claim("mail")
        broker.ack(job)
    return inside, job.payload


def dead_of(server: Server, plugins: list[object], inside: bytes) -> str:
    """Why a job whose stored payload is `inside` went to dead when it was claimed."""
    with Broker(server.url) as plain:
        plain.enqueue("mail", inside)
    with Broker(server.url, plugins=plugins) as broker:
        assert broker.claim("mail") == []
        (dead,) = broker.dead("mail")
        assert dead.reason == "undecodable"
        assert dead.payload == inside, "it is kept as it is"
        broker.purge("mail", ["dead"])
        return dead.error or ""


# --- compression


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_compression_makes_the_store_smaller_and_gives_the_same_bytes_back(server: Server, codec: str) -> None:
    inside, outside = through(server, [Compression(codec)], TEXT)
    assert outside == TEXT
    assert len(inside) < len(TEXT) / 20
    assert through(server, [Compression(codec, level=9)], TEXT)[1] == TEXT


@pytest.mark.parametrize("payload", [b"", b"short", NOISE], ids=["empty", "short", "noise"])
def test_compression_leaves_alone_what_would_not_become_shorter(server: Server, payload: bytes) -> None:
    assert through(server, [Compression(least=0)], payload) == (payload, payload)


@pytest.mark.parametrize("rest", [b"", b"z", b"zz", b"-", b"s" + TEXT], ids=repr)
def test_compression_is_not_deceived_by_a_payload_that_looks_compressed(server: Server, rest: bytes) -> None:
    payload = compression.MAGIC + rest
    assert through(server, [Compression()], payload)[1] == payload


def test_either_codec_reads_what_the_other_and_what_none_wrote(server: Server) -> None:
    with Broker(server.url) as plain:
        plain.enqueue("mail", TEXT)
    for codec in ("zlib", "zstd"):
        with Broker(server.url, plugins=[Compression(codec)]) as broker:
            broker.enqueue("mail", TEXT)
    for codec in ("zlib", "zstd", "zlib"):
        with Broker(server.url, plugins=[Compression(codec)]) as broker:
            assert [job.payload for job in broker.claim("mail")] == [TEXT]


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_a_payload_that_would_grow_beyond_the_limit_goes_to_dead(server: Server, codec: str) -> None:
    inside, _outside = through(server, [Compression(codec)], bytes(10_000))
    error = dead_of(server, [Compression(codec, most=9_999)], inside)
    assert "would have more than 9999 bytes" in error
    assert through(server, [Compression(codec, most=10_000)], bytes(10_000))[1] == bytes(10_000)


@pytest.mark.parametrize(
    "inside",
    [
        compression.MAGIC + b"z" + zlib.compress(TEXT)[:-5],
        compression.MAGIC + b"znonsense",
        compression.MAGIC + b"?x",
        compression.MAGIC,
        compression.MAGIC + b"s(nonsense",
    ],
    ids=["cut short", "no stream", "unknown codec", "no codec", "no frame"],
)
def test_a_compressed_payload_that_is_broken_goes_to_dead_as_it_is(server: Server, inside: bytes) -> None:
    assert "payload does not decode" in dead_of(server, [Compression()], inside)


def test_a_codec_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="codec must be zlib or zstd, got 'lz4'"):
        Compression("lz4")


def test_without_its_package_zstd_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match="pip install zstandard"):
        Compression("zstd")


# --- encryption


def test_encryption_hides_the_payload_in_the_store_and_gives_it_back(server: Server) -> None:
    plugin = Encryption({"a": KEY}, "a")
    inside, outside = through(server, [plugin], TEXT)
    assert outside == TEXT
    assert b"concern" not in inside
    assert through(server, [plugin], TEXT)[0] != inside, "a nonce of its own each time"
    assert through(server, [plugin], b"")[1] == b""


def test_keys_are_changed_without_losing_a_job(server: Server) -> None:
    steps = [
        Encryption({"old": KEY}, "old"),
        Encryption({"old": KEY, "new": OTHER}, "old"),
        Encryption({"old": KEY, "new": OTHER}, "new"),
        Encryption({"new": OTHER}, "new"),
    ]
    # while a step is under way, a process of the step before it still writes
    for writer, reader in itertools.pairwise(steps):
        with Broker(server.url, plugins=[writer]) as producer, Broker(server.url, plugins=[reader]) as worker:
            producer.enqueue("mail", TEXT)
            (job,) = worker.claim("mail")
            assert job.payload == TEXT
            worker.ack(job)


def test_a_job_whose_key_is_missing_waits_among_the_dead_for_it(server: Server) -> None:
    with Broker(server.url, plugins=[Encryption({"new": OTHER}, "new")]) as producer:
        producer.enqueue("mail", TEXT)
    with Broker(server.url, plugins=[Encryption({"old": KEY}, "old")]) as worker:
        assert worker.claim("mail") == []
        (dead,) = worker.dead("mail")
        assert dead.reason == "undecodable"
        assert "key b'new', which is not here" in (dead.error or "")
    with Broker(server.url, plugins=[Encryption({"old": KEY, "new": OTHER}, "old")]) as worker:
        assert worker.requeue("mail") == 1
        assert [job.payload for job in worker.claim("mail")] == [TEXT]


def test_a_changed_or_moved_payload_and_a_wrong_key_are_refused(server: Server) -> None:
    plugin = Encryption({"a": KEY}, "a")
    good = plugin.relay_encode_payload(TEXT, "mail")
    for place in (0, 4, 5, 8, 20, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        assert "CannotDecrypt" in dead_of(server, [plugin], bytes(bad))
    for length in (0, 3, 4, 5, 6, 10, len(good) - 1):
        assert "CannotDecrypt" in dead_of(server, [plugin], good[:length])
    elsewhere = plugin.relay_encode_payload(TEXT, "post")
    assert "belongs to another queue" in dead_of(server, [plugin], elsewhere)
    assert "CannotDecrypt" in dead_of(server, [Encryption({"a": OTHER}, "a")], good)


def test_plain_payloads_are_read_only_where_that_is_allowed(server: Server) -> None:
    assert "plain ones are not accepted" in dead_of(server, [Encryption({"a": KEY}, "a")], b"plain")
    with Broker(server.url) as plain:
        plain.enqueue("mail", b"plain")
    with Broker(server.url, plugins=[Encryption({"a": KEY}, "a", accept_plain=True)]) as broker:
        assert [job.payload for job in broker.claim("mail")] == [b"plain"]


@pytest.mark.parametrize(
    ("keys", "write_with", "said"),
    [
        ({"a": KEY}, "b", "not among"),
        ({"a": b"short"}, "a", "must have 16, 24 or 32 bytes"),
        ({"": KEY}, "", "1 to 255 bytes"),
        ({"a" * 256: KEY}, "a" * 256, "1 to 255 bytes"),
    ],
)
def test_keys_that_are_none_are_refused_and_not_shown(keys: dict[str, bytes], write_with: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        Encryption(keys, write_with)
    assert "short" not in str(refused.value)


def test_keys_come_from_the_environment_the_first_one_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("new", OTHER), ("old", KEY)]
    text = ", ".join(f"{name}:{base64.b64encode(key).decode()}" for name, key in pairs)
    monkeypatch.setenv("RELAY_KEYS", text)
    plugin = Encryption.from_environment()
    assert repr(plugin) == "Encryption(['new', 'old'], write_with='new')"
    assert plugin.relay_decode_payload(Encryption({"old": KEY}, "old").relay_encode_payload(b"x", "q"), "q") == b"x"
    for wrong in ("", "new", "new:not base64!"):
        monkeypatch.setenv("RELAY_KEYS", wrong)
        with pytest.raises(ValueError, match="RELAY_KEYS"):
            Encryption.from_environment()
    with pytest.raises(CannotDecrypt):
        plugin.relay_decode_payload(b"plain", "q")


@pytest.mark.parametrize("turned", [False, True])
def test_compression_comes_before_encryption_in_either_order(server: Server, turned: bool) -> None:
    plugins: list[object] = [Compression(), Encryption({"a": KEY}, "a")]
    inside, outside = through(server, plugins[::-1] if turned else plugins, TEXT)
    assert outside == TEXT
    assert inside.startswith(encryption.MAGIC)
    assert len(inside) < len(TEXT) / 20


def test_a_changed_payload_of_a_retry_is_compressed_and_encrypted_too(server: Server) -> None:
    with Broker(server.url, plugins=[Compression(), Encryption({"a": KEY}, "a")]) as broker:
        broker.enqueue("mail", b"first")
        (job,) = broker.claim("mail")
        broker.nack(job, "no", delay=0, payload=TEXT)
        (inside,) = stored(server, broker)
        assert inside.startswith(encryption.MAGIC)
        assert [job.payload for job in broker.claim("mail")] == [TEXT]


# --- the audit log


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_audit_log_has_a_line_for_each_move_of_each_job(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, headers=["tenant"], sync=True)
    with Broker(server.url, plugins=[log], lease=0.1) as broker:
        id = broker.enqueue("mail", b"secret", headers={"tenant": "a", "card": "4000"}, dedup_key="k").id
        broker.enqueue("mail", b"secret", dedup_key="k")
        (job,) = broker.claim("mail")
        broker.nack(job, ValueError("no"), delay=0)
        (job,) = broker.claim("mail")
        eventually(lambda: broker.reap("mail"), "the end of the lease")
        broker.extend(job)
        (job,) = broker.claim("mail")
        broker.nack(job, "no", dead=True)
        broker.requeue("mail")
        broker.ack(broker.claim("mail")[0])
        broker.enqueue("mail", b"later", delay=3600)
    log.close()
    found = lines(path)
    assert [line["event"] for line in found] == [
        "enqueued", "deduplicated", "claimed", "retried", "claimed", "reaped", "lease_lost", "claimed", "dead",
        "claimed", "acked", "enqueued",
    ]  # fmt: skip
    assert {line["id"] for line in found if line["event"] not in ("reaped", "enqueued")} == {id}
    retried, dead, acked = (next(line for line in found if line["event"] == e) for e in ("retried", "dead", "acked"))
    assert (retried["error"], retried["delay"], retried["headers"]) == ("ValueError('no')", 0, {"tenant": "a"})
    assert (dead["reason"], dead["error"], dead["deliveries"], dead["retries"]) == ("rejected", "no", 3, 1)
    assert 0 <= acked["latency"] < 60
    assert found[-1]["delay"] == 3600
    assert all(line["pid"] == os.getpid() and line["host"] and line["at"][-6:] == "+00:00" for line in found)
    assert "secret" not in path.read_text()
    assert "4000" not in path.read_text()


def test_errors_are_left_out_where_they_may_hold_secrets(server: Server, tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", errors=False)
    with Broker(server.url, plugins=[log]) as broker:
        broker.enqueue("mail", b"x")
        broker.nack(broker.claim("mail")[0], "password is hunter2", dead=True)
    log.close()
    assert lines(tmp_path / "log")[-1]["error"] == "(not written)"


def test_threads_and_processes_share_an_audit_log_and_no_line_is_torn(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AuditLog(path)

    def work(broker: Broker, name: str) -> None:
        for n in range(50):
            broker.enqueue("mail", b"x", id=f"{name}-{n}", dedup_key=f"{name}-{n}-" + "k" * 300)

    with Broker(server.url, plugins=[log]) as broker:
        threads = [threading.Thread(target=work, args=(broker, f"t{n}")) for n in range(4)]
        for thread in threads:
            thread.start()
        children = []
        for n in range(2):
            child = os.fork()
            if child == 0:
                try:
                    work(broker, f"c{n}")
                finally:
                    os._exit(0)
            children.append(child)
        for thread in threads:
            thread.join()
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    log.close()
    found = lines(path)
    assert len({line["id"] for line in found}) == len(found) == 300
    assert len({line["pid"] for line in found}) == 3


def test_an_audit_log_that_was_rotated_goes_on_in_a_new_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AuditLog(path)
    with Broker(server.url, plugins=[log]) as broker:
        broker.enqueue("mail", b"x", id="one")
        path.rename(tmp_path / "log.1")
        broker.enqueue("mail", b"x", id="two")
    log.close()
    assert [line["id"] for line in lines(tmp_path / "log.1")] == ["one"]
    assert [line["id"] for line in lines(path)] == ["two"]


def test_a_log_that_cannot_be_written_does_not_hold_up_a_job(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(tmp_path / "log")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Broker(server.url, plugins=[log]) as broker:
        with monkeypatch.context() as patched:
            patched.setattr(audit_log.os, "write", full)
            broker.enqueue("mail", b"x")
        broker.ack(broker.claim("mail")[0])
    log.close()
    assert "No space left on device" in caplog.text
    assert [line["event"] for line in lines(tmp_path / "log")] == ["claimed", "acked"]
    with pytest.raises(FileNotFoundError):
        AuditLog(tmp_path / "nowhere" / "log")


# --- traces


class Traces:
    """A tracer provider that keeps its spans."""

    def __init__(self) -> None:
        self.provider = TracerProvider()
        self._kept = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self.tracer = self.provider.get_tracer("test")
        self.plugin = Tracing(self.provider)

    def spans(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for span in sorted(self._kept.get_finished_spans(), key=lambda span: span.start_time or 0):
            found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def traces() -> Iterator[Traces]:
    made = Traces()
    yield made
    made.provider.shutdown()


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_trace_goes_from_the_sender_through_retry_death_and_requeue_into_the_handler(
    server: Server, traces: Traces, kind: str
) -> None:
    seen: list[int] = []
    worker: Worker

    def plain(job: Job) -> None:
        with traces.tracer.start_as_current_span("inner") as inner:
            seen.append(inner.get_span_context().trace_id)
        if len(seen) < 3:
            raise ValueError("not yet")
        worker.stop()

    async def coroutine(job: Job) -> None:
        await asyncio.sleep(0)
        plain(job)

    with Broker(server.url, plugins=[traces.plugin], retry=RetryPolicy(base=0.01)) as broker:
        with traces.tracer.start_as_current_span("request") as request:
            id = broker.enqueue("mail", b"x", max_retries=1).id
        (job,) = broker.claim("mail")
        broker.nack(job, "of a worker without traces", delay=0)
        worker = Worker(broker, plain if kind == "thread" else coroutine, ["mail"])
        thread = threading.Thread(target=worker.run)
        thread.start()
        eventually(lambda: broker.requeue("mail"), "it is dead after its run, and ready again with a retry to come")
        thread.join(30)
        assert not thread.is_alive()
    spans = traces.spans()
    root = request.get_span_context()
    assert seen == [root.trace_id] * 3
    (send,) = spans["mail send"]
    assert send.parent.span_id == root.span_id
    assert len(spans["mail process"]) == 3
    for span, inner in zip(spans["mail process"], spans["inner"], strict=True):
        assert span.parent.span_id == send.context.span_id
        assert inner.parent.span_id == span.context.span_id
        assert span.attributes["messaging.message.id"] == id
    assert [span.status.is_ok for span in spans["mail process"]] == [False, False, True]
    assert spans["mail process"][0].events[0].attributes["exception.message"] == "not yet"
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_context_that_the_caller_passes_on_by_itself_is_kept(server: Server, traces: Traces) -> None:
    with traces.tracer.start_as_current_span("request"):
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
    with Broker(server.url, plugins=[traces.plugin]) as broker:
        broker.enqueue("mail", b"x", headers=carrier)
        broker.enqueue_many("mail", [JobSpec(b"y", headers={"mine": "1"})])
        first, second = broker.claim("mail", 2)
    assert dict(first.headers) == carrier
    assert second.headers["mine"] == "1"
    assert second.headers["traceparent"] != carrier["traceparent"]


def test_each_task_of_an_async_producer_sends_its_own_context(server: Server, traces: Traces) -> None:
    async def produce() -> list[tuple[str, int]]:
        async with AsyncBroker(server.url, plugins=[traces.plugin]) as broker:

            async def one(n: int) -> tuple[str, int]:
                with traces.tracer.start_as_current_span(f"request {n}") as span:
                    await asyncio.sleep(0)
                    return (await broker.enqueue("mail", b"x")).id, span.get_span_context().trace_id

            return await asyncio.gather(*(one(n) for n in range(10)))

    sent = dict(asyncio.run(produce()))
    with Broker(server.url) as broker:
        found = {job.id: int(job.headers["traceparent"].split("-")[1], 16) for job in broker.claim("mail", 10)}
    assert found == sent


def test_in_dramatiq_a_trace_goes_from_the_sender_into_the_actor_and_its_retries(
    server: Server, traces: Traces
) -> None:
    broker = RelayBroker(url=server.url, plugins=[traces.plugin])
    seen: list[tuple[int, object]] = []

    def run() -> None:
        current = dramatiq.middleware.CurrentMessage.get_current_message()
        assert current is not None
        seen.append((trace.get_current_span().get_span_context().trace_id, current.options["options"]))
        if len(seen) < 3:
            raise ValueError("not yet")

    broker.add_middleware(dramatiq.middleware.CurrentMessage())
    actor = dramatiq.actor(run, actor_name="flaky", broker=broker, min_backoff=1, max_backoff=2, max_retries=5)
    with traces.tracer.start_as_current_span("request") as request:
        # a message's options are how instrumentations of Dramatiq pass a context on
        actor.send_with_options(options={"trace_context": {"traceparent": "its own"}})
    with running(broker, threads=2):
        broker.join("default", timeout=30_000)
    broker.close()
    assert seen == [(request.get_span_context().trace_id, {"trace_context": {"traceparent": "its own"}})] * 3
    assert [span.status.is_ok for span in traces.spans()["default process"]] == [False, False, True]


CELERY_APP = """
import json, os, sys
sys.path.insert(0, os.environ["PLUGINS"])
from celery import Celery
from celery.exceptions import Reject
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from audit_log import AuditLog
from payload_compression import Compression
from payload_encryption import Encryption

class Lines(SpanExporter):
    def export(self, spans):
        with open("spans", "a") as out:
            for span in spans:
                parent = span.parent.span_id if span.parent else 0
                out.write(json.dumps([span.name, span.context.trace_id, span.context.span_id, parent]) + "\\n")

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(Lines()))
CeleryInstrumentor().instrument(tracer_provider=provider)
tracer = provider.get_tracer("test")

plugins = [Compression(least=1), Encryption({"a": bytes(range(32))}, "a"), AuditLog("audit.jsonl")]
app = Celery("traced", broker=os.environ["SITE_URL"], broker_transport_options={"plugins": plugins})

def runs():
    with open("runs", "a+") as out:
        out.write("x")
        return out.tell()

@app.task(name="flaky", bind=True, acks_late=True)
def flaky(self):
    n = runs()
    if n == 1:
        raise self.retry(countdown=0.01)
    if n == 2:
        raise Reject("to the dead", requeue=False)

def send():
    with tracer.start_as_current_span("request"):
        flaky.delay()
    app.pool.force_close_all()
"""


def test_in_celery_a_trace_goes_from_the_sender_through_retry_and_requeue_and_plugins_change_the_payloads(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "traced.py").write_text(CELERY_APP)
    path = os.pathsep.join(map(str, (tmp_path, Path(__file__).parent.parent)))
    environment = {**os.environ, "SITE_URL": server.url, "PLUGINS": str(FOLDER), "PYTHONPATH": path}
    sent = subprocess.run(
        [sys.executable, "-c", "import traced; traced.send()"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    with Broker(server.url) as core:
        (inside,) = stored(server, core, "celery")
        assert inside.startswith(encryption.MAGIC)
        celery = str(Path(sysconfig.get_path("scripts"), "celery"))
        with open(tmp_path / "log", "ab") as log:
            worker = subprocess.Popen(
                [celery, "-A", "traced", "worker", "-P", "solo", "--without-mingle", "--without-gossip"],
                cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            eventually(lambda: core.stats("celery").dead, f"the task is dead; {tmp_path / 'log'}", 60)
            assert core.requeue("celery") == 1
            eventually(lambda: core.stats("celery").pending == 0, "the third run")
            os.killpg(worker.pid, signal.SIGTERM)
            assert worker.wait(30) == 0, (tmp_path / "log").read_text()
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait(10)
    assert (tmp_path / "runs").read_text() == "xxx"
    spans = [json.loads(line) for line in (tmp_path / "spans").read_text().splitlines()]
    assert {trace_id for _name, trace_id, _span, _parent in spans} == {spans[0][1]}, spans
    assert sum(name == "run/flaky" for name, *_ in spans) == 3
    assert "request" in [name for name, *_ in spans]
    events = [line["event"] for line in lines(tmp_path / "audit.jsonl") if line["queue"] == "celery"]
    assert events[0] == "enqueued"
    assert events[-1] == "acked"
    assert "dead" in events


def test_the_example_in_the_readme_runs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    exec(compile(example.replace("relay://localhost:6379/0", server.url), "README.md", "exec"), {})
    assert capsys.readouterr().out == "6000 bytes came back\n"
    assert [line["event"] for line in lines(tmp_path / "audit.jsonl")] == ["enqueued", "claimed", "acked"]


def test_each_file_is_in_the_readme_and_stands_on_the_public_names_alone() -> None:
    readme = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.py"):
        assert f"]({path.name})" in readme
        imported = re.findall(r"(?m)^\s*(?:from|import) (relay\w+[.\w]*)", path.read_text())
        assert imported == ["relay_core"], path.name
