"""Dead jobs by filter: read in bounded pages, and moved in bulk so that a killed run can go on.

However many jobs are dead, a page holds at most 200 of them and a few MiB, and while a run goes over them others may
add and remove: a place is a time of death and an id, not a number in a list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from relay_core import commands
from relay_core.broker import Broker
from relay_core.cli.jobview import matches
from relay_core.cli.output import age
from relay_core.cli.stats import known
from relay_core.cli.values import Since
from relay_core.commands.moves import MAX_BATCH
from relay_core.inspector import readable
from relay_core.job import JobSummary, StoredJob

Point = tuple[int, str]
"""Time of death in unix ms and id: what was looked at lies at or before it."""

_KEPT = 7 * 86400.0
"""Seconds after which the place of a run that was given up is forgotten."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead jobs of a queue are meant; what is None does not matter.

    :ivar task: name of the task, as its framework gives it
    :ivar error: a part of the reason or error, whatever its case
    :ivar since: died then or later
    """

    queue: str
    task: str | None = None
    error: str | None = None
    since: Since | None = None

    @property
    def picks(self) -> bool:
        """False when it lets all pass."""
        return (self.task, self.error, self.since) != (None, None, None)

    def start(self, now: float) -> Point:
        """Where to begin, by the server's clock `now`."""
        return (0 if self.since is None else round(self.since.unix(now) * 1000), "")


@dataclass(frozen=True, slots=True)
class Page:
    """:ivar left: dead jobs from the page's start on
    :ivar end: the page's last job
    :ivar jobs: those that the filter picks, each with its place
    """

    left: int
    looked_at: int
    end: Point
    jobs: Sequence[tuple[StoredJob, JobSummary | None, Point]]


def pages(broker: Broker, pick: Filter, point: Point, now: float, *, records: bool) -> Iterator[Page]:
    """All that is dead after `point` and died by `now` (unix seconds of the server), the longest dead first.

    :param records: with payloads and task names, also when the filter needs none
    """
    q = broker.settings.keys(pick.queue)
    records = records or pick.task is not None
    while True:
        command = commands.scan(q, point, round(now * 1000), MAX_BATCH, records=records)
        left, rows = broker.store.run(command)
        if not rows:
            return
        found = []
        for stored, died in rows:
            job = readable(broker.operations, stored)
            summary = broker.plugins.describe(job) if records else None
            if matches(job, summary, pick.task, pick.error):
                found.append((job, summary, (died, job.id)))
        point = (rows[-1][1], rows[-1][0].id)
        yield Page(left, len(rows), point, found)


@dataclass(slots=True)
class Tally:
    """:ivar done: jobs moved by this run
    :ivar before: jobs moved by the runs that it goes on with
    """

    done: int = 0
    before: int = 0
    looked_at: int = 0


class Run:
    """A bulk command over the dead jobs that a filter picks.

    Its place is stored with the queue, so that `resume` can go on after a kill, on any machine. A run that came to its
    end leaves nothing behind.

    :param verb: names the command: a run of another one has a place of its own
    :param resume: go on where a killed run of this verb and filter stopped, if there is one

    Raises QueueNotFound: a name that was mistyped has no dead jobs either.
    """

    def __init__(self, broker: Broker, verb: str, pick: Filter, *, resume: bool) -> None:
        self._broker = broker
        self._pick = pick
        self._keys = broker.settings.keys(pick.queue)
        self._now = known(broker, pick.queue).now
        since = None if pick.since is None else pick.since.text
        self._name = json.dumps([verb, pick.task, pick.error, since])
        self.tally = Tally()
        self._point = pick.start(self._now)
        self._began = self._now
        saved = self._saved()
        if saved is None:
            return
        begun = age(self._now - float(saved["began"]))
        if resume:
            self._point = max(self._point, (int(saved["at"][0]), str(saved["at"][1])))
            self._began = float(saved["began"])
            self.tally.before = int(saved["done"])
            click.echo(f"Going on with a run begun {begun} ago, which {verb} {self.tally.before}.", err=True)
        else:
            told = f"a run with these filters, begun {begun} ago, did not come to its end"
            click.echo(f"Note: {told}; --resume goes on with it. This one begins anew.", err=True)

    def count(self, limit: int | None) -> int:
        """How many jobs a run would move."""
        found = 0
        for page in pages(self._broker, self._pick, self._point, self._now, records=False):
            found += len(page.jobs)
            if limit is not None and found >= limit - self.tally.before:
                return max(0, limit - self.tally.before)
        return found

    def carry_out(
        self,
        move: Callable[[Sequence[str]], int],
        limit: int | None,
        show: Callable[[int | None], Any],
    ) -> Tally:
        """Move the jobs batch by batch.

        :param move: moves jobs by id, at most 200, and says how many it did move
        :param limit: at most so many, those of the runs before included
        :param show: see `progress`; given the number of jobs to look at
        """
        tally = self.tally
        most = None if limit is None else limit - tally.before
        reading = pages(self._broker, self._pick, self._point, self._now, records=False)
        first = next(reading, None) if most is None or most > 0 else None
        with show(0 if first is None else first.left) as note:
            page = first
            while page is not None:
                rest = [job.id for job, _summary, _point in page.jobs]
                while rest and (most is None or tally.done < most):
                    room = len(rest) if most is None else most - tally.done
                    batch, rest = rest[:room], rest[room:]
                    # counted before they are moved: whenever it is killed, no run after it exceeds the limit
                    self._save(tally.before + tally.done + len(batch))
                    tally.done += move(batch)
                tally.looked_at += page.looked_at
                self._point = page.end
                note(page.looked_at)
                page = None if most is not None and tally.done >= most else next(reading, None)
        self._broker.store.raw("HDEL", self._keys.bulk, self._name)
        return tally

    def _saved(self) -> dict[str, Any] | None:
        """What is stored of this run; runs that were given up long ago are forgotten."""
        flat = self._broker.store.raw("HGETALL", self._keys.bulk)
        found = {name.decode(): json.loads(text) for name, text in zip(flat[::2], flat[1::2], strict=True)}
        old = [name for name, saved in found.items() if self._now - float(saved["began"]) > _KEPT]
        if old:
            self._broker.store.raw("HDEL", self._keys.bulk, *old)
        return None if self._name in old else found.get(self._name)

    def _save(self, done: int) -> None:
        text = json.dumps({"at": self._point, "done": done, "began": self._began})
        self._broker.store.run(commands.bookmark(self._keys, self._name, text))
