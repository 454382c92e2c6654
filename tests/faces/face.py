"""What a face can do. The suite in test_conformance.py speaks only these words, and asks the store what came of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from relay_core import Broker

QUEUE = "mail"


class Failed(Exception):
    """A handler raises it: the run failed, and is to be retried by the face's policy."""


class Rejected(Exception):
    """A handler raises it: the job is not to be tried again."""


@dataclass(frozen=True)
class Run:
    """One run of a job as its handler sees it.

    :ivar id: by which the framework knows the job; the same in all its retries
    :ivar retries: how many of its runs failed before
    """

    body: str
    id: str
    retries: int


Handler = Callable[[Run], None]


@dataclass(frozen=True)
class Terms:
    """What the jobs of a face are run under. Durations are seconds.

    :ivar lease: after which a silent holder's job goes to another
    :ivar max_deliveries: without an answer, after which a job is dead
    :ivar retries: after which a job that still fails is dead
    :ivar backoff: between two tries
    """

    lease: float = 15.0
    max_deliveries: int = 5
    retries: int = 2
    backoff: float = 0.05


class Taker(ABC):
    """A consumer that is driven by hand, one job at a time, through the face's own consumer interface."""

    @abstractmethod
    def take(self, seconds: float) -> str | None:
        """Wait for a job: its body."""

    @abstractmethod
    def ack(self) -> str:
        """The job that was taken is done: the name of the error that this face tells of a lost lease, or ''."""

    @abstractmethod
    def hand_back(self) -> None:
        """Not started: somebody else may have it."""

    @abstractmethod
    def close(self) -> None:
        """Give back its connections."""


class Face(ABC):
    """One way to use relay.

    :cvar lacks: verb -> why this face has no such thing. Tests of it are not made for this face
    :cvar failed: why a job is dead whose retries are used up
    :cvar rejected: why a job is dead that its handler rejected
    :cvar tells_lost: what `Taker.ack` answers when the lease was lost; '' where the framework has nobody to tell
    """

    name: ClassVar[str]
    lacks: ClassVar[Mapping[str, str]] = {}
    failed: ClassVar[str]
    rejected: ClassVar[str]
    tells_lost: ClassVar[str] = ""

    def __init__(self, url: str, terms: Terms) -> None:
        self.url = url
        self.terms = terms

    @abstractmethod
    def send(self, body: str, *, delay: float | None = None, priority: int = 0) -> None:
        """Send one job to QUEUE."""

    @abstractmethod
    def send_garbage(self) -> None:
        """Put a job into QUEUE that this face cannot decode."""

    @abstractmethod
    def working(self, handler: Handler, concurrency: int = 1) -> AbstractContextManager[None]:
        """A worker of this process, with a consumer of its own, that is stopped at the end."""

    @abstractmethod
    def taker(self) -> Taker:
        """A consumer driven by hand, which the caller closes."""

    @abstractmethod
    def waiting(self) -> int:
        """How many jobs wait in QUEUE, delayed ones included."""

    @abstractmethod
    def purge(self) -> None:
        """Drop what waits in QUEUE."""

    def send_once(self, body: str, key: str) -> str:
        """Send one job unless one of this key is there: the id of the one that is stored, where the face tells it."""
        raise NotImplementedError(self.lacks["dedup"])

    def pause(self) -> None:
        """Hold QUEUE back in all workers. A framework without such a verb leaves it to relay's operator."""
        with Broker(self.url) as operator:
            operator.pause(QUEUE)

    def resume(self) -> None:
        with Broker(self.url) as operator:
            operator.resume(QUEUE)

    @abstractmethod
    def close(self) -> None:
        """Give back all connections."""
