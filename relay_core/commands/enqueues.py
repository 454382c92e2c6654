"""Commands by which jobs come into the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from relay_core import scripts
from relay_core.clock import sent_now
from relay_core.commands.command import Apart, Arg, Command, Same, Transacted, id_of
from relay_core.commands.moves import LongWay
from relay_core.job import Enqueued, Record
from relay_core.keys import LAYOUT, QueueKeys

_LAYOUT = str(LAYOUT).encode()

LARGE = 12288
"""Bytes from which on a payload is stored apart from its record, by plain commands and not by scripts: a server's Lua
hashes every byte of each string that it meets, which takes longer than all else that is done with a large one."""


class NewJob(NamedTuple):
    """A job to store.

    `due`: "" now, "+<ms>" after the server's now, "@<unix ms>". `dedup`: "" or "<ms, 0 until done>:<key>".
    `record`: Record.pack.
    """

    id: str
    due: str
    dedup: str
    record: bytes


def is_large(job: NewJob) -> bool:
    """Whether its payload is to lie apart from its record. Headers do not count, however large: they never do."""
    size = len(job.record)
    return size > LARGE and size - job.record.index(b"\n") > LARGE


class Short(NamedTuple):
    """The answer to an enqueue the short way: the job is stored.

    :ivar level: one that the queue was seen to have in use
    :ivar now_ms: the server's time, unix ms; None where it did not say
    :ivar asked: `sent_now()` before it was asked
    """

    id: str
    level: int = 0
    now_ms: int | None = None
    asked: float = 0.0


class Stored(list[Enqueued]):
    """The answers to one enqueue of many.

    :ivar founded: True where the queue had no job before, or where an earlier send may have been its first: its name
        may not be among those that people are shown
    """

    __slots__ = ("founded",)

    def __init__(self, answers: Iterable[Enqueued], founded: bool) -> None:
        super().__init__(answers)
        self.founded = founded


def enqueue(q: QueueKeys, jobs: Sequence[NewJob], *, since: float | None = None) -> Command[Stored]:
    """Store up to MAX_BATCH jobs. A job that a first send of this command stored is not a duplicate.

    :param since: `sent_now()` at which an earlier command was sent that may have stored them
    """
    levels = {job.record[:1] for job in jobs}
    ahead: tuple[Arg, ...] = (LAYOUT, 0, b"".join(levels))

    def parse(reply: Sequence[Any], resent: bool) -> Stored:
        now_ms, *answers = reply[0] if isinstance(reply, Transacted) else reply
        return Stored(
            (
                Enqueued(job.id) if answer == 1 else Enqueued(job.id if answer == 0 else id_of(answer), duplicate=True)
                for job, answer in zip(jobs, answers, strict=True)
            ),
            not now_ms or resent or since is not None,
        )

    lists = [q.ready[int(level)] for level in levels]
    keys = (
        q.config, q.jobs, q.counters, q.marker, q.delayed, q.dedup, q.dedup_expiry, q.finished, q.payloads, *lists,
    )  # fmt: skip
    args: tuple[Arg, ...] = (*ahead, *(arg for job in jobs for arg in job))
    apart = _apart(q, ahead, jobs) if any(map(is_large, jobs)) else None
    script = scripts.load("enqueue")
    return Command(script, keys, args, parse, resent_at=1, durable=True, since=since, apart=apart)


def _apart(q: QueueKeys, ahead: tuple[Arg, ...], jobs: Sequence[NewJob]) -> Apart | None:
    """The enqueue whose large payloads are stored after its script, which does not see them; None for none."""
    args, payloads, named = list(ahead), {}, Counter(job.id for job in jobs)
    for job in jobs:
        record = job.record
        if is_large(job) and named[job.id] == 1:  # of several of one id, nobody knows yet which is stored
            record, payloads[job.id] = Record.split(record)
        args += (*job[:3], record)
    if not payloads:
        return None
    # a job that was there before keeps its payload if that lies apart; what is stored for others is tidied up
    stores = (("HSETNX", q.payloads, id, payload) for id, payload in payloads.items())
    # by its text, as nothing loads it where the server does not know it
    tidied = tidy(q, list(payloads))
    return Apart(tuple(args), (*stores, ("EVAL", tidied.script.text, *tidied.wire()[1:])))


def enqueue_large(q: QueueKeys, job: NewJob, *, born: int | None = None) -> Command[Short | LongWay]:
    """Store a large job; the long way is `enqueue`, for what else there is to do than with most.

    :param job: one that is ready now (`due` is "") and has no dedup key
    :param born: see enqueue_one
    """
    asked = sent_now() if born is None else 0.0

    def parse(reply: Any, resent: bool) -> Short | LongWay:
        if isinstance(reply, Transacted):
            if isinstance(reply[0], int):
                return _plain_answer(job, reply)
            reply = reply[0]
        now_ms, answer = reply
        if answer == 1 and now_ms:
            return Short(job.id, _level(job), now_ms, asked)
        return LongWay(resent or answer == 1, id=job.id)

    stored = enqueue(q, (job,))
    plain = None if born is None else _plain(q, job, born)
    return Command(
        stored.script, stored.keys, stored.args, parse, resent_at=1, durable=True, apart=stored.apart, plain=plain
    )


def tidy(q: QueueKeys, ids: Sequence[str]) -> Command[int]:
    """Payloads that lie apart from jobs that are not there, or have theirs in their records, leave the store."""
    return Command(scripts.load("tidy"), (q.jobs, q.payloads), tuple(ids), lambda reply, _resent: int(reply))


def enqueue_one(q: QueueKeys, job: NewJob, *, born: int | None = None) -> Command[Short | LongWay]:
    """Store a job the short way; the long one is `enqueue`, for any job.

    A job that no other enqueue can have stored needs no script, which is for what depends on what is there: plain
    commands do it in half of the server's time.

    :param job: one that is ready now (`due` is "") and has no dedup key
    :param born: the server's time now, unix ms, for a job with a fresh id, where the caller knows it and has seen its
        level in use
    """
    asked = sent_now() if born is None else 0.0

    def parse(reply: Any, resent: bool) -> Short | LongWay:
        if isinstance(reply, Transacted):
            return _plain_answer(job, reply)
        return Short(job.id, _level(job), reply, asked) if reply else LongWay(resent, id=job.id)

    keys = (q.config, q.jobs, q.marker, q.ready[_level(job)])
    args = (LAYOUT, 0, job.id, job.record)
    plain = None if born is None else _plain(q, job, born)
    return Command(scripts.load("enqueue_one"), keys, args, parse, resent_at=1, durable=True, plain=plain)


def _level(job: NewJob) -> int:
    return job.record[0] - 48  # an ASCII digit


def _plain(q: QueueKeys, job: NewJob, born: int) -> tuple[tuple[Arg, ...], ...]:
    """What stores a job without a look at what is there, which `_plain_answer` has in the replies."""
    record, beside = job.record, list[tuple[Arg, ...]]()
    if is_large(job):
        record, payload = Record.split(record)
        beside.append(("HSETNX", q.payloads, job.id, payload))
    return (
        ("HSETNX", q.jobs, job.id, b"%d %b" % (born, record)),
        *beside,
        ("RPUSH", q.ready[_level(job)], job.id),
        Same(("ZADD", q.marker, "0", "w")),
        Same(("HMGET", q.config, "v", "levels")),
    )


def _plain_answer(job: NewJob, replies: Transacted) -> Short | LongWay:
    """The long way mends what should have been looked at before: of a queue that was deleted meanwhile, no claim would
    look at the job's level."""
    stored, *_, (layout, levels) = replies
    if stored and layout == _LAYOUT and levels is not None and job.record[:1] in levels:
        return Short(job.id)
    return LongWay(bool(stored), id=job.id, stored=bool(stored))


def retract(q: QueueKeys, job: NewJob) -> Command[int]:
    """A job that plain commands have stored leaves the store again, unless it was taken: its queue refuses it."""
    keys = (q.jobs, q.payloads, q.ready[_level(job)])
    return Command(scripts.load("retract"), keys, (job.id,), lambda reply, _resent: int(reply))
