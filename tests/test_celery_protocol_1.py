"""Tasks of protocol 1, which say in their body what those of protocol 2 say in headers: found and told of alike."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery, chord, group
from celery._state import _task_stack
from celery.exceptions import ChordError, TaskRevokedError
from celery.utils.nodenames import gethostname
from kombu import Queue

from relay_adapters.celery.messages import due
from relay_adapters.celery.messages.envelope import unpack
from relay_adapters.celery.messages.protocol import body_of, protocol_1, told_of
from relay_adapters.celery.sending import groups
from relay_core import Broker
from relay_core.errors import InvalidArgument
from relay_core.testing import advance
from tests.aging import age_by
from tests.celery_client import app_of, broker, cut, flavour, server, store_of  # noqa: F401 (fixtures)
from tests.celery_workers import CeleryWorker, client_of, lines, results_of
from tests.command_line import Cli
from tests.servers import Server, eventually


@pytest.fixture
def app(server: Server, tmp_path: Path) -> Iterator[Celery]:
    app = app_of(server.url, tmp_path, task_protocol=1)
    yield app
    app.close()


def stored(broker: Broker, queue: str = "celery") -> list[Any]:
    return [*broker.jobs(queue, "ready"), *broker.jobs(queue, "delayed")]


# what a publish stores


def test_the_id_of_its_job_is_its_own_and_one_more_for_each_try(app: Celery, broker: Broker) -> None:
    app.send_task("pay", task_id="t")
    app.send_task("pay", task_id="t", retries=1)
    app.send_task("pay", task_id="t")
    app.send_task("pay", task_id="later", countdown=60)
    assert {job.id for job in stored(broker)} == {"t", "t.1", "t~1", "later"}


@pytest.mark.parametrize("task_id", ["a b", "é", "x" * 101, 7, None, ["t"], "\n"])
@pytest.mark.parametrize("retries", [0, "x y", 10**200, None, {}])
def test_what_can_be_no_id_of_a_job_is_stored_under_another(
    server: Server, broker: Broker, task_id: Any, retries: Any
) -> None:
    body = {"task": "pay", "id": task_id, "args": [], "kwargs": {}, "retries": retries, "eta": None}
    with kombu.Connection(server.url) as connection, connection.SimpleQueue("celery") as queue:
        queue.put(body)
        queue.put({**body, "id": "good"})
    first, second = stored(broker)
    assert first.id not in ("", "good")
    assert second.id == "good"


def test_of_a_task_with_headers_the_body_is_not_looked_at() -> None:
    headers = {"task": "pay", "id": "t"}
    message = {"content-type": "application/json", "headers": headers, "properties": {}, "body": object()}
    assert told_of(message) is headers
    assert protocol_1(message) is None
    due.run_now(message)


@pytest.mark.parametrize(
    "body",
    [{"task": ["pay"], "id": "t", "eta": None}, {"task": "pay", "eta": None}, [{"task": "pay", "id": "t", "eta": 1}]],
)
def test_what_is_no_task_keeps_an_id_of_relays(server: Server, broker: Broker, body: Any) -> None:
    with kombu.Connection(server.url) as connection, connection.SimpleQueue("celery") as queue:
        queue.put(body)
    (job,) = stored(broker)
    assert job.id != "t"
    assert broker.plugins.describe(job) is None


def test_of_a_task_that_is_pickled_nothing_is_read(app: Celery, broker: Broker) -> None:
    result = app.send_task("pay", [1], countdown=60, serializer="pickle")
    (job,) = stored(broker)
    assert job.id != result.id
    assert (job.state, broker.plugins.describe(job)) == ("ready", None)


def test_one_that_is_compressed_is_read(app: Celery, broker: Broker) -> None:
    result = app.send_task("pay", [1], countdown=60, compression="zlib", relay_dedup_key=True)
    (job,) = stored(broker)
    summary = broker.plugins.describe(job)
    assert summary is not None
    assert (job.id, job.state, summary.name) == (result.id, "delayed", "pay")
    app.send_task("pay", [1], relay_dedup_key=True)
    assert len(stored(broker)) == 1


def test_one_that_says_nowhere_to_reply_to_is_taken_for_no_reply(server: Server, broker: Broker) -> None:
    body = {"task": "pay", "id": "t", "args": [], "kwargs": {}, "eta": None}
    with kombu.Connection(server.url) as connection:
        kombu.Producer(connection.default_channel).publish(body, routing_key="undeclared", correlation_id="t")
    assert [job.id for job in stored(broker, "undeclared")] == ["t"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_publish_whose_answer_is_lost_is_stored_once(app: Celery, broker: Broker, times: int) -> None:
    app.send_task("warm-up", queue="other")
    with cut(store_of(app), times) as lost:
        result = app.send_task("pay", [1])
    assert lost == [0]
    assert [job.id for job in stored(broker)] == [result.id]


def test_the_tasks_of_a_group_are_stored_together_under_their_ids(
    app: Celery, server: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "SECONDS", 60.0)
    app.send_task("warm-up", queue="other")
    server.cli("CONFIG", "RESETSTAT")
    result = group(app.signature("pay", [n], countdown=60 * (n % 2)) for n in range(50)).apply_async()
    assert {job.id for job in stored(broker)} == {one.id for one in result.results}
    assert broker.stats("celery").delayed == 25
    calls = server.info("commandstats")["cmdstat_evalsha"]
    assert int(calls.split(",")[0].removeprefix("calls=")) < 10


def test_a_task_of_an_id_that_is_taken_is_stored_from_a_group_too(app: Celery, broker: Broker) -> None:
    app.send_task("pay", task_id="t")
    group(app.signature("pay", task_id="t"), app.signature("pay", task_id="u")).apply_async()
    assert {job.id for job in stored(broker)} == {"t", "t~1", "u"}


def test_a_key_for_dedup_is_made_of_its_name_and_arguments_as_of_protocol_2(
    app: Celery, server: Server, broker: Broker, tmp_path: Path
) -> None:
    first = app.send_task("pay", [1], {"a": 2}, relay_dedup_key=True)
    app.send_task("pay", [1], {"a": 2}, relay_dedup_key=True)
    other = app.send_task("pay", [2], {"a": 2}, relay_dedup_key=True)
    newer = app_of(server.url, tmp_path)
    newer.send_task("pay", [1], {"a": 2}, relay_dedup_key=True)
    assert {job.id for job in stored(broker)} == {first.id, other.id}
    with pytest.raises(InvalidArgument, match="serialize"):
        app.send_task("pay", [1], relay_dedup_key=True, serializer="pickle")
    newer.close()


def test_the_retry_of_a_task_is_no_duplicate_of_it(app: Celery, broker: Broker) -> None:
    keyed = {"relay_dedup_key": "k", "relay_dedup_for": 60}
    app.send_task("pay", [1], task_id="t", headers=keyed)
    app.send_task("pay", [1], task_id="t", headers=keyed, retries=1)
    assert {job.id for job in stored(broker)} == {"t", "t.1"}


def test_nor_is_one_whose_body_does_not_tell_that_it_is_a_retry(app: Celery, broker: Broker) -> None:
    keyed = {"relay_dedup_key": "k"}

    @app.task(name="runs", shared=False)
    def task() -> None: ...

    app.send_task("pay", [1], task_id="t", headers=keyed, serializer="pickle")
    _task_stack.push(task)
    task.push_request(id="t")
    try:
        app.send_task("pay", [1], task_id="t", headers=keyed, retries=1, serializer="pickle")
        app.send_task("pay", [1], task_id="u", headers=keyed, serializer="pickle")
    finally:
        task.pop_request()
        _task_stack.pop()
    assert len(stored(broker)) == 2


def test_an_eta_that_no_message_waits_for_is_refused_in_the_words_of_a_task(app: Celery) -> None:
    with pytest.raises(InvalidArgument, match=r"the eta of task 'pay' \(.*\) is 30\.0 years away"):
        app.send_task("pay", countdown=30 * 365 * 86_400)


# what relay's tools and its queues tell of it


def test_tools_read_its_name_arguments_retries_and_eta(app: Celery, server: Server, broker: Broker) -> None:
    result = app.send_task("pay", [1, "é\n"], {"a": None, "long": "x" * 5000}, countdown=60, retries=2)
    (job,) = stored(broker)
    summary = broker.plugins.describe(job)
    assert summary is not None
    assert (summary.name, summary.args, summary.retries) == ("pay", r"[1, 'é\n']", 2)
    assert summary.kwargs.startswith("{'a': None, 'long': 'xxx")
    assert len(summary.kwargs) == 1024
    assert summary.kwargs.endswith("...")
    assert summary.eta is not None
    assert dict(summary.extra) == {"id": result.id}
    cli = Cli(server.url)
    assert "pay" in cli.run("job", "ls", "--queue", "celery", "--state", "delayed").stdout
    told = cli.json("job", "show", job.id, "--queue", "celery")
    assert "[1, 'é\\n']" in json.dumps(told, ensure_ascii=False).replace("\\\\", "\\")


def test_a_dead_one_is_found_by_its_name(app: Celery, server: Server, broker: Broker) -> None:
    for name in ("pay", "mail"):
        app.send_task(name, task_id=name)
    for job in broker.claim("celery", 2):
        broker.nack(job, "no good", dead=True)
    cli = Cli(server.url)
    cli.run("dlq", "requeue", "--queue", "celery", "--task", "pay", "--yes")
    assert [job.id for job in broker.jobs("celery", "ready")] == ["pay"]
    assert [job.id for job in broker.jobs("celery", "dead")] == ["mail"]


def test_a_time_limit_of_its_queue_counts_from_when_it_is_due(app: Celery, server: Server, broker: Broker) -> None:
    with kombu.Connection(server.url) as connection:
        Queue("short", message_ttl=60)(connection.default_channel).declare()
        app.send_task("pay", countdown=100_000.1, queue=Queue("short", message_ttl=60))
        age_by(broker, "short", 100_000)  # since its publish its time is over
        advance(broker, 100_000, "short")
        message = None
        while message is None:
            message = connection.default_channel.basic_get("short", no_ack=True)
        assert message.payload["expires"] is None


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_one_whose_time_is_over_stays_for_the_worker_that_revokes_it(
    app: Celery, server: Server, broker: Broker, compression: str | None
) -> None:
    short = Queue("short", message_ttl=60)
    with kombu.Connection(server.url) as connection:
        channel = connection.default_channel
        short(channel).declare()
        app.send_task("pay", queue=short, compression=compression)
        age_by(broker, "short", 100_000)
        channel.sweep("short", channel.topology.terms("short"))
        assert broker.stats("short").ready == 1
        message = channel.basic_get("short", no_ack=True)
        assert message.payload["expires"].startswith("1970")


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_worker_whose_clock_is_late_does_not_hold_it_back(
    app: Celery, broker: Broker, compression: str | None
) -> None:
    app.send_task("pay", [1], countdown=3600, compression=compression)
    (job,) = stored(broker)
    message = unpack(job.payload)
    before = json.loads(body_of(message))
    due.run_now(message)
    after = json.loads(body_of(message))
    assert after.pop("eta") < before.pop("eta")
    assert after == before
    kept = dict(message)
    due.run_now(message)
    assert message == kept


# with workers


class Site:
    """Two workers: one retries by protocol 2, as Celery does unless it is told otherwise, the other by protocol 1."""

    def __init__(self, server: Server, folder: Path, stack: ExitStack) -> None:
        self.server, self.folder = server, folder
        self.broker = stack.enter_context(Broker(server.url))
        results = results_of(server)
        options = {"client_name": f"protocol-1-{uuid.uuid4().hex}"}
        self.app: Celery = client_of(server.url, folder, results, task_protocol=1, broker_transport_options=options)
        stack.callback(self.app.close)
        for number in (1, 2):
            stack.enter_context(
                CeleryWorker(
                    server.url, folder, "-P", "prefork", "-c", "1", "-Q", f"by-{number}",
                    "--include", "tests.celery_note_revoked", name=f"by-{number}", results=results,
                    conf={"task_protocol": number}, options={"max_deliveries": 2, "lease": 2.0},
                )
            )  # fmt: skip

    def send(self, name: str, *args: Any, by: int, **options: Any) -> Any:
        return self.app.send_task(f"tests.celery_app.{name}", args, queue=f"by-{by}", **options)

    def ask(self, by: int, what: str, *args: Any) -> Any:
        to = f"by-{by}@{gethostname()}"
        return getattr(self.app.control.inspect([to], timeout=20, limit=1), what)(*args)[to]

    def revoke(self, by: int, *ids: str) -> None:
        to = [f"by-{by}@{gethostname()}"]
        assert self.app.control.revoke(list(ids), reply=True, destination=to, timeout=20, limit=1)

    def emptied(self, by: int) -> None:
        eventually(lambda: not self.broker.stats(f"by-{by}").pending, "the queue to be empty")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Server("redis", tcp=True) as server, ExitStack() as stack:
        yield Site(server, tmp_path_factory.mktemp("protocol-1"), stack)


def test_a_revoke_finds_it_in_the_store_delayed_or_ready(site: Site) -> None:
    site.broker.pause("by-2")
    gone = [site.send("run", "gone", by=2, countdown=3600), site.send("run", "gone", by=2)]
    kept = site.send("run", "kept", by=2, countdown=3600)
    again = site.send("run", "gone", by=2, countdown=3600, task_id=gone[0].id, retries=1)
    site.revoke(2, *[result.id for result in gone])
    assert [job.id for job in stored(site.broker, "by-2")] == [kept.id]
    assert again.id == gone[0].id
    eventually(lambda: {result.state for result in gone} == {"REVOKED"}, "the results to say so")
    for result in gone:
        eventually(lambda id=result.id: lines(site.folder, "revoked", id), "the signal")
    assert site.broker.cancel("by-2", kept.id) == "delayed"
    site.broker.resume("by-2")
    assert lines(site.folder, start="gone") == []


def test_the_chord_of_one_that_is_revoked_hears_of_it(site: Site) -> None:
    run = site.app.signature("tests.celery_app.run", args=("in",)).set(queue="by-2")
    gone = site.app.signature("tests.celery_app.run", args=("out",)).set(queue="by-2", countdown=3600)
    mourned = site.app.signature("tests.celery_app.mourn").set(queue="by-2")
    result = chord([run, gone])(site.app.signature("tests.celery_app.count").set(queue="by-2").on_error(mourned))
    site.revoke(2, result.parent.results[1].id)
    with pytest.raises((ChordError, TaskRevokedError)):
        result.get(timeout=20)
    eventually(lambda: lines(site.folder, "mourned", result.id), "the error link of its body")
    site.emptied(2)


def test_inspect_tells_of_what_waits(site: Site) -> None:
    result = site.send("run", "listed", by=2, countdown=3600, kwargs={"a": [1]})
    (listed,) = site.ask(2, "scheduled")
    assert listed["eta"] is not None
    request = listed["request"]
    assert (request["id"], request["name"]) == (result.id, "tests.celery_app.run")
    assert (request["args"], request["kwargs"]) == (["listed"], {"a": [1]})
    assert site.ask(2, "query_task", result.id, "nobody") == {result.id: ["scheduled", request]}
    assert site.broker.cancel("by-2", result.id) == "delayed"


@pytest.mark.parametrize("by", [1, 2])
@pytest.mark.parametrize("header", [{}, {"relay_dedup_key": "k"}])
def test_a_retry_that_is_acked_late_is_the_same_job(site: Site, by: int, header: dict[str, str]) -> None:
    queue, key = f"by-{by}", f"late-{by}-{len(header)}"
    before = site.broker.stats(queue).counters.get("enqueued", 0)
    result = site.send("again_late", key, 3, by=by, headers=header)
    assert result.get(timeout=20) == key
    site.emptied(by)
    assert site.broker.stats(queue).counters["enqueued"] - before == 1
    assert lines(site.folder, start=f"{key} ") == [f"{key} {result.id} {n}" for n in range(4)]
    assert lines(site.folder, "redelivered", key) == []


@pytest.mark.parametrize("by", [1, 2])
def test_a_retry_that_is_acked_early_keeps_its_id(site: Site, by: int) -> None:
    key = f"early-{by}"
    result = site.send("again_early", key, 2, by=by, headers={"relay_dedup_key": key, "relay_dedup_for": 60})
    assert result.get(timeout=20) == key
    site.emptied(by)
    assert lines(site.folder, start=f"{key} ") == [f"{key} {result.id} {n}" for n in range(3)]


@pytest.mark.parametrize("by", [1, 2])
def test_a_retry_that_waits_is_revoked(site: Site, by: int) -> None:
    result = site.send("wait_again", f"wait-{by}", by=by)
    # that it waits is told after it does, and would be told over the revoke
    eventually(lambda: result.state == "RETRY", "the retry to wait")
    (job,) = stored(site.broker, f"by-{by}")
    assert job.id == f"{result.id}.1"
    site.revoke(by, result.id)
    assert stored(site.broker, f"by-{by}") == []
    eventually(lambda: result.state == "REVOKED", "the result to say so")


def test_one_that_expires_while_it_waits_is_revoked_then(site: Site) -> None:
    result = site.send("run", "expired", by=2, countdown=3600, expires=0.5)
    eventually(lambda: result.state == "REVOKED", "the result to be REVOKED")
    site.emptied(2)
    assert lines(site.folder, start="expired") == []


def test_one_that_kills_its_child_goes_to_dead_by_its_name_and_its_result_is_a_failure(site: Site) -> None:
    link = site.app.signature("tests.celery_app.mourn").set(queue="by-2")
    result = site.send("kill_child", "poison", by=2, link_error=link)
    eventually(lambda: result.state == "FAILURE", "the result to say so")
    assert "delivered 2 times" in str(result.result)
    assert len(lines(site.folder, start="poison ")) == 2
    eventually(lambda: lines(site.folder, "mourned", result.id), "the error link")
    (job,) = site.broker.jobs("by-2", "dead")
    assert job.id == result.id
    assert "tests.celery_app.kill_child" in Cli(site.server.url).run("dlq", "ls", "--queue", "by-2").stdout
