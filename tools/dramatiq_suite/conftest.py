"""Fixtures of Dramatiq's published tests, with the broker that is judged in the place of theirs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq import Worker
from dramatiq.rate_limits import backends as limits
from dramatiq.results import backends as results

from .judged import REDIS_URL, judged

# They look into another broker: its keys and scripts, its attributes, or its server.
INTERNALS = {
    "test_redis_unacked_messages_can_be_requeued": "RedisBroker's scripts and keys",
    "test_redis_messages_can_be_dead_lettered": "RedisBroker's keys",
    "test_redis_dead_lettered_messages_are_cleaned_up": "RedisBroker's maintenance",
    "test_redis_messages_belonging_to_missing_actors_are_rejected": "RedisBroker's keys",
    "test_redis_requeues_unhandled_messages_on_shutdown": "RedisBroker's keys",
    "test_redis_requeues_unhandled_delay_messages_on_shutdown": "RedisBroker's keys",
    "test_redis_broker_can_connect_via_url": "RedisBroker's arguments",
    "test_redis_broker_can_connect_via_client": "RedisBroker's arguments",
    "test_redis_consumer_ack_can_retry_on_connection_error": "RedisBroker's scripts",
    "test_redis_consumer_nack_can_retry_on_connection_error": "RedisBroker's scripts",
    "test_redis_join_race_condition": "RedisBroker's scripts",
    "test_stub_broker_can_be_flushed": "the stub broker's attributes",
    # a RedisBroker takes messages for queues that only other applications declare, and so does relay
    "test_stub_broker_raises_queue_error_when_enqueueing_messages_on_undeclared_queues": "the stub broker's rule",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [one for one in items if one.name.partition("[")[0] in INTERNALS]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [one for one in items if one not in left_out]


@pytest.fixture(autouse=True)
def the_tests_own_global_broker() -> Iterator[None]:
    yield
    dramatiq.broker.global_broker = None


@pytest.fixture
def stub_broker() -> Iterator[Any]:
    broker = judged()
    broker.forget_all()
    assert broker.failures is not None
    broker.emit_after("process_boot")
    dramatiq.set_broker(broker)
    yield broker
    broker.forget_all()
    broker.close()


redis_broker = stub_broker


def _working(broker: Any, **options: Any) -> Iterator[Worker]:
    worker = Worker(broker, worker_threads=32, **options)
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def stub_worker(stub_broker: Any) -> Iterator[Worker]:
    yield from _working(stub_broker, worker_timeout=100)


@pytest.fixture
def redis_worker(redis_broker: Any) -> Iterator[Worker]:
    yield from _working(redis_broker)


@pytest.fixture
def start_cli() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def run(broker_module: str, *, extra_args: Any = (), **options: Any) -> subprocess.Popen[bytes]:
        options.setdefault("bufsize", 0)
        started.append(subprocess.Popen([sys.executable, "-m", "dramatiq", broker_module, *extra_args], **options))
        return started[-1]

    yield run
    for process in started:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def info_logging() -> Iterator[None]:
    import logging

    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


def _emptied(backend: Any) -> Any:
    backend.client.flushall()
    return backend


@pytest.fixture
def redis_result_backend() -> Any:
    return _emptied(results.RedisBackend(url=REDIS_URL))


@pytest.fixture
def stub_result_backend() -> Any:
    return results.StubBackend()


@pytest.fixture(params=["redis", "stub"])
def result_backend(request: pytest.FixtureRequest) -> Any:
    return _emptied(results.RedisBackend(url=REDIS_URL)) if request.param == "redis" else results.StubBackend()


@pytest.fixture(params=["redis", "stub"])
def rate_limiter_backend(request: pytest.FixtureRequest) -> Any:
    return _emptied(limits.RedisBackend(url=REDIS_URL)) if request.param == "redis" else limits.StubBackend()
