"""Queues that are worked off in line: no process, no thread, no waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay_core.broker import Broker, check_blocking
from relay_core.broker_base import names
from relay_core.commands import Verdict
from relay_core.errors import InvalidArgument, RelayError
from relay_core.job import Claimed, Job
from relay_core.testing.times import advance
from relay_core.worker.handlers import Handler, check_result, checked_handler, is_async
from relay_core.worker.outcome import nack_of


class NotDrained(RelayError):
    """A queue cannot be worked off: it is paused, others hold its jobs, or there is no end to them."""


@dataclass
class Drained:
    """What ran, in its order.

    :ivar done: jobs whose handler returned
    :ivar retried: jobs that failed and were to run again, each with what its handler raised
    :ivar dead: jobs that failed for good, each with what its handler raised
    :ivar lost: jobs that were the handler's no more at its end: it nacked or released them by itself, or outlived the
        lease
    """

    done: list[Job] = field(default_factory=list)
    retried: list[tuple[Job, BaseException]] = field(default_factory=list)
    dead: list[tuple[Job, BaseException]] = field(default_factory=list)
    lost: list[Job] = field(default_factory=list)

    @property
    def runs(self) -> int:
        """How often the handler was called."""
        return len(self.done) + len(self.retried) + len(self.dead) + len(self.lost)


def drain(
    broker: Broker,
    handler: Handler,
    queues: Sequence[str] | str,
    *,
    raise_errors: bool = False,
    limit: int = 10_000,
) -> Drained:
    """Run a handler on the jobs of these queues until none is left, those with a delay and retries included.

    It is what `Worker` does with the same handler, plain or async: returning acks, raising nacks by the retry policy,
    Retry and Reject say how. Instead of waiting, delayed jobs come nearer; rate limits do not hold it up.

    :param raise_errors: what a handler raises ends it, once the job is nacked
    :param limit: calls of the handler after which it gives up

    Raises NotDrained, and InvalidArgument for a handler that cannot be one, or an async one where a loop runs already.
    """
    queues = names(queues)
    check_blocking("drain", broker)
    checked_handler(handler)
    drained = Drained()
    loop = _loop() if is_async(handler) else None
    try:
        while True:
            claimed = broker.claim(queues)
            if not claimed and not _make_due(broker, queues, claimed):
                return drained
            for job in claimed:
                if drained.runs == limit:
                    broker.release(job)
                    raise NotDrained(f"{limit} jobs have run and more are there; does the handler enqueue without end?")
                error = _run(broker, handler, job, loop)
                _end(broker, drained, job, error)
                if error is not None and raise_errors:
                    raise error
    finally:
        if loop is not None:
            loop.close()


def _loop() -> asyncio.AbstractEventLoop:
    """A loop for async handlers; not beside one that runs in this thread, where each of them would fail."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.new_event_loop()
    raise InvalidArgument(
        "drain runs async handlers on a loop of its own, and one runs here already: "
        "await asyncio.to_thread(drain, broker, handler, queues)"
    )


def _run(broker: Broker, handler: Handler, job: Job, loop: asyncio.AbstractEventLoop | None) -> BaseException | None:
    try:
        result = handler(job)
        if loop is not None:
            result = loop.run_until_complete(result)
        if loop is None or not isinstance(result, asyncio.Future):
            check_result(handler, result)
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        return error
    except BaseException:  # Ctrl-C, or the end of a test: as if it had never begun
        broker.release(job)
        raise
    return None


def _end(broker: Broker, drained: Drained, job: Job, error: BaseException | None) -> None:
    """As a worker does, which leaves alone what its handler has ended by itself."""
    if error is None:
        (verdict,), _nacked, _jobs = broker.finish(job.queue, [job])
        (drained.done if verdict else drained.lost).append(job)
        return
    _acked, (verdict,), _jobs = broker.finish(job.queue, nacks=[(job, nack_of(broker.operations, job, error))])
    if verdict is Verdict.DEAD:
        drained.dead.append((job, error))
    elif verdict is Verdict.DONE:
        drained.retried.append((job, error))
    else:
        drained.lost.append(job)


def _make_due(broker: Broker, queues: Sequence[str], claimed: Claimed) -> bool:
    """Let the time pass until something is to be done: False when nothing is left."""
    stats = [broker.stats(queue) for queue in queues]
    if claimed.limited == "paused":
        paused = [one.queue for one in stats if one.paused and one.pending]
        if paused:
            raise NotDrained(f"queue {paused[0]!r} is paused; resume it first")
    if any(one.ready for one in stats):
        if claimed.limited == "max_inflight":
            raise NotDrained("max_inflight holds jobs back, for others are held; ack or release them first")
        if claimed.limited == "rate" and claimed.retry_after is not None:
            advance(broker, claimed.retry_after, queues, leases=False)
        return True
    due = [one.next_due_at - one.now for one in stats if one.next_due_at is not None]
    if not due:
        return False
    if min(due) > 0:
        advance(broker, min(due), queues, leases=False)
    return True
