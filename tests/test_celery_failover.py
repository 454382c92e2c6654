"""A broker of a list that takes connections and refuses what is done with them: workers and producers turn to the next
one, and no job becomes two."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, group
from celery.signals import before_task_publish
from kombu import Connection
from kombu.exceptions import OperationalError

from relay_adapters.celery import failover, options
from relay_adapters.celery.failover import Refusals
from relay_core import Broker
from relay_core.connection import fitness
from relay_core.errors import PermissionDenied, ServerTooOld, StoreError, Unavailable
from tests.celery_workers import CeleryWorker, client_of, lines
from tests.forking import child_of, code_of
from tests.proxy import Proxy, to_port
from tests.servers import AclServer, Server, eventually


@pytest.fixture
def first() -> Iterator[AclServer]:
    """The first broker of the list."""
    with AclServer() as server:
        yield server


@pytest.fixture
def second() -> Iterator[Server]:
    """The next one."""
    with Server("redis", tcp=True) as server:
        yield server


def lacks_rights(server: AclServer) -> None:
    """Which a connection alone does not need."""
    server.cli("ACL", "SETUSER", server.user, "-evalsha")


def may_evict(server: AclServer) -> None:
    server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    server.cli("CLIENT", "KILL", "USER", server.user)


def refuses_its_login(server: AclServer) -> None:
    server.cli("ACL", "SETUSER", server.user, "resetpass", ">another")
    server.cli("CLIENT", "KILL", "USER", server.user)


REFUSES = pytest.mark.parametrize("refuses", [lacks_rights, may_evict, refuses_its_login])


def app_of(urls: str, folder: Path) -> Celery:
    """With connections that are no other test's."""
    return client_of(urls, folder, broker_transport_options={"client_name": uuid.uuid4().hex})


def sent(url: str) -> list[Any]:
    """The first argument of each task that waits there."""
    with Broker(url) as broker:
        return [json.loads(job.payload.partition(b"\n")[2])[0][0] for job in broker.jobs("celery", "ready")]


def as_it_was(server: AclServer) -> str:
    """Let the worker's user in again: its URL."""
    server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.cli("ACL", "LOAD")
    return server.url


# workers


def is_a_replica(server: Server) -> None:
    """Of nobody who is there."""
    server.cli("REPLICAOF", "127.0.0.1", "1")


def lacks_replicas(server: Server) -> None:
    server.cli("CONFIG", "SET", "min-replicas-to-write", "1")


@pytest.mark.parametrize("cannot", [is_a_replica, lacks_replicas])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
def test_a_worker_turns_to_the_next_broker_where_one_is_there_and_cannot_serve(
    first: AclServer, second: Server, tmp_path: Path, cannot: Callable[[Server], None], late: bool
) -> None:
    if not late:
        cannot(first)
    with (
        app_of(second.url, tmp_path) as client,
        CeleryWorker(f"{first.url};{second.url}", tmp_path, "-P", "solo") as running,
    ):
        if late:
            cannot(first)
        client.send_task("tests.celery_app.run", ["here"])
        eventually(lambda: lines(tmp_path, start="here"), "the task on the next broker")
        assert not running.logged("needs, next try in"), "it has waited for none"


@pytest.mark.parametrize("flags", [("-P", "solo"), ("-P", "prefork", "-c", "1"), ("-P", "gevent", "-c", "2")], ids=str)
@REFUSES
def test_a_worker_starts_on_the_next_broker_where_the_first_refuses_it(
    first: AclServer, second: Server, tmp_path: Path, flags: tuple[str, ...], refuses: Callable[[AclServer], None]
) -> None:
    refuses(first)
    with (
        app_of(second.url, tmp_path) as client,
        CeleryWorker(f"{first.url};{second.url}", tmp_path, *flags) as running,
    ):
        client.send_task("tests.celery_app.run", ["here"])
        eventually(lambda: lines(tmp_path, start="here"), "the task on the next broker")
        assert client.control.inspect(timeout=20, limit=1).ping(), "control is there, too"
        assert not running.logged("needs, next try in"), "it has waited for none"


@REFUSES
def test_a_worker_turns_to_the_next_broker_of_its_list_when_one_comes_to_refuse_it(
    first: AclServer, second: Server, tmp_path: Path, refuses: Callable[[AclServer], None]
) -> None:
    with (
        app_of(second.url, tmp_path) as client,
        CeleryWorker(f"{first.url};{second.url}", tmp_path, "-P", "solo") as running,
    ):
        refuses(first)
        client.send_task("tests.celery_app.run", ["here"])
        eventually(lambda: lines(tmp_path, start="here"), "the task on the next broker")
        assert not running.logged("needs, next try in"), "it has waited for none"


def test_a_workers_beat_turns_to_the_next_broker_when_one_comes_to_refuse_it(
    first: AclServer, second: Server, tmp_path: Path
) -> None:
    entry = {"task": "tests.celery_app.run", "schedule": 0.2, "args": ["tick"]}
    conf = {"beat_schedule": {"ticks": entry}, "beat_schedule_filename": str(tmp_path / "beat")}
    with CeleryWorker(f"{first.url};{second.url}", tmp_path, "-c", "1", "-B", conf=conf):
        eventually(lambda: lines(tmp_path), "a tick on the first broker")
        lacks_rights(first)
        with Broker(second.url) as broker:
            eventually(lambda: broker.stats("celery").counters["claimed"], "a tick on the next broker")


def test_a_worker_that_all_of_its_list_refuse_waits_after_the_last_and_goes_on_with_the_first_that_does_not(
    first: AclServer, tmp_path: Path
) -> None:
    with AclServer() as last, CeleryWorker(f"{first.url};{last.url}", tmp_path, "-P", "solo") as running:
        lacks_rights(last)
        lacks_rights(first)
        eventually(lambda: running.logged("next try in 4 s: "), "its second round")
        told = re.findall(r"worker needs, (.*?): 127\.0\.0\.1:(\d+): NOPERM", running.text)
        turns, ports = "which turns to the next one", (str(first.port), str(last.port))
        assert told[:2] == [*zip((turns, "next try in 2 s"), ports, strict=True)]
        assert told[2:] == [*zip((turns, "next try in 4 s"), ports, strict=True)]
        with app_of(as_it_was(last), tmp_path) as client:
            client.send_task("tests.celery_app.run", ["last"])
            eventually(lambda: lines(tmp_path, start="last"), "the task")


class Clock:
    """For a module's `time`: it passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.asleep: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.asleep()


class Consuming:
    """What a worker does with its connection, which it makes anew each time.

    :ivar waited: seconds, before it was made
    """

    def __init__(self, urls: str, clock: Clock) -> None:
        self._urls, self._clock = urls, clock
        self._url = ""
        self.waited = 0.0

    def _connection(self) -> Connection:
        return Connection(self._urls, transport_options={"retry_for": 0.0})

    def connect(self) -> str:
        """Where it ends up."""
        began = self._clock.now
        with self._connection() as connection:
            connection.completes_cycle = failover.Pace(connection)
            connection.ensure_connection(max_retries=5)
            self.waited, self._url = self._clock.now - began, options.url_of(connection)
        return self._url

    def ends(self, error: BaseException) -> None:
        with self._connection() as connection:
            Refusals.of(connection).ended(self._url, error)

    def is_refused(self) -> None:
        self.connect()
        self.ends(PermissionDenied("no"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(failover, "time", clock)
    return clock


def test_a_worker_waits_once_a_round_and_ever_longer(first: AclServer, second: Server, clock: Clock) -> None:
    worker = Consuming(f"{first.url};{second.url}", clock)
    waits = []
    for _ in range(17):
        worker.is_refused()
        waits.append(worker.waited)
        worker.is_refused()
        assert worker.waited == 0, "there was another one to turn to"
    assert waits == pytest.approx([0, *range(2, 32, 2), 30], abs=0.3)


def test_of_those_that_cannot_serve_just_now_none_is_waited_for(first: AclServer, second: Server, clock: Clock) -> None:
    worker, loading = Consuming(f"{first.url};{second.url}", clock), Unavailable("LOADING", answered=True)
    for _ in range(3):
        assert worker.connect() == first.url
        worker.ends(loading)
        assert worker.connect() == second.url
        worker.ends(loading)
        assert worker.waited == 0
    worker.connect()
    worker.ends(Unavailable("cut"))
    assert worker.connect() == first.url, "which says nothing of its server"


def test_one_that_refused_is_passed_over_for_as_long_as_the_next_one_serves(
    first: AclServer, second: Server, clock: Clock
) -> None:
    worker = Consuming(f"{first.url};{second.url}", clock)
    worker.is_refused()
    for _ in range(2):
        assert worker.connect() == second.url, "also another connection of the worker"
    clock.now += 3600
    assert worker.connect() == second.url
    clock.now += 3600
    worker.ends(Unavailable("cut"))
    assert worker.connect() == first.url, "it may be right by now"


def test_where_the_others_are_away_one_that_refused_is_tried_ever_more_seldom(first: AclServer, clock: Clock) -> None:
    away = Server("redis", tcp=True)
    away.pick_ports()
    try:
        worker = Consuming(f"{first.url};{away.url}", clock)
        waits = []
        for _ in range(5):
            worker.is_refused()
            waits.append(worker.waited)
        assert waits == pytest.approx([0, 2, 4, 6, 8], abs=0.3)
        clock.asleep = lambda: None if away.running else away.start()
        assert worker.connect() == first.url
        assert worker.waited == pytest.approx(0.2), "one came back"
        worker.ends(PermissionDenied("no"))
        assert worker.connect() == away.url
        assert worker.waited == 0
    finally:
        away.close()


def test_a_child_that_is_forked_while_one_is_passed_over_does_not_do_so_for_ever(
    first: AclServer, second: Server, clock: Clock
) -> None:
    """It publishes only, and hears nothing of what its parent finds out later."""
    urls = f"{first.url};{second.url}"
    Consuming(urls, clock).is_refused()
    second.close()

    def publishes() -> bool:
        with Connection(urls, transport_options={"retry_for": 0.0}) as connection:
            connection.ensure_connection(max_retries=3, interval_start=0, interval_step=0)
            return options.url_of(connection) == first.url

    assert code_of(child_of(publishes)) == 0


@pytest.mark.parametrize("consumes", [True, False], ids=["worker", "producer"])
def test_a_server_that_is_too_old_is_passed_over(
    first: AclServer, second: Server, monkeypatch: pytest.MonkeyPatch, consumes: bool
) -> None:
    unfit = fitness.unfit

    def too_old(info: bytes, at: str, *args: Any) -> Any:
        return ServerTooOld(f"{at}: old") if str(first.port) in at else unfit(info, at, *args)

    monkeypatch.setattr(fitness, "unfit", too_old)
    with Connection(f"{first.url};{second.url}") as connection:
        if consumes:
            connection.completes_cycle = failover.Pace(connection)
        connection.ensure_connection(max_retries=1)
        assert options.url_of(connection) == second.url


# producers


@REFUSES
def test_a_task_goes_to_the_next_broker_where_the_first_refuses_it(
    first: AclServer, second: Server, tmp_path: Path, refuses: Callable[[AclServer], None]
) -> None:
    refuses(first)
    with app_of(f"{first.url};{second.url}", tmp_path) as client:
        for key in ("one", "two"):
            client.send_task("pay", [key])
    assert sent(second.url) == ["one", "two"]
    assert sent(as_it_was(first)) == []


def test_a_task_does_so_over_a_connection_that_was_made_before(
    first: AclServer, second: Server, tmp_path: Path
) -> None:
    with app_of(f"{first.url};{second.url}", tmp_path) as client:
        client.send_task("pay", ["before"])
        lacks_rights(first)
        for key in ("one", "two"):
            client.send_task("pay", [key])
    assert sent(second.url) == ["one", "two"]
    assert sent(as_it_was(first)) == ["before"]


def test_a_group_does_so_too(first: AclServer, second: Server, tmp_path: Path) -> None:
    with app_of(f"{first.url};{second.url}", tmp_path) as client:
        client.send_task("pay", ["before"])
        lacks_rights(first)
        group(client.signature("pay", [n], app=client) for n in range(30)).apply_async()
    assert sent(second.url) == [*range(30)]
    assert sent(as_it_was(first)) == ["before"]


def test_a_group_does_so_whatever_its_own_thread_met_before(first: AclServer, second: Server, tmp_path: Path) -> None:
    """What it could not store is not taken for what may be there."""

    def slow(body: Any, **_: Any) -> None:
        if body[0][0] == "last":
            eventually(lambda: "errorstat_NOPERM" in first.info("errorstats"), "it is refused")

    with app_of(f"{first.url};{second.url}", tmp_path) as client:
        before_task_publish.connect(slow)
        try:
            client.send_task("pay", ["before"])
            lacks_rights(first)
            group([client.signature("pay", [key], app=client) for key in ("early", "last")]).apply_async()
        finally:
            before_task_publish.disconnect(slow)
    assert sent(second.url) == ["early", "last"]


@pytest.mark.parametrize("together", [False, True], ids=["task", "group"])
def test_it_goes_to_the_last_where_all_others_refuse_it(
    first: AclServer, second: Server, tmp_path: Path, together: bool
) -> None:
    with AclServer() as between, app_of(f"{first.url};{between.url};{second.url}", tmp_path) as client:
        client.send_task("pay", ["before"])
        lacks_rights(first)
        lacks_rights(between)
        task = client.signature("pay", [1], app=client)
        group([task, task]).apply_async() if together else task.apply_async()
    assert sent(second.url) == [1] * (1 + together)


def test_where_all_refuse_the_error_says_so(first: AclServer, tmp_path: Path) -> None:
    lacks_rights(first)
    with AclServer() as last, app_of(f"{first.url};{last.url}", tmp_path) as client:
        lacks_rights(last)
        for send in (client.send_task, lambda *args: group([client.signature(*args, app=client)] * 2).apply_async()):
            with pytest.raises(OperationalError, match="allow it in the user's ACL") as raised:
                send("pay", ["x"])
            assert isinstance(raised.value, StoreError)


@pytest.mark.parametrize("together", [False, True], ids=["task", "group"])
def test_a_task_that_the_first_broker_may_have_stored_is_not_sent_to_the_next(
    first: AclServer, second: Server, tmp_path: Path, together: bool
) -> None:
    """Its reply was lost, and then the server came to refuse."""
    with Proxy(to_port(first.port)) as proxy:
        url = first.url.replace(f":{first.port}/", f":{proxy.port}/")
        with app_of(f"{url};{second.url}", tmp_path) as client:

            def send(*keys: Any) -> None:
                tasks = [client.signature("pay", [key], app=client) for key in keys]
                group(tasks).apply_async() if together else tasks[0].apply_async()

            client.send_task("pay", ["before"])
            first.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")  # seen by a new connection only
            proxy.cut_reply(b"in-doubt")
            with pytest.raises(OperationalError, match="set it to noeviction"):
                send("in-doubt", "too")
            assert proxy.pending == 0
            assert sent(second.url) == []
            send("next", "two")
            assert sent(second.url) == ["next", "two"][: 1 + together]
    assert sent(as_it_was(first)) == ["before", "in-doubt", "too"][: 2 + together]


@pytest.mark.parametrize("together", [False, True], ids=["task", "group"])
def test_nor_is_one_that_it_has_stored_before_it_refuses_what_comes_next(
    first: AclServer, second: Server, tmp_path: Path, together: bool
) -> None:
    """Its queue was deleted meanwhile, and is put among those that people are shown again."""
    with app_of(f"{first.url};{second.url}", tmp_path) as client:
        client.send_task("pay", ["before"])
        with Broker(first.url) as broker:
            broker.purge("celery")
            assert broker.delete_queue("celery")
        first.cli("ACL", "SETUSER", first.user, "-sadd")
        task = client.signature("pay", [1], app=client)
        with pytest.raises(OperationalError, match="'sadd'"):
            group([task, task]).apply_async() if together else task.apply_async()
    assert sent(second.url) == []
    assert sent(as_it_was(first)) == [1] * (1 + together)


def test_nor_is_one_of_which_it_has_stored_a_half(first: AclServer, second: Server, tmp_path: Path) -> None:
    first.cli("ACL", "SETUSER", first.user, "-rpush")  # which its script comes to when the record is there
    with app_of(f"{first.url};{second.url}", tmp_path) as client:
        with pytest.raises(OperationalError, match="script") as raised:
            client.send_task("pay", [1])
        assert isinstance(raised.value.__cause__, StoreError)
        assert raised.value.__cause__.maybe_executed
    assert sent(second.url) == []


def test_a_message_for_several_queues_that_one_has_by_then_is_not_sent_to_the_next(
    first: AclServer, second: Server
) -> None:
    with Connection(f"{first.url};{second.url}", transport_options={"client_name": uuid.uuid4().hex}) as connection:
        channel = connection.default_channel
        channel.exchange_declare("both", "fanout")
        for queue in ("allowed", "denied"):
            channel.queue_declare(queue)
            channel.queue_bind(queue, "both")
        first.cli("ACL", "SETUSER", first.user, "resetkeys", "~relay:{celery}*", "~relay:queues", "~relay:{allowed:*")
        with pytest.raises(OperationalError, match="NOPERM"):
            connection.Producer().publish({}, exchange="both", retry=True, retry_policy={"max_retries": 3})
    with Broker(as_it_was(first)) as broker:
        assert [broker.stats(queue).ready for queue in ("allowed", "denied")] == [1, 0]
    with Broker(second.url) as broker:
        assert [broker.stats(queue).ready for queue in ("allowed", "denied")] == [0, 0]
