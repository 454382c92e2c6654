"""`relay exporter`: what the store knows of all queues, whoever made the moves."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from relay_core import Broker, commands
from relay_core.keys import worker_keys
from relay_core.metrics import StoreCollector
from relay_core.metrics.exporter import LIFETIME
from tests.command_line import finished, spawn
from tests.scraping import Scrape, scrape_registry, scrape_url
from tests.servers import Server, eventually, free_port
from tests.test_metrics import make_due
from tests.topologies import Cluster


@pytest.fixture(params=["valkey"])
def flavour(request: pytest.FixtureRequest) -> str:
    """One is enough: what differs between servers is tested below the metrics."""
    return str(request.param)


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url, retry_for=1.0) as broker:
        yield broker


def look(broker: Broker, *patterns: str, max_queues: int = 1000) -> Scrape:
    registry = CollectorRegistry()
    registry.register(StoreCollector(broker, patterns, max_queues))
    return scrape_registry(registry)


def test_the_lifetime_counters_are_those_of_the_store(server: Server, broker: Broker) -> None:
    broker.enqueue_many("mail", [b"%d" % n for n in range(8)])
    broker.enqueue("mail", b"k", dedup_key="k", delay=3600)
    broker.enqueue("mail", b"k", dedup_key="k")
    jobs = broker.claim("mail", 6)
    broker.ack_many(jobs[:2])
    broker.nack(jobs[2], "no", delay=0)
    broker.nack(jobs[3], "no", dead=True)
    broker.release(jobs[4])
    make_due(server, broker, "mail", "leases")
    assert broker.reap("mail") == 1
    broker.requeue("mail")
    make_due(server, broker, "mail", "delayed")
    broker.promote("mail")
    (waiting, *_others) = broker.jobs("mail", "ready")
    broker.cancel("mail", waiting.id)
    broker.purge("mail")
    scrape = look(broker)
    found = {name: scrape(f"relay_queue_{name}_total", queue="mail") for name in LIFETIME}
    assert found == {
        "enqueued": 9, "deduplicated": 1, "claimed": 6, "processed": 2, "retried": 1, "dead": 1, "reaped": 1,
        "promoted": 1, "released": 1, "requeued": 1, "cancelled": 1, "purged": 6, "forgotten": 0,
    }  # fmt: skip
    assert scrape("relay_store_up") == 1


def test_every_counter_that_a_script_keeps_is_served(server: Server) -> None:
    from relay_core import scripts

    written = set()
    for name in scripts.names():
        written |= set(re.findall(r"'HINCRBY', counters, '(\w+)'", scripts.load(name).text))
    assert written | {"enqueued"} == LIFETIME.keys() | {"repaired"}


def test_all_queues_are_found_and_a_counter_begins_at_zero(broker: Broker) -> None:
    for queue in ("mail", "a/b {c}", "Ümläut\n"):
        broker.enqueue(queue, b"x")
    scrape = look(broker)
    for queue in ("mail", "a/b {c}", "Ümläut\n"):
        assert scrape("relay_queue_enqueued_total", queue=queue) == 1
        assert scrape("relay_queue_dead_total", queue=queue) == 0
        assert scrape("relay_queue_depth", queue=queue, state="ready") == 1
        assert scrape("relay_workers", queue=queue) == 0


def test_patterns_and_a_bound_choose_queues_and_internal_ones_are_left_out(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    for queue in ("mail", "mail.low", "post", "f00.reply.celery.pidbox", "celeryev.f00"):
        broker.enqueue(queue, b"x")

    def served(*patterns: str, **options: int) -> set[str]:
        found = look(broker, *patterns, **options)
        return {dict(labels)["queue"] for _name, labels in found.samples if labels}

    assert served() == {"mail", "mail.low", "post"}
    assert served("mail*") == {"mail", "mail.low"}
    assert served("post", "mail.?ow") == {"post", "mail.low"}
    assert caplog.text == ""
    assert served(max_queues=2) == {"mail", "mail.low"}
    assert "3 queues, of which the first 2 are served" in caplog.text


def test_the_age_of_the_oldest_ready_job_and_pauses(server: Server, broker: Broker) -> None:
    broker.enqueue("mail", b"x")
    broker.pause("mail")
    broker.enqueue("post", b"x", delay=3600)
    key = broker.settings.keys("mail").jobs
    id = server.cli("HKEYS", key)[0]
    record = server.cli("HGET", key, id)
    server.cli("HSET", key, id, b"%d%s" % (int(record[:13]) - 90_000, record[13:]))
    scrape = look(broker)
    age = scrape("relay_queue_oldest_job_age_seconds", queue="mail")
    assert age is not None
    assert 90 <= age < 120
    assert scrape("relay_queue_oldest_job_age_seconds", queue="post") == 0
    assert (scrape("relay_queue_paused", queue="mail"), scrape("relay_queue_paused", queue="post")) == (1, 0)


def test_repairs_of_the_audit_are_counted(server: Server, broker: Broker) -> None:
    broker.enqueue("mail", b"x")
    server.cli("DEL", broker.settings.keys("mail").ready[0])
    assert not broker.audit("mail").clean
    assert look(broker)("relay_audit_repairs_total", queue="mail") == 1


def test_workers_are_counted_by_the_queues_that_they_serve(broker: Broker) -> None:
    broker.enqueue("mail", b"x")
    for name, queues in (("a", ["mail", "post"]), ("b", ["mail"]), ("gone", ["mail"])):
        says = {"host": "h", "pid": 1, "face": "celery", "queues": queues, "concurrency": 1, "inflight": 0}
        alive = 1 if name == "gone" else 60_000
        broker.store.run(commands.beat(worker_keys("relay"), name, says, age_ms=0, alive_ms=alive))
    eventually(lambda: len(broker.workers()) == 2, "one of them is silent for too long")
    scrape = look(broker)
    assert scrape("relay_workers", queue="mail") == 2
    assert scrape("relay_workers", queue="post") == 1, "a queue that is served and was never used"
    assert scrape("relay_queue_enqueued_total", queue="post") == 0


def test_while_the_store_is_away_it_says_so_and_nothing_else(server: Server, broker: Broker) -> None:
    registry = CollectorRegistry()
    registry.register(StoreCollector(broker))
    broker.enqueue("mail", b"x")
    assert scrape_registry(registry)("relay_queue_enqueued_total", queue="mail") == 1
    server.kill()
    assert scrape_registry(registry).samples == {("relay_store_up", ()): 0}
    server.start()
    assert scrape_registry(registry)("relay_store_up") == 1


def test_one_metric_can_be_asked_for_by_name(broker: Broker) -> None:
    broker.enqueue("mail", b"x")
    registry = CollectorRegistry()
    registry.register(StoreCollector(broker))
    some = registry.restricted_registry(["relay_queue_paused"])
    assert scrape_registry(some).names() == {"relay_queue_paused"}  # type: ignore[arg-type]


def test_it_reads_a_cluster(cluster: Cluster) -> None:
    with Broker(cluster.url) as broker:
        for n in range(12):
            broker.enqueue(f"q{n}", b"x")
        scrape = look(broker)
        assert [scrape("relay_queue_enqueued_total", queue=f"q{n}") for n in range(12)] == [1] * 12


# --- the command


def test_the_command_serves_until_it_is_told_to_stop(server: Server, broker: Broker, tmp_path: Path) -> None:
    broker.enqueue("mail", b"x")
    broker.enqueue("post", b"x")
    port = free_port()
    process = spawn("exporter", "--addr", str(port), "-q", "m*", "--json", url=server.url, cwd=tmp_path)
    try:
        found: list[Scrape] = []
        eventually(lambda: found.append(scrape_url(f"http://127.0.0.1:{port}/metrics")) or found, "the first scrape")
        assert found[0]("relay_queue_enqueued_total", queue="mail") == 1
        assert found[0]("relay_queue_enqueued_total", queue="post") is None
        assert "relay_build_info" in found[0].names()
        process.send_signal(signal.SIGTERM)
        code, out, err = finished(process)
        assert (code, json.loads(out)) == (0, {"url": f"http://127.0.0.1:{port}/metrics"}), err
        assert f"serving http://127.0.0.1:{port}/metrics of relay+unix://" in err
    finally:
        process.kill()
        process.communicate()


def test_the_command_ends_with_1_when_the_port_is_taken_and_2_when_the_address_is_none(
    server: Server, tmp_path: Path
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _out, err = finished(spawn("exporter", "--addr", address, url=server.url, cwd=tmp_path))
    assert code == 1
    assert f"cannot listen on {address}: " in err
    assert "choose another with --addr" in err
    code, _out, err = finished(spawn("exporter", "--addr", "nowhere", url=server.url, cwd=tmp_path))
    assert code == 2
    assert "metrics address must be host:port" in err
