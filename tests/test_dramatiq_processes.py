"""RelayBroker under Dramatiq's own command line, its processes killed in the middle of their work.

Each test starts whole processes, so it runs on one of the two server programs; the others run on both.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.dramatiq_workers import Workers, lines
from tests.servers import Flavour, Server, eventually, free_port, seconds_until

pytestmark = pytest.mark.slow


def application(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The application, as a process that sends imports it."""
    monkeypatch.setenv("APP_URL", server.url)
    monkeypatch.setenv("APP_FOLDER", str(folder))
    sys.modules.pop("tests.dramatiq_app", None)
    return importlib.import_module("tests.dramatiq_app")


@pytest.fixture
def app(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = application(server, tmp_path, monkeypatch)
    yield module
    module.broker.close()


def booted(workers: Workers, count: int = 1) -> None:
    eventually(lambda: lines(workers.folder, "boots").count(workers.name) >= count, f"boot of {workers.name}")


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_two_processes_of_four_threads_run_every_message_once(app: ModuleType, server: Server, tmp_path: Path) -> None:
    for x in range(300):
        app.work.send(x)
    with Workers(server, tmp_path, processes=2, threads=4) as workers:
        app.broker.join("default", timeout=30_000)
        assert workers.stop() == 0
    ran = Counter(line.split()[0] for line in lines(tmp_path))
    assert ran == Counter(str(x) for x in range(300))
    assert app.broker.core.audit("default", repair=False).clean


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_what_a_killed_worker_held_runs_elsewhere_within_a_lease_and_a_second(
    app: ModuleType, server: Server, tmp_path: Path
) -> None:
    for x in range(8):
        app.hang.send(x)
    with Workers(server, tmp_path, threads=4, name="victim") as victim:
        eventually(lambda: len(lines(tmp_path, "starts")) == 4, "four of them run")
        eventually(lambda: app.broker.core.stats("default").inflight == 8, "and four are prefetched")
        with Workers(server, tmp_path, threads=4, name="standing") as standing:
            booted(standing)
            time.sleep(1.5 * app.LEASE)  # the victim's heartbeats count, not the age of its claims
            assert lines(tmp_path) == []
            victim.kill()
            assert seconds_until(lambda: len(lines(tmp_path)) == 8, "all run elsewhere") < app.LEASE + 1.0
            app.broker.join("default", timeout=30_000)
            assert standing.stop() == 0
    assert Counter(lines(tmp_path)) == Counter(f"{x} standing" for x in range(8))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_signal_in_mid_load_loses_nothing_and_repeats_nothing(
    app: ModuleType, server: Server, tmp_path: Path, how: signal.Signals
) -> None:
    for x in range(200):
        app.work.send(x, 0.02)
    with Workers(server, tmp_path, processes=2, threads=2, name="first") as first:
        eventually(lambda: len(lines(tmp_path)) > 20, "some ran")
        first.send(how)
        if how == signal.SIGTERM:
            assert first.process.wait(30) == 0
            assert len(lines(tmp_path)) < 200
            assert app.broker.core.stats("default").inflight == 0, "a stopped worker held something back"
            with Workers(server, tmp_path, processes=2, threads=2, name="second"):
                app.broker.join("default", timeout=30_000)
        else:
            app.broker.join("default", timeout=30_000)
    assert Counter(line.split()[0] for line in lines(tmp_path)) == Counter(str(x) for x in range(200))


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_workers_killed_again_and_again_lose_no_message(app: ModuleType, server: Server, tmp_path: Path) -> None:
    for x in range(120):
        app.work.send(x, 0.02)
    for round_ in range(2):
        with Workers(server, tmp_path, processes=2, threads=2, name=f"killed{round_}") as workers:
            enough = len(lines(tmp_path)) + 15
            eventually(lambda enough=enough: len(lines(tmp_path)) > enough, "some ran")  # type: ignore[misc]
            workers.kill()
    with Workers(server, tmp_path, processes=2, threads=4, name="last"):
        app.broker.join("default", timeout=30_000)
    ran = {line.split()[0] for line in lines(tmp_path)}
    # what was in a killed worker's hands both times has used up its two deliveries
    dead = {app.dramatiq.Message.decode(job.payload).args[0] for job in app.broker.core.dead("default")}
    assert {int(x) for x in ran} | dead == set(range(120))
    assert len(lines(tmp_path, "nacks")) == len(dead)
    assert app.broker.core.audit("default", repair=False).clean


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_message_that_kills_its_workers_ends_in_dead_and_tells_the_middleware(
    app: ModuleType, server: Server, tmp_path: Path
) -> None:
    app.deadly.send()
    for name in ("one", "two"):
        app.broker.core.pause("default")  # Dramatiq's master waits for ever for a process that dies while it boots
        with Workers(server, tmp_path, threads=1, name=name) as workers:
            eventually(lambda workers=workers: "ready for action" in workers.log.read_text(), "the process to be up")
            app.broker.core.resume("default")
            assert workers.process.wait(30) != 0
    with Workers(server, tmp_path, threads=1, name="three"):
        eventually(lambda: lines(tmp_path, "nacks"), "the middleware is told")
    assert lines(tmp_path, "nacks") == ["deadly WorkerLost"]
    assert lines(tmp_path, "starts") == ["deadly one", "deadly two"]
    [dead] = app.broker.core.dead("default")
    assert (dead.reason, dead.deliveries) == ("max_deliveries", 2)


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_retries_are_counted_once_across_processes(app: ModuleType, server: Server, tmp_path: Path) -> None:
    for x in range(20):
        app.flaky.send(x)
    with Workers(server, tmp_path, processes=2, threads=4):
        app.broker.join("default", timeout=30_000)
    assert Counter(lines(tmp_path, "tries")) == Counter({str(x): 3 for x in range(20)})
    counters = app.broker.core.stats("default").counters
    assert (counters["enqueued"], counters["retried"], counters["processed"]) == (20, 40, 20)


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_worker_stopped_past_its_lease_starts_nothing_that_ran_elsewhere(
    app: ModuleType, server: Server, tmp_path: Path
) -> None:
    for x in range(8):
        app.work.send(x, 0.3)
    with Workers(server, tmp_path, threads=2, name="sleeper") as sleeper:
        eventually(lambda: app.broker.core.stats("default").inflight == 4, "it holds four")
        os.killpg(sleeper.process.pid, signal.SIGSTOP)
        with Workers(server, tmp_path, threads=4, name="other"):
            app.broker.join("default", timeout=30_000)
            others = {line.split()[0] for line in lines(tmp_path) if line.endswith("other")}
            os.killpg(sleeper.process.pid, signal.SIGCONT)
            assert sleeper.stop() == 0
    late = [line for line in lines(tmp_path) if line.endswith("sleeper") and line.split()[0] in others]
    assert len(late) <= 2, "more than what was already running ran twice"


@pytest.mark.parametrize("flavour", ["valkey", "redis"])
def test_a_server_that_is_killed_and_started_again_under_load_loses_no_message(
    flavour: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable = {"appendonly": "yes", "appendfsync": "always"}
    with Server(flavour, options=durable) as server:
        app = application(server, tmp_path, monkeypatch)
        with Workers(server, tmp_path, processes=2, threads=2, name="w") as workers:
            booted(workers, 2)
            for x in range(300):
                if x == 100:
                    server.kill()
                    server.start()
                app.work.send(x, 0.01)  # waits for its server, and stores the message once
            app.broker.join("default", timeout=60_000)
            assert workers.stop() == 0
        ran = Counter(line.split()[0] for line in lines(tmp_path))
        assert ran.keys() == {str(x) for x in range(300)}
        # only what ran, or waited for its ack, when the server went may have run again
        assert sum(ran.values()) <= 300 + 2 * (2 + 4)
        assert app.broker.core.audit("default", repair=False).clean
        app.broker.close()


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
@pytest.mark.since("dramatiq", "2.0")  # 1.18 counts some messages twice
def test_dramatiqs_own_prometheus_middleware_counts_as_ever(app: ModuleType, server: Server, tmp_path: Path) -> None:
    port = free_port()
    for x in range(20):
        app.work.send(x)
    for x in range(5):
        app.flaky.send(x)

    def scraped() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] not in ("", "#")}

    def of(actor: str) -> str:
        return f'{{actor_name="{actor}",queue_name="default"}}'

    metrics = {"dramatiq_prom_host": "127.0.0.1", "dramatiq_prom_port": str(port)}
    metrics["dramatiq_prom_db"] = str(tmp_path / "db")
    with Workers(server, tmp_path, processes=2, threads=2, **metrics):
        app.broker.join("default", timeout=30_000)
        eventually(lambda: scraped().get("dramatiq_messages_total" + of("work")) == 20, "all messages are counted")
        found = scraped()
    assert found["dramatiq_messages_total" + of("flaky")] == 15
    assert found["dramatiq_message_errors_total" + of("flaky")] == 10
    assert found["dramatiq_message_retries_total" + of("flaky")] == 10
    assert found["dramatiq_messages_inprogress" + of("work")] == 0


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_under_gevent_messages_run_at_the_same_time_and_are_retried_and_delayed(
    app: ModuleType, server: Server, tmp_path: Path
) -> None:
    for x in range(40):
        app.work.send(x, 0.2)
    for x in range(40, 45):
        app.flaky.send(x)
    app.work.send_with_options(args=(45,), delay=300)
    with Workers(server, tmp_path, threads=20, script="dramatiq-gevent") as workers:
        eventually(lambda: app.broker.core.stats("default").inflight >= 20, "many run at the same time")
        app.broker.join("default", timeout=30_000)
        assert workers.stop() == 0
    assert Counter(line.split()[0] for line in lines(tmp_path)) == Counter(str(x) for x in range(46))
