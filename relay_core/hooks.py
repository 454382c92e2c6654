"""The hooks through which relay is watched and extended. Their docstrings are their documentation.

Write a class or module with functions of these names, each marked with `relay_core.hookimpl`, and pass it
as `Broker(url, plugins=[...])`, or name it in the entry-point group `relay`. Implementations may take any
subset of the parameters. They are plain functions: an `async def` is refused when it is registered.

Notify hooks fire after the store confirmed the move, on the thread (or event loop) that made it. What they
raise is logged and ignored, and the plugins after them still run. They must not block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy

from relay_core.job import Job, JobSummary, StoredJob

PROJECT = "relay"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def relay_job_enqueued(queue: str, id: str, delay: float, headers: Mapping[str, str]) -> None:
    """A job was stored. Not called for a duplicate.

    :param delay: seconds until it is ready, 0.0 for at once; of `at=`, as seen by this process's clock
    :param headers: as they were stored, those of `relay_add_headers` included
    """


@hookspec
def relay_job_deduplicated(queue: str, id: str, dedup_key: str | None) -> None:
    """An enqueue stored nothing, because its id or dedup key is taken.

    :param id: the job that is already there
    """


@hookspec
def relay_job_claimed(job: Job) -> None:
    """A job was leased to this process."""


@hookspec
def relay_job_acked(job: Job, latency: float) -> None:
    """A job is done and has left the store.

    :param latency: seconds from its creation to the ack
    """


@hookspec
def relay_job_retried(job: Job, delay: float, error: str | None) -> None:
    """A job failed and will run again.

    :param delay: seconds until it is ready again
    :param error: what the nack reported, at most 4 KiB
    """


@hookspec
def relay_job_dead(job: Job, reason: str, error: str | None, again: bool) -> None:
    """A job went to dead: at a nack, or because its deliveries were used up when a claim or reap found it.

    In the latter case nobody asked for it, and it is told of at least once: where the process that found it died before
    it told, never got the reply, or has no plugin for this hook, the next one that has and claims from the queue tells,
    after half a minute. That may be the second time where telling took longer, or ended with its process. Of a queue
    where nobody has such a plugin, the last 10,000 that are not yet dropped wait for one.

    One that takes the parameter `again` may then raise `relay_core.NotYet`: it could not do its part, for a server of
    its own is away, say, or does it on a thread of its own, which calls `broker.told(job)` once it is done. Until then
    it is told again, here or in another process: after half a minute, later on after half of the time that has gone by
    since, at most 10 minutes, until the job leaves the dead. Those that do not take `again` are told no second time.
    What else is raised counts as told.

    :param job: in the latter case a job that this process never ran; its token is the last holder's
    :param reason: `max_retries`, `max_deliveries`, `rejected`, `undecodable`, or what the nack named
    :param again: all plugins were told before, and one of them, here or in another process, raised NotYet
    """


@hookspec
def relay_jobs_reaped(queue: str, count: int) -> None:
    """Leases had expired, and this process ended them; the jobs are ready again, or dead.

    :param count: at least 1
    """


@hookspec
def relay_jobs_promoted(queue: str, count: int) -> None:
    """Delayed jobs were due, and this process made them ready.

    :param count: at least 1
    """


@hookspec
def relay_lease_lost(queue: str, id: str, move: str) -> None:
    """A job that this process held is no longer its own; the move changed nothing.

    :param move: `ack`, `nack`, `extend` or `release`
    """


@hookspec
def relay_worker_started(worker: str, queues: tuple[str, ...], concurrency: int) -> None:
    """A `relay worker` is about to claim its first job.

    :param worker: `<host>:<pid>:<random>`
    """


@hookspec
def relay_worker_stopped(worker: str, queues: tuple[str, ...], processed: int) -> None:
    """A `relay worker` has finished or released all its jobs.

    :param processed: jobs that it acked
    """


@hookspec
def relay_run_started(job: Job) -> None:
    """A handler is about to run a job, here: on its thread, or in its task where it is a coroutine.

    Called by relay workers and in Dramatiq's worker threads. Not by Celery's workers: it has signals of its own for
    this, in the process that runs the task.
    """


@hookspec
def relay_run_ended(job: Job, seconds: float, error: BaseException | None) -> None:
    """The handler is done, on the same thread or in the same task; the ack or nack is still to come.

    In a Celery worker it is called in the main process, when the pool says that the task is done.

    :param seconds: for which it ran
    :param error: what it raised, or None
    """


@hookspec(firstresult=True)
def relay_retry_delay(job: Job, error: BaseException | str | None, delay: float) -> float | None:
    """Seconds until a failed job runs again. First answer that is not None wins; None keeps `delay`.

    An implementation that raises is logged and passed over. Called before the nack is sent.

    :param delay: what the job's, queue's or broker's RetryPolicy says
    """


@hookspec(firstresult=True)
def relay_route_job(queue: str, payload: bytes, headers: Mapping[str, str]) -> str | None:
    """The queue that a job goes to instead. First answer that is not None wins; None keeps `queue`.

    What it raises reaches the caller of `enqueue`, as does a PluginError for an answer that is no text; nothing was
    stored.
    """


@hookspec
def relay_add_headers(queue: str, payload: bytes, headers: Mapping[str, str]) -> Mapping[str, str] | None:
    """Headers to add to a job on its way into the store: a trace context, a tenant. None adds none.

    All implementations run, each with what the ones before it added; a name that is there already is replaced.
    What one raises reaches the caller of `enqueue`; nothing was stored. Called for each
    tick of a schedule too, and not for what `relay migrate` takes in.

    :param payload: before any encoding
    """


@hookspec
def relay_encode_payload(payload: bytes, queue: str) -> bytes | None:
    """Payload bytes on their way into the store: compression, encryption. None leaves them as they are.

    All implementations run, each on the result of the one before. What one raises reaches the caller of
    `enqueue`; nothing was stored.
    """


@hookspec
def relay_decode_payload(payload: bytes, queue: str) -> bytes | None:
    """The reverse of `relay_encode_payload`, in the reverse order. None leaves the bytes as they are.

    If one raises, that job goes to dead with reason `undecodable`, and the rest of the batch runs.
    """


@hookspec(firstresult=True)
def relay_describe_job(job: Job | StoredJob) -> JobSummary | None:
    """What a job is, for people and metrics, read without unpickling. First answer that is not None wins.

    An implementation that raises is logged and passed over.
    """


@hookspec
def relay_register_adapter(register: Callable[..., None]) -> None:
    """Called once per broker: `register(name, description)` makes a framework known to `relay version`.

    `register(name, description, internal=("*.pidbox",))` also names, by shell patterns, the queues in which the
    framework's own processes talk to each other: metrics leave them out, for they come and go without bound.
    """


@hookspec
def relay_register_commands(group: Any) -> None:
    """Called once by the `relay` command: add click commands to `group`."""
