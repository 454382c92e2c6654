"""The scripts against the model: random histories with lost replies, expired leases and stale tokens.

Time does not really pass. `pass_time` takes whole hours off every time in the store, which is the same to the
scripts as a clock that moved on; a history takes seconds, so no hour is ever reached by accident.

RELAY_MODEL_EXAMPLES sets how many histories run per server (default 150); RELAY_MODEL_SHRINK=1 makes a failing one
as short as it can be.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from relay_core import commands, scripts
from relay_core.broker import Broker
from relay_core.clock import sent_now
from relay_core.commands import Ack, ClaimReply, Command, Finish, Grant, LongWay, Nack, NewJob, Short, Verdict
from relay_core.commands.command import Transacted
from relay_core.commands.enqueues import LARGE
from relay_core.job import Enqueued, Options, Record, State
from relay_core.keys import QueueKeys
from relay_core.maintenance import limits
from tests.histories import histories
from tests.model import Model, ModelClaim, ModelJob
from tests.servers import Server

T = TypeVar("T")
U = TypeVar("U")

UNIT = 3_600_000
"""Milliseconds of one unit of the model's time."""

FOREVER = 100_000
LARGE_PAYLOAD = b"x" * LARGE
LONG_AGO = sent_now() - 1e6

# Everything in the store that is a time, moved into the past by ARGV[1] ms.
PASS_TIME = """
for i = 1, 5 do
  local rows = redis.call('ZRANGE', KEYS[i], 0, -1, 'WITHSCORES')
  for at = 1, #rows, 2 do redis.call('ZADD', KEYS[i], rows[at + 1] - ARGV[1], rows[at]) end
end
for _, name in ipairs({'due', 'stamp'}) do
  local value = redis.call('HGET', KEYS[6], name)
  if value then redis.call('HSET', KEYS[6], name, string.format('%.0f', value - ARGV[1])) end
end
"""

times = st.integers(1, 4)
pauses = st.sampled_from([0, 0, 1, 2, 5])
picks = st.lists(st.integers(0, 12), min_size=1, max_size=3)
lost = st.sampled_from([False, False, True])


class Queue(RuleBasedStateMachine):
    """One queue. Each rule runs a command against the server and the same move on the model."""

    server: Server
    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.server.cli("FLUSHALL")
        self.q = QueueKeys("relay", "q")
        self.model = Model()
        self.receipts: list[tuple[str, str, str]] = []
        self.burials: list[tuple[str, str]] = []
        self.sent: list[tuple[Callable[[], list[Enqueued] | Short], list[ModelJob]]] = []
        self.made = self.most = self.claims = 0
        self.levels = ""
        self.at = 0
        # a wake-up is owed to waiting workers while there is work, unless a limit took it
        self.marker_taken = False
        self.excused = False

    # how a command is run

    def send(self, command: Command[T], resent: bool = False) -> T:
        while time.time_ns() // 1_000_000 == self.at:  # no two steps share a millisecond
            time.sleep(0.0001)
        self.model.step += 1
        since = LONG_AGO if resent else None
        if wires := command.transaction(since, again=resent):
            with self.client.pipeline(transaction=True) as pipe:
                for wire in wires[1:-1]:
                    pipe.execute_command(*wire)
                reply = Transacted(pipe.execute())
        else:
            reply = self.server.cli("EVALSHA", *command.wire(since))
        self.at = time.time_ns() // 1_000_000  # the server looked at its clock in this one or before
        return command.parse(reply, resent)

    def both(self, command: Command[T], move: Callable[[bool], Any], twice: bool) -> tuple[T, Any]:
        """Run it here and there; `twice`: the first reply is lost, and the command is sent again."""
        got, want = self.send(command), move(False)
        if twice:
            got, want = self.send(command, True), move(True)
        return got, want

    def short_or_long(
        self, short: Command[T | LongWay], long: Callable[[LongWay], Command[U]], resent: bool = False
    ) -> T | U:
        """As brokers do: the short way, and the long one where that is asked for."""
        reply = self.send(short, resent)
        return self.send(long(reply)) if isinstance(reply, LongWay) else reply

    def receipts_at(self, pick: list[int]) -> list[tuple[str, str, str]]:
        """Receipts of claims, the latest first: many are stale."""
        return [self.receipts[-1 - n % len(self.receipts)] for n in pick] if self.receipts else []

    def lies_apart(self, id: str) -> bool:
        """Whether a job has its payload beside its record, so that the short way of an ack is not for it."""
        return bool(self.server.cli("HEXISTS", self.q.payloads, id))

    def ids_at(self, pick: list[int]) -> list[str]:
        return [f"id{max(0, self.made - 1 - n):04}" for n in pick]

    @initialize(delay=st.sampled_from([0, 3]), claimed=st.integers(0, 4), lease=times)
    def begin(self, delay: int, claimed: int, lease: int) -> None:
        """Some jobs, some of them claimed: there is something to do from the first step."""
        for name in scripts.names():
            self.server.cli("SCRIPT", "LOAD", scripts.load(name).text)
        self.enqueue([(5, 0, "", 0, 0, False)] * 5 + [(5, 0, "", 0, 0, True), (9, delay, "b", 0, 0, False)], 0, False)
        if claimed:
            self.claim(0, [], claimed, lease, 3, False, False)

    # moves

    @rule(
        jobs=st.lists(
            st.tuples(
                st.integers(0, 2).map(lambda n: (0, 5, 9)[n]),
                st.sampled_from([0, 0, 0, 1, 3]),
                st.sampled_from(["", "", "a", "b"]),
                st.sampled_from([0, 2]),
                st.sampled_from([0, 0, 1]),
                st.sampled_from([False, False, True]),
            ),
            min_size=1,
            max_size=4,
        ),
        again=st.sampled_from([0, 0, 0, 1, 3]),
        twice=lost,
    )
    def enqueue(self, jobs: list[tuple[int, int, str, int, int, bool]], again: int, twice: bool) -> None:
        """Fresh ids, but for `again`: that far back, an id of before."""
        self.made = max(0, self.made - again)
        rows: list[tuple[ModelJob, int]] = []
        new: list[NewJob] = []
        for level, delay, key, keep, own_max, large in jobs:
            id = f"id{self.made:04}"
            self.made += 1
            self.most = max(self.most, self.made)
            keep = keep if key else 0
            rows.append((ModelJob(id, level, own_max, key, keep), delay))
            options = Options(
                max_deliveries=own_max or None, dedup_key=key or None, dedup_ms=keep * UNIT if keep else None
            )
            dedup = f"{keep * UNIT}:{key}" if key else ""
            record = Record.pack(level, options, LARGE_PAYLOAD if large else b"x")
            new.append(NewJob(id, f"+{delay * UNIT}" if delay else "", dedup, record))
        command = commands.enqueue(self.q, new)
        answers: list[int | str] = []

        def move(resent: bool) -> list[int | str]:
            # a copy each time: the model keeps what it is given
            fresh = [(ModelJob(j.id, j.level, j.own_max, j.dedup_key, j.dedup_units), d) for j, d in rows]
            answers.append([self.model.enqueue(job, delay, resent) for job, delay in fresh])
            return answers[-1]

        got, want = self.both(command, move, twice)
        assert got == self.enqueued(rows, want, twice)
        if all(answer == 1 for answer in answers[0]):
            self.sent.append((lambda: self.send(command, True), [job for job, _delay in rows]))

    @rule(
        level=st.sampled_from([0, 5, 9]),
        own_max=st.sampled_from([0, 0, 1]),
        large=st.booleans(),
        again=st.integers(0, 3),
        plainly=st.booleans(),
        twice=lost,
    )
    def enqueue_one(self, level: int, own_max: int, large: bool, again: int, plainly: bool, twice: bool) -> None:
        if plainly:  # which is for fresh ids
            again, self.made = 0, max(self.made, self.most)
        self.made = max(0, self.made - again)
        job = ModelJob(f"id{self.made:04}", level, own_max, "", 0)
        self.made += 1
        self.most = max(self.most, self.made)
        payload = LARGE_PAYLOAD if large else b"x"
        new = NewJob(job.id, "", "", Record.pack(level, Options(max_deliveries=own_max or None), payload))
        born = time.time_ns() // 1_000_000 if plainly else None
        short = (commands.enqueue_large if large else commands.enqueue_one)(self.q, new, born=born)

        def long(answer: LongWay) -> Command[list[Enqueued]]:
            return commands.enqueue(self.q, [new], since=LONG_AGO if answer.resent else None)

        def model(resent: bool) -> int | str:
            return self.model.enqueue(ModelJob(job.id, level, own_max, "", 0), 0, resent)

        got, first = self.short_or_long(short, long), model(False)
        want = first
        if twice:
            got, want = self.short_or_long(short, long, resent=True), model(True)
        (answer,) = got if isinstance(got, list) else (Enqueued(got.id),)
        assert [answer] == self.enqueued([(job, 0)], [want], twice)
        if first == 1:
            self.sent.append((lambda: self.short_or_long(short, long, resent=True), [job]))

    @staticmethod
    def enqueued(rows: list[tuple[ModelJob, int]], answers: list[int | str], resent: bool) -> list[Enqueued]:
        return [
            Enqueued(job.id, duplicate=answer == 0 and not resent)
            if answer in (0, 1)
            else Enqueued(str(answer), duplicate=True)
            for (job, _delay), answer in zip(rows, answers, strict=True)
        ]

    @rule(back=st.integers(0, 5))
    def send_an_old_enqueue_again(self, back: int) -> None:
        """Its jobs may be claimed, retried, dead or done by now; nothing is stored twice."""
        for resend, jobs in self.sent[-1 - back :][:1]:
            gone = {job.id for job in jobs} - self.model.jobs.keys() - {id for id, _ in self.model.finished}
            if not gone:  # cancelled and purged ones are stored anew: nobody remembers them
                answer = resend()
                answers = answer if isinstance(answer, list) else [Enqueued(answer.id)]
                assert answers == [Enqueued(job.id) for job in jobs]

    @rule(
        after=pauses,
        pick=st.one_of(st.just([]), picks),
        count=st.integers(1, 4),
        lease=times,
        most=st.integers(1, 3),
        woken=st.booleans(),
        twice=lost,
    )
    def claim(self, after: int, pick: list[int], count: int, lease: int, most: int, woken: bool, twice: bool) -> None:
        """With acks, or without."""
        self.pass_time(after)
        woken = self.take_marker() if woken else False
        nonce = self.nonce()
        acks = [item for item in self.plain_acks(pick) if not item.token.endswith("g")]
        for resent in (False, True)[: 1 + twice]:
            got, acked = self.claim_as_brokers_do(acks, count, lease, nonce, most, woken, resent)
            assert acked == self.model.ack(acks)
            want = self.model.claim(count, lease, nonce, most, resent)
        self.check_claim(got, want, woken, ordered=not twice)

    def claim_as_brokers_do(
        self, acks: list[Ack], count: int, lease: int, nonce: str, most: int, woken: bool, resent: bool
    ) -> tuple[ClaimReply, list[Verdict]]:
        def long(answer: LongWay) -> Command[Finish]:
            return commands.finish(
                self.q, acks, (), count, lease * UNIT, nonce,
                max_deliveries=most, keep_ms=FOREVER * UNIT, woken=woken, resent=answer.resent,
            )  # fmt: skip

        short = (
            commands.claim_one(self.q, lease * UNIT, nonce, levels=self.levels)
            if count == 1 and not acks and not woken
            else commands.claim(self.q, count, lease * UNIT, nonce, levels=self.levels, woken=woken, acks=acks)
        )
        reply = self.short_or_long(short, long, resent)
        claimed = reply.claim if isinstance(reply, Finish) else reply
        self.levels = claimed.levels
        return claimed, [*reply.acked] if isinstance(reply, Finish) else [Verdict.DONE] * len(acks)

    def nonce(self) -> str:
        self.claims += 1
        return f"n{self.claims}"

    def take_marker(self) -> bool:
        """What BZPOPMIN does for a waiting worker."""
        self.marker_taken = bool(self.server.cli("ZPOPMIN", self.q.marker))
        return self.marker_taken

    def check_claim(self, got: ClaimReply, want: ModelClaim, woken: bool, ordered: bool) -> None:
        for grant in got.grants:
            lies_apart = Record.lies_apart(grant.record)
            payload = self.server.cli("HGET", self.q.payloads, grant.id) if lies_apart else b""
            assert Record.unpack(grant.record + payload).payload == (LARGE_PAYLOAD if lies_apart else b"x")
            job = self.model.jobs[grant.id]
            expected = re.fullmatch(r"(\d+:\d+:\w+?)(g?)", job.token)
            # the server's time is between the nonce and the mark of a limit
            if expected and re.fullmatch(f"{expected[1]}t[0-9a-f]{{8}}{expected[2]}", grant.token):
                job.fence_and_nonce = f":{grant.token.partition(':')[2]}"
        want.grants = [(id, self.model.jobs[id].token, retries) for id, _token, retries in want.grants]
        grants = [(grant.id, grant.token, grant.retries) for grant in got.grants]
        assert (grants if ordered else sorted(grants)) == (want.grants if ordered else sorted(want.grants))
        assert (got.limited, got.promoted, got.reaped) == (want.limited, want.promoted, want.reaped)
        assert {grant.id for grant in got.buried} == want.buried
        self.found_buried([*got.buried])
        self.receipts += [(grant.id, grant.token, self.model.jobs[grant.id].dedup_key) for grant in got.grants]
        self.marker_taken = False
        if woken and got.limited:
            self.excused = True

    def acks(self, pick: list[int]) -> list[Ack]:
        items = []
        for id, token, key in self.receipts_at(pick):
            job = self.model.jobs.get(id)
            items.append(Ack(id, token, key if job and not job.dedup_units else ""))
        return items

    def plain_acks(self, pick: list[int]) -> list[Ack]:
        """Those that may go the short way, each job once."""
        each = {item.id: item for item in self.acks(pick) if not (item.dedup_key or self.lies_apart(item.id))}
        return list(each.values())

    def nacks(self, pick: list[int], delay: int, retries: int) -> list[Nack]:
        ms = delay * UNIT if delay > 0 else delay
        return [Nack(id, token, ms, retries, "why", "error") for id, token, _key in self.receipts_at(pick)]

    @rule(pick=picks, twice=lost)
    def ack(self, pick: list[int], twice: bool) -> None:
        if items := self.acks(pick):
            got, want = self.both(commands.ack(self.q, items), lambda _resent: self.model.ack(items), twice)
            assert got == want

    @rule(pick=picks, twice=lost)
    def ack_plain(self, pick: list[int], twice: bool) -> None:
        if items := self.plain_acks(pick):
            got, want = None, None
            for resent in (False, True)[: 1 + twice]:
                got = self.short_or_long(
                    commands.ack_plain(self.q, items), lambda _: commands.ack(self.q, items), resent
                )
                want = self.model.ack(items)
            assert got == want

    @rule(pick=picks, delay=st.integers(-1, 3), retries=st.integers(0, 3), twice=lost)
    def nack(self, pick: list[int], delay: int, retries: int, twice: bool) -> None:
        if items := self.nacks(pick, delay, retries):
            command = commands.nack(self.q, items)
            got, want = self.both(command, lambda resent: self.model.nack(items, UNIT, resent), twice)
            assert got == want

    @rule(pick=picks, nacked=picks, delay=st.integers(-1, 2), count=st.integers(0, 3), lease=times, twice=lost)
    def finish(self, pick: list[int], nacked: list[int], delay: int, count: int, lease: int, twice: bool) -> None:
        acks, nacks, nonce = self.acks(pick), self.nacks(nacked, delay, 2), self.nonce()
        command = commands.finish(
            self.q, acks, nacks, count, lease * UNIT, nonce, max_deliveries=3, keep_ms=FOREVER * UNIT
        )

        def move(resent: bool) -> Any:
            acked = self.model.ack(acks)
            return acked, self.model.nack(nacks, UNIT, resent), self.model.claim(count, lease, nonce, 3, resent)

        got, want = self.both(command, move, twice)
        assert (got.acked, got.nacked) == want[:2]
        assert got.untold == self.model.owed()
        assert got.claim is not None
        self.check_claim(got.claim, want[2], woken=False, ordered=not twice)

    @rule(pick=picks, lease=times, twice=lost)
    def extend(self, pick: list[int], lease: int, twice: bool) -> None:
        if pairs := [(id, token) for id, token, _ in self.receipts_at(pick)]:
            command = commands.extend(self.q, pairs, lease * UNIT)
            got, want = self.both(command, lambda _: self.model.extend(pairs, lease), twice)
            assert got == want

    @rule(pick=picks, twice=lost)
    def release(self, pick: list[int], twice: bool) -> None:
        if pairs := [(id, token) for id, token, _ in self.receipts_at(pick)]:
            got, want = self.both(commands.release(self.q, pairs), lambda _: self.model.release(pairs), twice)
            assert got == want

    def pass_time(self, units: int) -> None:
        if not units:
            return
        q = self.q
        keys = (q.delayed, q.leases, q.dead, q.dedup_expiry, q.untold, q.config)
        self.server.cli("EVAL", PASS_TIME, 6, *keys, units * UNIT)
        self.model.clock += units

    @rule(after=pauses, limit=st.integers(1, 4), most=st.integers(1, 3), keep=st.sampled_from([FOREVER, 2]), twice=lost)
    def reap(self, after: int, limit: int, most: int, keep: int, twice: bool) -> None:
        self.pass_time(after)
        command = commands.reap(self.q, limit, max_deliveries=most, keep_ms=keep * UNIT)
        got, want = self.both(command, lambda _: (*self.model.reap(limit, most), self.model.forget(limit, keep)), twice)
        assert (got.reaped, {grant.id for grant in got.buried}, got.dropped) == want
        assert got.untold == self.model.owed()
        self.found_buried([*got.buried])

    @rule(after=pauses, twice=lost)
    def retell(self, after: int, twice: bool) -> None:
        """The second one finds that the first one is to tell of them."""
        self.pass_time(after)
        command, want = commands.retell(self.q), self.model.retell()
        got = self.send(command)
        assert {grant.id for grant in got} == want
        for grant in got:
            job = self.model.jobs[grant.id]
            assert (grant.token, grant.retries) == (job.token, job.retries)
            assert grant.again == (grant.id in self.model.marked)
        self.found_buried(got)
        if twice:
            assert self.send(command, True) == []

    @rule(back=st.integers(0, 3), count=st.integers(1, 3), by_all=st.booleans(), twice=lost)
    def told(self, back: int, count: int, by_all: bool, twice: bool) -> None:
        """Of the burials that were found last, or of ones from before: their jobs may be anywhere by now."""
        burials = self.burials[-count - back :][:count]
        if burials:
            command = commands.told(self.q, burials, by_all=by_all)
            got, want = self.both(command, lambda _: self.model.told(burials, by_all), twice)
            assert got == want

    def found_buried(self, grants: list[Grant]) -> None:
        self.burials += [(grant.id, grant.token) for grant in grants]

    @rule(after=pauses, limit=st.integers(1, 4), twice=lost)
    def promote(self, after: int, limit: int, twice: bool) -> None:
        self.pass_time(after)
        got, want = self.both(commands.promote(self.q, limit), lambda _: self.model.promote(limit), twice)
        assert got[0] == want

    # upkeep

    @rule(pick=picks, twice=lost)
    def requeue(self, pick: list[int], twice: bool) -> None:
        ids = self.ids_at(pick)
        got, want = self.both(commands.requeue(self.q, ids), lambda _: self.model.requeue(ids), twice)
        assert got == want

    @rule(pick=picks, twice=lost)
    def cancel(self, pick: list[int], twice: bool) -> None:
        ids = self.ids_at(pick)
        got, want = self.both(commands.cancel(self.q, ids), lambda _: self.model.cancel(ids), twice)
        assert got == want

    @rule(state=st.sampled_from(["ready", "delayed", "dead"]), limit=st.integers(1, 3), twice=lost)
    def purge(self, state: State, limit: int, twice: bool) -> None:
        got, want = self.both(commands.purge(self.q, state, limit), lambda _: self.model.purge(state, limit), twice)
        assert got == want

    @rule(twice=lost)
    def delete_queue(self, twice: bool) -> None:
        got, want = self.both(commands.delete_queue(self.q), lambda _: self.model.delete_queue(), twice)
        assert got == want

    @rule(paused=st.sampled_from([False, False, True]), twice=lost)
    def pause_or_resume(self, paused: bool, twice: bool) -> None:
        def move(_resent: bool) -> None:
            self.model.paused = paused

        self.both(commands.configure(self.q, {"paused": "1" if paused else ""}), move, twice)
        self.excused = False

    @rule(rate=st.booleans(), burst=st.integers(1, 3), max_inflight=st.sampled_from([None, None, 1, 3]), twice=lost)
    def limit(self, rate: bool, burst: int, max_inflight: int | None, twice: bool) -> None:
        def move(_resent: bool) -> None:
            if rate != self.model.rate:
                self.model.tokens = None
            self.model.rate, self.model.burst = rate, burst
            self.model.max_inflight = max_inflight

        per_second = 1000 / UNIT if rate else None
        changes = limits(per_second, burst if rate else None, max_inflight)
        self.both(commands.configure(self.q, changes), move, twice)
        self.excused = False

    @rule(pick=picks, count=st.integers(1, 3), lease=times, twice=lost)
    def ack_and_claim_as_brokers_do(self, pick: list[int], count: int, lease: int, twice: bool) -> None:
        items = list({item.id: item for item in self.acks(pick) if not item.dedup_key}.values())
        nonce = self.nonce()

        def long(answer: LongWay) -> Command[Finish]:
            return commands.finish(
                self.q, items, (), count, lease * UNIT, nonce,
                max_deliveries=3, keep_ms=FOREVER * UNIT, resent=answer.resent,
            )  # fmt: skip

        items = [item for item in items if not self.lies_apart(item.id)]
        short = commands.claim(self.q, count, lease * UNIT, nonce, levels=self.levels, acks=items)
        for resent in (False, True)[: 1 + twice]:
            reply = self.short_or_long(short, long, resent)
            want = self.model.ack(items), self.model.claim(count, lease, nonce, 3, resent)
        got = reply if isinstance(reply, Finish) else Finish([Verdict.DONE] * len(items), (), reply)
        assert got.acked == want[0]
        self.levels = got.claim.levels
        self.check_claim(got.claim, want[1], woken=False, ordered=not twice)

    # what holds after every step

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        q, model = self.q, self.model
        with self.client.pipeline(transaction=False) as pipe:
            for key in (q.delayed, q.leases, q.dead, q.untold):
                pipe.zrange(key.decode(), 0, -1, withscores=True)
            pipe.hget(q.config.decode(), "due")
            pipe.zcard(q.marker.decode())
            pipe.hgetall(q.dedup.decode())
            pipe.hkeys(q.jobs.decode())
            pipe.hgetall(q.owners.decode())
            for level in range(10):
                pipe.lrange(q.ready[level].decode(), 0, -1)
            delayed, leases, dead, untold, due, marked, held, stored, owners, *ready = pipe.execute()
        assert [[id.decode() for id in row] for row in ready] == model.ready
        for rows, times in ((delayed, model.delayed), (leases, model.leases), (dead, model.dead)):
            assert [id.decode() for id, _score in rows] == model.in_order(times)
        assert {id.decode() for id, _score in untold} == model.untold.keys() <= model.dead.keys()
        assert {id.decode() for id in stored} == model.jobs.keys()
        assert {id.decode(): owner.decode() for id, owner in owners.items()} == {
            job.id: f"{job.token} {job.retries} {job.flag}" for job in model.jobs.values() if job.fence_and_nonce
        }
        # a dedup key is held as long as it should be; one whose time is over may still be there
        live = {(key, id) for key, (id, until) in model.dedup.items() if until is None or until > model.now}
        keys = {(key.decode(), id.decode()) for key, id in held.items()}
        assert live <= keys
        assert keys - live <= {(key, id) for key, (id, _until) in model.dedup.items()}
        # claims look no later than the next due time
        first = min((score for _id, score in (*delayed[:1], *leases[:1])), default=None)
        assert first is None or (due is not None and float(due) <= first)
        # a wake-up waits while there is work
        assert marked == 1 or not any(model.ready) or self.marker_taken or self.excused

    @invariant()
    def depths_and_counters_are_those_of_the_model(self) -> None:
        command = commands.stats(self.q)
        stats = command.parse(self.server.cli("EVALSHA", *command.wire()), False)
        assert (stats.ready_by_level, stats.delayed, stats.inflight, stats.dead) == self.model.depths()
        assert dict(stats.counters) == {name: n for name, n in self.model.counters.items() if n}
        assert stats.paused == self.model.paused

    @invariant()
    def every_job_ever_stored_is_in_one_state_or_over(self) -> None:
        counts, model = self.model.counters, self.model
        over = sum(counts[name] for name in ("processed", "cancelled", "purged", "forgotten"))
        assert counts["enqueued"] == over + len(model.jobs)
        assert sum(model.depths()[0]) + sum(model.depths()[1:]) == len(model.jobs)

    def teardown(self) -> None:
        """The auditor, which knows nothing of the model, agrees."""
        with Broker(self.server.url) as broker:
            assert broker.audit("q", repair=False).findings == {}
        super().teardown()


def test_the_scripts_do_what_the_model_does(server: Server) -> None:
    """Histories of 40 steps. A failure prints the one that failed."""
    client = server.client(protocol=2)
    machine = type("QueueOnServer", (Queue,), {"server": server, "client": client})
    run_state_machine_as_test(
        machine,
        settings=histories("RELAY_MODEL_EXAMPLES", 150, 40),
    )
    client.close()
