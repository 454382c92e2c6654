"""What keeps a message that may kill its process apart from the others, so that it takes none of them to dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Protocol

from relay_adapters.dramatiq.message import Holding, Lease
from relay_core import Job
from relay_core.operations import Settings


class Neighbour(Protocol):
    """What the gate asks of a line, and tells it."""

    holdings: list[Holding]

    @property
    def unsent(self) -> bool: ...

    def freed(self) -> None: ...


class Gate:
    """Shut while this process holds a suspect (see `Settings.is_suspect`): then none of its consumers claims.

    One per process, for all of its lines. The consumer that claimed the suspect gives it out once the process holds
    nothing else, or a lease's time later; the gate opens when it is settled.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lines: dict[str, Neighbour] = {}
        self._lock = threading.Lock()
        self._claiming = 0
        self._suspect: Lease | None = None
        self._home: Holding | None = None
        self._deadline = 0.0

    def stand_by(self, queue: str, line: Neighbour) -> None:
        """A line whose messages are in the same danger."""
        self._lines[queue] = line

    # around each claim

    def enter(self) -> bool:
        """Somebody is about to talk to the store; follow it by `leave`. False: and must not claim."""
        with self._lock:
            self._claiming += 1
            return not self._is_shut()

    def leave(self) -> None:
        """What was claimed is where `Line.leases` sees it, or handed back."""
        with self._lock:
            self._claiming -= 1
        self.changed()

    def first_suspect(self, claimed: Iterable[Job]) -> Job | None:
        """The first that may have killed its workers."""
        is_suspect = self._settings.is_suspect
        for job in claimed:
            if job.deliveries > 1 and is_suspect(job):
                return job
        return None

    def shut(self, suspect: Lease, home: Holding) -> bool:
        """Nobody claims any more until the suspect has left its holding. False: another one was first."""
        with self._lock:
            if self._is_shut():
                return False
            self._suspect, self._home = suspect, home
            self._deadline = time.monotonic() + self._settings.lease
            return True

    # while it is shut

    @property
    def is_shut(self) -> bool:
        """Whether a suspect is unsettled."""
        if self._suspect is None:
            return False
        with self._lock:
            return self._is_shut()

    def _is_shut(self) -> bool:
        if self._suspect is not None and (self._home is None or self._suspect.job.token not in self._home):
            self._suspect = self._home = None
        return self._suspect is not None

    def is_clear(self) -> bool:
        """Whether the suspect may be given out: nothing else is at stake, or that took too long."""
        if time.monotonic() >= self._deadline:
            return True
        lines = list(self._lines.values())
        held = sum(len(holding) for line in lines for holding in line.holdings)
        return held <= 1 and not self._claiming and not any(line.unsent for line in lines)

    def changed(self) -> None:
        """Something was settled, sent or handed back: whoever waits for the gate looks again."""
        if self._suspect is not None:
            for line in list(self._lines.values()):
                line.freed()
