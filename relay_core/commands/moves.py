"""Commands on the hot path of workers: claim, and how a claimed job ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from relay_core import scripts
from relay_core.commands.command import Arg, Command, id_of
from relay_core.keys import LAYOUT, QueueKeys

MAX_BATCH = 200
"""Most jobs in one script call: a longer one would keep the server from its other clients."""

DEFAULT_KEEP_MS = 7 * 86_400_000
"""How long dead jobs are kept."""


class Ack(NamedTuple):
    """`dedup_key`: the key that the job holds until it is done, or ""."""

    id: str
    token: str
    dedup_key: str = ""


class Nack(NamedTuple):
    """`delay_ms`: -1 for dead at once. `record`: a new Record.pack, or b"" to keep the body."""

    id: str
    token: str
    delay_ms: int
    max_retries: int
    reason: str
    error: str
    record: bytes = b""


class Verdict(IntEnum):
    """What became of one job of an ack, nack, extend or release."""

    LOST = 0
    DONE = 1
    """Acked, extended, released; of a nack: waits for its retry."""
    DEAD = 2
    """Of a nack: went to dead."""
    ALREADY = 3
    """An earlier send of the same receipt did it."""


_DEAD_SINCE = 4
"""What scripts answer to a nack that an earlier send did, where the job went to dead."""


class Grant(NamedTuple):
    """One leased (or buried) job as the scripts give it.

    :ivar again: all plugins but some were told of this burial before
    """

    id: str
    token: str
    retries: int
    record: bytes
    again: bool = False


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """What one claim found.

    :ivar limited: None, `paused`, `rate` or `max_inflight`
    :ivar hint_ms: milliseconds until asking again makes sense; None when only a wake-up will tell
    :ivar buried: jobs that this claim moved to dead because their deliveries were used up
    :ivar levels: the priority levels in use, highest first, a digit each
    """

    grants: Sequence[Grant]
    limited: str | None
    hint_ms: int | None
    now_ms: int
    promoted: int
    reaped: int
    buried: Sequence[Grant]
    levels: str


@dataclass(frozen=True, slots=True)
class LongWay:
    """The answer of a short way that did nothing, because more is to be done than it can: take the long one.

    :ivar resent: an earlier send of the short one may have run: the long one must say so
    :ivar levels: of a claim: the priority levels in use, for the next claim
    :ivar id: of an enqueue: the job's, to be the same on the long way
    :ivar stored: of an enqueue by plain commands, which have stored the job: the long way looks at what they could not
    """

    resent: bool
    levels: str = ""
    id: str | None = None
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """What one finish did: a verdict per ack and per nack, and what the claim found.

    :ivar untold: how many burials nobody has told of in time, see `retell`
    """

    acked: Sequence[Verdict]
    nacked: Sequence[Verdict]
    claim: ClaimReply
    untold: int = 0


_LIMITS = (None, "paused", "rate", "max_inflight")


def _sweep_keys(q: QueueKeys) -> tuple[bytes, ...]:
    return (
        q.config, q.jobs, q.counters, q.marker, q.delayed, q.leases, q.dead, q.owners, q.errors,
        q.dedup, q.dedup_expiry, q.untold, *q.ready, q.payloads,
    )  # fmt: skip


def grants_of(flat: Sequence[Any], start: int = 0) -> list[Grant]:
    return [
        Grant(id_of(flat[i]), flat[i + 1].decode(), int(flat[i + 2]), flat[i + 3]) for i in range(start, len(flat), 4)
    ]


def _claim_reply(reply: Sequence[Any], _resent: bool = False) -> ClaimReply:
    status, hint, now, promoted, reaped, buried, levels = reply[:7]
    return ClaimReply(
        grants=grants_of(reply, 7),
        limited=_LIMITS[status],
        hint_ms=None if hint < 0 else hint,
        now_ms=now,
        promoted=promoted,
        reaped=reaped,
        buried=grants_of(buried) if buried else (),
        levels=levels.decode(),
    )


def _acked(reply: Sequence[int], _resent: bool = False) -> list[Verdict]:
    return [Verdict.ALREADY if answer == 2 else Verdict(answer) for answer in reply]


def _extended(reply: Sequence[int], _resent: bool) -> list[Verdict]:
    return [Verdict(answer) for answer in reply]


def _nacked(reply: Sequence[int], resent: bool) -> list[Verdict]:
    # that it is dead was not heard by anybody yet where the reply to an earlier send was lost
    dead = Verdict.DEAD if resent else Verdict.ALREADY
    return [dead if answer == _DEAD_SINCE else Verdict(answer) for answer in reply]


def claim_one(q: QueueKeys, lease_ms: int, nonce: str, *, levels: str) -> Command[ClaimReply | LongWay]:
    """Lease a job, the short way, by a caller that took no wake-up; see `claim`."""

    def parse(reply: Any, resent: bool) -> ClaimReply | LongWay:
        if isinstance(reply, bytes):
            return LongWay(resent, reply.decode())
        hint, now, *row = reply
        grants = [Grant(id_of(row[0]), row[1].decode(), 0, row[2])] if row else ()
        return ClaimReply(grants, None, None if hint < 0 else hint, now, 0, 0, (), levels)

    lists = [q.ready[int(level)] for level in levels]
    keys = (q.config, q.jobs, q.counters, q.leases, q.owners, *lists)
    return Command(scripts.load("claim_one"), keys, (LAYOUT, levels, 0, lease_ms, nonce), parse, resent_at=2)


def claim(
    q: QueueKeys, count: int, lease_ms: int, nonce: str, *, levels: str, woken: bool = False, acks: Sequence[Ack] = ()
) -> Command[ClaimReply | LongWay]:
    """Lease up to `count` (1..MAX_BATCH) jobs, the short way, and ack jobs, all or none: a ClaimReply means all.

    :param acks: as of `ack_plain`
    :param nonce: fresh per claim; a re-send finds its jobs by it
    :param levels: those in use, as the last reply told; what is out of date makes the answer a LongWay
    """

    def parse(reply: Any, resent: bool) -> ClaimReply | LongWay:
        if isinstance(reply, bytes):
            return LongWay(resent, reply.decode())
        hint, now, fence, *rows = reply
        tail = f":{nonce}t{now // 1000:x}"
        grants = [
            Grant(id_of(id), f"1:{fence + n}{tail}", 0, record)
            for n, (id, record) in enumerate(zip(rows[::2], rows[1::2], strict=True), 1)
        ]
        return ClaimReply(grants, None, None if hint < 0 else hint, now, 0, 0, (), levels)

    lists = [q.ready[int(level)] for level in levels]
    keys = (q.config, q.jobs, q.counters, q.marker, q.leases, q.owners, q.finished, *lists)
    args: list[Arg] = [LAYOUT, levels, 0, count, lease_ms, nonce, int(woken)]
    args += _held(acks)
    return Command(scripts.load("claim"), keys, tuple(args), parse, resent_at=2)


def finish(
    q: QueueKeys,
    acks: Sequence[Ack],
    nacks: Sequence[Nack],
    count: int,
    lease_ms: int,
    nonce: str,
    *,
    max_deliveries: int,
    keep_ms: int = DEFAULT_KEEP_MS,
    woken: bool = False,
    resent: bool = False,
) -> Command[Finish]:
    """End up to MAX_BATCH jobs each way and lease up to `count` (0..MAX_BATCH) more, in one round trip."""
    args: list[Arg] = [LAYOUT, int(resent), count, lease_ms, nonce, max_deliveries, keep_ms, int(woken)]
    args += (len(acks), len(nacks))
    for item in (*acks, *nacks):
        args += item

    def parse(reply: Sequence[Any], resent: bool) -> Finish:
        acked, nacked, claimed, untold = reply
        return Finish(_acked(acked), _nacked(nacked, resent), _claim_reply(claimed), untold)

    return Command(scripts.load("finish"), (*_sweep_keys(q), q.finished), tuple(args), parse, resent_at=1)


def ack(q: QueueKeys, acks: Sequence[Ack]) -> Command[list[Verdict]]:
    """The jobs are done and leave the store."""
    args = tuple(arg for item in acks for arg in item)
    keys = (
        q.owners, q.jobs, q.leases, q.errors, q.dedup, q.finished, q.counters, q.marker, q.payloads,
    )  # fmt: skip
    return Command(scripts.load("ack"), keys, args, _acked)


def ack_plain(q: QueueKeys, acks: Sequence[Ack]) -> Command[list[Verdict] | LongWay]:
    """Jobs are done and leave the store, the short way, all or none; the long one is `ack`, for any jobs.

    :param acks: of jobs that never failed, without a dedup key, and with their payloads in their records; each job once
    """

    def parse(reply: int, resent: bool) -> list[Verdict] | LongWay:
        return [Verdict.DONE] * len(acks) if reply else LongWay(resent)

    keys = (q.owners, q.jobs, q.leases, q.finished, q.counters)
    return Command(scripts.load("ack_plain"), keys, tuple(_held(acks)), parse)


def _held(acks: Sequence[Ack]) -> list[Arg]:
    """The delivery states by which jobs that never failed are held, and then their ids."""
    return [*[f"{item.token} 0 h" for item in acks], *[item.id for item in acks]]


def nack(q: QueueKeys, nacks: Sequence[Nack]) -> Command[list[Verdict]]:
    """The jobs failed: each is retried after its delay, or goes to dead."""
    args = tuple(arg for item in nacks for arg in item)
    keys = (
        q.owners, q.jobs, q.leases, q.errors, q.dedup, q.delayed, q.counters, q.config, q.marker, q.dead, *q.ready,
        q.payloads,
    )  # fmt: skip
    return Command(scripts.load("nack"), keys, args, _nacked)


def extend(q: QueueKeys, receipts: Sequence[tuple[str, str]], lease_ms: int) -> Command[list[Verdict]]:
    """Heartbeat: the leases of these (id, token) pairs end `lease_ms` from now."""
    args: tuple[Arg, ...] = (lease_ms, *(arg for pair in receipts for arg in pair))
    return Command(scripts.load("extend"), (q.owners, q.leases, q.config), args, _extended)


def release(q: QueueKeys, receipts: Sequence[tuple[str, str]]) -> Command[list[Verdict]]:
    """Hand back jobs, by (id, token), that were not started; the delivery does not count."""
    args: tuple[Arg, ...] = tuple(arg for pair in receipts for arg in pair)
    keys = (q.owners, q.jobs, q.leases, q.counters, q.marker, *q.ready)
    return Command(scripts.load("release"), keys, args, _acked)


def promote(q: QueueKeys, limit: int = MAX_BATCH) -> Command[tuple[int, int | None]]:
    """Due jobs become ready: how many, and milliseconds until the next one is due (None: never)."""

    def parse(reply: Sequence[int], _resent: bool) -> tuple[int, int | None]:
        return reply[1], None if reply[2] < 0 else reply[2]

    return Command(scripts.load("promote"), _sweep_keys(q), (LAYOUT, limit), parse)


class Reaped(NamedTuple):
    """What one reap did: leases that had expired, the jobs of these that went to dead, old dead jobs that were dropped.

    `untold`: as of Finish.
    """

    reaped: int
    buried: Sequence[Grant]
    dropped: int
    untold: int
    now_ms: int


def reap(
    q: QueueKeys, limit: int = MAX_BATCH, *, max_deliveries: int, keep_ms: int = DEFAULT_KEEP_MS
) -> Command[Reaped]:
    """Expired leases end, and old dead jobs are dropped."""

    def parse(reply: Sequence[Any], _resent: bool) -> Reaped:
        now, reaped, buried, dropped, untold = reply
        return Reaped(reaped, grants_of(buried), dropped, untold, now)

    return Command(scripts.load("reap"), _sweep_keys(q), (LAYOUT, limit, max_deliveries, keep_ms), parse)
