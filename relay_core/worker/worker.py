"""`Worker`: claims in batches, runs handlers, ends jobs together with the next claim."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from relay_core.broker import Broker, check_blocking
from relay_core.broker_base import names
from relay_core.commands import Nack
from relay_core.connection import Bell
from relay_core.errors import InvalidArgument, LayoutError, LeaseLost, RelayError, Unavailable
from relay_core.job import Job
from relay_core.presence import Load, Presence, worker_name
from relay_core.validation import seconds, whole
from relay_core.worker.handlers import Handler, checked_handler, is_async
from relay_core.worker.held import Heartbeat, Held
from relay_core.worker.news import News
from relay_core.worker.outcome import Outcome, Reject, Retry, nack_of
from relay_core.worker.pools import LoopPool, Pool, ThreadPool

if TYPE_CHECKING:
    from relay_core.metrics import MetricsServer

logger = logging.getLogger("relay.worker")

_HOLD = 0.05
"""Seconds of work that a worker holds beyond what runs: short jobs come in large batches, long ones one by one."""

_MOST_PREFETCHED = 150

_FAREWELL = 1.0
"""Seconds for which a worker that stops tries to tell what is left to tell, where the server is away."""


_TURN = 1.0
"""Seconds for which a queue's claim is repeated where others may lie on another server."""


class _Cut(BaseException):
    """Raised by a signal's handler into a command that waits for a server which does not answer."""


def _metrics_server(address: str, broker: Broker, queues: Sequence[str], tasks: int) -> MetricsServer:
    """Imported only here, so that a worker without metrics needs no prometheus-client."""
    try:
        import prometheus_client  # noqa: F401, its own error says the least

        from relay_core.metrics import MetricsServer
    except ImportError as error:
        raise InvalidArgument(
            f"metrics_addr {address!r} needs prometheus-client ({error}): pip install 'relay-queue[metrics]'"
        ) from error
    return MetricsServer(address, broker, queues, tasks=tasks)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


class Worker:
    """Runs a handler on the jobs of some queues.

    A handler is a plain or an async function that gets the Job. Returning acks; raising nacks by the retry
    policy; raising Retry or Reject says how. Plain handlers run on threads, async ones on one event loop. One that
    returns a coroutine or a generator, which nobody runs, has failed; a generator function is refused.

    :param queues: asked in this order, so that the first is served first
    :param concurrency: handlers at a time. Default 1
    :param grace: seconds that a stop waits for running handlers before it releases their jobs. Default 30
    :param prefetch: jobs held beyond those that run. Default: what 50 ms of work amounts to
    :param metrics_addr: `host:port`, or `host:first-last` for the first free port of these, on which to serve
        `/metrics`. Default: none
    :param metrics_tasks: how many names of tasks get a `task` label of their own there. Default 0: no such label
    """

    def __init__(
        self,
        broker: Broker,
        handler: Handler,
        queues: Sequence[str],
        *,
        concurrency: int = 1,
        grace: float = 30.0,
        prefetch: int | None = None,
        metrics_addr: str | None = None,
        metrics_tasks: int = 0,
    ) -> None:
        check_blocking("Worker", broker)
        if isinstance(queues, str) or not (given := names(queues)):
            raise InvalidArgument(f"queues must be a list of at least one name, got {queues!r}")
        self.broker = broker
        for queue in given:
            broker.settings.keys(queue)  # refuses what is no name
        self.queues = tuple(dict.fromkeys(given))
        self.concurrency = whole("concurrency", concurrency, least=1, most=10_000)
        self.grace = seconds("grace", grace)
        self.prefetch = None if prefetch is None else whole("prefetch", prefetch, least=0, most=10_000)
        whole("metrics_tasks", metrics_tasks, least=0, most=10_000)
        self.processed = 0
        self.name = worker_name()
        self._handler = checked_handler(handler)
        self._metrics = _metrics_server(metrics_addr, broker, self.queues, metrics_tasks) if metrics_addr else None
        self._held = Held()
        self._ended: deque[Outcome] = deque()
        self._alone: deque[Job] = deque()
        self._unsent: dict[str, tuple[list[Job], list[tuple[Job, Nack]]]] = {q: ([], []) for q in self.queues}
        self._news = News()
        self._stops = 0
        self._until = math.inf  # monotonic; from then on nothing is repeated
        self._away_at: float | None = None  # monotonic; when the server was asked last, if it was away
        self._asked: float | None = None  # monotonic; since when a command is under way
        self._markers = {queue: broker.settings.keys(queue).marker for queue in self.queues}
        self._idle = False
        self._mean = 0.0
        self._bell: Bell | None = None

    def run(self) -> int:
        """Work until `stop`, SIGTERM, SIGINT or SIGHUP: how many jobs were acked.

        The first signal stops claiming, and running handlers have `grace` seconds; the second releases at once, but for
        SIGHUP, which often comes on top of another. Signal handlers are installed only on the main thread, that of
        SIGHUP only where nothing was said about it, such as by nohup.
        """
        heartbeat = Heartbeat(self.broker, self._held)
        presence = Presence(
            self.broker, "worker", lambda: Load(self.queues, self.concurrency, len(self._held)), self.name
        )
        with self._signals(), self.broker.store.hurried(until=lambda: self._until):
            pool: Pool = (LoopPool if is_async(self._handler) else ThreadPool)(
                self._handler, self.concurrency, self._held, self._done, self.broker.plugins
            )
            self._bell = bell = self.broker.store.bell(list(self._markers.values()))
            if self._metrics:
                self._metrics.start()
            heartbeat.start()
            presence.start()
            self.broker.plugins.notify(
                "relay_worker_started", worker=self.name, queues=self.queues, concurrency=self.concurrency
            )
            try:
                try:
                    self._work(pool, bell)
                finally:  # also when claims are refused for good: what runs may end, and need not run again
                    self._drain()
            finally:
                pool.close()
                heartbeat.stop()
                self._hand_back(started=True)
                presence.stop(0.0 if self._away else 2.0)
                self.broker.plugins.notify(
                    "relay_worker_stopped", worker=self.name, queues=self.queues, processed=self.processed
                )
                if self._metrics:
                    self._metrics.stop()
        return self.processed

    def stop(self) -> None:
        """Stop as a signal would; the second call releases at once. From any thread, or a signal handler."""
        self._stops += 1
        self._until = time.monotonic() + _FAREWELL if self._stops == 1 else 0.0
        self._news.tell()
        if self._bell is not None:
            self._bell.wake()

    # on the handlers' threads

    def _done(self, outcome: Outcome) -> None:
        self._ended.append(outcome)
        self._news.tell()
        if self._idle and self._bell is not None:
            self._bell.wake()

    # on the thread of `run`

    def _work(self, pool: Pool, bell: Bell) -> None:
        woken = False
        while not self._stops:
            self._news.forget()
            self._sort_ended()
            wait: float | None = None
            busy = False
            if bell.away:  # a worker that is busy does not wait for it
                woken = bell.rung() or woken
            for queue in self.queues:
                if self._markers[queue] in bell.away:
                    continue
                room = max(0, self._capacity() - len(self._held))
                try:
                    with self._turning():
                        got, retry_after = self._exchange(queue, room, woken)
                except Unavailable as error:
                    logger.warning("the server cannot be reached, held jobs go on: %s", error)
                    got, retry_after = [], None if bell.put_off(self._markers[queue], error) else 1.0
                for job in got:
                    self._held.add(job)
                    if self.broker.settings.is_suspect(job):
                        self._alone.append(job)
                    else:
                        pool.submit(job)
                busy = busy or bool(got)
                if retry_after is not None:
                    wait = retry_after if wait is None else min(wait, retry_after)
            woken = False
            if not busy and not self._ended:
                woken = self._rest(wait)

            if self._alone:
                self._run_alone(pool)

    def _turning(self) -> AbstractContextManager[None]:
        """Around what is asked of one queue: where others may lie elsewhere, it is soon their turn."""
        hurried = self.broker.store.hurried
        return hurried(_TURN, until=lambda: self._until) if self.broker.url.several else nullcontext()

    def _run_alone(self, pool: Pool) -> None:
        """Run suspects one at a time with nothing else held, so that a poison job takes no neighbour to dead.

        What was not started is handed back, uncounted; what runs has a lease's time to end first.
        """
        self._release(started=False, but=self._alone[0])
        job = self._alone.popleft()
        self._alone.clear()
        self._wait_until(lambda: len(self._held) <= 1, time.monotonic() + self.broker.settings.lease)
        if not self._stops:
            pool.submit(job)
            self._wait_until(lambda: not self._held.holds(job), float("inf"))

    def _wait_until(self, reached: Callable[[], bool], deadline: float) -> None:
        """Go on telling what ended until something is reached, the deadline has passed or a stop is asked for."""
        while True:
            self._news.forget()
            self._settle()
            if reached() or self._stops or (left := deadline - time.monotonic()) <= 0:
                return
            self._news.wait(min(left, 0.5))

    def _capacity(self) -> int:
        if self.prefetch is not None:
            return self.concurrency + self.prefetch
        if not self._mean:
            return self.concurrency
        return self.concurrency + min(_MOST_PREFETCHED, int(self.concurrency * _HOLD / self._mean))

    def _rest(self, wait: float | None) -> bool:
        """Wait for an ended job or a wake-up. True when the marker may have been taken, and must be put back."""
        longest = self.broker.settings.max_block
        full = len(self._held) >= self._capacity()
        assert self._bell is not None
        if full and not self._bell.armed:
            self._news.wait(longest)
            return False
        # a full worker does not begin to wait for a wake-up, but one that it still waits for is passed on
        self._idle = True
        try:
            if self._ended or self._stops:
                return False
            return self._bell.wait(max(0.001, min(longest, longest if wait is None else wait))) or not full
        except Unavailable:
            time.sleep(0.05)
            return True
        finally:
            self._idle = False

    def _sort_ended(self) -> None:
        while self._ended:
            outcome = self._ended.popleft()
            job = outcome.job
            self._mean = outcome.seconds if not self._mean else 0.9 * self._mean + 0.1 * outcome.seconds
            acks, nacks = self._unsent[job.queue]
            if not self._held.drop(job):
                continue  # released or lost while it ran: its token is of no use
            if outcome.error is None:
                acks.append(job)
            else:
                nacks.append((job, self._nack_of(job, outcome.error)))

    def _nack_of(self, job: Job, error: BaseException) -> Nack:
        if not isinstance(error, (Reject, Retry)):
            logger.error("job %s of queue %r failed", job.id, job.queue, exc_info=error)
        return nack_of(self.broker.operations, job, error)

    def _exchange(self, queue: str, room: int, woken: bool) -> tuple[list[Job], float | None]:
        """Tell what ended and get more, in one round trip. What cannot be told now is told the next time."""
        acks, nacks = self._unsent[queue]
        if not acks and not nacks and not room and not woken:
            return [], None
        now_acks, now_nacks = acks[:200], nacks[:200]
        with self._asking():
            acked, _nacked, jobs = self.broker.finish(queue, now_acks, now_nacks, min(200, room), woken)
        del acks[:200], nacks[:200]
        self.processed += sum(1 for verdict in acked if verdict)
        return jobs, 0.0 if acks or nacks else jobs.retry_after

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Around what is asked of the server, which may be away, or not answer."""
        self._asked = time.monotonic()
        try:
            yield
            self._away_at = None
        except _Cut:
            self._away_at = time.monotonic()
            raise Unavailable("given up at the second signal") from None
        except Unavailable:
            self._away_at = time.monotonic()
            raise
        finally:
            self._asked = None

    @property
    def _away(self) -> bool:
        """The server was away just now."""
        return self._away_at is not None and time.monotonic() - self._away_at < _FAREWELL

    @property
    def _hopeless(self) -> bool:
        """The server is away, and there is no more time to try."""
        return self._away and time.monotonic() >= self._until

    def _drain(self) -> None:
        """Hand back what was not started, and give what runs its grace."""
        assert self._bell is not None
        self._bell.close()
        self._hand_back(started=False)
        for queue in self.queues:
            if not (self._hopeless or self._markers[queue] in self._bell.away):
                with suppress(RelayError):
                    self._exchange(queue, 0, woken=True)  # a wake-up that came too late is for another worker
        if (running := len(self._held)) and self._stops < 2:
            run, them = ("runs", "it") if running == 1 else ("run", "them")
            told = f"{_jobs(running)} {run}, up to {self.grace:g} s; stop again to hand {them} back"
            logger.info("stopping: %s", told)
        deadline = time.monotonic() + self.grace
        while len(self._held) and self._stops < 2 and time.monotonic() < deadline:
            self._news.wait(max(0.0, min(0.5, deadline - time.monotonic())))
            self._news.forget()
            self._settle()
        self._sort_ended()
        ran = running or any(acks or nacks for acks, nacks in self._unsent.values())
        if ran and self._stops < 2:
            # what has run by now shall not run again for want of patience
            self._until = time.monotonic() + self.broker.store.settings.retry_for
        self._settle(last=True)

    def _settle(self, *, last: bool = False) -> None:
        """Tell what ended. What cannot be told now is told the next time, unless this is the last."""
        self._sort_ended()
        for queue, (acks, nacks) in self._unsent.items():
            while acks or nacks:
                level = logging.DEBUG if self._away and not last else logging.ERROR  # not twice a second
                try:
                    if self._stops >= 2 and self._hopeless:
                        raise Unavailable("the server is away")
                    self._exchange(queue, 0, False)
                except LayoutError:
                    self._end_by_hand(acks, nacks)
                except RelayError as error:
                    count = len(acks) + len(nacks)
                    logger.log(level, "%d ended jobs of %r could not be told: %s", count, queue, error)
                    break

    def _end_by_hand(self, acks: list[Job], nacks: list[tuple[Job, Nack]]) -> None:
        """A newer relay has taken over the store, and refuses what could claim. It lets held jobs end."""
        self.processed += sum(1 for verdict in self.broker.ack_many(acks) if verdict)
        acks.clear()
        while nacks:
            job, item = nacks.pop()
            dead = item.delay_ms < 0
            with suppress(LeaseLost):
                self.broker.nack(job, item.error, None if dead else item.delay_ms / 1000, dead=dead, reason=item.reason)

    def _hand_back(self, *, started: bool) -> None:
        """At the end, as `_release` does, and told of."""
        if count := self._release(started=started):
            logger.info("%s handed back", _jobs(count))

    def _release(self, *, started: bool, but: Job | None = None) -> int:
        """Let go of jobs: how many the store has taken back."""
        jobs = self._held.take_all(started=started, but=but)
        if not jobs:
            return 0
        try:
            if self._hopeless:
                raise Unavailable("the server is away")
            with self._asking():
                return sum(1 for verdict in self.broker.release(jobs) if verdict)
        except RelayError as error:
            logger.error("not handed back: %s, to run elsewhere once the leases are over: %s", _jobs(len(jobs)), error)
            return 0

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.stop()
            asked = self._asked
            if self._stops >= 2 and asked is not None and time.monotonic() - asked > _FAREWELL:
                self._asked = None  # once is enough
                raise _Cut

        def on_hangup(_number: int, _frame: FrameType | None) -> None:
            # a terminal that closes has both its shell and the system say so, and systemd may after its SIGTERM
            if not self._stops:
                self.stop()

        before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {
            number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        hangup = getattr(signal, "SIGHUP", None)  # which Windows has not
        if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:
            before[hangup] = signal.signal(hangup, on_hangup)
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
