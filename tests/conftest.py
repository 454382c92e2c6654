"""Fixtures over real servers. One process per flavour and pytest worker, emptied before each test.

`flavour` runs a test on Valkey and on Redis; `@pytest.mark.parametrize("flavour", ["redis"], indirect=True)`
narrows it. A server program that is missing fails the test and says what to install; nothing is skipped.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Protocol, TypeVar, cast

import pytest
from celery import _state as celery_state
from hypothesis import HealthCheck, settings

from relay_core import Broker
from tests.command_line import Cli
from tests.servers import FLAVOURS, AclServer, Flavour, MissingServer, Near, Server, TlsServer
from tests.topologies import Cluster, SentinelTrio

# Threads of an adapter live as long as their process. What they log when pytest has ended shall not follow its summary.
logging.getLogger("relay").addHandler(logging.NullHandler())


# What whoever runs the tests may have exported: a broker or proxy of theirs, and colours where text is looked for.
_EXPORTED = re.compile("RELAY_(URL|PREFIX)|CELERY_.*|(FORCE|NO)_COLOR|.*_PROXY", re.IGNORECASE)


def pytest_configure() -> None:
    """Shells have what they start in the background ignore interrupts, and so would all that tests start, and send
    interrupts to."""
    for name in filter(_EXPORTED.fullmatch, list(os.environ)):
        del os.environ[name]
    # a busy machine lets any process stand still
    settings.register_profile("patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs later versions of other packages than those of `make oldest`."""
    wanting = [item for item in items for mark in item.iter_markers("since") if _is_older(*mark.args)]
    if wanting:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]


def _is_older(package: str, than: str) -> bool:
    installed, needed = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version(package), than))
    return installed < needed


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    """A Celery worker that runs in the test's own process sets the level of the root logger, and leaves it there."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def _current_app_as_before() -> Iterator[None]:
    """Such a worker makes its app the current one, and the default one: the adapter asks that one for its backend."""
    default, current = celery_state.default_app, celery_state._tls.current_app
    yield
    celery_state.default_app, celery_state._tls.current_app = default, current


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    """Such a worker leaves there how its children are to log, and Dramatiq's Prometheus middleware, before 2.0, that
    all processes count into files: none that a later test starts is to hear of it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread keeps the leases of Celery messages, nor sends their acks: the test does so itself. Theirs ends as soon
    as it was started. Others start as ever: one that this process has for good would never be started again."""
    monkeypatch.setattr("relay_adapters.celery.holding.heartbeat._beat", lambda leases: None)


@pytest.fixture
def near() -> Near:
    """Equal to what is nearer to a number of seconds than 2 and those that the test has taken by then."""
    began = time.monotonic()
    return lambda expected: pytest.approx(expected, abs=2 + time.monotonic() - began)


class Resettable(Protocol):
    def __enter__(self) -> object: ...

    def close(self) -> None: ...

    def reset(self) -> None: ...


T = TypeVar("T", bound=Resettable)


class Pool:
    """Servers that are started at their first use and serve the whole session."""

    def __init__(self) -> None:
        self._started: dict[tuple[object, ...], Resettable] = {}

    def get(self, make: Callable[..., T], *args: object, **options: object) -> T:
        """The server that `make(*args, **options)` makes, started and as good as new."""
        key = (make, args, *options.items())
        if key not in self._started:
            try:
                made = make(*args, **options)
            except MissingServer as error:
                pytest.fail(str(error), pytrace=False)
            made.__enter__()
            self._started[key] = made
        server = cast(T, self._started[key])
        try:
            server.reset()
        except BaseException:  # broken beyond repair by the last test: the next one gets a new one
            self._started.pop(key).close()
            raise
        return server

    def close(self) -> None:
        for server in self._started.values():
            server.close()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """Which server a test runs on: both."""
    chosen: Flavour = request.param
    return chosen


@pytest.fixture
def server(flavour: Flavour, pool: Pool) -> Server:
    """An empty server on a unix socket: the fastest, and what most tests want."""
    return pool.get(Server, flavour)


@pytest.fixture
def cli(server: Server) -> Cli:
    """The `relay` command, on that server."""
    return Cli(server.url)


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    """A broker on that server, for tests that need nothing else of it."""
    with Broker(server.url, retry_for=2.0) as broker:
        yield broker


@pytest.fixture
def unix_server(server: Server) -> Server:
    """The same, for tests that are about unix sockets."""
    return server


@pytest.fixture
def tcp_server(flavour: Flavour, pool: Pool) -> Server:
    """An empty server on a loopback port."""
    return pool.get(Server, flavour, tcp=True)


@pytest.fixture
def redis_server(pool: Pool) -> Server:
    """An empty Redis on a loopback port, for what one flavour shows."""
    return pool.get(Server, "redis", tcp=True)


@pytest.fixture
def acl_server(flavour: Flavour, pool: Pool) -> AclServer:
    """An empty server that lets in two users by password: see AclServer."""
    return pool.get(AclServer, flavour)


@pytest.fixture
def tls_server(pool: Pool) -> TlsServer:
    """An empty server that speaks TLS only."""
    return pool.get(TlsServer)


@pytest.fixture
def mutual_tls_server(pool: Pool) -> TlsServer:
    """An empty server that asks its clients for a certificate."""
    return pool.get(TlsServer, mutual=True)


@pytest.fixture
def sentinel_trio(pool: Pool) -> SentinelTrio:
    """Redis: a primary, a replica and three sentinels that agree. What a test breaks is healed."""
    return pool.get(SentinelTrio, "redis")


@pytest.fixture
def cluster(pool: Pool) -> Cluster:
    """Valkey: six nodes, all slots served. What a test breaks is healed."""
    return pool.get(Cluster, "valkey")
