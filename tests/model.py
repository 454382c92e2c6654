"""What a queue must do, in plain Python: the yardstick of the stateful tests.

Time is a pair (units, step): whole units pass only when a test says so, and each step is later than the one
before it, so ties are impossible between steps and every order is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay_core.commands import Ack, Nack, Verdict

At = tuple[int, int]


@dataclass
class ModelJob:
    """A stored job. `owner` is the token of its last claim, or "" for none that counts."""

    id: str
    level: int
    own_max: int = 0
    dedup_key: str = ""
    dedup_units: int = 0
    deliveries: int = 0
    fence_and_nonce: str = ""
    retries: int = 0
    flag: str = "r"

    @property
    def token(self) -> str:
        return f"{self.deliveries}{self.fence_and_nonce}" if self.fence_and_nonce else ""

    @property
    def nonce(self) -> str:
        return self.fence_and_nonce.rpartition(":")[2].partition("t")[0].removesuffix("g")


@dataclass
class ModelClaim:
    grants: list[tuple[str, str, int]]
    limited: str | None
    promoted: int
    reaped: int
    buried: set[str]


@dataclass
class Model:
    clock: int = 0
    step: int = 0
    jobs: dict[str, ModelJob] = field(default_factory=dict)
    ready: list[list[str]] = field(default_factory=lambda: [[] for _ in range(10)])
    delayed: dict[str, At] = field(default_factory=dict)
    leases: dict[str, At] = field(default_factory=dict)
    dead: dict[str, At] = field(default_factory=dict)
    untold: dict[str, int] = field(default_factory=dict)
    marked: set[str] = field(default_factory=set)
    """Until which clock it is left to somebody to tell of a burial."""
    dedup: dict[str, tuple[str, At | None]] = field(default_factory=dict)
    finished: set[tuple[str, str]] = field(default_factory=set)
    counters: Counter[str] = field(default_factory=Counter)
    paused: bool = False
    rate: bool = False
    burst: int = 0
    max_inflight: int | None = None
    tokens: int | None = None
    stamp: int = 0

    @property
    def now(self) -> At:
        return self.clock, self.step

    def after(self, units: int) -> At:
        return self.clock + units, self.step

    @property
    def gated(self) -> bool:
        return self.paused or self.rate or self.max_inflight is not None

    @staticmethod
    def in_order(times: dict[str, At]) -> list[str]:
        return sorted(times, key=lambda id: (times[id], id))

    def depths(self) -> tuple[tuple[int, ...], int, int, int]:
        return tuple(map(len, self.ready)), len(self.delayed), len(self.leases), len(self.dead)

    # moves

    def enqueue(self, job: ModelJob, delay: int, resent: bool) -> int | str:
        """1 stored, 0 that id is taken, else the id that holds the dedup key."""
        holder = self._holder(job.dedup_key) if job.id not in self.jobs else None
        if job.id in self.jobs or holder == job.id or (resent and job.id in {id for id, _token in self.finished}):
            return 0
        if holder is not None:
            self.counters["deduplicated"] += 1
            return holder
        self.jobs[job.id] = job
        if job.dedup_key:
            until = self.after(job.dedup_units) if job.dedup_units else None
            self.dedup[job.dedup_key] = (job.id, until)
        if delay:
            self.delayed[job.id] = self.after(delay)
        else:
            self.ready[job.level].append(job.id)
        self.counters["enqueued"] += 1
        return 1

    def _holder(self, key: str) -> str | None:
        """The id that has a dedup key, unless that key's time is over."""
        holder, until = self.dedup.get(key, (None, None))
        return None if until is not None and until <= self.now else holder

    def _bury(self, job: ModelJob, flag: str) -> None:
        job.flag = flag
        self.dead[job.id] = self.now
        self.counters["dead"] += 1
        self._free(job)

    def _find_buried(self, job: ModelJob) -> None:
        self._bury(job, "r")
        self.untold[job.id] = self.clock
        self.marked.discard(job.id)

    def owed(self) -> int:
        return sum(until < self.clock for until in self.untold.values())

    def retell(self) -> set[str]:
        ids = {id for id, until in self.untold.items() if until < self.clock}
        self.untold.update(dict.fromkeys(ids, self.clock))
        return ids

    def told(self, burials: Sequence[tuple[str, str]], by_all: bool) -> int:
        settled = {id for id, token in burials if id in self.untold and self.jobs[id].token == token}
        if not by_all:
            settled -= self.marked
            self.marked |= settled
            return len(settled)
        for id in settled:
            del self.untold[id]
        return len(settled)

    def _free(self, job: ModelJob) -> None:
        if job.dedup_key and not job.dedup_units and self.dedup.get(job.dedup_key, ("",))[0] == job.id:
            del self.dedup[job.dedup_key]

    def promote(self, limit: int) -> int:
        due = [id for id in self.in_order(self.delayed) if self.delayed[id] <= self.now][:limit]
        for id in due:
            del self.delayed[id]
            self.ready[self.jobs[id].level].append(id)
        self.counters["promoted"] += len(due)
        return len(due)

    def reap(self, limit: int, most: int) -> tuple[int, set[str]]:
        """How many leases had expired, and whose job went to dead."""
        expired = [id for id in self.in_order(self.leases) if self.leases[id] <= self.now][:limit]
        buried = set()
        for id in reversed(expired):
            job = self.jobs[id]
            del self.leases[id]
            if job.deliveries - job.retries >= (job.own_max or most):
                self._find_buried(job)
                buried.add(id)
            else:
                job.flag = "r"
                self.ready[job.level].insert(0, id)
        self.counters["reaped"] += len(expired)
        return len(expired), buried

    def forget(self, limit: int, keep: int) -> int:
        old = [id for id in self.in_order(self.dead) if self.dead[id] <= (self.clock - keep, self.step)][:limit]
        for id in old:
            del self.dead[id], self.jobs[id]
            self.untold.pop(id, None)
        self.counters["forgotten"] += len(old)
        return len(old)

    def claim(self, want: int, lease: int, nonce: str, most: int, resent: bool) -> ModelClaim:
        promoted = self.promote(200)
        reaped, buried = self.reap(200, most)
        reply = ModelClaim([], None, promoted, reaped, buried)
        if resent:
            held = [self.jobs[id] for id in self.leases if self.jobs[id].nonce == nonce and self.jobs[id].flag == "h"]
            reply.grants = [(job.id, job.token, job.retries) for job in held]
            want = 0 if held else want
        if want:
            want, reply.limited = self._allowed(want)
        taken: list[str] = []
        for queue in reversed(self.ready):
            while queue and len(taken) < want:
                taken.append(queue.pop(0))
        for id in taken:
            self.counters["claimed"] += 1
            job = self.jobs[id]
            if job.deliveries - job.retries >= (job.own_max or most):
                self._find_buried(job)
                reply.buried.add(id)
                continue
            job.deliveries += 1
            job.fence_and_nonce = f":{self.counters['claimed']}:{nonce}{'g' if self.gated else ''}"
            job.flag = "h"
            self.leases[id] = self.after(lease)
            reply.grants.append((id, job.token, job.retries))
        if taken and self.rate:
            self.tokens, self.stamp = self._bucket() - len(taken), self.clock
        return reply

    def _bucket(self) -> int:
        """One token per unit, up to the burst."""
        return self.burst if self.tokens is None else min(self.burst, self.tokens + self.clock - self.stamp)

    def _allowed(self, want: int) -> tuple[int, str | None]:
        if self.paused:
            return 0, "paused"
        if self.max_inflight is not None:
            want = min(want, self.max_inflight - len(self.leases))
            if want < 1:
                return 0, "max_inflight"
        if self.rate:
            want = min(want, self._bucket())
            if want < 1:
                return 0, "rate"
        return want, None

    def ack(self, items: Sequence[Ack]) -> list[Verdict]:
        answers = []
        for item in items:
            job = self.jobs.get(item.id)
            if job and job.flag == "h" and job.token == item.token:
                self._free(job)
                del self.jobs[item.id], self.leases[item.id]
                self.finished.add((item.id, item.token))
                self.counters["processed"] += 1
                answers.append(Verdict.DONE)
            elif (item.id, item.token) in self.finished:
                answers.append(Verdict.ALREADY)
            else:
                answers.append(Verdict.LOST)
        return answers

    def nack(self, items: Sequence[Nack], unit_ms: int, resent: bool = False) -> list[Verdict]:
        answers = []
        for item in items:
            job = self.jobs.get(item.id)
            if job is None or job.token != item.token:
                answers.append(Verdict.LOST)
            elif job.flag != "h":
                known = Verdict.DEAD if resent and job.id in self.dead else Verdict.ALREADY
                answers.append(known if job.flag == "n" else Verdict.LOST)
            else:
                del self.leases[job.id]
                if item.delay_ms < 0 or job.retries >= item.max_retries:
                    self._bury(job, "n")
                    answers.append(Verdict.DEAD)
                    continue
                job.flag = "n"
                job.retries += 1
                self.counters["retried"] += 1
                if item.delay_ms:
                    self.delayed[job.id] = self.after(item.delay_ms // unit_ms)
                else:
                    self.ready[job.level].append(job.id)
                answers.append(Verdict.DONE)
        return answers

    def extend(self, receipts: Sequence[tuple[str, str]], lease: int) -> list[Verdict]:
        answers = []
        for id, token in receipts:
            job = self.jobs.get(id)
            held = job is not None and job.flag == "h" and job.token == token
            if held:
                self.leases[id] = self.after(lease)
            answers.append(Verdict.DONE if held else Verdict.LOST)
        return answers

    def release(self, receipts: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The last of a batch goes to the head first, so that the batch keeps its order."""
        answers = []
        for id, token in reversed(receipts):
            job = self.jobs.get(id)
            if job and job.flag == "h" and job.token == token:
                del self.leases[id]
                job.deliveries -= 1
                job.flag = "r"
                self.ready[job.level].insert(0, id)
                self.counters["released"] += 1
                answers.append(Verdict.DONE)
            elif job and job.flag == "r" and f"{job.deliveries + 1}{job.fence_and_nonce}" == token:
                answers.append(Verdict.ALREADY)
            else:
                answers.append(Verdict.LOST)
        return answers[::-1]

    # upkeep

    def state(self, id: str) -> str | None:
        for name, times in (("delayed", self.delayed), ("inflight", self.leases), ("dead", self.dead)):
            if id in times:
                return name
        return "ready" if id in self.jobs else None

    def requeue(self, ids: Sequence[str]) -> list[bool]:
        answers = []
        for id in ids:
            answers.append(id in self.dead)
            if id in self.dead:
                del self.dead[id]
                self.untold.pop(id, None)
                job = self.jobs[id]
                job.deliveries, job.fence_and_nonce, job.retries, job.flag = 0, "", 0, "r"
                self.ready[job.level].append(id)
                if job.dedup_key and not job.dedup_units and self._holder(job.dedup_key) is None:
                    self.dedup[job.dedup_key] = (id, None)
                self.counters["requeued"] += 1
        return answers

    def cancel(self, ids: Sequence[str]) -> list[str | None]:
        answers = []
        for id in ids:
            state = self.state(id)
            answers.append(state)
            if state not in (None, "inflight"):
                self._take_out(id)
                self.counters["cancelled"] += 1
        return answers

    def _take_out(self, id: str) -> None:
        job = self.jobs.pop(id)
        self.delayed.pop(id, None)
        self.dead.pop(id, None)
        self.untold.pop(id, None)
        if id in self.ready[job.level]:
            self.ready[job.level].remove(id)
        self._free(job)

    def delete_queue(self) -> bool:
        if self.jobs:
            return False
        self.dedup.clear()
        self.finished.clear()
        self.counters.clear()
        self.paused = self.rate = False
        self.max_inflight = self.tokens = None
        self.burst = self.stamp = 0
        return True

    def purge(self, state: str, limit: int) -> int:
        if state == "ready":
            ids = [id for queue in reversed(self.ready) for id in queue][:limit]
        else:
            ids = self.in_order(self.delayed if state == "delayed" else self.dead)[:limit]
        for id in ids:
            self._take_out(id)
        self.counters["purged"] += len(ids)
        return len(ids)
