"""`relay migrate celery-redis`: from kombu's own transport, killed in the middle, and run to the end on relay."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu import Connection, Exchange, Queue, pools

from relay_adapters.celery.redis_source import RedisSource
from relay_core import Broker
from tests.command_line import Cli, finished, spawn
from tests.servers import Server, eventually

QUEUES = ("celery", "mail")


def application(url: str, ran: list[int] | None = None, **options: Any) -> Celery:
    """The app of these tests, on either broker."""
    app = Celery("migrating", broker=url, set_as_current=False)
    app.conf.update(task_ignore_result=True, worker_hijack_root_logger=False, broker_transport_options=options)
    app.conf.update(broker_connection_retry_on_startup=True, worker_enable_remote_control=False)

    @app.task(name="note", shared=False)
    def note(x: int) -> None:
        assert ran is not None, "is to run on relay"
        ran.append(x)

    return app


@pytest.fixture
def origin(server: Server) -> Iterator[str]:
    yield f"redis+socket://{server.socket}"
    pools.reset()  # kombu remembers in its pools what it declared on the server, which is empty for the next test


@pytest.fixture
def stock(origin: str) -> Iterator[Celery]:
    app = application(origin)
    yield app
    app.close()


@pytest.fixture
def relay(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


def send(app: Celery, numbers: Sequence[int], queue: str = "celery", **options: Any) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        for x in numbers:
            app.send_task("note", (x,), queue=queue, producer=producer, **options)


def hold(url: str, queue: str, count: int) -> None:
    """Take messages as a worker does that is killed then: they stay unacked."""
    with Connection(url) as connection:
        channel = connection.channel()
        channel.qos.restore_at_shutdown = False
        for _ in range(count):
            assert channel.basic_get(queue) is not None
        channel.qos._delivered.clear()


def left(server: Server, prefix: str = "") -> list[bytes]:
    """Keys of kombu that hold messages."""
    keys: list[bytes] = server.cli("KEYS", f"{prefix}*")
    return [key for key in keys if not key.startswith((b"relay:", f"{prefix}_kombu.".encode()))]


def ran_on_relay(server: Server, expected: int) -> list[int]:
    """The numbers of all messages, run to the end, in order."""
    ran: list[int] = []
    app = application(server.url, ran)
    app.conf.task_queues = [Queue(name, Exchange(name), routing_key=name) for name in QUEUES]
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        eventually(lambda: len(ran) >= expected, f"{expected} tasks ran")
    app.close()
    return ran


def in_order(relay: Broker, queue: str = "celery") -> list[str]:
    """The arguments of the tasks that are ready, in the order in which workers get them."""
    jobs = relay.claim(queue, 100)
    relay.ack_many(jobs)
    return [summary.args for job in jobs if (summary := relay.plugins.describe(job)) is not None]


def counts(told: Any, name: str = "found") -> dict[tuple[str, str], int]:
    return {(one["queue"], one["state"]): one["count"] for one in told[name] if one["count"]}


def test_queued_delayed_and_unacked_messages_arrive_as_they_were(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, range(300, 500))
    hold(origin, "celery", 200)
    send(stock, range(300))
    sent = time.time()
    send(stock, range(500, 510), eta=datetime.now(timezone.utc) + timedelta(seconds=60))
    send(stock, range(510, 520), "mail", eta=datetime.now(timezone.utc) + timedelta(seconds=60))
    all_sent = time.time()
    hold(origin, "mail", 10)
    cli = Cli(server.url)
    told = cli.json("migrate", "celery-redis", "--from", origin, "--dry-run")
    # a list does not tell which of its messages have an ETA
    assert counts(told) == {("celery", "ready"): 510, ("mail", "delayed"): 10}
    assert (told["migrated"], told["dry_run"], relay.queues()) == (0, True, [])
    assert cli.json("migrate", "celery-redis", "--from", origin) == told | {"migrated": 520, "dry_run": False}
    assert left(server) == []

    assert (relay.stats("celery").ready, relay.stats("celery").delayed) == (500, 10)
    assert (relay.stats("mail").ready, relay.stats("mail").delayed) == (0, 10)
    for queue in QUEUES:
        assert all(sent + 59 < (job.due_at or 0) < all_sent + 61 for job in relay.jobs(queue, "delayed"))
        relay.purge(queue, ("delayed",))
    (first,) = relay.jobs("celery", "ready", limit=1)
    summary = relay.plugins.describe(first)
    assert summary is not None
    assert (summary.name, summary.args) == ("note", "(0,)")
    assert relay.audit("celery", repair=False).clean
    ran = ran_on_relay(server, 500)
    assert Counter(ran) == Counter(range(500))
    assert ran[:300] == sorted(ran[:300]), "the order of a list is kept"


def test_priorities_keep_their_order_in_either_sense(stock: Celery, relay: Broker, server: Server, origin: str) -> None:
    for priority in (9, 3, 0, 5):
        send(stock, [priority], priority=priority)
    send(stock, [100])
    cli = Cli(server.url)
    cli.run("migrate", "celery-redis", "--from", origin)
    by_level = relay.stats("celery").ready_by_level
    assert {level: count for level, count in enumerate(by_level) if count} == {0: 1, 4: 1, 6: 1, 9: 2}
    assert in_order(relay) == ["(0,)", "(100,)", "(3,)", "(5,)", "(9,)"]
    send(stock, [9], priority=9)
    send(stock, [0], priority=0)
    cli.run("migrate", "celery-redis", "--from", origin, "--priority-order", "amqp")
    assert in_order(relay) == ["(9,)", "(0,)"]


def test_what_living_workers_hold_stays_until_they_have_stopped(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, range(3))
    hold(origin, "celery", 2)
    cli = Cli(server.url)
    with server.client() as worker:
        pubsub = worker.pubsub()
        pubsub.psubscribe("/0.celery.pidbox")
        eventually(lambda: b"psub=1" in server.cli("CLIENT", "LIST"), "it is subscribed")
        told = cli.json("migrate", "celery-redis", "--from", origin, code=1)
        assert (told["migrated"], counts(told, "left")) == (1, {("celery", "ready"): 2})
        assert "migrate again" in told["left"][0]["note"]
        told = cli.json("migrate", "celery-redis", "--from", origin, "--unacked", "none", code=1)
        assert told["migrated"] == 0
        pubsub.close()
    eventually(lambda: b"psub=1" not in server.cli("CLIENT", "LIST"), "it is gone")
    assert cli.json("migrate", "celery-redis", "--from", origin)["migrated"] == 2
    assert left(server) == []
    assert sorted(in_order(relay)) == ["(0,)", "(1,)", "(2,)"]


def test_topic_routes_prefixes_and_other_queues_are_told_apart(server: Server, relay: Broker, origin: str) -> None:
    apps = {prefix: application(origin, global_keyprefix=prefix) for prefix in ("my[1]*app:", "my1xapp:")}
    topic = Exchange("news", type="topic")
    queues = [Queue("sport", topic, routing_key="sport.#"), Queue("all", topic, routing_key="#")]
    for app in apps.values():
        with app.connection_for_write() as connection:
            for queue in queues:
                queue(connection.default_channel).declare()
        app.send_task("note", (1,), exchange=topic, routing_key="sport.ski", declare=[topic])
        app.send_task("note", (2,), exchange=topic, routing_key="weather", declare=[topic])
        send(app, [3])
        app.close()
        pools.reset()
    cli = Cli(server.url)
    prefixed = ("migrate", "celery-redis", "--from", origin, "--key-prefix", "my[1]*app:")
    assert cli.json(*prefixed, "--queue", "celery", "--prefix", "relay")["migrated"] == 1
    assert cli.json("--prefix", "relay", *prefixed)["migrated"] == 3
    assert [relay.stats(queue).ready for queue in ("sport", "all", "celery")] == [1, 2, 1]
    assert left(server, "my[[]1[]][*]app:") == []
    assert len(left(server, "my1xapp:")) == 3
    # where no prefix is named, it is the one that an app with this global_keyprefix reads
    assert cli.json("migrate", "celery-redis", "--from", origin, "--key-prefix", "my1xapp:")["migrated"] == 4
    with Broker(server.url, prefix="my1xapp:relay") as there:
        assert [there.stats(queue).ready for queue in ("sport", "all", "celery")] == [1, 2, 1]


def test_an_apps_own_separator_is_asked_for_and_then_divides_its_lists(
    relay: Broker, server: Server, origin: str
) -> None:
    app = application(origin, sep=":", priority_steps=list(range(10)))
    send(app, [3], priority=3)
    send(app, [0])
    send(app, [1], "eu:mail", priority=1)
    send(app, [2], "eu:mail")
    news = Exchange("news", type="direct")
    with app.connection_for_write() as connection:
        Queue("sport", news, routing_key="ski")(connection.default_channel).declare()
    app.send_task("note", (4,), exchange=news, routing_key="ski")
    hold(origin, "sport", 1)  # names its exchange and routing key only
    app.close()
    before = sorted(left(server))
    cli = Cli(server.url)
    said = cli.json("migrate", "celery-redis", "--from", origin, code=2)["error"]["message"]
    assert "--sep" in said
    assert "::" in said
    assert (sorted(left(server)), relay.queues()) == (before, [])
    assert cli.json("migrate", "celery-redis", "--from", origin, "--sep", ":")["migrated"] == 5
    assert {queue: in_order(relay, queue) for queue in relay.queues()} == {
        "celery": ["(0,)", "(3,)"],
        "eu:mail": ["(2,)", "(1,)"],
        "sport": ["(4,)"],
    }
    assert left(server) == []


def test_another_list_with_the_separator_and_no_number_behind_it_is_passed_over(
    stock: Celery, server: Server, origin: str
) -> None:
    """`²` is a digit, and no number that `int` reads."""
    server.cli("LPUSH", "area:m²:²", "x")
    cli = Cli(server.url)
    assert cli.json("migrate", "celery-redis", "--from", origin, "--sep", ":")["migrated"] == 0


def test_lists_of_an_app_with_a_key_prefix_are_left_where_none_was_named(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, [1])
    other = application(origin, global_keyprefix="shop:")
    send(other, [2, 3], priority=3)
    other.close()
    cli = Cli(server.url)
    told = cli.json("migrate", "celery-redis", "--from", origin, code=1)
    assert (counts(told), counts(told, "left")) == ({("celery", "ready"): 1}, {("shop:celery", "ready"): 2})
    assert "--key-prefix shop:" in told["left"][0]["note"]
    assert relay.queues() == ["celery"]
    assert cli.json("migrate", "celery-redis", "--from", origin, "--queue", "celery")["left"] == []
    assert cli.json("migrate", "celery-redis", "--from", origin, "--key-prefix", "shop:")["migrated"] == 2


def test_tasks_of_one_id_are_all_kept_and_what_is_no_message_is_put_aside(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, [1, 2, 2], task_id="same")
    for text in (b"not JSON", b'{"body": "x"}', b"not JSON"):
        server.cli("LPUSH", "celery", text)
    cli = Cli(server.url)
    told = cli.json("migrate", "celery-redis", "--from", origin, code=1)
    assert (told["migrated"], counts(told, "left")) == (3, {("celery", "ready"): 2})
    assert server.cli("SMEMBERS", "relay-refused\x06\x16celery")
    assert "same" in {job.id for job in relay.jobs("celery", "ready")}
    assert sorted(in_order(relay)) == ["(1,)", "(2,)", "(2,)"]


def test_tasks_of_protocol_1_are_found_by_their_ids_too(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    stock.conf.task_protocol = 1
    soon = datetime.now(timezone.utc) + timedelta(seconds=60)
    send(stock, [1], task_id="now")
    send(stock, [2], task_id="later", eta=soon)
    hold(origin, "celery", 2)
    Cli(server.url).json("migrate", "celery-redis", "--from", origin)
    assert [job.id for job in relay.jobs("celery", "ready")] == ["now"]
    (later,) = relay.jobs("celery", "delayed")
    summary = relay.plugins.describe(later)
    assert (later.id, summary and summary.args) == ("later", "[2]")


def test_a_message_that_relay_cannot_take_holds_up_no_other(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    def odd() -> None:
        send(stock, [0], eta=datetime(9999, 1, 1, tzinfo=timezone.utc))
        send(stock, [1])
        (text,) = server.cli("LRANGE", "celery", 0, 0)
        message = json.loads(text)
        message["headers"]["id"] = 7  # as a producer in another language may have it
        server.cli("LSET", "celery", 0, json.dumps(message))

    odd()
    hold(origin, "celery", 2)
    odd()
    server.cli("LPUSH", "celery", b'{"headers": {}, "properties": ' + b"[" * 100_000)
    send(stock, [2])
    cli = Cli(server.url)
    assert cli.json("migrate", "celery-redis", "--from", origin, "--dry-run", code=1)["migrated"] == 0
    told = cli.json("migrate", "celery-redis", "--from", origin, code=1)
    assert (told["migrated"], counts(told, "left")) == (3, {("celery", "ready"): 2, ("?", "ready"): 1})
    assert all("due in more than 10 years" in one["note"] for one in told["left"])
    assert sorted(in_order(relay)) == ["(1,)", "(1,)", "(2,)"]
    assert (server.cli("LLEN", "celery"), server.cli("HLEN", "unacked")) == (0, 1)


def test_a_queue_that_relay_cannot_have_stays_and_holds_up_no_other(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    long = "q" * 256
    send(stock, [1], "a")
    send(stock, [2, 3], long)
    send(stock, [4], long, priority=6)
    send(stock, [5], "z")
    hold(origin, long, 1)
    cli = Cli(server.url)
    for given in (("--dry-run",), ()):
        told = cli.json("migrate", "celery-redis", "--from", origin, *given, code=1)
        assert counts(told) == {("a", "ready"): 1, ("z", "ready"): 1}
        assert counts(told, "left") == {(long, "ready"): 2, ("?", "ready"): 1}
        assert "has 256 bytes, at most 255 are allowed" in told["left"][0]["note"]
        assert "whose name relay cannot have" in told["left"][1]["note"]
    assert relay.queues() == ["a", "z"]
    assert [in_order(relay, queue) for queue in ("a", "z")] == [["(1,)"], ["(5,)"]]
    assert sorted(left(server)) == [b"q" * 256, b"q" * 256 + b"\x06\x166", b"unacked", b"unacked_index"]


@pytest.mark.parametrize("which", ["list", "binding"])
def test_names_that_are_no_text_hold_up_no_other(
    stock: Celery, relay: Broker, server: Server, origin: str, which: str
) -> None:
    send(stock, [1])
    if which == "list":
        server.cli("RENAME", "celery", b"caf\xe9")
    else:
        server.cli("SADD", "_kombu.binding.celery", b"caf\xe9\x06\x16\x06\x16caf\xe9")
        server.cli("COPY", "celery", b"caf\xe9")
    send(stock, [2])
    told = Cli(server.url).json("migrate", "celery-redis", "--from", origin, code=1)
    assert counts(told, "left") == {("caf\udce9", "ready"): 1}
    assert "not valid text" in told["left"][0]["note"]
    assert told["migrated"] == relay.stats("celery").ready == (1 if which == "list" else 2)


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_queue_whose_binding_is_gone_is_known_by_its_messages_and_other_lists_are_left(
    stock: Celery, relay: Broker, server: Server, origin: str, protocol: int
) -> None:
    stock.conf.task_protocol = protocol
    send(stock, range(3), priority=6)
    server.cli("DEL", "_kombu.binding.celery")
    server.cli("LPUSH", "shopping", "milk")
    cli = Cli(server.url)
    assert counts(cli.json("migrate", "celery-redis", "--from", origin)) == {("celery", "ready"): 3}
    assert left(server) == [b"shopping"]


def test_a_batch_that_relay_did_not_take_stays_and_comes_again_under_the_same_ids(
    stock: Celery, relay: Broker, server: Server, origin: str
) -> None:
    send(stock, range(10))
    hold(origin, "celery", 4)
    source = RedisSource(relay.store)
    seen = []
    for taken in (0, 0, 1, 0):
        batches = source.batches()
        for _ in range(taken):
            next(batches)
        seen.append([arrival.id for arrival in next(batches)])
        batches.close()  # as when relay refuses it, or the process ends
    listed, again, held, held_again = map(sorted, seen)
    assert (len(listed), len(held)) == (6, 4)
    assert (again, held_again) == (listed, held)
    assert server.cli("HLEN", "unacked") == 4


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_a_migration_killed_at_any_point_and_started_again_loses_nothing(
    stock: Celery, relay: Broker, server: Server, origin: str, tmp_path: Path
) -> None:
    total = 4000
    send(stock, range(total // 4))
    hold(origin, "celery", total // 4)
    send(stock, range(total // 4, total // 2), priority=6)
    send(stock, range(total // 2, total), "mail")
    arguments = ("migrate", "celery-redis", "--from", origin)
    for round_ in range(3):
        migration = spawn(*arguments, url=server.url, cwd=tmp_path)
        enough = 300 + 1000 * round_
        eventually(lambda enough=enough: moved(relay) >= enough, "it has begun")  # type: ignore[misc]
        os.kill(migration.pid, signal.SIGKILL)
        assert finished(migration)[0] == -signal.SIGKILL
    assert moved(relay) < total
    assert left(server) != []
    code, out, err = finished(spawn(*arguments, url=server.url, cwd=tmp_path))
    assert code == 0, (out, err)
    assert left(server) == []
    assert moved(relay) == total
    for queue in QUEUES:
        assert relay.audit(queue, repair=False).clean
    assert Counter(ran_on_relay(server, total)) == Counter(range(total))


def moved(relay: Broker) -> int:
    return sum(relay.stats(queue).counters.get("enqueued", 0) for queue in QUEUES)


def test_a_worker_still_on_redis_whose_process_sends_to_relay_is_as_celery_has_it(
    server: Server, origin: str, relay: Broker
) -> None:
    app = application(origin, ran := [])
    app.conf.update(worker_enable_remote_control=True, task_ignore_result=False, result_backend="cache+memory://")

    @app.task(name="again", shared=False, bind=True, acks_late=True)
    def again(self: Any, x: int) -> None:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        ran.append(x)

    @app.task(name="fail", shared=False, acks_late=True)
    def fail() -> None:
        raise LookupError("of no use")

    @app.task(name="pass-on", shared=False)
    def pass_on(x: int) -> None:
        with application(server.url) as newer:
            send(newer, [x])

    app.send_task("pass-on", [1])
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30) as worker:
        eventually(lambda: relay.stats("celery").ready, "a task to be sent to relay")
        app.send_task("nobody")
        with app.connection_for_write() as connection, connection.Producer() as producer:
            producer.publish("{broken", routing_key="celery", content_type="application/json", content_encoding="utf-8")
        later, failed = app.send_task("note", [2], countdown=3600), app.send_task("fail")
        app.send_task("note", [3])
        app.send_task("again", [4]).get(timeout=20)
        with pytest.raises(LookupError, match="of no use"):
            failed.get(timeout=20)
        control, name = app.control, worker.hostname
        (listed,) = control.inspect([name], timeout=20, limit=1).scheduled()[name]
        assert listed["request"]["id"] == later.id
        assert control.inspect([name], timeout=20, limit=1).query_task(later.id)[name][later.id][0] == "scheduled"
        assert control.inspect([name], timeout=20, limit=1).stats()[name]["broker"]["transport"].startswith("redis")
        assert control.revoke(later.id, reply=True, destination=[name], timeout=20, limit=1)
        assert control.revoke_by_stamped_headers({"a": "b"}, reply=True, destination=[name], timeout=20, limit=1)
        assert later.id in control.inspect([name], timeout=20, limit=1).revoked()[name]
    app.close()
    assert ran == [3, 4]
    assert in_order(relay) == ["(1,)"]
