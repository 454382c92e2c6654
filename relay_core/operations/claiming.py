"""How jobs are leased, and what time brings about."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from relay_core import commands
from relay_core.commands import ClaimReply, Finish, LongWay, Nack, Reaped, Verdict
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import InvalidArgument, RelayError, Unavailable
from relay_core.job import Claimed, Job
from relay_core.operations.burials import Burials
from relay_core.operations.ending import Ending, ack_of, are_plain
from relay_core.operations.steps import Flow, Wait, Waited
from relay_core.validation import seconds, whole

_PUT_OFF = 5.0
"""Seconds for which a queue that could not be claimed from is asked after the others."""


class Claiming(Ending, Burials):
    """claim, finish, promote and reap.

    :ivar several: True where queues may lie on several servers, of which one may be away alone
    """

    several = False

    def claim(self, queues: Sequence[str], count: int = 1, wait: float = 0.0, woken: bool = False) -> Flow[Claimed]:
        """Ask the queues in their order, but those that failed last, until `count` jobs are leased; wait up to `wait`
        seconds for the first."""
        if not queues:
            raise InvalidArgument("claim needs at least one queue")
        whole("count", count, least=1, most=MAX_BATCH)
        seconds("wait", wait)
        deadline = time.monotonic() + wait
        markers = {self.settings.keys(queue).marker: queue for queue in queues}
        away: set[str] = set()
        while True:
            found, now = Claimed(), time.monotonic()
            # one whose server is away alone, or that is at fault itself, keeps no other from being asked
            there = [queue for queue in queues if queue not in away]
            for queue in sorted(there, key=lambda queue: now < self.seen(queue).away_until):
                seen = self.seen(queue)
                if found and now < seen.away_until:
                    break
                began = time.monotonic()
                try:
                    got = yield from self._claim_one(queue, count - len(found), woken)
                except RelayError as error:
                    if self.several or not isinstance(error, Unavailable):  # else no other is better off
                        ended = time.monotonic()
                        seen.away_until = ended + max(_PUT_OFF, ended - began)
                    if not found:
                        raise
                    break  # what is leased by now must reach its worker; the next claim meets the error again
                seen.away_until = 0.0
                found.extend(got)
                if got.limited:
                    found.limited = got.limited
                if got.retry_after is not None:  # 0.0 is an answer, too: there is more at once
                    known = got.retry_after if found.retry_after is None else found.retry_after
                    found.retry_after = min(got.retry_after, known)
                if len(found) == count and not woken:
                    break  # else the marker that was taken may be of one of the others, which have to be looked at
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            hint = self.settings.max_block if found.retry_after is None else found.retry_after
            waited: Waited = yield Wait(tuple(markers), max(0.001, min(left, hint, self.settings.max_block)))
            away = {markers[marker] for marker in waited.away}
            # whoever waited may have taken the marker, and must put it back while work remains
            woken = True

    def _claim_one(self, queue: str, count: int, woken: bool) -> Flow[Claimed]:
        sent = time.monotonic()
        done = yield from self._end_and_claim(queue, (), (), count, woken, sent)
        return (yield from self._received(queue, done, sent))

    def _end_and_claim(
        self, queue: str, done: Sequence[Job], nacks: Sequence[Nack], count: int, woken: bool, sent: float
    ) -> Flow[Finish]:
        """The short way where that may do, and the long one where it does not.

        :param sent: `time.monotonic()`
        """
        s = self.settings
        q, nonce, resent = s.keys(queue), new_nonce(), False
        acks, seen = [ack_of(job) for job in done], self.seen(queue)
        if count and not nacks and not seen.long and are_plain(done) and sent < seen.look_at:
            levels = seen.levels
            answer: ClaimReply | LongWay = yield (
                commands.claim_one(q, s.lease_ms, nonce, levels=levels)
                if count == 1 and not acks and not woken
                else commands.claim(q, count, s.lease_ms, nonce, levels=levels, woken=woken, acks=acks)
            )
            seen.levels = answer.levels
            if not isinstance(answer, LongWay):
                return Finish([Verdict.DONE] * len(acks), (), answer)
            resent = answer.resent
        finished: Finish = yield commands.finish(
            q, acks, nacks, count, s.lease_ms, nonce,
            max_deliveries=s.max_deliveries, keep_ms=s.keep_ms, woken=woken, resent=resent,
        )  # fmt: skip
        seen.levels = finished.claim.levels
        self.looked(seen)
        if count:
            seen.long = _is_special(finished.claim)
        return finished

    def _received(self, queue: str, done: Finish, sent: float) -> Flow[Claimed]:
        reply = done.claim
        if reply.reaped or reply.promoted:
            self.plugins.notify("relay_jobs_promoted", queue=queue, count=reply.promoted) if reply.promoted else None
            self.plugins.notify("relay_jobs_reaped", queue=queue, count=reply.reaped) if reply.reaped else None
        if reply.buried or done.untold:
            yield from self.tell_buried(queue, reply.buried, done.untold, reply.now_ms, sent)
        jobs = Claimed((), reply.limited, None if reply.hint_ms is None else reply.hint_ms / 1000)
        spoiled: list[tuple[Job, str]] = []
        tell = self.plugins.wants("relay_job_claimed")
        for grant in (yield from self.whole(queue, reply.grants)):
            job, problem = self.job_of(queue, grant, reply.now_ms, sent)
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
        done = yield from self._end_and_claim(queue, acks, [item for _job, item in nacks], count, woken, sent)
        for job, verdict in zip(acks, done.acked, strict=True):
            self._tell_acked(job, verdict)
        for (job, item), verdict in zip(nacks, done.nacked, strict=True):
            self._tell_nacked(job, item, verdict)
        jobs = yield from self._received(queue, done, sent)
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
        done: Reaped = yield commands.reap(s.keys(queue), limit, max_deliveries=s.max_deliveries, keep_ms=s.keep_ms)
        if done.reaped:
            self.plugins.notify("relay_jobs_reaped", queue=queue, count=done.reaped)
        yield from self.tell_buried(queue, done.buried, done.untold, done.now_ms, sent)
        return done.reaped


def _is_special(reply: ClaimReply) -> bool:
    """Did it do what a short claim cannot? A token begins with the number of deliveries, and under limits ends in g."""
    return bool(reply.limited or reply.promoted or reply.reaped) or any(
        grant.token[:2] != "1:" or grant.token.endswith("g") for grant in reply.grants
    )


def new_nonce() -> str:
    """Fresh for each claim, from the operating system, so that forked workers never share one."""
    return os.urandom(5).hex()
