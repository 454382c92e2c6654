"""What an adapter says to move another queue system's jobs into relay. Descriptions only: nothing here does I/O.

An adapter adds a `Migration` to the commands of its `relay_register_commands` hook, and `relay migrate NAME --from URL`
drives it: opens the source, takes its batches into relay, shows how far it is, and answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import click

from relay_core.errors import InvalidArgument
from relay_core.job import Arrival, ArrivalState
from relay_core.keys import encode_queue

BATCH = 200
"""Jobs that a source should give at a time: what one script call takes in."""


@dataclass(frozen=True, slots=True)
class Found:
    """So many jobs of a source are, or were, in this state of this queue.

    :ivar note: of jobs that stay where they are: why, and what to do about it
    """

    queue: str
    state: ArrivalState
    count: int
    note: str = ""


def why_not(queue: str) -> str:
    """Why relay can have no queue of this name, as a note of Found has it; empty where it can."""
    try:
        encode_queue(queue)
    except InvalidArgument as error:
        return f"{error}; leave them to the old workers, or move them to another queue there"
    return ""


class SourceStore(Protocol):
    """The server that jobs are moved from. Any Redis or Valkey will do, whatever its version and settings."""

    def raw(self, *args: bytes | str | int) -> Any:
        """Run a plain command. Replies hold bytes. It is repeated when its reply was lost. Raises RelayError.

        A text may hold what is no UTF-8 as `surrogateescape` decodes it: the names of keys are anything.
        """


class Source(Protocol):
    """The jobs of another system, opened by `Migration.open`. Used from one thread."""

    def found(self) -> Iterable[Found]:
        """How many jobs there are to move now. Changes nothing."""

    def batches(self) -> Iterator[Sequence[Arrival]]:
        """All jobs to move, up to BATCH at a time.

        When the generator is resumed after a `yield`, relay has that batch, and its jobs are to be taken out of the
        source. If it is not resumed (an error, a kill), they stay there, and come again the next time.
        """

    def left(self) -> Iterable[Found]:
        """What stays in the source after `batches`, with a note each: a queue of a name for which there is a `why_not`,
        for one. Changes nothing."""


class Migration(click.Command):
    """`relay migrate NAME`.

    :param open: `open(store, **options)`, options being the parsed `params`; no I/O
    :param params: click options of this migration's own; `--from`, `--dry-run` and the shared ones are added
    :param prefix: `prefix(**options)`, the prefix to move to where `--prefix` names none; None: relay's default
    """

    def __init__(
        self,
        name: str,
        open: Callable[..., Source],
        help: str,
        params: Sequence[click.Option] = (),
        prefix: Callable[..., str | None] = lambda **_options: None,
    ) -> None:
        super().__init__(name, help=help, params=list(params))
        self.open, self.prefix = open, prefix
