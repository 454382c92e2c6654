"""Who tells of jobs that a claim or reap found to be over their deliveries, and buried.

Nobody asked for such a burial, so nobody else would know: a Celery result, for one, would be waited for for ever. The
script notes it, whoever gets its reply tells the plugins, and then takes the note away. Where the reply is lost, its
receiver dies, or a plugin says that it cannot do its part yet, the note stays, and the next process with a plugin that
wants to know takes it up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress

from relay_core import commands
from relay_core.commands import Grant
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import RelayError
from relay_core.job import Job
from relay_core.operations.base import MOST
from relay_core.operations.grants import Grants
from relay_core.operations.settings import Settings
from relay_core.operations.steps import Flow
from relay_core.plugins import Plugins
from relay_core.validation import check_job

LOOK_EVERY = 10.0
"""Seconds after which a claim takes the long way again, whose reply says whether there is something to take up. Every
process does so, whatever its plugins, for these are not to change what it sends."""


class Seen:
    """What the replies have told of a queue. It may be forgotten as a whole: the next claim then is as the first one.

    :ivar levels: that had jobs
    :ivar long: the last long way found more than the common case: the next claim takes it at once
    :ivar look_at: monotonic time from which a claim looks after burials that nobody has told of. The first claim of a
        queue does so anyway: it takes the long way since it does not know the queue's levels
    :ivar away_until: monotonic time until which a claim of several queues asks the others first, as this one failed
    """

    __slots__ = ("away_until", "levels", "long", "look_at")

    def __init__(self) -> None:
        self.levels = ""
        self.long = False
        self.look_at = math.inf
        self.away_until = 0.0


class Burials(Grants):
    """Tells of burials."""

    def __init__(self, settings: Settings, plugins: Plugins) -> None:
        super().__init__(settings, plugins)
        self._seen: dict[str, Seen] = {}

    def seen(self, queue: str) -> Seen:
        found = self._seen.get(queue)
        if found is None:
            if len(self._seen) >= MOST:
                self._seen.clear()
            found = self._seen[queue] = Seen()
        return found

    def looked(self, seen: Seen) -> None:
        """A script has looked, just now."""
        seen.look_at = time.monotonic() + LOOK_EVERY

    def tell_buried(self, queue: str, buried: Sequence[Grant], untold: int, now_ms: int, sent: float) -> Flow[None]:
        """Tell of what was buried here and, where the reply speaks of burials that nobody told of in time, of those.

        Raises nothing that the store does: the jobs that were claimed meanwhile must reach their worker.
        """
        if not (buried or untold) or not self.plugins.wants("relay_job_dead"):
            return  # it is left to who wants to know
        q = self.settings.keys(queue)
        with suppress(RelayError):  # then they are told of again, by whoever looks next
            yield from self._tell(queue, buried, now_ms, sent)
            if untold:
                seen = self.seen(queue)
                seen.look_at = 0.0  # there may be more
                if not (yield from self._tell(queue, (yield commands.retell(q)), now_ms, sent)):
                    self.looked(seen)  # the rest is in no hurry: a plugin cannot do its part now

    def _tell(self, queue: str, burials: Sequence[Grant], now_ms: int, sent: float) -> Flow[bool]:
        """False: some of them have to be told of again."""
        q, done = self.settings.keys(queue), True
        marks: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
        for grant in burials:
            job, _problem = self.job_of(queue, grant, now_ms, sent)
            error = f"delivered {job.deliveries - job.retries} times without an answer"
            by_all = self.plugins.tell_buried(job, error, grant.again)
            done = done and by_all
            if by_all or not grant.again:
                marks[by_all].append((grant.id, grant.token))
        for by_all, pairs in marks.items():
            for at in range(0, len(pairs), MAX_BATCH):
                yield commands.told(q, pairs[at : at + MAX_BATCH], by_all=by_all)
        return done

    def burial_told(self, job: Job) -> Flow[bool]:
        """A plugin that said NotYet has done its part. False: somebody has said so before, or the job is not dead."""
        check_job("told", job)
        return bool((yield commands.told(self.settings.keys(job.queue), [(job.id, job.token)])))
