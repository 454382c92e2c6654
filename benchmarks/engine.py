"""What a job costs the server: processor time, memory, and whether the depth of a queue matters.

Calls go out in pipelines of 100, so that what is measured are the scripts and not the system calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.servers import FLAVOURS, cpu_seconds, private
from relay_core import Broker, JobSpec, commands
from relay_core.commands import Ack, Command, NewJob
from relay_core.job import NO_OPTIONS, Record, new_id
from relay_core.keys import QueueKeys

PAYLOAD = b"x" * 200
PIPELINE = 100
LEASE_MS = 60_000


def new_job() -> NewJob:
    return NewJob(new_id(), "", "", Record.pack(0, NO_OPTIONS, PAYLOAD))


def sent(broker: Broker, built: Sequence[Command[Any]]) -> list[Any]:
    """Send in pipelines; any error ends the benchmark."""
    results: list[Any] = []
    for at in range(0, len(built), PIPELINE):
        for result in broker.store.run_many(built[at : at + PIPELINE]):
            if isinstance(result, Exception):
                raise result
            results.append(result)
    return results


class Costs:
    """What each move costs per job, by default in processor time of the server. The least of several rounds is quoted
    as well as the median, since other programs on the machine can only add to it."""

    def __init__(
        self, broker: Broker, server: Any, batch: int, jobs: int, clock: Callable[[], float] | None = None
    ) -> None:
        client = server.client()
        self.broker = broker
        self.clock = clock or (lambda: cpu_seconds(client))
        self.q: QueueKeys = broker.settings.keys("bench")
        self.batch = batch
        self.jobs = jobs
        broker.enqueue("bench", PAYLOAD)  # the first of its level goes the long way
        broker.purge("bench")

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        before = self.clock()
        result = work()
        return (self.clock() - before) / self.jobs * 1e6, result

    def round(self) -> tuple[float, float, float]:
        calls = self.jobs // self.batch
        alone = self.batch == 1  # then a broker sends the short scripts
        enqueues: list[Command[Any]] = [
            commands.enqueue_one(self.q, new_job())
            if alone
            else commands.enqueue(self.q, [new_job() for _ in range(self.batch)])
            for _ in range(calls)
        ]
        enqueue, _ = self.timed(lambda: sent(self.broker, enqueues))
        claims = [
            commands.claim_one(self.q, LEASE_MS, f"{i:010x}", levels="0")
            if alone
            else commands.claim(self.q, self.batch, LEASE_MS, f"{i:010x}", levels="0")
            for i in range(calls)
        ]
        claim, replies = self.timed(lambda: sent(self.broker, claims))
        done = [[Ack(grant.id, grant.token) for grant in reply.grants] for reply in replies]
        acks = [commands.ack_plain(self.q, items) for items in done]
        ack, verdicts = self.timed(lambda: sent(self.broker, acks))
        assert sum(map(len, done)) == self.jobs, "jobs went missing"
        assert all(isinstance(each, list) and all(each) for each in verdicts), "leases were lost"
        return enqueue, claim, ack


def processor(rounds: int = 7, jobs: int = 10_000) -> Table:
    """Server processor time per job for enqueue + claim + ack."""
    table = Table(title="Server processor time per job, µs (200 B payload, pipelines of 100 calls)")
    for column in ("server", "batch", "enqueue", "claim", "ack", "total: median", "total: least", "target"):
        table.add_column(column, justify="right")
    for flavour in FLAVOURS:
        with private(flavour) as server, Broker(server.url) as broker:
            for batch, target in ((1, "25"), (10, "12"), (50, "-")):
                costs = Costs(broker, server, batch, jobs)
                costs.round()
                found = [costs.round() for _ in range(rounds)]
                moves = [f"{statistics.median(move):.1f}" for move in zip(*found, strict=True)]
                totals = [sum(one) for one in found]
                cells = (f"{statistics.median(totals):.1f}", f"{min(totals):.1f}")
                table.add_row(flavour, str(batch), *moves, *cells, target)
    return table


def memory(jobs: int = 100_000) -> Table:
    """Bytes of the server per job in each state, one state after the other in the same queue."""
    table = Table(title=f"Memory per job by state, bytes ({jobs} jobs of 200 B)")
    for column in ("server", "ready", "inflight", "dead", "delayed", "target ready"):
        table.add_column(column, justify="right")
    for flavour in FLAVOURS:
        with private(flavour) as server, Broker(server.url, lease=3600) as broker:
            client = server.client()

            def used(client: Any = client) -> int:
                return int(client.info("memory")["used_memory"])

            broker.enqueue("bench", PAYLOAD)
            before = used()
            broker.enqueue_many("bench", [PAYLOAD] * jobs)
            sizes = [used() - before]
            claimed = [job for _ in range(jobs // 200) for job in broker.claim("bench", 200)]
            sizes.append(used() - before)
            for job in claimed:
                broker.nack(job, "why it failed", dead=True)
            sizes.append(used() - before)
            broker.purge("bench", ("dead",))
            before = used()
            broker.enqueue_many("bench", [JobSpec(PAYLOAD, delay=3600)] * jobs)
            sizes.append(used() - before)
            table.add_row(flavour, *(f"{size / jobs:.0f}" for size in sizes), "450")
    return table


def depth(rounds: int = 21, jobs: int = 5_000, deep: int = 1_000_000) -> Table:
    """Time per job, as clients see it, with few and with many jobs waiting, measured in turn in one run."""
    table = Table(title=f"Speed with {deep} jobs waiting against 1,000 (ratio of medians, 1.0 is as fast)")
    for column in ("server", "enqueue", "claim + ack", "target"):
        table.add_column(column, justify="right")
    for flavour in FLAVOURS:
        with private(flavour) as server, Broker(server.url) as broker:
            shallow = Costs(broker, server, 10, jobs, time.perf_counter)
            full = Costs(broker, server, 10, jobs, time.perf_counter)
            full.q = broker.settings.keys("deep")
            broker.enqueue_many("bench", [PAYLOAD] * 1_000)
            for _ in range(deep // 50_000):
                broker.enqueue_many("deep", [PAYLOAD] * 50_000)
            found: dict[str, list[tuple[float, float, float]]] = {"few": [], "many": []}
            turns = [("few", shallow), ("many", full)]
            for _ in range(rounds):
                for name, costs in turns:
                    found[name].append(costs.round())
                turns.reverse()  # neither always goes first
            few = [statistics.median(move) for move in zip(*found["few"], strict=True)]
            many = [statistics.median(move) for move in zip(*found["many"], strict=True)]
            ratios = (few[0] / many[0], (few[1] + few[2]) / (many[1] + many[2]))
            table.add_row(flavour, *(f"{ratio:.2f}" for ratio in ratios), "0.90")
    return table
