"""What the demo's tasks noted, held against what was enqueued and what the store counted."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from relay_core.broker import Broker
from relay_core.job import StoredJob

COLUMNS = ("framework", "enqueued", "processed", "retried", "dead", "reaped", "p50", "p99")


@dataclass(frozen=True)
class Plan:
    """What each framework was given to do.

    :ivar files: path -> digest
    :ivar others: how many tasks that fail twice, and how many delayed ones
    :ivar delay: seconds that the delayed ones wait
    :ivar deliveries: after which the task that kills its worker is dead
    :ivar duplicates: how many were sent, by the frameworks that have a word for it
    """

    files: Mapping[str, str]
    others: int
    delay: float
    deliveries: int
    duplicates: int


@dataclass
class Ledger:
    """What one framework's tasks noted."""

    indexed: dict[str, str] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    flaky: dict[str, int] = field(default_factory=dict)
    postponed: dict[str, float] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        return len(self.indexed) + len(self.flaky) + len(self.postponed)

    def add(self, line: Mapping[str, Any]) -> None:
        task, key = line["task"], line["key"]
        self.events[task] += 1
        if task == "index":
            self.indexed[key] = line["digest"]
            self.latencies.append(line["done"] - line["sent"])
        elif task == "flaky":
            self.flaky[key] = line["tries"]
        elif task == "postponed":
            self.postponed[key] = line["done"] - line["sent"]


class Ledgers(dict[str, Ledger]):
    """Framework -> ledger, read from the files of a folder; only what was added since the last look."""

    def __init__(self, folder: Path, frameworks: Iterable[str]) -> None:
        super().__init__({name: Ledger() for name in frameworks})
        self._folder = folder
        self._read: Counter[Path] = Counter()

    def look(self) -> int:
        """Read on: how many tasks are done."""
        for path in self._folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read[path])
                for line in file:
                    if line.endswith(b"\n"):
                        self._read[path] += len(line)
                        self._note(json.loads(line))
        return sum(ledger.done for ledger in self.values())

    def _note(self, line: Mapping[str, Any]) -> None:
        self[line["face"]].add(line)


@dataclass
class Part:
    """One framework's share: the row of the table, and what is wrong."""

    framework: str
    row: dict[str, Any]
    problems: list[str]
    stories: list[str]


def part(framework: str, queue: str, *, sent: int, has_dedup: bool, ledger: Ledger, plan: Plan, broker: Broker) -> Part:
    """Hold a framework's ledger and its queue against the plan.

    :param sent: how many jobs its producer sent, duplicates aside
    """
    stats, dead = broker.stats(queue), broker.dead(queue)
    counters = stats.counters
    poison = [job for job in dead if b"poison" in job.payload]
    p50, p99 = percentiles(ledger.latencies)
    row: dict[str, Any] = {
        name: counters.get(name, 0) for name in ("enqueued", "processed", "retried", "dead", "reaped")
    }
    row |= {"p50": p50, "p99": p99}
    problems = _tasks(ledger, plan)
    ended = counters.get("processed", 0) + stats.dead
    if stats.pending:
        problems.append(f"{stats.pending} jobs are still in queue {queue!r}")
    elif ended != sent:
        problems.append(f"{sent} jobs were sent to {queue!r} and {ended} came to an end")
    problems += [f"a job is in dead: {job.reason}, {job.error}" for job in dead if job not in poison]
    problems += _poison(poison, plan)
    dropped = counters.get("deduplicated", 0)
    if has_dedup and dropped != plan.duplicates:
        problems.append(f"{dropped} duplicates were dropped, {plan.duplicates} were sent")
    if not (audit := broker.audit(queue)).clean:
        problems.append(f"the audit found {audit.findings}")
    stories = [f"a task that kills its worker is in dead: {job.reason}, {job.error}" for job in poison]
    if has_dedup:
        stories.append(f"{dropped} duplicates were dropped")
    return Part(framework, row, [f"{framework}: {problem}" for problem in problems], stories)


def _tasks(ledger: Ledger, plan: Plan) -> list[str]:
    found = [f"{path} was not indexed" for path in sorted(plan.files.keys() - ledger.indexed.keys())]
    found += [f"{path} has another digest" for path, digest in ledger.indexed.items() if plan.files[path] != digest]
    if missing := plan.others - len(ledger.flaky):
        found.append(f"{missing} tasks that fail twice never worked")
    found += [f"{key} worked at try {tries}, not 3" for key, tries in ledger.flaky.items() if tries < 3]
    if missing := plan.others - len(ledger.postponed):
        found.append(f"{missing} delayed tasks never ran")
    found += [
        f"{key} ran {late:.2f} s after it was sent, not {plan.delay:g}"
        for key, late in ledger.postponed.items()
        if late < plan.delay
    ]
    return found


def _poison(poison: list[StoredJob], plan: Plan) -> list[str]:
    if len(poison) != 1:
        return [f"{len(poison)} tasks that kill their worker are in dead, not 1"]
    (job,) = poison
    if (job.reason, job.deliveries) != ("max_deliveries", plan.deliveries):
        return [f"the task that kills its worker is dead of {job.reason} after {job.deliveries} deliveries"]
    return []


def percentiles(values: list[float]) -> tuple[float | None, float | None]:
    """The 50th and the 99th, in seconds; None of too few."""
    if len(values) < 2:
        return None, None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def table(title: str, parts: Iterable[Part]) -> Table:
    """A row per framework."""
    made = Table(title=title)
    for column in COLUMNS:
        made.add_column(column, justify="left" if column == "framework" else "right")
    for each in parts:
        cells = [each.row[column] for column in COLUMNS[1:]]
        made.add_row(each.framework, *(_cell(cell) for cell in cells))
    return made


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s" if isinstance(value, float) else str(value)
