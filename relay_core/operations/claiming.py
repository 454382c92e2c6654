"""How jobs are leased, and what time brings about."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from relay_core import commands
from relay_core.commands import ClaimReply, Finish, Grant, LongWay, Nack, Verdict
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import InvalidArgument, InvalidRecord, RelayError
from relay_core.job import NO_OPTIONS, Claimed, Job, Record
from relay_core.operations.ending import Ending, ack_of, are_plain
from relay_core.operations.settings import Settings
from relay_core.operations.steps import Flow, Wait
from relay_core.plugins import Plugins
from relay_core.validation import seconds, whole


class Claiming(Ending):
    """claim, finish, promote and reap."""

    def __init__(self, settings: Settings, plugins: Plugins) -> None:
        super().__init__(settings, plugins)
        self._levels: dict[str, str] = {}
        self._long: set[str] = set()
        """Queues where the last long way found more than the common case: the next claim takes it at once."""

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
                try:
                    got = yield from self._claim_one(queue, count - len(found), woken)
                except RelayError:
                    if not found:
                        raise
                    break  # what is leased by now must reach its worker; the next claim meets the error again
                found.extend(got)
                if got.limited:
                    found.limited = got.limited
                if got.retry_after is not None:
                    found.retry_after = min(got.retry_after, found.retry_after or got.retry_after)
                if len(found) == count and not woken:
                    break  # else the marker that was taken may be of one of the others, which have to be looked at
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
        if count and not nacks and queue not in self._long and are_plain(done):
            levels = self._levels.get(queue, "")
            answer: ClaimReply | LongWay = yield (
                commands.claim_one(q, s.lease_ms, nonce, levels=levels)
                if count == 1 and not acks and not woken
                else commands.claim(q, count, s.lease_ms, nonce, levels=levels, woken=woken, acks=acks)
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
        if count:
            (self._long.add if _is_special(finished.claim) else self._long.discard)(queue)
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
            try:
                yield from self.nack(job, problem, reason="undecodable", dead=True, lenient=True)
            except RelayError:
                if not jobs:
                    raise
                break  # their leases end by themselves; those of the others must reach their worker
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


def _is_special(reply: ClaimReply) -> bool:
    """Did it do what a short claim cannot? A token begins with the number of deliveries, and under limits ends in g."""
    return bool(reply.limited or reply.promoted or reply.reaped) or any(
        grant.token[:2] != "1:" or grant.token.endswith("g") for grant in reply.grants
    )


def new_nonce() -> str:
    """Fresh for each claim, from the operating system, so that forked workers never share one."""
    return os.urandom(5).hex()
