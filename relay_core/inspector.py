"""What people and tools ask of a queue, as flows: nothing here changes a job."""

from __future__ import annotations

from collections.abc import Sequence

from relay_core import commands, keys
from relay_core.commands import QueueStats, WorkerInfo
from relay_core.commands.workers import PAGE as WORKERS_PAGE
from relay_core.errors import InvalidArgument
from relay_core.job import STATES, State, StoredJob
from relay_core.operations import Flow, Operations, Raw
from relay_core.validation import job_ids, whole

PAGE = 200


def queues(ops: Operations) -> Flow[list[str]]:
    """The names of the queues ever enqueued to, sorted."""
    found = yield Raw(("SMEMBERS", keys.registry(ops.settings.prefix)))
    return sorted(keys.decode_queue(name.decode()) for name in found)


def workers(ops: Operations) -> Flow[list[WorkerInfo]]:
    """The live workers, by host, process id and name."""
    keys_of = keys.worker_keys(ops.settings.prefix)
    found: dict[str, WorkerInfo | None] = {}
    after = 0
    while True:
        page, after = yield commands.roster(keys_of, after)
        known = len(found)
        found.update(page)
        if len(page) < WORKERS_PAGE or len(found) == known:
            live = [info for info in found.values() if info is not None]
            return sorted(live, key=lambda info: (info.host, info.pid, info.name))


def stats(ops: Operations, queue: str) -> Flow[QueueStats]:
    found: QueueStats = yield commands.stats(ops.settings.keys(queue))
    return found


def list_jobs(ops: Operations, queue: str, state: State, skip: int, limit: int) -> Flow[list[StoredJob]]:
    if state not in STATES:
        raise InvalidArgument(f"state must be one of {', '.join(STATES)}, got {state!r}")
    whole("skip", skip, least=0, most=2**53)
    whole("limit", limit, least=1, most=2**53)
    found: list[StoredJob] = []
    while len(found) < limit:
        size = min(PAGE, limit - len(found))
        page = yield commands.list_jobs(ops.settings.keys(queue), state, skip + len(found), size)
        found += [readable(ops, job) for job in page]
        if len(page) < size:
            break
    return found


def show(ops: Operations, queue: str, ids: Sequence[str]) -> Flow[list[StoredJob | None]]:
    found: list[StoredJob | None] = []
    ids = job_ids(ids)
    for at in range(0, len(ids), PAGE):
        page = yield commands.show(ops.settings.keys(queue), ids[at : at + PAGE])
        found += [job and readable(ops, job) for job in page]
    return found


def readable(ops: Operations, job: StoredJob) -> StoredJob:
    """The job with its payload decoded by the plugins, or as it is stored where that fails."""
    if not ops.plugins.wants("relay_decode_payload"):
        return job
    fields = {name: getattr(job, name) for name in StoredJob.__slots__}
    try:
        fields["payload"] = ops.plugins.decode(job.payload, job.queue)
    except (Exception, SystemExit):  # shown to a person who may be looking for just this
        return job
    return StoredJob(**fields)
