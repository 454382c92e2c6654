"""Existing tasks under real `celery worker` processes, in every pool. The workers are shared by all tests here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, group
from celery.result import AsyncResult

from relay_core import Broker
from relay_core.commands.enqueues import LARGE
from relay_core.testing import advance
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines, results_of
from tests.servers import Server, eventually

OPTIONS = {"lease": 3.0, "max_deliveries": 2, "retry": {"base": 0.1, "factor": 1.0, "max_retries": 2, "jitter": False}}
SETTINGS: Mapping[str, Any] = {"options": OPTIONS, "conf": {"result_extended": True}}


class Site:
    """One server and a worker per pool, each with a queue that is named as its pool."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.broker = Broker(server.url)
        self.results = results_of(server)
        self.app = client_of(server.url, folder, self.results)
        self.workers = {
            pool: CeleryWorker(
                server.url, folder, *flags, "-Q", pool, name=pool, results=self.results, **SETTINGS, ready=False
            )
            for pool, flags in POOLS.items()
        }
        for worker in self.workers.values():
            worker.ready()

    def task(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.signature(f"tests.celery_app.{name}", args=args, options=options)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.kill()
        self.app.close()
        self.broker.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Server("redis") as server:
        site = Site(server, tmp_path_factory.mktemp("celery"))
        yield site
        site.close()


Send = Callable[..., AsyncResult]


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def send(site: Site, pool: str) -> Send:
    """Send a task of the app to the worker of the pool: `send(name, *args, **options)`."""
    return lambda name, *args, **options: site.task(name, *args, queue=pool, **options).apply_async()


def outcome(result: AsyncResult) -> Any:
    """What a task returned or raised, by asking: a listening backend would outlive its server."""
    eventually(result.ready, f"the result of {result.id}")
    return result.result


def state_of(result: AsyncResult) -> Any:
    """What its backend says now, and of which task: the result itself keeps what it once said."""
    meta = result.backend.get_task_meta(result.id)
    return meta["status"], meta.get("name")


def ended(site: Site, pool: str) -> None:
    """Until nothing is left in the pool's queue but what is dead."""

    def empty() -> bool:
        stats = site.broker.stats(pool)
        return stats.ready + stats.delayed + stats.inflight == 0

    eventually(empty, f"the queue {pool} to be empty")


def test_tasks_of_a_group_and_their_chord_run_once_each(site: Site, pool: str) -> None:
    keys = [f"group-{pool}-{n}" for n in range(29)] + [f"group-{pool}-large".ljust(2 * LARGE, "-")]
    header = group(site.task("run", key, queue=pool) for key in keys)
    assert outcome(chord(header, site.task("count", queue=pool))()) == 30
    ended(site, pool)
    assert len(lines(site.folder, start=f"group-{pool}-")) == 30


def test_a_task_with_a_countdown_waits_in_the_store_and_is_not_early(site: Site, pool: str, send: Send) -> None:
    sent = time.time()
    result = send("run", f"eta-{pool}", countdown=1.5)
    stats = site.broker.stats(pool)
    assert (stats.delayed, stats.ready + stats.inflight) == (1, 0)
    outcome(result)
    (line,) = lines(site.folder, start=f"eta-{pool} ")
    assert sent + 1.5 <= float(line.split()[1]) + 0.001


def test_a_retried_task_that_is_acked_late_is_one_job_throughout(site: Site, pool: str, send: Send) -> None:
    before = site.broker.stats(pool).counters
    result = send("again_late", f"again-{pool}", 3)
    assert outcome(result) == f"again-{pool}"
    ended(site, pool)
    after = site.broker.stats(pool).counters
    assert after["enqueued"] - before.get("enqueued", 0) == 1
    assert lines(site.folder, start=f"again-{pool} ") == [f"again-{pool} {result.id} {n}" for n in range(4)]
    assert lines(site.folder, "redelivered", f"again-{pool}") == [], "a retry is a message of its own"
    assert not site.workers[pool].logged(f"{result.id} of queue {pool!r}: its ack came too late")


def test_a_task_that_retries_and_ends_well_is_not_warned_of(site: Site, pool: str, send: Send) -> None:
    result = send("again_quietly", f"quiet-{pool}")
    eventually(lambda: len(lines(site.folder, start=f"quiet-{pool}")) == 2, "both runs")
    ended(site, pool)
    assert not site.workers[pool].logged(f"{result.id} of queue {pool!r}: its ack came too late")


def test_a_retried_task_that_is_acked_early_keeps_its_id(site: Site, pool: str, send: Send) -> None:
    result = send("again_early", f"early-{pool}", 2)
    assert outcome(result) == f"early-{pool}"
    assert lines(site.folder, start=f"early-{pool} ") == [f"early-{pool} {result.id} {n}" for n in range(3)]
    ended(site, pool)


def test_a_reject_with_requeue_runs_the_task_again(site: Site, pool: str, send: Send) -> None:
    assert outcome(send("refuse", f"requeue-{pool}", True)) == f"requeue-{pool}"
    ended(site, pool)
    assert len(lines(site.folder, start=f"requeue-{pool}")) == 2


def test_a_reject_without_requeue_goes_to_dead_with_its_reason(site: Site, pool: str, send: Send) -> None:
    result = send("refuse", f"drop-{pool}", False)
    ended(site, pool)
    job = site.broker.show(pool, result.id)
    assert job is not None
    assert (job.state, job.reason, job.error) == ("dead", "rejected", f"no use for drop-{pool}")


def test_a_failure_that_is_not_acked_follows_relays_retries_then_goes_to_dead(
    site: Site, pool: str, send: Send
) -> None:
    result = send("fail", f"fail-{pool}")
    ended(site, pool)
    job = site.broker.show(pool, result.id)
    assert job is not None
    assert (job.state, job.reason) == ("dead", "max_retries")
    assert f"fail-{pool} is wrong" in (job.error or "")
    assert len(lines(site.folder, start=f"fail-{pool}")) == 3


def test_revoking_a_task_that_waits_in_the_store_cancels_it_there(site: Site, pool: str, send: Send) -> None:
    kept, revoked = send("run", f"kept-{pool}", countdown=3600), send("run", f"revoked-{pool}", countdown=3600)
    site.app.control.revoke(revoked.id)
    eventually(lambda: site.broker.show(pool, revoked.id) is None, "the job to be cancelled")
    eventually(lambda: revoked.state == "REVOKED", "the result to say so")
    assert site.broker.cancel(pool, kept.id) == "delayed"
    ended(site, pool)


def test_revoking_by_stamps_cancels_what_waits_in_the_store_and_bears_them(site: Site, pool: str, send: Send) -> None:
    """More tasks than one page of the search; delayed and ready ones; stamped so, with more, otherwise, not at all."""

    def stamped(key: str, value: object, **options: Any) -> AsyncResult:
        task = site.task("run", key, queue=pool)
        task.stamp(customer=value)
        return task.apply_async(**options)

    site.broker.pause(pool)
    others = [send("run", f"other-{pool}-{n}", countdown=3600) for n in range(210)]
    kept = [stamped(f"kept-{pool}", "one", countdown=3600), *others]
    gone = [
        stamped(f"gone-{pool}-0", "seven", countdown=3600),
        stamped(f"gone-{pool}-1", ["six", "seven"], countdown=7200),
        stamped(f"gone-{pool}-2", "seven"),
    ]
    site.app.control.revoke_by_stamped_headers({"customer": ["seven", "eight"]}, destination=[f"{pool}@{_host()}"])
    eventually(
        lambda: site.broker.show(pool, gone[2].id) is None, "the ready one, which is sought last, to be cancelled"
    )
    assert [site.broker.show(pool, result.id) for result in gone] == [None] * 3
    eventually(lambda: {result.state for result in gone} == {"REVOKED"}, "the results to say so")
    assert site.broker.cancel_many(pool, [result.id for result in kept]) == ["delayed"] * len(kept)
    site.broker.resume(pool)
    ended(site, pool)


@pytest.mark.parametrize("ack", ["early", "late"])
def test_a_task_that_is_revoked_as_its_next_try_was_sent_says_so_and_not_that_it_is_tried_again(
    site: Site, pool: str, ack: str, send: Send
) -> None:
    """Celery stores RETRY once the next try is sent, which a revoke may have found by then."""
    key, gone = f"meanwhile-{pool}-{ack}", ("REVOKED", f"tests.celery_app.again_meanwhile_{ack}")
    result = send(f"again_meanwhile_{ack}", key)
    (site.folder / f"{key}-send").touch()
    eventually(lambda: site.broker.stats(pool).delayed == 1, "its next try")
    # Celery 5.7's workers that do not know the task would store the same, without its name
    site.app.control.revoke(result.id, destination=[f"{pool}@{_host()}"])
    if pool != "solo":  # which hears of nothing while a task runs
        eventually(lambda: site.broker.stats(pool).delayed == 0, "it to be taken out")
        eventually(lambda: state_of(result) == gone, "its result to say so")
    (site.folder / f"{key}-end").touch()
    eventually(lambda: site.workers[pool].logged(f"[{result.id}] retry:"), "what Celery stores then")
    eventually(lambda: state_of(result) == gone, "its result to say so again")
    ended(site, pool)


@pytest.mark.parametrize("ack", ["early", "late"])
@pytest.mark.parametrize("by", ["id", "stamp"])
def test_a_task_that_is_revoked_while_it_runs_waits_for_no_next_try(site: Site, pool: str, by: str, ack: str) -> None:
    key = f"no-next-{pool}-{by}-{ack}"
    task = site.task(f"again_meanwhile_{ack}", key, queue=pool)
    task.stamp(customer=key)
    result = task.apply_async()
    eventually(lambda: key in lines(site.folder, "started"), "it to run")
    to = {"destination": [f"{pool}@{_host()}"]}
    if by == "id":
        site.app.control.revoke(result.id, **to)
    else:
        site.app.control.revoke_by_stamped_headers({"customer": key}, **to)
    if pool != "solo":
        site.app.control.inspect(**to, timeout=10, limit=1).ping()
    for step in ("send", "end"):
        (site.folder / f"{key}-{step}").touch()
    ended(site, pool)
    eventually(lambda: result.state == "REVOKED", "its result to say so")


def test_inspect_tells_of_what_waits_in_the_store(site: Site, pool: str, send: Send) -> None:
    result = send("run", f"listed-{pool}", countdown=3600)
    answer = site.app.control.inspect([f"{pool}@{_host()}"], timeout=10, limit=1).scheduled()
    assert [task["request"]["id"] for task in next(iter(answer.values()))] == [result.id]
    asked = [result.id, "no such task"]
    (answer,) = site.app.control.inspect([f"{pool}@{_host()}"], timeout=10, limit=1).query_task(*asked).values()
    assert {id: (state, request["name"]) for id, (state, request) in answer.items()} == {
        result.id: ("scheduled", "tests.celery_app.run")
    }
    site.broker.cancel(pool, result.id)


def test_a_task_that_expires_while_it_waits_is_revoked_then(site: Site, pool: str, send: Send) -> None:
    result = send("run", f"expired-{pool}", countdown=3600, expires=0.5)
    eventually(lambda: result.state == "REVOKED", "the result to be REVOKED")
    ended(site, pool)
    assert lines(site.folder, start=f"expired-{pool}") == []


def test_a_message_that_expired_before_a_worker_had_it_is_not_run(site: Site, pool: str, send: Send) -> None:
    site.broker.pause(pool)
    result = send("run", f"stale-{pool}", expires=0.3)
    time.sleep(0.4)
    site.broker.resume(pool)
    eventually(lambda: result.state == "REVOKED", "the result to be REVOKED")
    ended(site, pool)
    assert lines(site.folder, start=f"stale-{pool}") == []


def test_a_task_that_kills_its_child_is_bounded_and_its_result_is_a_failure(site: Site) -> None:
    header = [site.task("kill_child", "poison", queue="prefork"), site.task("add", 1, 1, queue="prefork")]
    mourned = site.task("mourn", queue="solo")
    body = site.task("count", queue="prefork").on_error(mourned)
    result = chord(header)(body)
    assert "delivered 2 times" in str(outcome(result))
    ended(site, "prefork")
    poison = result.parent.results[0]
    assert poison.state == "FAILURE"
    assert "delivered 2 times" in str(poison.result)
    assert len(lines(site.folder, start="poison ")) == 2
    assert lines(site.folder, "mourned")
    job = site.broker.show("prefork", poison.id)
    assert job is not None
    assert (job.state, job.reason) == ("dead", "max_deliveries")


def test_a_task_that_killed_its_workers_is_buried_by_the_next_one_and_its_result_is_a_failure(site: Site) -> None:
    """Two deliveries without an answer, as of workers that died; the bound is two."""
    result = site.task("add", 1, 1, queue="orphans", link_error=site.task("mourn", queue="solo")).apply_async()
    with Broker(site.server.url, lease=0.1) as dying:
        for _ in range(2):
            eventually(lambda: dying.claim("orphans"), "the task to be there again")
    site.app.control.add_consumer("orphans", destination=[f"gevent@{_host()}"])
    assert "delivered 2 times" in str(outcome(result))
    eventually(lambda: any(line.startswith(result.id) for line in lines(site.folder, "mourned")), "the error link")
    job = site.broker.show("orphans", result.id)
    assert job is not None
    assert (job.state, job.reason) == ("dead", "max_deliveries")


def test_a_task_that_was_buried_by_a_worker_that_died_at_once_has_a_failure_as_its_result(site: Site) -> None:
    """As the killed worker of the last delivery, and then that of the one who found it."""
    result = site.task("add", 1, 1, queue="graves", link_error=site.task("mourn", queue="solo")).apply_async()
    with Broker(site.server.url, max_deliveries=1) as dying:
        assert dying.claim("graves")
        advance(dying, 60, "graves")
        assert dying.claim("graves") == []
        advance(dying, 60, "graves")
        assert dying.stats("graves").dead == 1
    assert result.state == "PENDING"
    site.app.control.add_consumer("graves", destination=[f"gevent@{_host()}"])
    assert "delivered 1 times" in str(outcome(result))
    eventually(lambda: any(line.startswith(result.id) for line in lines(site.folder, "mourned")), "the error link")
    eventually(
        lambda: not site.broker.store.raw("ZCARD", site.broker.settings.keys("graves").untold), "no note is left"
    )


def _host() -> str:
    from celery.utils.nodenames import gethostname

    return str(gethostname())


def test_an_app_of_another_broker_in_the_same_process_is_left_alone(site: Site, tmp_path: Path) -> None:
    other = client_of(site.server.url, tmp_path, site.results, broker_transport_options={"prefix": "other"})
    site.task("run", "mine", queue="solo").apply_async()
    other.send_task("tests.celery_app.run", ["theirs"], queue="solo")
    ended(site, "solo")
    with Broker(site.server.url, prefix="other") as apart:
        assert apart.stats("solo").ready == 1
    assert isinstance(other, Celery)
    assert lines(site.folder, start="theirs") == []
