"""What the children of a prefork worker must know of leases, which their main process keeps.

A message may lie in a child's pipe while its lease ends, when both were frozen for a time or the server was away, or
while it is handed back, when the connection was lost or the worker stops. So main process and children share a piece
of memory, made before the pool forks. There the main process says until when its leases are sure, and which were lost;
a child looks before it starts a task, and says that it has. Where they are not sure it waits for the next heartbeat,
which knows. A child that is spawned, and not forked, is handed a descriptor of that memory.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from relay_adapters.celery.holding import chords

_ROWS = 252
"""Rows of leases that a process may have: two per broker."""

_NUMBERS = 1 << 20
"""Deliveries that are told apart, the latest of the process."""

_LOOK_EVERY = 0.005
"""Seconds between looks of a child that waits for word."""

_fence = threading.Lock
"""One is taken, for nothing else, between a write and a look: the processor must not do the look first. A fresh one
each time, for a fork may copy a lock that is taken."""

_UNTIL = struct.Struct("d")
_DONE, _LOST = 254, 255
"""What a delivery's byte says: acked, so that it is to run whatever its lease; not to be started. Else its row, from 1
on; 0 for nothing."""

_SIZE = _ROWS * _UNTIL.size + 2 * _NUMBERS

WAITS, DECIDES, RUNS, ENDED, MOVED = 1, 2, 3, 4, 5
"""What a child says of a delivery: it waits for word of it; it takes its last look; it has started it, for good; it ran
it to its end; the task itself has ended the delivery, as a retry does. Else 0."""


class Board:
    """The shared memory: per row a monotonic time until which its leases are sure; per delivery a byte for what is to
    be done with it, and one for what a child does.

    :param pid: of the main process
    :param descriptor: of the memory, which a spawned child was handed. Default: new memory
    """

    def __init__(self, pid: int, descriptor: int | None = None) -> None:
        self.pid = pid
        self.descriptor = _new_memory() if descriptor is None else descriptor
        self._rows = 0
        self._running: int | None = None
        """In a child: the number of the delivery that it runs, until that is over."""
        self.memory = mmap.mmap(self.descriptor, _SIZE)

    def row(self) -> Row:
        """A row of its own for a table of leases; one that says nothing when there are no more."""
        if self._rows == _ROWS:
            return Row()
        self._rows += 1
        return Row(self.memory, self._rows)

    def may_start(self, tag: object) -> bool:
        """In a child: whether to start what was delivered by this tag. Waits while that is not sure."""
        number = _number(tag)
        if number is None:
            return True
        said, does = _said(number), _does(number)
        while (row := self.memory[said]) not in (0, _DONE, _LOST):
            sure = time.monotonic() < _UNTIL.unpack_from(self.memory, (row - 1) * _UNTIL.size)[0]
            if sure and self.memory[said] == row:  # it may have come to another row, of which this one says nothing
                break
            if os.getppid() != self.pid:
                return False
            self.memory[does] = WAITS
            time.sleep(_LOOK_EVERY)
        # Who hands it back says so first and then looks what is done here; here it is the other way round. So one of
        # the two sees the other. What was lost is said before the row is sure again.
        self.memory[does] = DECIDES
        with _fence():
            lost = self.memory[said] == _LOST
        self.memory[does] = 0 if lost else RUNS
        return not lost

    def guarded(self, trace: Callable[..., Any]) -> Callable[..., Any]:
        """A function of Celery's that runs a task, and that looks first."""

        @functools.wraps(trace)
        def run(task: Any, uuid: Any, request: Mapping[str, Any], *rest: Any, **options: Any) -> Any:
            tag = (request.get("properties") or {}).get("delivery_tag")
            if not self.may_start(tag):
                from relay_adapters.celery.holding.forgotten import Forgotten

                raise Forgotten(uuid)
            self._running = _number(tag)
            result = trace(task, uuid, request, *rest, **options)
            self._end(ENDED)
            return result

        return run

    def moving(self, begun: bool) -> None:
        """In a child: the task that runs is about to end its delivery by itself, or could not."""
        if self._running is not None:
            self.memory[_does(self._running)] = MOVED if begun else RUNS

    def _end(self, how: int) -> None:
        """In a child: the delivery that runs is over, or its task is."""
        if self._running is not None:
            self.memory[_does(self._running)] = how
            self._running = None


class Row:
    """What the table of leases of one broker says to children. Without memory: to nobody."""

    def __init__(self, memory: mmap.mmap | None = None, row: int = 0) -> None:
        self._memory = memory
        self._row = row
        self.until = 0.0

    def sure(self, until: float) -> None:
        """All leases last until then, but for those of which something else was said before."""
        self.until = until
        if self._memory is not None:
            _UNTIL.pack_into(self._memory, (self._row - 1) * _UNTIL.size, until)

    def held(self, tag: str) -> None:
        self._say(tag, self._row, True)

    def done(self, tag: str) -> None:
        self._say(tag, _DONE)

    def lost(self, tag: str) -> None:
        self._say(tag, _LOST)

    def kept(self, tag: str) -> None:
        """It was said to be lost, and a child had started it by then."""
        self._say(tag, self._row)

    def does(self, tag: str) -> int:
        """What a child says of this delivery: WAITS, DECIDES, RUNS, ENDED, MOVED or 0."""
        number = _number(tag)
        if self._memory is None or number is None:
            return 0
        with _fence():
            return self._memory[_does(number)]

    def _say(self, tag: str, what: int, fresh: bool = False) -> None:
        if self._memory is None or (number := _number(tag)) is None:
            return
        if fresh:
            self._memory[_does(number)] = 0
        self._memory[_said(number)] = what


def _number(tag: object) -> int | None:
    """The number that this transport's delivery tags begin with; None for those of others."""
    number = tag.partition(".")[0] if isinstance(tag, str) else ""
    return int(number) % _NUMBERS if number.isdecimal() else None


def _said(number: int) -> int:
    return _ROWS * _UNTIL.size + number


def _does(number: int) -> int:
    return _ROWS * _UNTIL.size + _NUMBERS + number


def _new_memory() -> int:
    """A descriptor of zeros without a name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("relay-children")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _SIZE)
    return descriptor


_board: Board | None = None
_child = 0
"""This process, where it is a child of a pool."""


def install(prefork: Any) -> None:
    """In a worker's main process, before its pool starts children. Repeating it is harmless, in a child too.

    :param prefork: Celery's module of that pool
    """
    global _board
    if here():
        return
    if _board is None or _board.pid != os.getpid():
        _board = Board(os.getpid())
    if not isinstance(prefork.process_initializer, _Initializer):
        prefork.process_initializer = _Initializer(prefork.process_initializer)


def here() -> bool:
    """True in a child of a prefork pool."""
    return _child == os.getpid()


def moving(begun: bool) -> None:
    """In a child, by the task that it runs: it is about to end its delivery, or could not."""
    if here() and _board is not None:
        _board.moving(begun)


def moved() -> None:
    """In a child, by the task that it runs: its delivery was ended, and its ack will find nothing."""
    if here() and _board is not None:
        _board._end(MOVED)


def row() -> Row:
    """A row for a table of leases of this process."""
    return _board.row() if _board is not None and _board.pid == os.getpid() else Row()


class _Initializer:
    """What a child calls before all else: Celery's own function, and what makes it look at the memory.

    Its main process sends it the name of the function that runs a task: here that means a guarded one.
    """

    def __init__(self, stock: Callable[..., None]) -> None:
        self._stock = stock

    def __call__(self, app: Any, hostname: str) -> None:
        global _child
        _child = os.getpid()
        self._stock(app, hostname)
        chords.install()  # where it was forked, its main process did
        if _board is None:
            return
        trace = sys.modules["celery.app.trace"]
        for name in ("fast_trace_task", "trace_task_ret"):
            setattr(trace, name, _board.guarded(getattr(trace, name)))

    def __reduce__(self) -> tuple[Any, ...]:
        """For a child that is spawned: in its process, Celery's function is still found by its name."""
        from billiard.reduction import DupFd

        return _spawned, ((_board.pid, DupFd(_board.descriptor)) if _board else ())


def _spawned(pid: int = 0, descriptor: Any = None) -> _Initializer:
    global _board
    from celery.concurrency.prefork import process_initializer

    if descriptor is not None:
        _board = Board(pid, descriptor.detach())
    return _Initializer(process_initializer)
