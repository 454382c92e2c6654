"""URL schemes, failover lists and `broker_transport_options`: what works, and what each mistake is told."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from kombu import Connection
from kombu.exceptions import OperationalError

from relay_adapters.celery import failover, options
from relay_core import Broker, RetryPolicy
from relay_core.errors import (
    AuthError,
    InvalidArgument,
    InvalidUrl,
    PermissionDenied,
    RelayError,
    StoreError,
    Unavailable,
    UnsafeStore,
)
from tests.celery_workers import ROOT, CeleryWorker, client_of, lines
from tests.servers import AclServer, Server, TlsServer, eventually, free_port
from tests.topologies import Cluster, SentinelTrio


def round_trip(url: str, **conf: Any) -> Connection:
    """Publish and get one message through a connection of an app, which is given back open."""
    conf["broker_transport_options"] = {"client_name": uuid.uuid4().hex, **conf.get("broker_transport_options", {})}
    app = client_of(url, Path("."), **conf)
    connection = app.connection_for_read()
    queue = connection.SimpleQueue("trip")
    queue.put({"a": 1})
    message = queue.get(timeout=10)
    assert message.payload == {"a": 1}
    message.ack()
    queue.close()
    return connection


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_unix_sockets(unix_server: Server) -> None:
    with round_trip(unix_server.url) as connection:
        assert connection.as_uri() == unix_server.url


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_password_is_never_in_the_url_that_logs_show(acl_server: AclServer) -> None:
    with round_trip(acl_server.url) as connection:
        assert acl_server.password not in connection.as_uri()
        assert acl_server.password not in repr(connection)
        assert str(acl_server.port) in connection.as_uri()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_password_is_not_in_what_a_worker_tells_of_itself(acl_server: AclServer, tmp_path: Path) -> None:
    urls = f"{acl_server.url};relay+sentinel://:s3cret@127.0.0.1:1/x?sentinel_password=s3cret2"
    with CeleryWorker(urls, tmp_path, "-P", "solo"), client_of(acl_server.url, tmp_path) as client:
        stats = client.control.inspect(timeout=20, limit=1).stats()
    (told,) = stats.values()
    assert str(acl_server.port) in told["broker"]["hostname"]
    assert len(told["broker"]["alternates"]) == 2
    for secret in (acl_server.password, quote(acl_server.password, safe=""), "s3cret"):
        assert secret not in str(stats)


class Provider:
    """As redis-py has them."""

    def __init__(self, server: AclServer) -> None:
        self._server = server

    def get_credentials(self) -> tuple[str, str]:
        return self._server.user, self._server.password


class Comparable(Provider):
    """As a dataclass is, which has no hash."""

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize("kind", [Provider, Comparable])
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_credential_provider_logs_in(acl_server: AclServer, kind: type[Provider]) -> None:
    url = f"relay://127.0.0.1:{acl_server.port}/0"
    round_trip(url, broker_transport_options={"credential_provider": kind(acl_server)}).release()
    # where Celery's worker was imported, its connections try again, and kombu says in the end what it was
    with pytest.raises((RelayError, OperationalError), match="wrong or missing"), Connection(url) as nobody:
        nobody.ensure_connection(max_retries=1)


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_refusal_is_told_to_who_publishes_at_once_and_as_an_error_of_the_broker(
    acl_server: AclServer, tmp_path: Path
) -> None:
    """Apps have `except OperationalError` around `delay()`, which is what kombu's Redis transport raises then."""
    admin = acl_server.client()
    # of its own: a server that a connection of this process found fit is not looked at anew
    app = client_of(acl_server.url, tmp_path, broker_transport_options={"prefix": f"relay:{uuid.uuid4().hex}"})
    try:
        admin.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(OperationalError) as caught:
            app.send_task("pay")
        assert isinstance(caught.value, UnsafeStore)
        admin.config_set("maxmemory-policy", "noeviction")
        app.send_task("pay")
        admin.execute_command("ACL", "SETUSER", acl_server.user, "resetpass", ">another")
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(OperationalError) as caught:
            app.send_task("pay")
        assert isinstance(caught.value, AuthError)
    finally:
        admin.config_set("maxmemory-policy", "noeviction")
        app.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
@pytest.mark.parametrize("lost", [redis.ConnectionError, redis.TimeoutError])
def test_redis_results_that_are_away_are_told_to_who_publishes_as_over_kombus_redis_transport(
    tcp_server: Server, tmp_path: Path, lost: type[Exception]
) -> None:
    """The backend is asked first. Up to Celery 5.5 the error that comes of it is redis-py's, and apps expect one of the
    broker."""
    app = client_of(tcp_server.url, tmp_path, result_backend=f"redis://127.0.0.1:{free_port()}/0")

    def listen(*_args: Any) -> None:
        raise lost("gone")

    app.backend.on_task_call = listen
    with pytest.raises(OperationalError, match="gone"):
        app.send_task("pay")
    with app.connection() as connection:
        # a worker does not take it for the loss of its broker
        assert not issubclass(lost, connection.connection_errors)
    app.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_whatever_a_server_refuses_is_an_error_of_the_broker(
    acl_server: AclServer, tls_server: TlsServer, tmp_path: Path
) -> None:
    own = {"prefix": f"relay:{uuid.uuid4().hex}"}
    refused = {
        "no database of this number": f"{acl_server.url}99",
        "certificate": f"relays://localhost:{tls_server.port}/0",
    }
    for text, url in refused.items():
        with pytest.raises(OperationalError, match=text) as caught:
            client_of(url, tmp_path, broker_transport_options=own).send_task("pay")
        assert isinstance(caught.value, StoreError)
    # with a connection that was made before, too
    app = client_of(acl_server.url, tmp_path, broker_transport_options=own)
    app.send_task("pay")
    acl_server.cli("ACL", "SETUSER", acl_server.user, "-evalsha", "-eval")
    with pytest.raises(OperationalError, match="allow it in the user's ACL") as caught:
        app.send_task("pay")
    assert isinstance(caught.value, PermissionDenied)
    app.close()


@pytest.mark.since("kombu", "5.6.1")
@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_credential_provider_of_a_connection_logs_in(acl_server: AclServer) -> None:
    url = f"relay://127.0.0.1:{acl_server.port}/0"
    with Connection(url, credential_provider=Provider(acl_server)) as connection:
        connection.ensure_connection(max_retries=1)


def test_tls_by_scheme_and_by_setting(tls_server: TlsServer) -> None:
    round_trip(tls_server.url).release()
    plain = f"relay://localhost:{tls_server.port}/0"
    round_trip(plain, broker_use_ssl={"ssl_ca_certs": str(tls_server.ca), "ssl_cert_reqs": "CERT_REQUIRED"}).release()
    round_trip(plain, broker_use_ssl={"ca_certs": str(tls_server.ca)}).release()


def test_sentinels(sentinel_trio: SentinelTrio) -> None:
    with round_trip(sentinel_trio.url) as connection:
        assert connection.as_uri().startswith("relay+sentinel://127.0.0.1:")


def test_a_cluster(cluster: Cluster) -> None:
    with round_trip(cluster.url) as connection:
        assert connection.as_uri().startswith("relay+cluster://127.0.0.1:")


def test_the_embedded_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with round_trip("relay://") as connection:
        assert (tmp_path / ".relay").is_dir()
        broker = options.shared_broker(connection)
    broker.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_a_failover_list_of_several_hosts_and_sockets_moves_on(
    unix_server: Server, sentinel_trio: SentinelTrio
) -> None:
    gone = f"relay://127.0.0.1:{free_port()}/0"
    for spare in (unix_server.url, sentinel_trio.url):
        with Connection(f"{gone};{spare}", transport_options={"retry_for": 0.0}) as connection:
            connection.ensure_connection(max_retries=3, interval_start=0, interval_step=0)
            assert options.url_of(connection) == spare
            connection.SimpleQueue("list").put(1)


@pytest.mark.parametrize(
    ("urls", "given", "seconds"),
    [
        ("relay://127.0.0.1:1", {}, 2.0),
        ("relay://127.0.0.1:1;relay://127.0.0.1:2", {}, 0.25),
        ("relay://127.0.0.1:1;relay://127.0.0.1:2", {"retry_for": 7.0}, 7.0),
    ],
)
def test_a_command_is_not_repeated_for_long_where_there_is_another_broker(
    urls: str, given: dict[str, Any], seconds: float
) -> None:
    with Connection(urls, transport_options=given) as connection:
        for client in (connection, connection.clone(), connection.Pool(1).acquire()):
            assert options.shared_broker(client).store.settings.retry_for == seconds
            client.maybe_switch_next()
            assert options.shared_broker(client).store.settings.retry_for == seconds


def test_a_url_of_a_failover_list_inherits_nothing_from_the_one_before() -> None:
    with Connection("relay://user:secret@127.0.0.1:1/3;relay://127.0.0.2") as connection:
        assert connection.as_uri() == "relay://**@127.0.0.1:1/3"
        connection.maybe_switch_next()
        assert connection.as_uri() == "relay://127.0.0.2:6379/0"


def test_a_connection_knows_its_port_before_it_is_made_and_after_it_has_switched() -> None:
    with Connection("relay://127.0.0.1:7001;relay://127.0.0.1;relay+unix:///tmp/s") as connection:
        assert connection.port == connection.clone().port == connection.info()["port"] == 7001
        connection.maybe_switch_next()
        assert connection.port == connection.clone().port == 6379
        connection.maybe_switch_next()
        assert connection.port is None
    with Connection("relay://127.0.0.1:99999999/0") as connection:
        assert connection.port is None
    with Connection("redis://127.0.0.1:7002") as other:
        assert other.port == 7002


def test_a_list_with_brokers_of_others_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    options._said.clear()  # by other tests of this process
    with Connection("relay://127.0.0.1:1;redis://127.0.0.1:2") as connection:
        assert connection.transport is not None
    assert "has redis:// beside relay's" in caplog.text


def test_a_wrong_url_is_not_said_to_be_an_option() -> None:
    with pytest.raises(InvalidUrl, match=r"^database 'abc' in the"):
        Connection("relay://127.0.0.1:1/abc").channel()


def test_a_password_that_is_not_quoted_is_not_in_the_error() -> None:
    with pytest.raises(RelayError, match="'#'") as raised:
        Connection("relay://user:secret#1@127.0.0.1:6379/0").channel()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_options_reach_the_broker(tcp_server: Server) -> None:
    given = {
        "prefix": "shop", "lease": 30, "max_deliveries": 3, "max_payload": 1000, "keep_dead": 60,
        "retry": {"base": 0.5, "max_retries": 7}, "queue_retry": {"slow": RetryPolicy(base=9.0)},
    }  # fmt: skip
    with Connection(tcp_server.url, transport_options=given) as connection:
        broker = options.shared_broker(connection)
        settings = broker.settings
        assert (settings.prefix, settings.lease, settings.max_deliveries) == ("shop", 30, 3)
        assert (settings.retry.base, settings.retry.max_retries) == (0.5, 7)
        assert settings.queue_retry["slow"].base == 9.0
        assert options.shared_broker(connection) is broker
        with pytest.raises(InvalidArgument, match=r"payload has \d+ bytes, at most 1000"):
            connection.SimpleQueue("big").put("x" * 2000)


def test_apps_that_a_key_prefix_keeps_apart_stay_apart(tcp_server: Server) -> None:
    given = {"global_keyprefix": "shop:", "socket_connect_timeout": 3}
    with Connection(tcp_server.url, transport_options=given) as connection:
        assert options.options_of(connection) == {"prefix": "shop:relay", "connect_timeout": 3, "retry_for": 2.0}
        connection.SimpleQueue("q").put(1)
    with Broker(tcp_server.url, prefix="shop:relay") as here, Broker(tcp_server.url) as there:
        assert (here.stats("q").ready, there.stats("q").ready) == (1, 0)
    with Connection(tcp_server.url, transport_options={**given, "prefix": "mine"}) as connection:
        assert options.options_of(connection)["prefix"] == "mine"


WRONG = [
    ({"leese": 3}, r"no option 'leese'; did you mean 'lease'"),
    ({"lease": "long"}, r"broker_transport_options: lease must be .* got 'long'"),
    ({"max_deliveries": 0}, r"max_deliveries must be a whole number from 1 .* got 0"),
    ({"durability": "always"}, r"durability must be .* got 'always'"),
    ({"prefix": "a{b"}, r"prefix must be .* got 'a\{b'"),
    ({"global_keyprefix": "{shop}"}, r"\['global_keyprefix'\] becomes .* got '\{shop\}'; give 'prefix' instead"),
    ({"retry": 3}, r"\['retry'\] must be a dict or a RetryPolicy, got 3"),
    ({"retry": {"bass": 1}}, r"\['retry'\] has no field 'bass'; known: base, factor"),
    ({"retry": {"base": -1}}, r"\['retry'\]: retry base must be .* got '-1'"),
    ({"queue_retry": {"slow": {"maxx": 1}}}, r"\['queue_retry'\]\['slow'\] has no field 'maxx'"),
    ({"queue_retry": [1]}, r"\['queue_retry'\] must map queues to policies"),
    ({"priority_order": "up"}, r"\['priority_order'\] must be 'amqp' \(9 first\) or 'redis' \(0 first\), got 'up'"),
]


@pytest.mark.parametrize(
    ("given", "told"), WRONG, ids=[next(iter(given)) + str(n) for n, (given, _) in enumerate(WRONG)]
)
def test_a_wrong_option_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    connection = Connection("relay://127.0.0.1:1/0", transport_options=given)
    with pytest.raises(InvalidArgument, match=told):
        connection.channel()


@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
def test_options_of_other_transports_are_taken_and_explained_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """What matters to workers alone is no warning in the scripts that send tasks."""
    monkeypatch.setattr(options, "is_worker", lambda: level == logging.WARNING)
    given = {"visibility_timeout": 3600, "fanout_prefix": True, "max_retries": 3, f"mine_{uuid.uuid4().hex}": 1}
    options._said.clear()
    with caplog.at_level(logging.DEBUG, "relay.celery"):
        for _ in range(2):
            with Connection("relay://127.0.0.1:1/0", transport_options=given) as connection:
                options.options_of(connection)
    told = [record.message for record in caplog.records if record.name == "relay.celery"]
    assert len(told) == 2
    assert "visibility_timeout'] has no effect on relay" in told[0]
    assert [record.levelno for record in caplog.records if record.name == "relay.celery"] == [level, logging.WARNING]
    assert "'mine_" in told[1]


def warnings_of(caplog: pytest.LogCaptureFixture, given: dict[str, Any]) -> list[str]:
    """What a process is told of these options."""
    options._said.clear()
    with (
        caplog.at_level(logging.WARNING, "relay.celery"),
        Connection("relay://127.0.0.1:1/0", transport_options=given) as connection,
    ):
        options.options_of(connection)
    return [record.message for record in caplog.records if record.name == "relay.celery"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"socket_timeout": 30}, "socket_timeout"),
        ({"socket_connect_timeout": 15.0}, "socket_connect_timeout"),
        ({"connect_timeout": 4, "lease": 3}, "connect_timeout"),
        ({"socket_timeout": 30, "lease": 60}, None),
        ({"socket_timeout": 5}, None),
    ],
)
def test_who_waits_for_the_server_as_long_as_a_lease_is_told_what_comes_of_it(
    caplog: pytest.LogCaptureFixture, given: dict[str, Any], named: str | None
) -> None:
    told = warnings_of(caplog, given)
    assert [one.partition("]")[0] for one in told] == ([] if named is None else [f"broker_transport_options[{named!r}"])


@pytest.mark.parametrize("order", [None, "amqp", "redis"])
def test_who_has_priority_steps_is_told_that_9_comes_first_unless_the_order_is_named(
    caplog: pytest.LogCaptureFixture, order: str | None
) -> None:
    given = {"priority_steps": [0, 3, 6, 9]} | ({} if order is None else {"priority_order": order})
    told = warnings_of(caplog, given)
    assert len(told) == (order is None)
    assert all("'priority_order': 'redis'" in one for one in told), told


def test_every_option_of_kombus_redis_transport_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """Those that a loop's timers ask for are in no list of its own."""
    redis = pytest.importorskip("kombu.transport.redis")
    given = {*redis.Channel.from_transport_options, *redis.SentinelChannel.from_transport_options}
    given |= {"unacked_restore_interval", "reauth_check_interval"}
    options._said.clear()
    with caplog.at_level(logging.WARNING, "relay.celery"):
        options._check_names(dict.fromkeys(given - {"visibility_timeout"}))
    assert [record.message for record in caplog.records if record.name == "relay.celery"] == []


def test_a_server_that_is_not_there_is_a_connection_error_within_the_time_given() -> None:
    url = f"relay://127.0.0.1:{free_port()}/0"
    with Connection(url, transport_options={"retry_for": 0.0}) as connection, pytest.raises(Unavailable) as caught:
        connection.connect()
    assert isinstance(caught.value, connection.connection_errors)


@pytest.fixture
def late() -> Iterator[Server]:
    """A server with a port, and not started yet."""
    server = Server("redis", tcp=True)
    server.pick_ports()
    yield server
    server.close()


def test_a_worker_waits_for_its_broker_by_looking_not_by_sleeping(late: Server) -> None:
    with Connection(late.url, transport_options={"retry_for": 0.0}) as connection:
        pace = failover.Pace(connection)
        assert pace(0) is False  # kombu does not sleep
        pace._wait = 60.0
        done = threading.Event()
        waiting = threading.Thread(target=lambda: (pace.wait(), done.set()), daemon=True)
        waiting.start()
        assert not done.wait(0.5)
        late.start()
        assert done.wait(10)  # of the 60 s that kombu would have slept


class Clock:
    """For a module's `time`: it passes by sleeping only."""

    def __init__(self, asleep: Callable[[], object]) -> None:
        self.now, self._asleep = 1000.0, asleep

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._asleep()


def _taken(clock: Clock, connection: Connection) -> float:
    """How long a worker waits before it connects."""
    began = clock.now
    failover.Pace(connection).wait()
    failover.Refusals.of(connection).connected()
    return clock.now - began


def test_a_broker_that_refuses_what_a_worker_needs_is_tried_ever_more_seldom(
    late: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(lambda: None)
    monkeypatch.setattr(failover, "time", clock)
    late.start()
    with Connection(late.url) as connection:
        refusals = failover.Refusals.of(connection)
        refusals.connected()
        waits = []
        for _ in range(17):
            refusals.ended(late.url, PermissionDenied("no"))
            waits.append(_taken(clock, connection))
        assert waits == pytest.approx([*range(2, 32, 2), 30, 30], abs=0.2)
        assert _taken(clock, connection) == 0, "another connection of the worker, which has waited"
        refusals.ended(late.url, Unavailable("cut"))
        assert _taken(clock, connection) == 0, "an ordinary outage"
        clock.now += 31
        refusals.ended(late.url, PermissionDenied("no"))
        assert _taken(clock, connection) == pytest.approx(2, abs=0.2), "it was right for a while"


def test_a_broker_that_is_started_anew_after_it_refused_what_a_worker_needs_is_not_waited_for(
    late: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be set right by now."""
    clock = Clock(lambda: late.kill() if 1004 < clock.now < 1004.3 else None)
    monkeypatch.setattr(failover, "time", clock)
    late.start()
    with Connection(late.url) as connection:
        refusals = failover.Refusals.of(connection)
        refusals.connected()
        for _ in range(9):
            refusals.ended(late.url, PermissionDenied("no"))
        assert _taken(clock, connection) == pytest.approx(4.2, abs=0.3)
        late.start()
        assert _taken(clock, connection) == 0


def test_the_connections_that_publish_keep_to_their_own_retry_policy(late: Server) -> None:
    app = client_of(late.url, Path("."), broker_transport_options={"client_name": uuid.uuid4().hex, "retry_for": 0.0})
    with app.pool.acquire() as connection:
        failover.Pace.give(connection)
        assert failover.Pace.of(connection) is None


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_two_apps_of_one_process_share_a_broker_only_where_they_agree(tcp_server: Server) -> None:
    with (
        Connection(tcp_server.url) as one,
        Connection(tcp_server.url) as same,
        Connection(tcp_server.url, transport_options={"prefix": "two"}) as other,
    ):
        one.SimpleQueue("q").put(1)
        other.SimpleQueue("q").put(2)
        assert options.shared_broker(one) is options.shared_broker(same)
        assert other.SimpleQueue("q").get(timeout=5).payload == 2
        with Broker(tcp_server.url) as broker:
            assert broker.stats("q").ready == 1


def test_that_a_visibility_timeout_has_no_effect_is_a_warning_in_workers_alone(server: Server, tmp_path: Path) -> None:
    """Cron sends mail of what a script prints, as a warning is where nothing logs."""
    given = {"visibility_timeout": 3600}
    script = (
        "import json, sys; from celery import Celery\n"
        "app = Celery('sends', broker=sys.argv[1], broker_transport_options=json.loads(sys.argv[2]))\n"
        "app.send_task('tests.celery_app.run', ['one'])"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, server.url, json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with CeleryWorker(server.url, tmp_path, "-P", "solo", options=given) as worker:
        eventually(lambda: lines(tmp_path), "the task to run")
        told = [line for line in worker.text.splitlines() if "visibility_timeout" in line]
    assert len(told) == 1
    assert "WARNING" in told[0]
