"""How a scrape reads the store: all queues in one pipeline, and without waiting for a server that is away."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from relay_core import commands, inspector
from relay_core.broker import Broker
from relay_core.commands import Command, QueueStats, WorkerInfo
from relay_core.connection import SyncStore
from relay_core.errors import RelayError
from relay_core.operations import Flow, Raw

logger = logging.getLogger("relay.metrics")

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds for which a scrape waits for the server. Prometheus gives up on a scrape after ten, with all of it."""

_TOGETHER = 100
"""Queues read in one pipeline."""


class Reader:
    """Reads what a broker's store holds, over connections of its own that give up after PATIENCE.

    What cannot be read is None or left out, and logged once per scrape.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._store: SyncStore | None = None

    def _open(self) -> SyncStore:
        shared = self._broker.store
        if self._store is None or self._store.url != shared.url:
            short = min(PATIENCE, shared.settings.socket_timeout)
            settings = replace(
                shared.settings,
                retry_for=min(1.0, shared.settings.retry_for),
                socket_timeout=short,
                connect_timeout=min(short, shared.settings.connect_timeout),
                max_connections=4,
            )
            self._store = SyncStore(shared.url, settings)
        return self._store

    def stats(self, queues: Iterable[str]) -> list[QueueStats]:
        """Of each queue that can be read."""
        names = list(queues)
        found: list[QueueStats] = []
        failed: list[str] = []
        problem: RelayError | None = None
        for at in range(0, len(names), _TOGETHER):
            batch = names[at : at + _TOGETHER]
            try:
                keys_of = self._broker.settings.keys
                results = self._open().run_many([commands.stats(keys_of(name)) for name in batch])
            except RelayError as error:
                results = [error] * len(batch)
            for name, result in zip(batch, results, strict=True):
                if isinstance(result, RelayError):
                    failed.append(name)
                    problem = result
                else:
                    found.append(result)
            if len(failed) == at + len(batch):
                failed += names[at + len(batch) :]  # the server is away: the others would wait as long, in vain
                break
        if failed:
            logger.warning("%d queues are left out of this scrape (%s ...): %s", len(failed), failed[0], problem)
        return found

    def queues(self) -> list[str] | None:
        """The queues ever enqueued to; None when the store cannot be read."""
        return self._read(inspector.queues(self._broker.operations), "the names of the queues")

    def workers(self) -> list[WorkerInfo] | None:
        """The live workers; None when the store cannot be read."""
        return self._read(inspector.workers(self._broker.operations), "the live workers")

    def _read(self, flow: Flow[T], what: str) -> T | None:
        try:
            step: Any = next(flow)
            while True:
                step = flow.send(self._answer(step))
        except StopIteration as stop:
            result: T = stop.value
            return result
        except RelayError as error:
            logger.warning("%s are left out of this scrape: %s", what, error)
            return None

    def _answer(self, step: Command[Any] | Raw) -> Any:
        store = self._open()
        return store.raw(*step.args) if isinstance(step, Raw) else store.run(step)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def named(queues: Sequence[str], limit: int) -> Sequence[str]:
    """At most `limit` of the names, and a warning when there are more: each one is a set of time series."""
    if len(queues) > limit:
        logger.warning("%d queues, of which the first %d are served; choose with patterns", len(queues), limit)
    return queues[:limit]
