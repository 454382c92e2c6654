"""What a broker does, without saying how: generators that yield steps and are sent their results.

A step is a Command (answered by its result, or the error is thrown in), a list of Commands (answered by a
list of results and errors), a Raw command, or a Wait. `broker.py` drives them over a blocking or an asyncio
store, so that there is one copy of the logic, and it is tested without either.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from relay_core import commands, keys
from relay_core.commands import Ack, ClaimReply, Command, Finish, Grant, LongWay, Nack, NewJob, Verdict
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import InvalidArgument, InvalidRecord, LeaseLost, RelayError
from relay_core.job import NO_OPTIONS, Claimed, Enqueued, Job, Record
from relay_core.plugins import Plugins
from relay_core.retry import RetryPolicy
from relay_core.validation import MAX_PAYLOAD, JobSpec, payload_bytes, payload_size, seconds, whole

T = TypeVar("T")

MAX_ERROR = 4096
"""Bytes of an error text that are kept."""

_MAX_BATCH_BYTES = 4 * 2**20
_MAX_BLOCK = 5.0


@dataclass(frozen=True, slots=True)
class Wait:
    """Block until one of the markers is rung or `timeout` seconds passed; answered by True or False."""

    markers: tuple[bytes, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class Raw:
    """A plain server command."""

    args: tuple[Any, ...]


Step = Command[Any] | list[Command[Any]] | Raw | Wait
Flow = Generator[Step, Any, T]


def error_text(error: BaseException | str | None) -> str:
    """What is kept of an error: its repr or text, at most 4 KiB."""
    text = "" if error is None else error if isinstance(error, str) else repr(error)
    return text.encode(errors="replace")[:MAX_ERROR].decode(errors="ignore")


@dataclass(frozen=True)
class Settings:
    """A broker's settings; see Broker for their meaning."""

    prefix: str = "relay"
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    queue_retry: dict[str, RetryPolicy] = field(default_factory=dict)
    lease: float = 15.0
    max_deliveries: int = 5
    max_payload: int = MAX_PAYLOAD
    keep_dead: float = 7 * 86400.0

    def __post_init__(self) -> None:
        seconds("lease", self.lease, least=0.1, most=86400)
        seconds("keep_dead", self.keep_dead, least=1)
        whole("max_deliveries", self.max_deliveries, least=1, most=10**6)
        whole("max_payload", self.max_payload, least=1, most=512 * 2**20)
        for name, policy in (("retry", self.retry), *((f"queue_retry[{q!r}]", p) for q, p in self.queue_retry.items())):
            if not isinstance(policy, RetryPolicy):
                raise InvalidArgument(f"{name} must be a RetryPolicy, got {policy!r}")
        if (
            not isinstance(self.prefix, str)
            or not self.prefix
            or not self.prefix.isprintable()
            or set(self.prefix) & set("{} ")
        ):
            raise InvalidArgument(f"prefix must be a text without braces or spaces, got {self.prefix!r}")

    @property
    def lease_ms(self) -> int:
        return int(self.lease * 1000)

    @property
    def keep_ms(self) -> int:
        return int(self.keep_dead * 1000)

    @property
    def max_block(self) -> float:
        """Longest wait for a wake-up: short against the lease, so that a dead worker's jobs are seen in time; a little
        different each time, so that workers that began together do not all look together."""
        return min(_MAX_BLOCK, self.lease / 3) * random.uniform(0.9, 1.1)

    def keys(self, queue: str) -> keys.QueueKeys:
        try:
            return keys.queue_keys(self.prefix, queue)
        except TypeError:  # a list or dict cannot even be looked up: say what is wrong with it
            keys.encode_queue(queue)
            raise

    def policy(self, job: Job) -> RetryPolicy:
        if job.options.retry:
            return RetryPolicy.from_dict(job.options.retry)
        return self.queue_retry.get(job.queue, self.retry)

    def is_suspect(self, job: Job) -> bool:
        """True for a claimed job whose deliveries mostly ended with their worker, so that it may be what ended them.

        Whoever runs it holds nothing else meanwhile, so that a poison job takes no neighbour to dead.
        """
        most = job.options.max_deliveries or self.max_deliveries
        return job.deliveries - 1 - job.retries >= max(1, most - 2)


class Operations:
    """The moves, as flows."""

    def __init__(self, settings: Settings, plugins: Plugins) -> None:
        self.settings = settings
        self.plugins = plugins
        self._registered: set[str] = set()
        self._levels: dict[str, str] = {}

    # enqueue

    def enqueue_many(self, queue: str, specs: Iterable[JobSpec | bytes], again: bool = False) -> Flow[list[Enqueued]]:
        """All are checked before the first is sent.

        :param again: an earlier call may have stored jobs of these ids: such a job is no duplicate, done or not
        """
        checked = [spec if isinstance(spec, JobSpec) else JobSpec(spec) for spec in specs]
        if self.plugins.wants("relay_add_headers"):
            checked = [self._with_headers(queue, spec) for spec in checked]
        placed = [self.place(queue, spec) for spec in checked]
        answers: list[Enqueued | None] = [None] * len(placed)
        batches = self._batches(placed)
        for name in {placed[batch[0]][0] for batch in batches} - self._registered:
            yield from self.register(name)
        built = [
            commands.enqueue(self.settings.keys(placed[batch[0]][0]), [placed[i][1] for i in batch], again=again)
            for batch in batches
        ]
        failed: RelayError | None = None
        results = [(yield built[0])] if len(built) == 1 else (yield built) if built else []
        for batch, result in zip(batches, results, strict=True):
            if isinstance(result, RelayError):
                failed = failed or result
                continue
            for i, answer in zip(batch, result, strict=True):
                answers[i] = answer
                self._tell_enqueued(placed[i][0], checked[i], answer)
        if failed:
            raise failed
        return [answer for answer in answers if answer is not None]

    def enqueue(self, queue: str, spec: JobSpec, again: bool = False) -> Flow[Enqueued]:
        """`enqueue_many` of one, the commonest call, without the lists that many need."""
        if self.plugins.wants("relay_add_headers"):
            spec = self._with_headers(queue, spec)
        queue, job = self.place(queue, spec)
        if queue not in self._registered:
            yield from self.register(queue)
        answer = yield from self._enqueue_one(self.settings.keys(queue), job, again)
        self._tell_enqueued(queue, spec, answer)
        return answer

    @staticmethod
    def _enqueue_one(q: keys.QueueKeys, job: NewJob, again: bool) -> Flow[Enqueued]:
        if not (job.due or job.dedup or again):
            answer: Enqueued | LongWay = yield commands.enqueue_one(q, job)
            if not isinstance(answer, LongWay):
                return answer
            again = answer.resent
        (enqueued,) = yield commands.enqueue(q, (job,), again=again)
        return enqueued  # type: ignore[no-any-return]

    def register(self, queue: str) -> Flow[None]:
        """Put a queue among those that people are shown, once per process."""
        if queue not in self._registered:
            yield Raw(("SADD", keys.registry(self.settings.prefix), keys.encode_queue(queue)))
            self._registered.add(queue)

    def _with_headers(self, queue: str, spec: JobSpec) -> JobSpec:
        spec.options()  # its own headers are checked before a plugin is shown them
        return replace(spec, headers=self.plugins.headers(queue, payload_bytes(spec.payload), spec.headers or {}))

    def place(self, queue: str, spec: JobSpec) -> tuple[str, NewJob]:
        """The queue that a job goes to, and the job as it is stored, as the plugins make it."""
        payload = payload_bytes(spec.payload)
        self.settings.keys(queue)
        routed = self.plugins.route(queue, payload, spec.headers or {})
        if routed != queue:
            self.settings.keys(routed)
            queue = routed
        payload = self.plugins.encode(payload, queue)
        payload_size(payload, self.settings.max_payload)
        return queue, spec.stored(payload)

    @staticmethod
    def _batches(placed: Sequence[tuple[str, NewJob]]) -> list[list[int]]:
        """Indices, split by queue, count and bytes; the order within a queue is kept."""
        batches: list[list[int]] = []
        open_batch: dict[str, tuple[list[int], int]] = {}
        for i, (queue, job) in enumerate(placed):
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

    # claim

    def claim(self, queues: Sequence[str], count: int = 1, wait: float = 0.0, woken: bool = False) -> Flow[Claimed]:
        """Ask the queues in their order until `count` jobs are leased; wait up to `wait` seconds for the first."""
        if not queues:
            raise InvalidArgument("claim needs at least one queue")
        whole("count", count, least=1, most=MAX_BATCH)
        seconds("wait", wait)
        deadline = time.monotonic() + wait
        markers = tuple(self.settings.keys(queue).marker for queue in queues)
        while True:
            found = Claimed()
            for queue in queues:
                got = yield from self._claim_one(queue, count - len(found), woken)
                found.extend(got)
                if got.limited:
                    found.limited = got.limited
                if got.retry_after is not None:
                    found.retry_after = min(got.retry_after, found.retry_after or got.retry_after)
                if len(found) == count:
                    break
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            hint = self.settings.max_block if found.retry_after is None else found.retry_after
            yield Wait(markers, max(0.001, min(left, hint, self.settings.max_block)))
            # whoever waited may have taken the marker, and must put it back while work remains
            woken = True

    def _claim_one(self, queue: str, count: int, woken: bool) -> Flow[Claimed]:
        sent = time.monotonic()
        done = yield from self._end_and_claim(queue, (), (), count, woken)
        return (yield from self._received(queue, done.claim, sent))

    def _end_and_claim(
        self, queue: str, done: Sequence[Job], nacks: Sequence[Nack], count: int, woken: bool
    ) -> Flow[Finish]:
        """The short way where that may do, and the long one where it does not."""
        s = self.settings
        q, nonce, resent = s.keys(queue), new_nonce(), False
        acks = [ack_of(job) for job in done]
        if count and not nacks and all(map(is_plain, done)) and len({job.id for job in done}) == len(done):
            answer: ClaimReply | LongWay = yield commands.claim(
                q, count, s.lease_ms, nonce, levels=self._levels.get(queue, ""), woken=woken, acks=acks
            )
            self._levels[queue] = answer.levels
            if not isinstance(answer, LongWay):
                return Finish([Verdict.DONE] * len(acks), (), answer)
            resent = answer.resent
        finished: Finish = yield commands.finish(
            q, acks, nacks, count, s.lease_ms, nonce,
            max_deliveries=s.max_deliveries, keep_ms=s.keep_ms, woken=woken, resent=resent,
        )  # fmt: skip
        self._levels[queue] = finished.claim.levels
        return finished

    def _received(self, queue: str, reply: ClaimReply, sent: float) -> Flow[Claimed]:
        if reply.reaped or reply.promoted:
            self.plugins.notify("relay_jobs_promoted", queue=queue, count=reply.promoted) if reply.promoted else None
            self.plugins.notify("relay_jobs_reaped", queue=queue, count=reply.reaped) if reply.reaped else None
        for grant in reply.buried:
            self._tell_buried(queue, grant, reply.now_ms, sent)
        jobs = Claimed((), reply.limited, None if reply.hint_ms is None else reply.hint_ms / 1000)
        spoiled: list[tuple[Job, str]] = []
        tell = self.plugins.wants("relay_job_claimed")
        for grant in reply.grants:
            job, problem = self._job(queue, grant, reply.now_ms, sent)
            if problem:
                spoiled.append((job, problem))
                continue
            jobs.append(job)
            if tell:
                self.plugins.notify("relay_job_claimed", job=job)
        for job, problem in spoiled:
            yield from self.nack(job, problem, reason="undecodable", dead=True, lenient=True)
        return jobs

    def _job(self, queue: str, grant: Grant, now_ms: int, sent: float) -> tuple[Job, str]:
        """The job, and what is wrong with its record or payload, if anything."""
        problem = ""
        try:
            record = Record.unpack(grant.record)
            payload = self.plugins.decode(record.payload, queue)
        except InvalidRecord as error:
            record, payload, problem = Record(now_ms, 0, NO_OPTIONS, b""), grant.record, str(error)
        except Exception as error:  # a plugin's decoding may fail in any way, and only this job is spoiled
            payload, problem = record.payload, f"payload does not decode: {error!r}"
        job = Job(
            id=grant.id,
            queue=queue,
            payload=payload,
            created_at=record.created_ms / 1000,
            claimed_at=now_ms / 1000,
            priority=record.priority,
            deliveries=int(grant.token.partition(":")[0] or 0),
            retries=grant.retries,
            token=grant.token,
            expires_at=sent + self.settings.lease,
            claimed_monotonic=time.monotonic(),
            options=record.options,
        )
        return job, problem

    def _tell_buried(self, queue: str, grant: Grant, now_ms: int, sent: float) -> None:
        if self.plugins.wants("relay_job_dead"):
            job, _problem = self._job(queue, grant, now_ms, sent)
            error = f"delivered {job.deliveries - job.retries} times without an answer"
            self.plugins.notify("relay_job_dead", job=job, reason="max_deliveries", error=error)

    # how a claimed job ends

    def ack_many(self, jobs: Sequence[Job]) -> Flow[list[Verdict]]:
        verdicts = yield from self._by_queue(jobs, lambda q, batch: commands.ack(q, [ack_of(job) for job in batch]))
        for job, verdict in zip(jobs, verdicts, strict=True):
            self._tell_acked(job, verdict)
        return verdicts

    def ack(self, job: Job) -> Flow[None]:
        verdict = yield from self._ack_one(job)
        self._tell_acked(job, verdict)
        if verdict is Verdict.LOST:
            raise LeaseLost(job.queue, job.id, "ack")

    def _ack_one(self, job: Job) -> Flow[Verdict]:
        q, item = self.settings.keys(job.queue), ack_of(job)
        if is_plain(job):
            answer: Verdict | LongWay = yield commands.ack_one(q, item)
            if not isinstance(answer, LongWay):
                return answer
        (verdict,) = yield commands.ack(q, (item,))
        return verdict  # type: ignore[no-any-return]

    def _tell_acked(self, job: Job, verdict: Verdict) -> None:
        if verdict is Verdict.DONE:
            if self.plugins.wants("relay_job_acked"):
                self.plugins.notify("relay_job_acked", job=job, latency=job.age())
        elif verdict is Verdict.LOST:
            self._tell_lost(job, "ack")

    def _tell_lost(self, job: Job, move: str) -> None:
        self.plugins.notify("relay_lease_lost", queue=job.queue, id=job.id, move=move)

    def nack_of(
        self,
        job: Job,
        error: BaseException | str | None = None,
        delay: float | None = None,
        *,
        reason: str | None = None,
        dead: bool = False,
        payload: bytes | None = None,
    ) -> Nack:
        """The nack that the policies and plugins make of a failure."""
        policy = self.settings.policy(job)
        if delay is None:
            delay = self.plugins.retry_delay(job, error, policy.delay(job.retries))
        ms = -1 if dead else round(seconds("delay", delay) * 1000)
        limit = policy.max_retries if job.options.max_retries is None else job.options.max_retries
        record = b""
        if payload is not None:
            body = self.plugins.encode(payload_bytes(payload), job.queue)
            payload_size(body, self.settings.max_payload)
            record = Record.pack(job.priority, job.options, body)
        why = "_".join(error_text(reason).split()) or ("rejected" if dead else "max_retries")
        return Nack(job.id, job.token, ms, limit, why, error_text(error), record)

    def nack(
        self,
        job: Job,
        error: BaseException | str | None = None,
        delay: float | None = None,
        *,
        reason: str | None = None,
        dead: bool = False,
        payload: bytes | None = None,
        lenient: bool = False,
    ) -> Flow[Verdict]:
        item = self.nack_of(job, error, delay, reason=reason, dead=dead, payload=payload)
        (verdict,) = yield commands.nack(self.settings.keys(job.queue), [item])
        self._tell_nacked(job, item, verdict)
        if verdict is Verdict.LOST and not lenient:
            raise LeaseLost(job.queue, job.id, "nack")
        return Verdict(verdict)

    def _tell_nacked(self, job: Job, item: Nack, verdict: Verdict) -> None:
        error = item.error or None
        if verdict is Verdict.DONE:
            self.plugins.notify("relay_job_retried", job=job, delay=item.delay_ms / 1000, error=error)
        elif verdict is Verdict.DEAD:
            self.plugins.notify("relay_job_dead", job=job, reason=item.reason, error=error)
        elif verdict is Verdict.LOST:
            self._tell_lost(job, "nack")

    def finish(
        self,
        queue: str,
        acks: Sequence[Job],
        nacks: Sequence[tuple[Job, Nack]],
        count: int,
        woken: bool = False,
    ) -> Flow[tuple[list[Verdict], list[Verdict], Claimed]]:
        """Ack and nack jobs of one queue and claim up to `count` more of it, in one round trip."""
        if len(acks) > MAX_BATCH or len(nacks) > MAX_BATCH or not 0 <= count <= MAX_BATCH:
            raise InvalidArgument(f"finish takes at most {MAX_BATCH} acks, nacks and jobs to claim")
        sent = time.monotonic()
        done = yield from self._end_and_claim(queue, acks, [item for _job, item in nacks], count, woken)
        for job, verdict in zip(acks, done.acked, strict=True):
            self._tell_acked(job, verdict)
        for (job, item), verdict in zip(nacks, done.nacked, strict=True):
            self._tell_nacked(job, item, verdict)
        jobs = yield from self._received(queue, done.claim, sent)
        return list(done.acked), list(done.nacked), jobs

    def extend(self, jobs: Sequence[Job], lease: float | None = None) -> Flow[list[Verdict]]:
        lease = self.settings.lease if lease is None else seconds("lease", lease, least=0.1, most=86400)
        ms = int(lease * 1000)
        verdicts = yield from self._by_queue(
            jobs, lambda q, batch: commands.extend(q, [(job.id, job.token) for job in batch], ms)
        )
        for job, verdict in zip(jobs, verdicts, strict=True):
            if verdict is Verdict.LOST:
                self._tell_lost(job, "extend")
        return verdicts

    def release(self, jobs: Sequence[Job]) -> Flow[list[Verdict]]:
        verdicts = yield from self._by_queue(
            jobs, lambda q, batch: commands.release(q, [(job.id, job.token) for job in batch])
        )
        for job, verdict in zip(jobs, verdicts, strict=True):
            if verdict is Verdict.LOST:
                self._tell_lost(job, "release")
        return verdicts

    def _by_queue(self, jobs: Sequence[Job], build: Any) -> Flow[list[Verdict]]:
        """One command per queue and MAX_BATCH jobs, sent as one pipeline; verdicts in the order of `jobs`."""
        groups: dict[str, list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault(job.queue, []).append(i)
        batches = [
            (queue, indices[at : at + MAX_BATCH])
            for queue, indices in groups.items()
            for at in range(0, len(indices), MAX_BATCH)
        ]
        built = [build(self.settings.keys(queue), [jobs[i] for i in batch]) for queue, batch in batches]
        results = [(yield built[0])] if len(built) == 1 else (yield built) if built else []
        verdicts = [Verdict.LOST] * len(jobs)
        failed = next((result for result in results if isinstance(result, RelayError)), None)
        if failed:
            raise failed
        for (_queue, batch), result in zip(batches, results, strict=True):
            for i, verdict in zip(batch, result, strict=True):
                verdicts[i] = verdict
        return verdicts

    # time

    def promote(self, queue: str, limit: int = MAX_BATCH) -> Flow[int]:
        whole("limit", limit, least=1, most=MAX_BATCH)
        promoted, _next = yield commands.promote(self.settings.keys(queue), limit)
        if promoted:
            self.plugins.notify("relay_jobs_promoted", queue=queue, count=promoted)
        return int(promoted)

    def reap(self, queue: str, limit: int = MAX_BATCH) -> Flow[int]:
        s = self.settings
        whole("limit", limit, least=1, most=MAX_BATCH)
        sent = time.monotonic()
        reaped, buried, _dropped = yield commands.reap(
            s.keys(queue), limit, max_deliveries=s.max_deliveries, keep_ms=s.keep_ms
        )
        if reaped:
            self.plugins.notify("relay_jobs_reaped", queue=queue, count=reaped)
        for grant in buried:
            self._tell_buried(queue, grant, int(time.time() * 1000), sent)
        return int(reaped)


def holds_key(job: Job) -> bool:
    """Is a dedup key taken until the job is done?"""
    return bool(job.options.dedup_key and not job.options.dedup_ms)


def is_plain(job: Job) -> bool:
    """May its ack go the short way? A job that failed before is sent back there, and one of a queue with limits, which
    the last letter of its token tells."""
    return not (job.retries or job.token.endswith("g") or holds_key(job))


def ack_of(job: Job) -> Ack:
    """The ack of a job; it frees the dedup key that is held until the job is done."""
    return Ack(job.id, job.token, (job.options.dedup_key or "") if holds_key(job) else "")


def new_nonce() -> str:
    """Fresh for each claim, from the operating system, so that forked workers never share one."""
    return os.urandom(5).hex()
