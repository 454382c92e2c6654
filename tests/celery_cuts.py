"""Publishes whose answers are lost on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

from relay_core.commands import LongWay
from relay_core.errors import Unavailable


@contextmanager
def cut(broker_store: Any, times: int, stored: bool = True) -> Iterator[list[int]]:
    """The next enqueues are stored, and their answers lost for longer than relay tries.

    :param stored: False: they are lost on their way to the server
    """
    run, lost = broker_store.run, [times]

    def cutting(command: Any) -> Any:
        losing = command.resent_at is not None and command.durable and lost[0]
        answer = run(command) if stored or not losing else None
        if losing and not isinstance(answer, LongWay):
            lost[0] -= 1
            raise Unavailable("cut", maybe_executed=True)
        return answer

    broker_store.run = cutting
    try:
        yield lost
    finally:
        broker_store.run = run


def store_of(app: Celery) -> Any:
    with app.producer_or_acquire() as producer:
        return producer.channel.broker.store
