"""A signal that comes at a chosen moment, and a handler of it that must not wait for its own thread."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handled_by(handler: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """What raises the signal, in the main thread, for the first time only. What takes more than 20 s in all fails,
    with an error that nobody repeats it for."""
    left = [handler]

    def handle(*_: object) -> None:
        left.pop()()

    def give_up(*_: object) -> None:
        raise AssertionError("it waits for its own thread")

    def ring() -> None:
        if left:
            signal.raise_signal(signal.SIGUSR1)

    before = {s: signal.signal(s, h) for s, h in ((signal.SIGUSR1, handle), (signal.SIGALRM, give_up))}
    signal.setitimer(signal.ITIMER_REAL, 20, 1)  # again, for what is tidied up may wait, too
    try:
        yield ring
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, earlier in before.items():
            signal.signal(number, earlier)
