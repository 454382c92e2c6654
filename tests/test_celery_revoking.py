"""A task that is revoked while it waits in the store: all are told whom Celery tells of one that it drops itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import kombu
import pytest
from celery import Celery, chord
from celery.backends.base import Backend
from celery.events.state import State
from celery.exceptions import ChordError, TaskRevokedError
from celery.utils.nodenames import gethostname

from relay_adapters.celery.workers.revoking import Revoker
from relay_core import Broker
from relay_core.commands.enqueues import LARGE
from tests.celery_workers import CeleryWorker, client_of, lines, results_of
from tests.servers import Server, eventually

FLAGS = ("-P", "solo", "--include", "tests.celery_note_revoked", "-E")


class Site:
    """A worker with a result backend, and one without."""

    def __init__(self, server: Server, folder: Path, stack: ExitStack) -> None:
        self.server, self.folder, self.broker = server, folder, stack.enter_context(Broker(server.url))
        results = results_of(server)
        self.app: Celery = client_of(server.url, folder, results, result_extended=True)
        stack.callback(self.app.close)
        both = [
            CeleryWorker(server.url, folder, *FLAGS, name="some", results=results, conf={"result_extended": True},
                         ready=False),
            CeleryWorker(server.url, folder, *FLAGS, "-Q", "none", name="none", ready=False),
            CeleryWorker(server.url, folder, *FLAGS, "-Q", "rpc", name="rpc", results="rpc://", ready=False),
        ]  # fmt: skip
        for worker in both:
            stack.enter_context(worker)
            worker.ready()

    def revoke(self, worker: str, *ids: str) -> Any:
        to = f"{worker}@{gethostname()}"
        (said,) = self.app.control.revoke(list(ids), reply=True, destination=[to], timeout=20, limit=1)
        return said[to]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Server("redis", tcp=True) as server, ExitStack() as stack:
        yield Site(server, tmp_path_factory.mktemp("revoking"), stack)


def test_its_signal_its_event_its_result_and_its_chord_say_so(site: Site) -> None:
    run = site.app.signature("tests.celery_app.run", args=("kept",))
    gone = site.app.signature("tests.celery_app.run", args=("gone",)).set(countdown=3600)
    body = site.app.signature("tests.celery_app.count").on_error(site.app.signature("tests.celery_app.mourn"))
    events: list[dict[str, Any]] = []
    with site.app.connection_for_read() as connection:
        receiver = site.app.events.Receiver(connection, handlers={"task-revoked": events.append})
        with kombu.Consumer(connection, [receiver.queue], callbacks=[receiver._receive], no_ack=True):
            result = chord([run, gone])(body)
            member = result.parent.results[1]
            assert "ok" in site.revoke("some", member.id)
            while not events:
                connection.drain_events(timeout=20)
    state = State()
    state.event(events[0])
    shown = state.tasks[member.id]
    assert (shown.name, shown.args, shown.state) == ("tests.celery_app.run", "('gone',)", "REVOKED")
    assert shown.eta
    assert (events[0]["uuid"], events[0]["terminated"], events[0]["expired"]) == (member.id, False, False)
    eventually(lambda: lines(site.folder, "revoked", member.id), "the signal")
    eventually(lambda: member.state == "REVOKED", "its result")
    assert (member.name, member.args, member.worker) == ("tests.celery_app.run", ["gone"], f"some@{gethostname()}")
    with pytest.raises((ChordError, TaskRevokedError)):
        result.get(timeout=20)


def test_without_a_result_backend_all_that_are_named_are_taken_out(site: Site) -> None:
    names = ["x", "y", "z" * 2 * LARGE]
    ids = [site.app.send_task("tests.celery_app.run", [name], countdown=3600, queue="none").id for name in names]
    assert "ok" in site.revoke("none", *ids)
    assert site.broker.stats("none").delayed == 0
    eventually(lambda: all(lines(site.folder, "revoked", id) for id in ids), "the signals")


def test_the_signal_tells_of_its_delivery_what_it_does_where_celery_drops_a_task(site: Site) -> None:
    id = site.app.send_task("tests.celery_app.run", ["x"], countdown=3600, queue="none", priority=3).id
    assert "ok" in site.revoke("none", id)
    eventually(lambda: lines(site.folder, "revoked-of", id), "the signal")
    (line,) = lines(site.folder, "revoked-of", id)
    told = json.loads(line.partition(" ")[2])
    assert told == {"exchange": "", "routing_key": "none", "priority": 3, "redelivered": False}


def test_stamps_are_named_by_texts_on_the_command_line(site: Site) -> None:
    ids = []
    for customer in ("six", "seven"):
        task = site.app.signature("tests.celery_app.run", args=("x",)).set(countdown=3600, queue="none")
        task.stamp(customer=customer)
        ids.append(task.apply_async().id)
    to = {"destination": [f"none@{gethostname()}"], "reply": True, "timeout": 20, "limit": 1}
    assert site.app.control.broadcast("revoke_by_stamped_headers", {"headers": ["customer=seven"]}, **to)
    eventually(lambda: site.broker.stats("none").delayed == 1, "the one that bears it to be cancelled")
    assert site.broker.cancel_many("none", ids) == ["delayed", None]


def test_who_asked_for_its_result_by_rpc_is_answered(site: Site) -> None:
    app = Celery("tests.celery_app", broker=site.server.url, backend="rpc://", set_as_current=False)
    results = [app.send_task("tests.celery_app.run", ["x"], countdown=3600, queue="rpc") for _ in range(2)]
    assert "ok" in site.revoke("rpc", *[result.id for result in results])
    for result in results:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=20)
    app.close()


def test_whatever_has_become_of_a_task_its_revoke_finds_it(broker: Broker, server: Server, tmp_path: Path) -> None:
    """Its retries, what replaced it and the retries of that, and other tasks of its id."""
    became: list[dict[str, int]] = [{}] * 10
    became += [{"retries": n} for n in (1, 2, 100)] + [{"replaced_task_nesting": n} for n in (1, 2, 20)]
    became += [{"replaced_task_nesting": n, "retries": m} for n, m in ((1, 1), (1, 10), (20, 1), (20, 10))]
    with client_of(server.url, tmp_path) as app:
        for options in became:
            app.send_task("unknown", task_id="t", countdown=3600, **options)
        app.send_task("unknown", task_id="other", countdown=3600)
        assert broker.stats("celery").delayed == len(became) + 1
        Revoker(app, broker, ["celery"], None, "me").by_ids(["t"])
    assert [job.id for job in broker.jobs("celery", "delayed")] == ["other"]


def test_a_task_that_is_not_there_costs_no_search_of_a_long_queue(
    broker: Broker, server: Server, tmp_path: Path
) -> None:
    app = client_of(server.url, tmp_path)
    app.send_task("waits")
    server.cli("CONFIG", "RESETSTAT")
    Revoker(app, broker, ["celery"], None, "me").by_ids(["nobody"])
    assert not {"cmdstat_lpos", "cmdstat_lrem", "cmdstat_lrange"} & set(server.info("commandstats"))
    app.close()


def test_a_backend_that_fails_keeps_no_other_from_being_revoked(
    broker: Broker, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = client_of(server.url, tmp_path)
    monkeypatch.setattr(type(app.backend), "mark_as_revoked", Mock(side_effect=RuntimeError("it is full")))
    ids = [app.send_task("unknown", countdown=3600).id for _ in range(3)]
    Revoker(app, broker, ["celery"], None, "me").by_ids(ids)
    assert broker.stats("celery").delayed == 0
    eventually(lambda: caplog.text.count("it is full") == 3, "its error to be logged")
    app.close()


def test_of_a_task_that_runs_nobody_is_told_that_it_is_revoked(broker: Broker, server: Server, tmp_path: Path) -> None:
    app, events = client_of(server.url, tmp_path), Mock(enabled=True)
    runs, waits = app.send_task("unknown").id, app.send_task("unknown", countdown=3600).id
    (job,) = broker.claim("celery")
    Revoker(app, broker, ["celery"], events, "me").by_ids([runs, waits])
    assert [call.kwargs["uuid"] for call in events.send.call_args_list] == [waits]
    broker.ack(job)
    app.close()


def test_one_that_cannot_be_read_keeps_no_other_from_being_revoked(
    broker: Broker, server: Server, tmp_path: Path
) -> None:
    app, events = client_of(server.url, tmp_path), Mock(enabled=True)
    ids = [broker.enqueue("celery", b"{broken", id="odd").id, app.send_task("unknown").id]
    Revoker(app, broker, ["celery"], events, "me").by_ids(ids)
    assert broker.stats("celery").ready == 0
    assert [call.kwargs["uuid"] for call in events.send.call_args_list] == ids[1:]
    app.close()


class Plain(Backend):
    """Stores whatever it is told over what it has, as those do that keep results in a database."""

    def __init__(self, app: Celery) -> None:
        super().__init__(app)
        self.states: dict[str, str] = {}

    def _store_result(self, task_id: str, result: Any, state: str, *_args: Any, **_options: Any) -> Any:
        self.states[task_id] = state
        return result

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        return {"status": self.states.get(task_id, "PENDING"), "result": None}


@pytest.mark.parametrize(
    ("had", "has"), [("RETRY", "REVOKED"), ("STARTED", "STARTED"), ("SUCCESS", "SUCCESS"), ("FAILURE", "FAILURE")]
)
def test_a_next_try_that_another_worker_has_run_by_then_keeps_its_result(
    broker: Broker, server: Server, tmp_path: Path, had: str, has: str
) -> None:
    """That one was not told of the revoke yet, and nothing waits that could be taken out."""
    with client_of(server.url, tmp_path) as app:
        backend = Plain(app)
        backend.store_result("t", None, had)
        request = Mock(id="t", store_errors=True, request_dict={"id": "t"}, task=Mock(backend=backend))
        Revoker(app, broker, ["celery"], None, "me").next_try(request)
    assert backend.states == {"t": has}


class Told(Backend):
    """Is told of results, and asked for none: by a webhook, say."""

    def __init__(self, app: Celery) -> None:
        super().__init__(app)
        self.states: list[str] = []

    def _store_result(self, _task_id: str, result: Any, state: str, *_args: Any, **_options: Any) -> Any:
        self.states.append(state)
        return result


def test_a_backend_that_cannot_be_asked_is_told_that_the_next_try_is_revoked(
    broker: Broker, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as Celery's own where there is none, which makes nothing of it."""
    with client_of(server.url, tmp_path) as app:
        told = Told(app)
        for backend in (told, app.backend):
            request = Mock(id="t", store_errors=True, request_dict={"id": "t"}, task=Mock(backend=backend))
            Revoker(app, broker, ["celery"], None, "me").next_try(request)
    assert told.states == ["REVOKED"]
    assert "cannot be told" not in caplog.text


def test_a_store_that_is_away_fails_no_revoke(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The worker has it in its memory all the same."""
    nowhere = f"relay+unix://{tmp_path}/nobody"
    with Broker(nowhere, retry_for=0.1) as broker, client_of(nowhere, tmp_path) as app:
        Revoker(app, broker, ["celery"], None, "me").by_ids(["t"])
    assert "tasks that wait in the store could not be revoked there" in caplog.text
