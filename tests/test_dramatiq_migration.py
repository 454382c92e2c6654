"""`relay migrate dramatiq-redis`: from a real RedisBroker, killed in the middle, and run to the end on RelayBroker."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.encoder import PickleEncoder

from relay_adapters.dramatiq import RelayBroker
from relay_core import Broker
from relay_core.errors import Unavailable
from tests.command_line import Cli, finished, spawn
from tests.dramatiq_workers import running
from tests.servers import Server, eventually


@pytest.fixture
def stock(server: Server) -> Iterator[RedisBroker]:
    """A RedisBroker on the same server, which keeps its keys elsewhere."""
    broker = RedisBroker(client=redis.Redis(unix_socket_path=str(server.socket)))  # type: ignore[no-untyped-call]
    dramatiq.set_broker(broker)
    yield broker
    broker.client.close()


@pytest.fixture
def relay(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


@pytest.fixture
def origin(server: Server) -> str:
    return f"unix://{server.socket}"


def send(broker: dramatiq.Broker, numbers: range, queue: str = "default", actor: str = "note", **options: Any) -> None:
    delay = options.pop("delay", None)
    broker.declare_queue(queue)
    for x in numbers:
        broker.enqueue(dramatiq.Message(queue, actor, (x,), {}, options), delay=delay)


def left(server: Server) -> list[bytes]:
    keys: list[bytes] = server.cli("KEYS", "dramatiq:*")
    return [key for key in keys if not key.endswith(b"__heartbeats__")]


def ran_on_relay(server: Server, queues: tuple[str, ...]) -> list[int]:
    """All messages, run to the end."""
    broker = RelayBroker(url=server.url)
    ran: list[int] = []

    def note(x: int) -> None:
        ran.append(x)

    dramatiq.actor(note, broker=broker)
    for queue in queues:
        broker.declare_queue(queue)
        broker.core.requeue(queue)
    with running(broker):
        for queue in queues:
            broker.join(queue, timeout=30_000)
    broker.close()
    return ran


def test_queued_delayed_and_dead_messages_arrive_as_they_were(
    stock: RedisBroker, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, range(300))
    send(stock, range(300, 310), "mail", broker_priority=3)
    sent = time.time()
    send(stock, range(310, 320), delay=60_000)
    all_sent = time.time()
    send(stock, range(320, 325), "default", "fail", max_retries=0)

    @dramatiq.actor
    def fail(x: int) -> None:
        raise ValueError("no")

    @dramatiq.actor
    def note(x: int) -> None:
        raise AssertionError("is to run on relay")

    consumer = stock.consume("default", prefetch=305)
    messages = [next(consumer) for _ in range(305)]  # type: ignore[call-overload]
    for message in messages[300:]:
        consumer.nack(message)
    consumer.requeue(messages[:300])
    cli = Cli(server.url)
    counts = {("default", "dead"): 5, ("default", "delayed"): 10, ("default", "ready"): 300, ("mail", "ready"): 10}
    told = cli.json("migrate", "dramatiq-redis", "--from", origin, "--dry-run")
    assert {(one["queue"], one["state"]): one["count"] for one in told["found"] if one["count"]} == counts
    assert (told["migrated"], told["dry_run"], relay.queues()) == (0, True, [])
    assert cli.json("migrate", "dramatiq-redis", "--from", origin) == told | {"migrated": 325, "dry_run": False}
    assert left(server) == []

    assert [relay.stats("default").ready, relay.stats("default").delayed, relay.stats("default").dead] == [300, 10, 5]
    assert relay.stats("mail").ready_by_level[3] == 10
    delayed = relay.jobs("default", "delayed")
    assert all(sent + 59 < (job.due_at or 0) < all_sent + 61 for job in delayed)
    dead = relay.dead("default")
    assert all(job.failed_at is not None and abs(job.failed_at - sent) < 30 for job in dead)
    summaries = [summary for job in dead if (summary := relay.plugins.describe(job))]
    assert {(summary.name, summary.args) for summary in summaries} == {("fail", str(x)) for x in range(320, 325)}
    message = dramatiq.Message.decode(delayed[0].payload)
    assert (message.queue_name, message.options["relay_job_id"]) == ("default", delayed[0].id)
    assert relay.audit("default", repair=False).clean
    relay.purge("default", ("delayed", "dead"))
    assert Counter(ran_on_relay(server, ("default", "mail"))) == Counter(range(310))


def test_what_dead_workers_held_comes_first_and_what_living_ones_hold_stays(
    stock: RedisBroker, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, range(4))
    send(stock, range(4, 6), delay=60_000)
    held = stock.consume("default", prefetch=2)
    assert [next(held).args[0] for _ in range(2)] == [0, 1]  # type: ignore[call-overload]
    assert next(stock.consume("default.DQ")) is not None  # type: ignore[call-overload]
    cli = Cli(server.url)
    told = cli.json("migrate", "dramatiq-redis", "--from", origin, code=1)
    assert told["migrated"] == 3
    assert [(one["queue"], one["count"]) for one in told["left"]] == [("default", 3)]
    assert "seen in the last 60 s" in told["left"][0]["note"]
    # the worker is silent for more than a minute
    server.cli("ZADD", "dramatiq:__heartbeats__", int((time.time() - 61) * 1000), stock.broker_id)
    assert cli.json("migrate", "dramatiq-redis", "--from", origin)["migrated"] == 3
    assert left(server) == []
    assert (relay.stats("default").ready, relay.stats("default").delayed) == (4, 2)


@pytest.mark.slow
def test_a_migration_killed_at_any_point_and_started_again_loses_nothing(
    stock: RedisBroker, relay: Broker, server: Server, origin: str, tmp_path: Path
) -> None:
    total = 6000
    send(stock, range(total // 3))
    send(stock, range(total // 3, 2 * total // 3), "mail")
    send(stock, range(2 * total // 3, total), delay=1)
    for round_ in range(3):
        migration = spawn("migrate", "dramatiq-redis", "--from", origin, url=server.url, cwd=tmp_path)
        enough = 500 + 1500 * round_
        eventually(lambda enough=enough: moved(relay) >= enough, "it has begun")  # type: ignore[misc]
        os.kill(migration.pid, signal.SIGKILL)
        assert finished(migration)[0] == -signal.SIGKILL
    assert moved(relay) < total
    assert left(server) != []
    code, out, err = finished(spawn("migrate", "dramatiq-redis", "--from", origin, url=server.url, cwd=tmp_path))
    assert code == 0, (out, err)
    assert left(server) == []
    assert moved(relay) == total
    assert Counter(ran_on_relay(server, ("default", "mail"))) == Counter(range(total))


def test_what_relay_did_not_take_stays_where_it_was(
    stock: RedisBroker, relay: Broker, server: Server, origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(stock, range(500))
    send(stock, range(500, 510), delay=60_000)
    adopt, calls = Broker.adopt, []

    def refused(broker: Broker, arrivals: Any) -> list[bool]:
        calls.append(len(arrivals))
        if len(calls) == 2:
            raise Unavailable("the server went away")
        return adopt(broker, arrivals)

    monkeypatch.setattr(Broker, "adopt", refused)
    cli = Cli(server.url)
    assert "the server went away" in cli.run("migrate", "dramatiq-redis", "--from", origin, code=3).stderr
    assert calls == [200, 200]
    assert relay.stats("default").ready == 200
    assert server.cli("LLEN", "dramatiq:default") == server.cli("HLEN", "dramatiq:default.msgs") == 300
    assert server.cli("LLEN", "dramatiq:default.DQ") == 10
    assert cli.json("migrate", "dramatiq-redis", "--from", origin)["migrated"] == 310
    assert left(server) == []
    assert (relay.stats("default").ready, relay.stats("default").delayed) == (500, 10)


def moved(relay: Broker) -> int:
    return sum(relay.stats(queue).counters.get("enqueued", 0) for queue in ("default", "mail"))


def test_a_batch_that_was_run_before_it_could_be_taken_out_is_not_run_again(
    stock: RedisBroker, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, range(50))
    keys = list(server.cli("KEYS", "dramatiq:default*"))
    copies = [(key, server.cli("DUMP", key)) for key in keys]
    cli = Cli(server.url)
    cli.run("migrate", "dramatiq-redis", "--from", origin)
    assert len(ran_on_relay(server, ("default",))) == 50
    for key, dump in copies:  # as if it had been killed before
        server.cli("RESTORE", key, 0, dump)
    cli.run("migrate", "dramatiq-redis", "--from", origin)
    assert relay.stats("default").ready == 0
    assert left(server) == []


def test_messages_of_another_encoder_need_the_module_that_sets_it_only_where_their_time_matters(
    stock: RedisBroker, relay: Broker, server: Server, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = dramatiq.get_encoder()
    dramatiq.set_encoder(PickleEncoder())
    try:
        send(stock, range(3))
        send(stock, range(3, 255), delay=60_000)
        dramatiq.set_encoder(encoder)
        cli = Cli(server.url)
        told = cli.json("migrate", "dramatiq-redis", "--from", origin, code=1)
        assert told["migrated"] == 3
        assert [(one["state"], one["count"]) for one in told["left"]] == [("delayed", 252)]
        assert "--app" in told["left"][0]["note"]
        (tmp_path / "pickling.py").write_text(
            "import dramatiq\nfrom dramatiq.encoder import PickleEncoder\ndramatiq.set_encoder(PickleEncoder())\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, "pickling", raising=False)
        assert cli.json("migrate", "dramatiq-redis", "--from", origin, "--app", "pickling")["migrated"] == 252
        assert (relay.stats("default").ready, relay.stats("default").delayed) == (3, 252)
        relay.purge("default", ("delayed",))
        assert sorted(ran_on_relay(server, ("default",))) == [0, 1, 2]
    finally:
        dramatiq.set_encoder(encoder)
    assert "nowhere" in cli.run("migrate", "dramatiq-redis", "--from", origin, "--app", "nowhere", code=2).stderr


@pytest.mark.parametrize("queue", ["default", "default.DQ", "default.XQ"])
def test_a_message_of_an_impossible_time_holds_up_no_other(
    relay: Broker, server: Server, origin: str, queue: str
) -> None:
    """Producers in other languages write what they like, and JSON as Python has it knows NaN and Infinity."""
    stamps: tuple[Any, ...] = (None, "now", float("nan"), float("inf"), 10**30, -1)
    sent: list[dramatiq.Message[Any]]
    sent = [dramatiq.Message("default", "note", (x,), {}, {}, f"stamp{x}", t) for x, t in enumerate(stamps)]
    sent += [dramatiq.Message("default", "note", (x,), {}, {"eta": t}, f"eta{x}") for x, t in enumerate(stamps)]
    sent.append(dramatiq.Message("default", "note", (0,), {}, {}, "last"))
    for message in sent:
        server.cli("HSET", f"dramatiq:{queue}.msgs", message.message_id, message.encode())
        if queue.endswith(".XQ"):
            server.cli("ZADD", f"dramatiq:{queue}", 1000 * time.time(), message.message_id)
        else:
            server.cli("RPUSH", f"dramatiq:{queue}", message.message_id)
    assert Cli(server.url).json("migrate", "dramatiq-redis", "--from", origin)["migrated"] == len(sent)
    assert left(server) == []
    stats = relay.stats("default")
    # later than relay can wait is as late as it can
    never = 0 if queue.endswith(".XQ") else 2
    assert (stats.delayed, stats.ready + stats.dead) == (never, len(sent) - never)


@pytest.mark.parametrize("name", [b"q" * 256, b"caf\xe9"], ids=["too long", "no text"])
def test_a_queue_that_relay_cannot_have_stays_and_holds_up_no_other(
    stock: RedisBroker, relay: Broker, server: Server, origin: str, name: bytes
) -> None:
    """In every place where its messages may lie."""
    body = dramatiq.Message("default", "note", (1,), {}, {}, "id").encode()
    for queue in (name, name + b".DQ", name + b".XQ"):
        server.cli("HSET", b"dramatiq:" + queue + b".msgs", "id", body)
    server.cli("RPUSH", b"dramatiq:" + name, "id")
    server.cli("RPUSH", b"dramatiq:" + name + b".DQ", "id")
    server.cli("ZADD", b"dramatiq:" + name + b".XQ", 1, "id")
    server.cli("SADD", b"dramatiq:__acks__.gone." + name, "held")
    send(stock, range(3), "a")
    send(stock, range(3), "z")
    before = {key: server.cli("DUMP", key) for key in left(server) if name in key}
    cli = Cli(server.url)
    for given in (("--dry-run",), ()):
        told = cli.json("migrate", "dramatiq-redis", "--from", origin, *given, code=1)
        assert {one["queue"] for one in told["found"] if one["count"]} == {"a", "z"}
        stay = {(one["queue"].encode(errors="surrogateescape"), one["state"], one["count"]) for one in told["left"]}
        assert stay == {(name, "ready", 2), (name, "delayed", 1), (name, "dead", 1)}
        assert all("queue name" in one["note"] for one in told["left"])
    assert cli.run("migrate", "dramatiq-redis", "--from", origin, code=1).stderr.count("left: queue name") == 3
    assert {key: server.cli("DUMP", key) for key in left(server)} == before
    assert relay.queues() == ["a", "z"]
    assert [relay.stats(queue).ready for queue in ("a", "z")] == [3, 3]


def test_another_namespace_with_odd_characters_is_moved_and_its_neighbour_is_not(
    server: Server, relay: Broker, origin: str
) -> None:
    client = redis.Redis(unix_socket_path=str(server.socket))
    for namespace in ("my[1]*app", "my1xapp"):
        broker = RedisBroker(client=client, namespace=namespace)  # type: ignore[no-untyped-call]
        send(broker, range(5), "a.b:c")
    Cli(server.url).run("migrate", "dramatiq-redis", "--from", origin, "--namespace", "my[1]*app")
    assert relay.stats("a.b:c").ready == 5
    assert server.cli("LLEN", "my1xapp:a.b:c") == 5
    assert server.cli("LLEN", "my[1]*app:a.b:c") == 0
    client.close()


def test_the_source_may_be_a_server_that_relay_would_not_work_on(
    stock: RedisBroker, relay: Broker, server: Server, pool: Any
) -> None:
    other = pool.get(Server, server.flavour, tcp=True)
    send(stock, range(3))
    server.cli("CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
    with Broker(other.url) as target:
        Cli(other.url).run("migrate", "dramatiq-redis", "--from", f"redis+unix://{server.socket}")
        assert target.stats("default").ready == 3
