"""How a claimed job ends, or is held on to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from relay_core import commands
from relay_core.commands import Ack, Command, LongWay, Nack, Verdict
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import LeaseLost, RelayError
from relay_core.job import Job, Record
from relay_core.keys import QueueKeys
from relay_core.operations.base import Base
from relay_core.operations.steps import Flow
from relay_core.validation import check_job, check_jobs, payload_bytes, payload_size, seconds

MAX_ERROR = 4096
"""Bytes of an error text that are kept."""


def safe_repr(error: object) -> str:
    """The repr of an exception. It is the user's code, and may raise in turn."""
    try:
        return repr(error)
    except Exception as failure:
        return f"{type(error).__name__} (its repr raises {type(failure).__name__})"


def error_text(error: BaseException | str | None) -> str:
    """What is kept of an error: its repr or text, at most 4 KiB."""
    text = "" if error is None else error if isinstance(error, str) else safe_repr(error)
    return text.encode(errors="replace")[:MAX_ERROR].decode(errors="ignore")


def holds_key(job: Job) -> bool:
    """Is a dedup key taken until the job is done?"""
    return bool(job.options.dedup_key and not job.options.dedup_ms)


def is_plain(job: Job) -> bool:
    """May its ack go the short way? A job that failed before is sent back there, and one of a queue with limits, which
    the last letter of its token tells. It leaves payloads that lie apart where they are."""
    return not (job.retries or job.token.endswith("g") or holds_key(job) or job.options.apart)


def are_plain(jobs: Sequence[Job]) -> bool:
    """May their acks go the short way together? It takes each job once."""
    return all(map(is_plain, jobs)) and (len(jobs) < 2 or len({job.id for job in jobs}) == len(jobs))


def ack_of(job: Job) -> Ack:
    """The ack of a job; it frees the dedup key that is held until the job is done."""
    return Ack(job.id, job.token, (job.options.dedup_key or "") if holds_key(job) else "")


def _long_ack(q: QueueKeys, jobs: Sequence[Job]) -> Command[list[Verdict]]:
    return commands.ack(q, [ack_of(job) for job in jobs])


def _short_ack(q: QueueKeys, jobs: Sequence[Job]) -> Command[Any]:
    """The short way where that may do."""
    return commands.ack_plain(q, [ack_of(job) for job in jobs]) if are_plain(jobs) else _long_ack(q, jobs)


class Ending(Base):
    """ack, nack, extend and release."""

    def ack_many(self, jobs: Sequence[Job]) -> Flow[list[Verdict]]:
        return _all_told((yield from self.ack_each(jobs)))

    def ack_each(self, jobs: Sequence[Job]) -> Flow[list[Verdict | RelayError]]:
        """What became of each, an error for those whose queue could not be told."""
        check_jobs("ack_many", jobs)
        results: list[Any] = yield from self._by_queue(jobs, _short_ack)
        if left := [i for i, result in enumerate(results) if isinstance(result, LongWay)]:
            for i, result in zip(left, (yield from self._by_queue([jobs[i] for i in left], _long_ack)), strict=True):
                results[i] = result
        for job, verdict in zip(jobs, results, strict=True):
            if isinstance(verdict, Verdict):
                self._tell_acked(job, verdict)
        return results

    def ack(self, job: Job) -> Flow[None]:
        check_job("ack", job)
        verdict = yield from self._ack_one(job)
        self._tell_acked(job, verdict)
        if verdict is Verdict.LOST:
            raise LeaseLost(job.queue, job.id, "ack")

    def _ack_one(self, job: Job) -> Flow[Verdict]:
        q = self.settings.keys(job.queue)
        answer: Sequence[Verdict] | LongWay = yield _short_ack(q, (job,))
        return (yield _long_ack(q, (job,)))[0] if isinstance(answer, LongWay) else answer[0]

    def _tell_acked(self, job: Job, verdict: Verdict) -> None:
        if verdict is Verdict.DONE:
            if self.plugins.wants("relay_job_acked"):
                self.plugins.notify("relay_job_acked", job=job, latency=job.age())
        elif verdict is Verdict.LOST:
            self.tell_lost(job, "ack")

    def tell_lost(self, job: Job, move: str) -> None:
        """The plugins hear of a lease that was over before its move."""
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
            record = Record.pack(job.priority, replace(job.options, apart=None), body)
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
        check_job("nack", job)
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
            self.plugins.notify("relay_job_dead", job=job, reason=item.reason, error=error, again=False)
        elif verdict is Verdict.LOST:
            self.tell_lost(job, "nack")

    def extend(self, jobs: Sequence[Job], lease: float | None = None) -> Flow[list[Verdict]]:
        results = yield from self.extend_each(jobs, lease)
        self._tell_losses(jobs, results, "extend")
        return _all_told(results)

    def extend_each(self, jobs: Sequence[Job], lease: float | None = None) -> Flow[list[Verdict | RelayError]]:
        """What became of each, an error for those whose queue could not be told. The caller tells the plugins of what
        was lost."""
        check_jobs("extend", jobs)
        lease = self.settings.lease if lease is None else seconds("lease", lease, least=0.1, most=86400)
        ms = int(lease * 1000)
        return (
            yield from self._by_queue(
                jobs, lambda q, batch: commands.extend(q, [(job.id, job.token) for job in batch], ms)
            )
        )

    def release(self, jobs: Sequence[Job]) -> Flow[list[Verdict]]:
        return _all_told((yield from self.release_each(jobs)))

    def release_each(self, jobs: Sequence[Job]) -> Flow[list[Verdict | RelayError]]:
        """What became of each, an error for those whose queue could not be told."""
        check_jobs("release", jobs)
        results = yield from self._by_queue(
            jobs, lambda q, batch: commands.release(q, [(job.id, job.token) for job in batch])
        )
        self._tell_losses(jobs, results, "release")
        return results

    def _tell_losses(self, jobs: Sequence[Job], results: Sequence[Verdict | RelayError], move: str) -> None:
        for job, verdict in zip(jobs, results, strict=True):
            if verdict is Verdict.LOST:
                self.tell_lost(job, move)

    def _by_queue(self, jobs: Sequence[Job], build: Any) -> Flow[list[Any]]:
        """One command per queue and MAX_BATCH jobs, sent as one pipeline; verdicts in the order of `jobs`, and in their
        place a LongWay, or the error where a queue could not be told: it may be alone with that."""
        groups: dict[str, list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault(job.queue, []).append(i)
        batches = [
            (queue, indices[at : at + MAX_BATCH])
            for queue, indices in groups.items()
            for at in range(0, len(indices), MAX_BATCH)
        ]
        built = [build(self.settings.keys(queue), [jobs[i] for i in batch]) for queue, batch in batches]
        results: Sequence[Any] = ()
        if len(built) == 1:
            try:
                results = [(yield built[0])]
            except RelayError as error:
                results = [error]
        elif built:
            results = yield built
        verdicts: list[Any] = [Verdict.LOST] * len(jobs)
        for (_queue, batch), result in zip(batches, results, strict=True):
            each = [result] * len(batch) if isinstance(result, (RelayError, LongWay)) else result
            for i, verdict in zip(batch, each, strict=True):
                verdicts[i] = verdict
        return verdicts


def _all_told(results: Sequence[Verdict | RelayError]) -> list[Verdict]:
    """The verdicts. Raises the first error among them, now that nothing is left to do for the others."""
    verdicts: list[Verdict] = []
    for result in results:
        if isinstance(result, RelayError):
            raise result
        verdicts.append(result)
    return verdicts
