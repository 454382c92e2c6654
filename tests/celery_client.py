"""A Celery client in the test's own process, and publishes of it whose answers are lost on their way.

The fixtures are for tests of what a client does, for which one flavour of server is enough.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from relay_core import Broker
from relay_core.commands import LongWay
from relay_core.errors import Unavailable
from tests.celery_workers import client_of
from tests.servers import Server


@pytest.fixture
def flavour() -> str:
    return "valkey"


@pytest.fixture
def server(tcp_server: Server) -> Server:
    return tcp_server


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    with Broker(server.url) as broker:
        yield broker


def app_of(url: str, folder: Path, **conf: Any) -> Celery:
    """With connections of its own: an app whose settings are like those of another test's would be given those."""
    options = {"client_name": f"test-{uuid.uuid4().hex}"}
    return client_of(
        url, folder, broker_transport_options=options, task_publish_retry_policy={"max_retries": 3}, **conf
    )


@contextmanager
def cut(broker_store: Any, times: int, stored: bool = True, known: bool = False, after: int = 0) -> Iterator[list[int]]:
    """The next enqueues are stored, and their answers lost for longer than relay tries.

    :param stored: False: they are lost on their way to the server
    :param known: True: the client knows that the server has not had them
    :param after: how many are let through before
    """
    run, lost, through = broker_store.run, [times], [after]

    def cutting(command: Any) -> Any:
        stores = command.resent_at is not None and command.durable
        losing = stores and lost[0] and not through[0]
        answer = run(command) if stored or not losing else None
        if stores and through[0] and not isinstance(answer, LongWay):
            through[0] -= 1
        if losing and not isinstance(answer, LongWay):
            lost[0] -= 1
            raise Unavailable("cut", maybe_executed=not known)
        return answer

    broker_store.run = cutting
    try:
        yield lost
    finally:
        broker_store.run = run


def store_of(app: Celery) -> Any:
    with app.producer_or_acquire() as producer:
        return producer.channel.broker.store
