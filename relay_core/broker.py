"""`Broker`: one line per method over the flows, but for the commonest; driven over a blocking store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from relay_core import adoption, inspector, maintenance
from relay_core.broker_base import BrokerBase, as_jobs, job_spec, nack_options, names, schedule_of
from relay_core.clock import sent_now
from relay_core.commands import Command, LongWay, Nack, QueueStats, Verdict, WorkerInfo
from relay_core.connection import Bell, RestingBells, Sender, SyncStore
from relay_core.errors import InvalidArgument, RelayError, Unavailable
from relay_core.job import Arrival, Claimed, Enqueued, Job, State, StoredJob
from relay_core.maintenance import AuditReport, Progress
from relay_core.operations import Flow, Raw, Step, Wait, Waited
from relay_core.schedule import flows as schedule_flows
from relay_core.schedule.flows import Round
from relay_core.schedule.plan import Scheduled
from relay_core.validation import JobSpec

T = TypeVar("T")


def check_blocking(owner: str, broker: object) -> None:
    """Refuse, with InvalidArgument, what is no Broker: an AsyncBroker, or a URL."""
    if not isinstance(broker, Broker):
        raise InvalidArgument(f"{owner} needs a Broker, as Broker(url) makes it, got {broker!r}")


class Broker(BrokerBase):
    """The blocking broker. Safe to use from many threads, and in the children of a fork.

    Durations are float seconds, times unix seconds of the server. Every method raises InvalidArgument for a value that
    is out of bounds, Unavailable when the server cannot serve it within `retry_for` seconds (default 10), and
    StoreError when the server refuses it for good; what it raises beside these, it says.
    """

    _store: SyncStore | None = None
    _opened_by = 0

    @property
    def store(self) -> SyncStore:
        """The connection, opened at its first use."""
        if self._store is None or (self._lease is not None and self._opened_by != os.getpid()):
            with self._opening:
                if self._store is None or self._opened_by != os.getpid():
                    store = SyncStore(self.address(), self._store_settings)
                    # a signal's handler may have opened it meanwhile
                    if self._store is None or self._opened_by != os.getpid():
                        self._opened_by = os.getpid()
                        self._bells: RestingBells[Bell] = RestingBells()
                        self._store = store
        return self._store

    def close(self) -> None:
        """Give back all connections, and the embedded server."""
        with self._opening:
            if self._store is not None:
                for bell in self._bells.take_all():
                    bell.close()
                self._store.close()
                self._store = None
            if self._lease is not None:
                self._lease.close()
                self._lease = None

    def __enter__(self) -> Broker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def drive(self, flow: Flow[T], begun: tuple[Any, Callable[[Any], Any]] | None = None) -> T:
        """Carry out a flow, step by step.

        :param begun: the step at which it stands, and what performs that one. Default: it has not begun
        """
        try:
            step, perform = begun or (next(flow), self._perform)
            while True:
                try:
                    answer = perform(step)
                except RelayError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
                perform = self._perform
        except StopIteration as stop:
            result: T = stop.value
            return result

    def begin(self, flow: Flow[T], sender: Sender) -> Callable[[], T]:
        """Send the first command of a flow, for who has other things to do until `sender.arrived()`.

        Returns what waits for its reply and carries out the rest. Call it before the sender's next command.
        """
        command = next(flow)
        if not isinstance(command, Command):
            raise TypeError(f"a flow that begins with {command!r} cannot be begun")
        sender.send(command)
        return partial(self.drive, flow, (command, sender.result))

    def _perform(self, step: Step) -> Any:
        if isinstance(step, Command):
            return self.store.run(step)
        if isinstance(step, list):
            return self.store.run_many(step)
        if isinstance(step, Raw):
            return self.store.raw(*step.args)
        return self._wait(step)

    def _wait(self, step: Wait) -> Waited:
        store = self.store
        resting = self._bells
        bell = resting.take(step.markers) or store.bell(step.markers)
        try:
            waited = Waited(bell.wait(step.timeout), frozenset() if bell.lost else bell.away)
        except Unavailable:
            bell.close()
            time.sleep(min(0.1, step.timeout))
            return Waited(True)  # the next command finds out whether the server is there, and waits for it
        except BaseException:
            bell.close()
            raise
        if unused := resting.put(step.markers, bell):
            unused.close()
        return waited

    # one line per operation, in the order of a job's life

    def enqueue(self, queue: str, payload: bytes, **options: Any) -> Enqueued:
        """Store one job, ready at once unless `options` say otherwise. Repeating it with the same id stores one job.

        :param payload: at most `max_payload` bytes, default 16 MiB
        :param options: id, delay and dedup_for (seconds), at (unix seconds), priority (0 to 9, default 0), max_retries,
            max_deliveries, dedup_key, headers, retry; see JobSpec

        Raises NotDurable when it is stored, and `durability` was not confirmed in time.
        """
        command = self.operations.straight(queue, payload, **options)
        if command is None:
            return self.drive(self.operations.enqueue(queue, job_spec(payload, options)))
        sent_at = sent_now()
        answer = self.store.run(command)
        if isinstance(answer, LongWay):
            options["id"] = answer.id
            return self.drive(self.operations.enqueue(queue, JobSpec(payload, **options), answer, sent_at))
        return self.operations.told(queue, answer, options.get("headers"))

    def enqueue_many(self, queue: str, jobs: Iterable[JobSpec | bytes]) -> list[Enqueued]:
        """Store many `jobs` in few round trips, their order kept. All are checked before the first is sent.

        Raises NotDurable. After an error some may be stored: repeat it with the same ids.
        """
        return self.drive(self.operations.enqueue_many(queue, jobs))

    def adopt(self, arrivals: Sequence[Arrival]) -> list[bool]:
        """Take in jobs of another queue system (`arrivals`), each in its state and with its times: True for each that
        is new. Raises NotDurable."""
        return self.drive(adoption.adopt(self.operations, arrivals))

    def claim(self, queues: Sequence[str] | str, count: int = 1, wait: float = 0.0) -> Claimed:
        """Lease jobs for the broker's `lease`. An empty answer says in `limited` and `retry_after` whether a limit or a
        pause held work back. What is on its way to a task that is cancelled (AsyncBroker) is handed back.

        :param queues: asked in their order, but one of which a claim failed just now after the others
        :param count: at most so many jobs, 1 to 200. Default 1
        :param wait: seconds to wait for the first. Default 0, do not wait
        """
        return self.drive(self.operations.claim(names(queues), count, wait))

    def ack(self, job: Job) -> None:
        """The `job` is done and leaves the store. Raises LeaseLost."""
        return self.drive(self.operations.ack(job))

    def ack_many(self, jobs: Sequence[Job]) -> list[Verdict]:
        """The `jobs` are done: a verdict each, LOST where the lease was lost."""
        return self.drive(self.operations.ack_many(jobs))

    def nack(
        self, job: Job, error: BaseException | str | None = None, delay: float | None = None, **options: Any
    ) -> Verdict:
        """The `job` failed: DONE when it will be retried, DEAD when its retries are used up.

        :param error: kept with the job, at most 4 KiB of its repr or text. Default none
        :param delay: seconds until it runs again. Default: what the policies and plugins say
        :param options: dead=True (no retry), reason (one word), payload (a new body)

        Raises LeaseLost.
        """
        return self.drive(self.operations.nack(job, error, delay, **nack_options(options)))

    def finish(
        self,
        queue: str,
        acks: Sequence[Job] = (),
        nacks: Sequence[tuple[Job, Nack]] = (),
        count: int = 0,
        woken: bool = False,
    ) -> tuple[list[Verdict], list[Verdict], Claimed]:
        """End jobs of one queue and claim more of it, in one round trip: verdicts of the acks, of the nacks, and jobs.

        :param acks: jobs that are done, at most 200
        :param nacks: (job, `operations.nack_of(job, ...)`) of jobs that failed, at most 200
        :param count: jobs to claim, 0 to 200. Default 0
        :param woken: True when the caller took the wake marker, to put it back while work remains. Default False
        """
        return self.drive(self.operations.finish(queue, acks, nacks, count, woken))

    def extend(self, jobs: Job | Sequence[Job], lease: float | None = None) -> list[Verdict]:
        """Heartbeat of `jobs`: their leases end `lease` seconds from now (default: the broker's). LOST where one was
        lost."""
        return self.drive(self.operations.extend(as_jobs(jobs), lease))

    def release(self, jobs: Job | Sequence[Job]) -> list[Verdict]:
        """Hand back `jobs` that were not started; the delivery does not count. LOST where a lease was lost."""
        return self.drive(self.operations.release(as_jobs(jobs)))

    def reap(self, queue: str, limit: int = 200) -> int:
        """End expired leases, at most `limit` (default and most 200): how many. Claims do this by themselves."""
        return self.drive(self.operations.reap(queue, limit))

    def told(self, job: Job) -> bool:
        """A plugin whose `relay_job_dead` raised NotYet for this `job` has done its part, and is not told again. False:
        somebody has said so before, or the job is dead no longer."""
        return self.drive(self.operations.burial_told(job))

    def promote(self, queue: str, limit: int = 200) -> int:
        """Make due jobs ready, at most `limit` (default and most 200): how many. Claims do this by themselves."""
        return self.drive(self.operations.promote(queue, limit))

    def cancel(self, queue: str, id: str) -> State | None:
        """Take the job `id` out: the state it was in; `inflight`: it runs and was left alone; None: no such job."""
        return self.drive(maintenance.cancel(self.operations, queue, [id]))[0]

    def cancel_many(self, queue: str, ids: Sequence[str]) -> list[State | None]:
        """`cancel` for many `ids`: their states in the same order."""
        return self.drive(maintenance.cancel(self.operations, queue, ids))

    def dead(self, queue: str, limit: int = 100, skip: int = 0) -> list[StoredJob]:
        """At most `limit` (default 100) dead jobs, the longest dead first, after `skip` (default 0) of them."""
        return self.drive(inspector.list_jobs(self.operations, queue, "dead", skip, limit))

    def jobs(self, queue: str, state: State, limit: int = 100, skip: int = 0) -> list[StoredJob]:
        """At most `limit` (default 100) jobs in a `state`, after `skip` (default 0) of them: ready ones in the order of
        claims, delayed and inflight by time, dead by age."""
        return self.drive(inspector.list_jobs(self.operations, queue, state, skip, limit))

    def show(self, queue: str, id: str) -> StoredJob | None:
        """The job `id` as it lies in the store; None when it is not there."""
        return self.drive(inspector.show(self.operations, queue, [id]))[0]

    def requeue(
        self,
        queue: str,
        ids: Sequence[str] | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Dead jobs become ready again: how many. Their retries and deliveries count anew.

        :param ids: these. Default: all that are dead now
        :param limit: at most so many of all, the longest dead first. Default: no limit
        :param progress: called with the number of jobs moved since its last call
        """
        return self.drive(maintenance.requeue(self.operations, queue, ids, limit, progress))

    def purge(
        self, queue: str, states: Sequence[State] = ("ready", "delayed"), progress: Progress | None = None
    ) -> int:
        """Drop all jobs that are in these states: how many. What runs is left alone.

        :param states: of ready, delayed and dead. Default: ready and delayed
        :param progress: called with the number of jobs dropped since its last call
        """
        return self.drive(maintenance.purge(self.operations, queue, states, progress))

    def delete_queue(self, queue: str) -> bool:
        """Forget a queue that holds no job, with its settings, counters, dedup keys and name: False when it holds one.

        Nothing stops who still enqueues to it: it then is there again, as a new queue whose fences begin anew.
        """
        return self.drive(maintenance.delete_queue(self.operations, queue))

    def pause(self, queue: str) -> None:
        """Stop all claims of a queue, in every worker. Enqueue goes on."""
        return self.drive(maintenance.configure(self.operations, queue, {"paused": "1"}))

    def resume(self, queue: str) -> None:
        """End a pause."""
        return self.drive(maintenance.configure(self.operations, queue, {"paused": ""}))

    def limit(
        self, queue: str, rate: float | None = None, burst: int | None = None, max_inflight: int | None = None
    ) -> None:
        """Set a queue's limits for all workers: `rate` jobs per second with a bucket of `burst` (default: one second's
        worth), at most `max_inflight` claimed at a time. What is None, the default, is no limit."""
        changes = maintenance.limits(rate, burst, max_inflight)
        return self.drive(maintenance.configure(self.operations, queue, changes))

    def schedule(self, name: str, queue: str, payload: bytes = b"", **options: Any) -> Scheduled:
        """Store a recurring job called `name`, or change it: each tick enqueues `payload` (at most 64 KiB) to `queue`.
        Storing the same again changes nothing. `ScheduleRunner` or `relay schedule run` carries it out.

        :param options: `cron` or `every` (seconds), `tz`, `missed`, `catch_up`, `overlap`, `priority`,
            `max_retries`, `max_deliveries`, `headers`; see Schedule

        Raises InvalidArgument, Unavailable, NotDurable.
        """
        return self.drive(schedule_flows.schedule(self.operations, schedule_of(name, queue, payload, options)))

    def unschedule(self, name: str) -> bool:
        """Remove the recurring job called `name`: whether there was one. What is enqueued stays."""
        return self.drive(schedule_flows.unschedule(self.operations, name))

    def schedules(self) -> list[Scheduled]:
        """All recurring jobs, by name, each with its next tick."""
        return self.drive(schedule_flows.schedules(self.operations))

    def run_due(self) -> Round:
        """Enqueue the jobs of the ticks that have come; see ScheduleRunner for doing so all the time."""
        return self.drive(schedule_flows.run_due(self.operations))

    def queues(self) -> list[str]:
        """Names of the queues ever enqueued to, but for deleted ones."""
        return self.drive(inspector.queues(self.operations))

    def workers(self) -> list[WorkerInfo]:
        """The live worker processes of every face, by host and process id."""
        return self.drive(inspector.workers(self.operations))

    def stats(self, queue: str) -> QueueStats:
        """Depths, settings and counters at one instant. A queue that was never used has zeros."""
        return self.drive(inspector.stats(self.operations, queue))

    def audit(self, queue: str, repair: bool = True, progress: Progress | None = None) -> AuditReport:
        """Find ids that are in no state or in two, and mend them.

        :param repair: False only looks. Default True
        :param progress: called with the number of jobs looked at
        """
        return self.drive(maintenance.audit(self.operations, queue, repair, progress))
