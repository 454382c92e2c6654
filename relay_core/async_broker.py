"""`AsyncBroker`: the same one-line methods over the same flows, driven over an asyncio store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from relay_core import adoption, inspector, maintenance
from relay_core.broker_base import BrokerBase, as_jobs, job_spec, nack_options, names, schedule_of
from relay_core.clock import sent_now
from relay_core.commands import Command, LongWay, Nack, QueueStats, Verdict, WorkerInfo
from relay_core.connection import AsyncBell, AsyncStore, RestingBells
from relay_core.errors import RelayError, Unavailable
from relay_core.job import Arrival, Claimed, Enqueued, Job, State, StoredJob
from relay_core.maintenance import AuditReport, Progress
from relay_core.operations import Flow, Raw, Wait, Waited
from relay_core.schedule import flows as schedule_flows
from relay_core.schedule.flows import Round
from relay_core.schedule.plan import Scheduled
from relay_core.validation import JobSpec

T = TypeVar("T")

_FAREWELL = 1.0
"""Seconds for which `close` waits until jobs are handed back, where the server is away."""


class AsyncBroker(BrokerBase):
    """The asyncio broker: the methods of Broker, to be awaited. One per event loop."""

    _store: AsyncStore | None = None
    _returning: set[asyncio.Future[None]]
    """What hands back jobs that nobody waits for any more."""

    @property
    def store(self) -> AsyncStore:
        """The connection, opened at its first use."""
        if self._store is None:
            self._bells: RestingBells[AsyncBell] = RestingBells()
            self._returning = set()
            self._store = AsyncStore(self.address(), self._store_settings)
        return self._store

    async def close(self) -> None:
        """Give back all connections, and the embedded server."""
        if self._store is not None:
            if mine := [task for task in self._returning if task.get_loop() is asyncio.get_running_loop()]:
                await asyncio.wait(mine, timeout=_FAREWELL)
            for bell in self._bells.take_all():
                await bell.close()
            await self._store.close()
            self._store = None
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    async def __aenter__(self) -> AsyncBroker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def drive(self, flow: Flow[T]) -> T:
        """Carry out a flow, step by step."""
        waited: Waited | None = None
        while True:
            end = await self._until_wait(flow, waited)
            if not isinstance(end, Wait):
                return end
            waited = await self._wait(end)

    async def _until_wait(self, flow: Flow[T], answer: Any) -> T | Wait:
        """Carry out a flow up to its end, or to where it waits for work."""
        try:
            step = flow.send(answer)
            while not isinstance(step, Wait):
                try:
                    answer = await self._perform(step)
                except RelayError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
            return step
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _perform(self, step: Command[Any] | list[Command[Any]] | Raw) -> Any:
        if isinstance(step, Command):
            return await self.store.run(step)
        if isinstance(step, Raw):
            return await self.store.raw(*step.args)
        return await self.store.run_many(step)

    async def _wait(self, step: Wait) -> Waited:
        store = self.store
        resting = self._bells
        bell = resting.take(step.markers) or store.bell(step.markers)
        try:
            waited = Waited(await bell.wait(step.timeout), frozenset() if bell.lost else bell.away)
        except Unavailable:
            await bell.close()
            await asyncio.sleep(min(0.1, step.timeout))
            return Waited(True)  # the next command finds out whether the server is there, and waits for it
        except BaseException:
            await bell.close()
            raise
        if unused := resting.put(step.markers, bell):
            await unused.close()
        return waited

    # one line per operation, in the order of a job's life

    async def enqueue(self, queue: str, payload: bytes, **options: Any) -> Enqueued:
        """See Broker.enqueue."""
        command = self.operations.straight(queue, payload, **options)
        if command is None:
            return await self.drive(self.operations.enqueue(queue, job_spec(payload, options)))
        sent_at = sent_now()
        answer = await self.store.run(command)
        if isinstance(answer, LongWay):
            options["id"] = answer.id
            return await self.drive(self.operations.enqueue(queue, JobSpec(payload, **options), answer, sent_at))
        return self.operations.told(queue, answer, options.get("headers"))

    async def enqueue_many(self, queue: str, jobs: Iterable[JobSpec | bytes]) -> list[Enqueued]:
        """See Broker.enqueue_many."""
        return await self.drive(self.operations.enqueue_many(queue, jobs))

    async def adopt(self, arrivals: Sequence[Arrival]) -> list[bool]:
        """See Broker.adopt."""
        return await self.drive(adoption.adopt(self.operations, arrivals))

    async def claim(self, queues: Sequence[str] | str, count: int = 1, wait: float = 0.0) -> Claimed:
        """See Broker.claim."""
        flow = self.operations.claim(names(queues), count, wait)
        waited: Waited | None = None
        while True:
            asking = self._until_wait(flow, waited)
            end = await self._to_its_end(asking, lambda end: [] if isinstance(end, Wait) else end)
            if not isinstance(end, Wait):
                return end
            waited = await self._wait(end)

    async def _to_its_end(self, asking: Coroutine[Any, Any, T], leased: Callable[[T], Sequence[Job]]) -> T:
        """Carry out what leases jobs. Where its task is cancelled meanwhile, nobody else knows of the leases that it
        was about to get: this goes on by itself, and hands them back.

        :param leased: the jobs in its result
        """
        asked = asyncio.ensure_future(asking)

        async def hand_back() -> None:
            with suppress(RelayError):
                if jobs := leased(await asked):
                    await self.release(jobs)

        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            task = asyncio.ensure_future(hand_back())
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
            raise

    async def ack(self, job: Job) -> None:
        """See Broker.ack."""
        return await self.drive(self.operations.ack(job))

    async def ack_many(self, jobs: Sequence[Job]) -> list[Verdict]:
        """See Broker.ack_many."""
        return await self.drive(self.operations.ack_many(jobs))

    async def nack(
        self, job: Job, error: BaseException | str | None = None, delay: float | None = None, **options: Any
    ) -> Verdict:
        """See Broker.nack."""
        return await self.drive(self.operations.nack(job, error, delay, **nack_options(options)))

    async def finish(
        self,
        queue: str,
        acks: Sequence[Job] = (),
        nacks: Sequence[tuple[Job, Nack]] = (),
        count: int = 0,
        woken: bool = False,
    ) -> tuple[list[Verdict], list[Verdict], Claimed]:
        """See Broker.finish."""
        flow = self.operations.finish(queue, acks, nacks, count, woken)
        return await self._to_its_end(self.drive(flow), lambda end: end[2])

    async def extend(self, jobs: Job | Sequence[Job], lease: float | None = None) -> list[Verdict]:
        """See Broker.extend."""
        return await self.drive(self.operations.extend(as_jobs(jobs), lease))

    async def release(self, jobs: Job | Sequence[Job]) -> list[Verdict]:
        """See Broker.release."""
        return await self.drive(self.operations.release(as_jobs(jobs)))

    async def reap(self, queue: str, limit: int = 200) -> int:
        """See Broker.reap."""
        return await self.drive(self.operations.reap(queue, limit))

    async def told(self, job: Job) -> bool:
        """See Broker.told."""
        return await self.drive(self.operations.burial_told(job))

    async def promote(self, queue: str, limit: int = 200) -> int:
        """See Broker.promote."""
        return await self.drive(self.operations.promote(queue, limit))

    async def cancel(self, queue: str, id: str) -> State | None:
        """See Broker.cancel."""
        return (await self.drive(maintenance.cancel(self.operations, queue, [id])))[0]

    async def cancel_many(self, queue: str, ids: Sequence[str]) -> list[State | None]:
        """See Broker.cancel_many."""
        return await self.drive(maintenance.cancel(self.operations, queue, ids))

    async def dead(self, queue: str, limit: int = 100, skip: int = 0) -> list[StoredJob]:
        """See Broker.dead."""
        return await self.drive(inspector.list_jobs(self.operations, queue, "dead", skip, limit))

    async def jobs(self, queue: str, state: State, limit: int = 100, skip: int = 0) -> list[StoredJob]:
        """See Broker.jobs."""
        return await self.drive(inspector.list_jobs(self.operations, queue, state, skip, limit))

    async def show(self, queue: str, id: str) -> StoredJob | None:
        """See Broker.show."""
        return (await self.drive(inspector.show(self.operations, queue, [id])))[0]

    async def requeue(
        self,
        queue: str,
        ids: Sequence[str] | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """See Broker.requeue."""
        return await self.drive(maintenance.requeue(self.operations, queue, ids, limit, progress))

    async def purge(
        self, queue: str, states: Sequence[State] = ("ready", "delayed"), progress: Progress | None = None
    ) -> int:
        """See Broker.purge."""
        return await self.drive(maintenance.purge(self.operations, queue, states, progress))

    async def delete_queue(self, queue: str) -> bool:
        """See Broker.delete_queue."""
        return await self.drive(maintenance.delete_queue(self.operations, queue))

    async def pause(self, queue: str) -> None:
        """See Broker.pause."""
        return await self.drive(maintenance.configure(self.operations, queue, {"paused": "1"}))

    async def resume(self, queue: str) -> None:
        """See Broker.resume."""
        return await self.drive(maintenance.configure(self.operations, queue, {"paused": ""}))

    async def limit(
        self, queue: str, rate: float | None = None, burst: int | None = None, max_inflight: int | None = None
    ) -> None:
        """See Broker.limit."""
        changes = maintenance.limits(rate, burst, max_inflight)
        return await self.drive(maintenance.configure(self.operations, queue, changes))

    async def schedule(self, name: str, queue: str, payload: bytes = b"", **options: Any) -> Scheduled:
        """See Broker.schedule."""
        return await self.drive(schedule_flows.schedule(self.operations, schedule_of(name, queue, payload, options)))

    async def unschedule(self, name: str) -> bool:
        """See Broker.unschedule."""
        return await self.drive(schedule_flows.unschedule(self.operations, name))

    async def schedules(self) -> list[Scheduled]:
        """See Broker.schedules."""
        return await self.drive(schedule_flows.schedules(self.operations))

    async def run_due(self) -> Round:
        """See Broker.run_due."""
        return await self.drive(schedule_flows.run_due(self.operations))

    async def queues(self) -> list[str]:
        """See Broker.queues."""
        return await self.drive(inspector.queues(self.operations))

    async def workers(self) -> list[WorkerInfo]:
        """See Broker.workers."""
        return await self.drive(inspector.workers(self.operations))

    async def stats(self, queue: str) -> QueueStats:
        """See Broker.stats."""
        return await self.drive(inspector.stats(self.operations, queue))

    async def audit(self, queue: str, repair: bool = True, progress: Progress | None = None) -> AuditReport:
        """See Broker.audit."""
        return await self.drive(maintenance.audit(self.operations, queue, repair, progress))
