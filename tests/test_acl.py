"""The ACL user of docs/operations.md has what relay needs, and nothing that it does not."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import dramatiq
import kombu
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker

from relay_adapters.dramatiq import RelayBroker
from relay_core import Broker, JobSpec, Verdict
from relay_core.errors import PermissionDenied
from relay_core.job import Arrival
from relay_core.worker import Worker
from tests.command_line import Cli
from tests.pages import ROOT, blocks
from tests.servers import AclServer

PAGE = (ROOT / "docs" / "operations.md").read_text()
LUA = [*ROOT.glob("relay_core/lua/**/*.lua"), *ROOT.glob("relay_adapters/**/*.lua")]
ELSEWHERE = {"cluster|slots": "asked of Cluster nodes only", "waitaof": "Redis 7.2 and later know it"}


def rules(user: str = "relay") -> list[str]:
    """What follows the name in the page's `user relay …`: on, password, keys, channels, commands."""
    users = [block.text.split() for block in blocks(PAGE) if block.tag == "acl"]
    assert all(words[0] == "user" for words in users)
    (found,) = [words[2:] for words in users if words[1] == user]
    return found


def granted(user: str = "relay") -> set[str]:
    return {word[1:] for word in rules(user) if word.startswith("+") and not word.startswith("+@")}


def in_scripts() -> set[str]:
    """Commands that Lua scripts call: the user needs them as if they were sent."""
    calls = [re.findall(r"redis\.p?call\('(\w+)'", Path(file).read_text()) for file in LUA]
    return {command.lower() for found in calls for command in found}


@pytest.fixture
def narrow(acl_server: AclServer) -> Iterator[str]:
    """URL of a server that lets in the page's user. Rules for commands that this server does not know are left out."""
    known = {name.decode() for name in acl_server.cli("COMMAND", "LIST")}
    fitting = [rule for rule in rules() if rule[0] != "+" or rule[1] == "@" or rule[1:].split("|")[0] in known]
    acl_server.cli("ACL", "SETUSER", "relay", "reset", *fitting)
    yield f"relay://relay:secret@127.0.0.1:{acl_server.port}/0"
    acl_server.cli("ACL", "DELUSER", "relay")


def test_every_command_that_a_script_calls_is_on_the_page() -> None:
    assert in_scripts() - granted() == set()


def direct(url: str) -> None:
    """Every move of the broker."""
    with Broker(url, lease=5.0) as broker:
        broker.enqueue("q", b"1", dedup_key="a", dedup_for=60)
        broker.enqueue("q", b"2", delay=0.001)
        broker.enqueue_many("q", [JobSpec(b"3", priority=9, dedup_key="b"), b"4"])
        broker.adopt([Arrival("q", "id", b"5", state="dead")])
        first, second = broker.claim("q", 2, wait=1.0)
        broker.extend(first)
        broker.release(first)
        broker.nack(second, "why", 0.001)
        broker.finish("q", count=1)
        broker.limit("q", rate=1000, max_inflight=100)
        broker.pause("q")
        broker.resume("q")
        for job in broker.claim("q", 10, wait=1.0):
            broker.nack(job, "why", dead=True)
        broker.reap("q")
        broker.promote("q")
        for state in ("ready", "delayed", "inflight", "dead"):
            broker.jobs("q", state)
        broker.show("q", first.id)
        broker.requeue("q")
        broker.cancel("q", first.id)
        assert broker.queues() == ["q"]
        broker.stats("q")
        assert broker.audit("q").clean
        broker.purge("q", ("ready", "delayed", "dead"))
        broker.enqueue("q", b"6" * 100_000)
        worker = Worker(broker, lambda job: worker.stop(), ["q"])
        assert worker.run() == 1
        assert broker.workers() == []
        assert broker.claim("q", wait=0.01) == []
        broker.schedule("s", "q", b"8", every=0.1, missed="all")
        broker.run_due()
        assert [stored.schedule.name for stored in broker.schedules()] == ["s"]
        broker.unschedule("s")
        assert broker.delete_queue("never") is True


def replicated(url: str) -> None:
    """With a replica asked for, WAIT is sent; that there is none is not the user's rights."""
    with (
        Broker(url, durability="replica:1", durability_timeout=0.01) as broker,
        pytest.raises(Exception, match=r"only 0 of 1 replicas"),
    ):
        broker.enqueue("q", b"7")


def through_celery(url: str) -> None:
    """What a Celery worker does by kombu: declare, publish to each kind of exchange, consume, ack, purge."""
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        for kind in ("direct", "topic", "fanout"):
            exchange = kombu.Exchange(f"x-{kind}", kind)
            queue = kombu.Queue(f"c-{kind}", exchange, routing_key="k")(channel)
            queue.declare()
            kombu.Producer(channel, exchange).publish({"n": 1}, routing_key="k")
            message = queue.get()
            assert message is not None
            message.ack()
            queue.purge()
            assert list(channel.list_bindings())
            queue.delete()
            exchange(channel).delete()
        # as Celery declares where its control commands, replies and events go
        box = kombu.Queue("c-box", durable=False, auto_delete=True, expires=10, message_ttl=5)
        with kombu.Consumer(channel, [box], callbacks=[lambda body, message: message.ack()], no_ack=True) as consumer:
            kombu.Producer(channel).publish({"n": 2}, routing_key="c-box")
            connection.drain_events(timeout=10)
            assert channel.queue_declare("c-box", passive=True).message_count == 0
            consumer.purge()
        assert channel.queue_delete("c-box", if_unused=True) == 0


def through_dramatiq(url: str) -> None:
    """Send and work off one message."""
    broker = RelayBroker(url)
    done = threading.Event()
    actor = dramatiq.actor(done.set, broker=broker, actor_name="done")
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    actor.send()
    assert done.wait(30)
    worker.stop()
    broker.close()


def by_command_line(url: str) -> None:
    """What an operator looks at."""
    cli = Cli(url)
    cli.run("job", "enqueue", "x", "-q", "q")
    job = cli.json("job", "ls", "-q", "q")
    assert job
    cli.run("stats")
    cli.run("dlq", "requeue", "-q", "q", "--all")
    cli.run("dlq", "purge", "-q", "q", "--all", "--yes")
    cli.run("audit")
    cli.run("doctor")


def test_a_user_with_just_these_rights_can_do_everything(narrow: str, acl_server: AclServer) -> None:
    acl_server.cli("CONFIG", "RESETSTAT")
    acl_server.cli("ACL", "LOG", "RESET")
    for use in (direct, replicated, through_celery, through_dramatiq, by_command_line):
        use(narrow)
    refused = {str(entry) for entry in acl_server.cli("ACL", "LOG")}
    # doctor asks for a setting that it can do without
    assert {one for one in refused if "config" not in one.lower()} == set()
    # and each right was made use of
    seen = {name.removeprefix("cmdstat_") for name in acl_server.info("commandstats")}
    assert granted() - seen - in_scripts() - set(ELSEWHERE) == set()


def test_durability_aof_works_with_these_rights(narrow: str, acl_server: AclServer) -> None:
    if b"waitaof" not in acl_server.cli("COMMAND", "LIST"):
        assert acl_server.flavour == "redis"
        return
    acl_server.cli("CONFIG", "SET", "appendonly", "yes")
    try:
        with Broker(narrow, durability="aof") as broker:
            assert not broker.enqueue("q", b"8").duplicate
            (job,) = broker.claim("q")
            assert broker.ack_many([job]) == [Verdict.DONE]
    finally:
        acl_server.cli("CONFIG", "SET", "appendonly", "no")


def test_the_page_s_users_as_lines_of_an_aclfile_are_taken() -> None:
    with AclServer("valkey") as server:
        file = Path(server.options["aclfile"])
        told = file.read_text() + "".join(f"user {one} {' '.join(rules(one))}\n" for one in ("relay", "migration"))
        file.write_text(told)
        assert server.cli("ACL", "LOAD") == b"OK"
        with Broker(f"relay://relay:secret@127.0.0.1:{server.port}/0") as broker:
            assert not broker.enqueue("q", b"x").duplicate


def celery_jobs(url: str, admin: redis.Redis) -> None:
    """Of kombu's: a message, one that a worker held, one that is none, and lists of others."""
    with kombu.Connection(url) as connection, connection.SimpleQueue("jobs") as queue:
        queue.put("one")
        queue.put("two")
    admin.hset("unacked", "tag", json.dumps([json.loads(admin.rpop("jobs")), "", "jobs"]))
    admin.zadd("unacked_index", {"tag": 1})
    admin.lpush("jobs", "none")
    admin.lpush("others", "x")


def dramatiq_jobs(url: str, admin: redis.Redis) -> None:
    """Of RedisBroker's: a message that waits, one that is delayed, one that is dead, one that a dead worker held."""
    broker = RedisBroker(url=url)
    broker.declare_queue("default")
    for delay in (None, None, None, 60_000):
        broker.enqueue(dramatiq.Message("default", "a", (), {}, {}), delay=delay)
    dead, held = admin.lpop("dramatiq:default", 2)
    admin.hset("dramatiq:default.XQ.msgs", dead, admin.hget("dramatiq:default.msgs", dead))
    admin.zadd("dramatiq:default.XQ", {dead: 1e12})
    admin.sadd("dramatiq:__acks__.w.default", held)
    broker.close()
    broker.client.close()


def test_a_user_with_just_these_rights_can_migrate_from_a_server(narrow: str, acl_server: AclServer) -> None:
    acl_server.cli("ACL", "SETUSER", "migration", "reset", *rules("migration"))
    name, password = acl_server.admin
    admin = redis.Redis(port=acl_server.port, db=1, username=name, password=password)
    for make in (celery_jobs, dramatiq_jobs):
        make(f"redis://{name}:{password}@127.0.0.1:{acl_server.port}/1", admin)
    acl_server.cli("CONFIG", "RESETSTAT")
    acl_server.cli("ACL", "LOG", "RESET")
    cli, origin = Cli(narrow), f"redis://migration:secret@127.0.0.1:{acl_server.port}/1"
    told = cli.run("migrate", "celery-redis", "--from", origin, code=1)
    assert "2 jobs migrated to " in told.stdout
    assert "not readable as messages of kombu" in told.stderr
    assert "4 jobs migrated to " in cli.run("migrate", "dramatiq-redis", "--from", origin).stdout
    assert acl_server.cli("ACL", "LOG") == []
    seen = {name.removeprefix("cmdstat_") for name in acl_server.info("commandstats")}
    assert granted("migration") - seen == set()
    admin.close()
    acl_server.cli("ACL", "DELUSER", "migration")


def test_a_right_that_only_a_script_needs_is_missed_as_any_other(narrow: str, acl_server: AclServer) -> None:
    acl_server.cli("ACL", "SETUSER", "relay", "-rpush")
    with Broker(narrow) as broker, pytest.raises(PermissionDenied, match="allow it in the user's ACL") as caught:
        broker.enqueue("q", b"x")
    assert caught.value.maybe_executed  # what the script did before it was refused stays done


def test_of_jobs_that_go_by_several_commands_some_may_be_stored_where_one_is_refused(
    narrow: str, acl_server: AclServer
) -> None:
    with Broker(narrow) as broker:
        placed = [broker.operations.prepare(queue, JobSpec(b"x")) for queue in ("allowed", "denied")]
        for job in placed:
            broker.drive(broker.operations.register(job.queue))
        acl_server.cli("ACL", "SETUSER", "relay", "resetkeys", "~relay:{allowed:*")
        with pytest.raises(PermissionDenied) as caught:
            broker.drive(broker.operations.enqueue_placed(placed))
        assert caught.value.maybe_executed
        with pytest.raises(PermissionDenied) as caught:
            broker.drive(broker.operations.enqueue_placed(placed[1:]))
        assert not caught.value.maybe_executed
