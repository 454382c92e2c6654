"""How a job comes into the store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from relay_core import commands, keys
from relay_core.clock import sent_now
from relay_core.commands import Command, LongWay, NewJob, Short, Stored
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import LayoutError, RelayError, StoreError, Unavailable
from relay_core.job import Enqueued, FreshId
from relay_core.operations.base import MOST, Base
from relay_core.operations.serverclock import ServerClock
from relay_core.operations.settings import Settings
from relay_core.operations.steps import Flow, Raw
from relay_core.plugins import Plugins
from relay_core.validation import JobSpec, payload_bytes, payload_size, plain_job

_MAX_BATCH_BYTES = 4 * 2**20


class Placed(NamedTuple):
    """A job that was checked and is as the plugins make it, and the queue that it goes to."""

    queue: str
    job: NewJob
    spec: JobSpec

    def delayed(self, seconds: float | None) -> Placed:
        """The same with another delay."""
        spec = replace(self.spec, delay=seconds)
        return self._replace(job=self.job._replace(due=spec.due()), spec=spec)


class Enqueueing(Base):
    """Enqueues of one job and of many."""

    def __init__(self, settings: Settings, plugins: Plugins) -> None:
        super().__init__(settings, plugins)
        self._registered: set[str] = set()
        self._clock = ServerClock()

    def enqueue_many(self, queue: str, specs: Iterable[JobSpec | bytes]) -> Flow[list[Enqueued]]:
        """All are checked before the first is sent."""
        placed = [self.prepare(queue, spec if isinstance(spec, JobSpec) else JobSpec(spec)) for spec in specs]
        return (yield from self.enqueue_placed(placed))

    def enqueue_placed(self, placed: Sequence[Placed], since: float | None = None) -> Flow[list[Enqueued]]:
        """Store jobs that `prepare` has made.

        :param since: `sent_now()` of an earlier call that may have stored them: what it stored is no duplicate,
            done or not
        """
        answers: list[Enqueued | None] = [None] * len(placed)
        batches = self._batches(placed)
        for name in {placed[batch[0]].queue for batch in batches} - self._registered:
            yield from self.register(name)
        built = [
            commands.enqueue(self.settings.keys(placed[batch[0]].queue), [placed[i].job for i in batch], since=since)
            for batch in batches
        ]
        failed: RelayError | None = None
        results = [(yield built[0])] if len(built) == 1 else (yield built) if built else []
        for batch, result in zip(batches, results, strict=True):
            if isinstance(result, RelayError):
                failed = failed or result
                continue
            if result.founded:
                yield from self._register_anew(placed[batch[0]].queue)
            for i, answer in zip(batch, result, strict=True):
                answers[i] = answer
                self._tell_enqueued(placed[i].queue, placed[i].spec, answer)
        if isinstance(failed, StoreError | Unavailable):
            failed.maybe_executed = len(built) > 1 or failed.maybe_executed  # what it says is true of one command
        if failed:
            raise failed
        return [answer for answer in answers if answer is not None]

    def straight(
        self,
        queue: str,
        payload: bytes,
        *,
        id: str | None = None,
        priority: int = 0,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Command[Short | LongWay] | None:
        """The one command of most enqueues, which nothing has to come before: run it, and tell of it by `told`. None
        for others, which are for `enqueue`, as is what answers LongWay."""
        if options or type(queue) is not str or queue not in self._registered or self.plugins.alter_jobs:
            return None
        payload = payload_bytes(payload)
        payload_size(payload, self.settings.max_payload)
        job = plain_job(payload, id, priority, headers)
        return None if job is None else self._short(queue, job, id, priority)

    def _short(self, queue: str, job: NewJob, id: str | None, priority: int) -> Command[Short | LongWay]:
        """The command of most, which are ready now and have no dedup key.

        :param id: the one that was asked for
        """
        short = commands.enqueue_large if commands.is_large(job) else commands.enqueue_one
        fresh = id is None or isinstance(id, FreshId)
        return short(self.settings.keys(queue), job, born=self._clock.now_ms(queue, priority) if fresh else None)

    def _stored(self, queue: str, answer: Short) -> Enqueued:
        """What the store answered the short way, of which the time is remembered."""
        if answer.now_ms is not None:
            self._clock.set(queue, answer.level, answer.now_ms, answer.asked)
        return Enqueued(answer.id)

    def told(self, queue: str, answer: Short, headers: Mapping[str, str] | None) -> Enqueued:
        """The answer to a straight enqueue, of which the plugins know now."""
        enqueued = self._stored(queue, answer)
        if self.plugins.wants("relay_job_enqueued"):
            self._tell_enqueued(queue, JobSpec(b"", headers=headers), enqueued)
        return enqueued

    def enqueue(
        self, queue: str, spec: JobSpec, answer: LongWay | None = None, since: float | None = None
    ) -> Flow[Enqueued]:
        """`enqueue_many` of one, without the lists that many need.

        :param answer: of the short way, where that was taken
        :param since: `sent_now()` of the short way's send, or of an earlier call that may have stored it
        """
        queue, job, spec = self.prepare(queue, spec)
        if queue not in self._registered:
            yield from self.register(queue)
        enqueued = yield from self._enqueue_one(Placed(queue, job, spec), answer, since)
        self._tell_enqueued(queue, spec, enqueued)
        return enqueued

    def _enqueue_one(self, placed: Placed, answer: Short | LongWay | None, since: float | None) -> Flow[Enqueued]:
        queue, job, spec = placed
        if answer is None and since is None and not (job.due or job.dedup):
            since = sent_now()
            answer = yield self._short(queue, job, spec.id, spec.priority)
        if isinstance(answer, Short):
            return self._stored(queue, answer)
        if answer is not None and answer.resent:
            self._clock.forget(queue, spec.priority)  # no job follows that one until another has looked where it goes
        elif answer is not None:
            since = None
        try:
            stored: Stored = yield commands.enqueue(self.settings.keys(queue), (job,), since=since)
        except LayoutError:
            if answer is not None and answer.stored:
                yield commands.retract(self.settings.keys(queue), job)
            raise
        except Unavailable as error:
            error.maybe_executed = error.maybe_executed or since is not None
            raise
        if stored.founded:
            yield from self._register_anew(queue)
        return stored[0]

    def register(self, queue: str, anew: bool = False) -> Flow[None]:
        """Put a queue among those that people are shown, once per process.

        :param anew: whatever this process did before: the queue was deleted meanwhile, or may be just now
        """
        if anew or queue not in self._registered:
            yield Raw(("SADD", keys.registry(self.settings.prefix), keys.encode_queue(queue)))
            if len(self._registered) >= MOST:
                self._registered.clear()
            self._registered.add(queue)

    def _register_anew(self, queue: str) -> Flow[None]:
        try:
            yield from self.register(queue, anew=True)
        except (StoreError, Unavailable) as error:
            error.maybe_executed = True  # not this command, but what came before it: its jobs are stored
            raise

    def prepare(self, queue: str, spec: JobSpec) -> Placed:
        """A job as it is to be stored. Raises InvalidArgument, and what a plugin raises."""
        if self.plugins.wants("relay_add_headers"):
            spec = self.with_headers(queue, spec)
        return self.place(queue, spec)

    def with_headers(self, queue: str, spec: JobSpec) -> JobSpec:
        """The job with what plugins add to its headers. What a plugin raises goes to the caller."""
        spec.options()  # its own headers are checked before a plugin is shown them
        return replace(spec, headers=self.plugins.headers(queue, payload_bytes(spec.payload), spec.headers or {}))

    def place(self, queue: str, spec: JobSpec) -> Placed:
        """What `prepare` does but for the headers, which are as they should be."""
        payload = payload_bytes(spec.payload)
        self.settings.keys(queue)
        routed = self.plugins.route(queue, payload, spec.headers or {})
        if routed != queue:
            self.settings.keys(routed)
            queue = routed
        payload = self.plugins.encode(payload, queue)
        payload_size(payload, self.settings.max_payload)
        return Placed(queue, spec.stored(payload), spec)

    @staticmethod
    def _batches(placed: Sequence[Placed]) -> list[list[int]]:
        """Indices, split by queue, count and bytes; the order within a queue is kept."""
        batches: list[list[int]] = []
        open_batch: dict[str, tuple[list[int], int]] = {}
        for i, (queue, job, _spec) in enumerate(placed):
            batch, size = open_batch.get(queue, (None, 0))
            if batch is None or len(batch) == MAX_BATCH or size + len(job.record) > _MAX_BATCH_BYTES:
                batch, size = [], 0
                batches.append(batch)
            batch.append(i)
            open_batch[queue] = (batch, size + len(job.record))
        return batches

    def _tell_enqueued(self, queue: str, spec: JobSpec, answer: Enqueued) -> None:
        if answer.duplicate:
            self.plugins.notify("relay_job_deduplicated", queue=queue, id=answer.id, dedup_key=spec.dedup_key)
        elif self.plugins.wants("relay_job_enqueued"):
            delay = spec.delay or (max(0.0, spec.at - time.time()) if spec.at else 0.0)
            self.plugins.notify(
                "relay_job_enqueued", queue=queue, id=answer.id, delay=delay, headers=spec.headers or {}
            )
