"""`RelayBroker`: Dramatiq's broker, on relay."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from dramatiq.broker import Broker
from dramatiq.common import current_millis, iter_queue, q_name
from dramatiq.errors import QueueJoinTimeout, QueueNotFound
from dramatiq.message import Message
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.worker import Worker

import relay_core
from relay_adapters.dramatiq import batch as batches
from relay_adapters.dramatiq.burial import Burial
from relay_adapters.dramatiq.consumer import MAX_RETRIES, RelayConsumer
from relay_adapters.dramatiq.errors import DramatiqErrors, WorkerErrors
from relay_adapters.dramatiq.gate import Gate
from relay_adapters.dramatiq.heartbeat import Heartbeat, extend
from relay_adapters.dramatiq.line import Line
from relay_adapters.dramatiq.message import JOB_ID, RelayMessage, encoded, with_options
from relay_adapters.dramatiq.monitoring import Monitoring
from relay_adapters.dramatiq.options import check_options
from relay_adapters.dramatiq.plugin import ADAPTER, HEADER
from relay_core import JobSpec
from relay_core.errors import RelayError, StoreError, Unavailable
from relay_core.job import new_id
from relay_core.keys import LEVELS
from relay_core.operations.ending import safe_repr
from relay_core.plugins import listed

PRIORITY = "broker_priority"
"""Actor and message option: 0 to 9, 9 is claimed first. Default 0. What is over 9 counts as 9."""

_MARK = {HEADER: ADAPTER}


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    alive = method()
    if alive is not None:
        alive()


def _until_eta(message: Message[Any]) -> float:
    """Milliseconds until its `eta` option. 0 if that is no number, or not set."""
    eta = message.options.get("eta")
    return eta - current_millis() if isinstance(eta, (int, float)) and eta == eta else 0


def _seconds(delay: float) -> float:
    """A delay as relay_core takes it, which refuses what is not finite; one that is over is none."""
    return 0.0 if delay < 0 else delay / 1000  # unlike max(), which would make 0 of NaN


class _Current(threading.local):
    """The message whose `after_process_message` signal this thread is emitting, and whether its run failed."""

    message: RelayMessage | None = None
    failed = False

    def failing(self, message: object) -> RelayMessage | None:
        """This very message, when its run failed and nothing was decided about it yet."""
        mine = self.message if self.message is message else None
        return mine if mine is not None and self.failed and not mine.settled else None


class RelayBroker(Broker):
    """Dramatiq's messages as relay's jobs. Building one does no I/O.

    :param url: where the store is, see relay_core.Broker. Default: the embedded server in `./.relay`
    :param middleware: as Dramatiq's Broker takes it
    :param plugins: objects with hook implementations, see relay_core/hooks.py
    :param metrics_addr: where each worker process serves Prometheus metrics at `/metrics`: `host:port`, or
        `host:first-last` for as many processes, each on the first port of these that is free. Default: nowhere
    :param metrics_tasks: how many names of actors get a `task` label of their own there. Default 0: no such label
    :param options: those of relay_core.Broker: `prefix`, `lease` (seconds after which the messages of a dead
        worker run again, default 15), `max_deliveries` (default 5), `keep_dead`, `durability`, ...

    Raises InvalidArgument for a value that cannot be, and TypeError for an option that is none, which names the
    counterpart of one of RedisBroker's or RabbitmqBroker's.

    `core` is the relay_core.Broker underneath: its stats, dead letters, limits and pauses are at hand.
    """

    def __init__(
        self,
        url: str = "relay://",
        *,
        middleware: list[Middleware] | None = None,
        plugins: Iterable[object] = (),
        metrics_addr: str | None = None,
        metrics_tasks: int = 0,
        **options: Any,
    ) -> None:
        check_options(options)
        self.core = relay_core.Broker(url, plugins=[*listed(plugins), Burial(self)], **options)
        self._current = _Current()
        batches.install(RelayBroker)
        self._forget_threads()
        super().__init__(middleware=middleware)
        self.queues: set[str] = set()
        self._monitoring = Monitoring(self, metrics_addr, metrics_tasks)
        self.actor_options.add(PRIORITY)
        if hasattr(os, "register_at_fork"):
            method = weakref.WeakMethod(self._forget_threads)
            os.register_at_fork(after_in_child=lambda: _call(method))

    def _forget_threads(self) -> None:
        """A new process has no consumers yet: what a parent claimed stays the parent's."""
        self._lines: dict[str, Line] = {}
        self._gate = Gate(self.core.settings)
        self._errors = WorkerErrors()
        self._heartbeat: Heartbeat | None = None
        self._opening = threading.Lock()

    # queues

    def declare_queue(self, queue_name: str) -> None:
        """Make `queue_name` known in this process. No I/O, and no delay queue: delayed messages wait in the store.

        Raises InvalidArgument for a name that cannot be used.
        """
        if queue_name in self.queues:
            return
        self.core.settings.keys(queue_name)
        self.emit_before("declare_queue", queue_name)
        self.queues.add(queue_name)
        self.emit_after("declare_queue", queue_name)

    def get_declared_queues(self) -> set[str]:
        """Names of the queues that this process has declared."""
        return self.queues.copy()

    def get_declared_delay_queues(self) -> set[str]:
        """None: delayed messages wait in the store."""
        return set()

    def get_queue_message_counts(self, queue_name: str) -> tuple[int, int, int]:
        """How many messages of `queue_name` are ready, delayed and dead, at one instant. Raises ConnectionClosed."""
        with DramatiqErrors():
            stats = self.core.stats(queue_name)
        return stats.ready, stats.delayed, stats.dead

    def flush(self, queue_name: str) -> None:
        """Drop all messages of `queue_name` but those that are running. Raises ConnectionClosed."""
        with DramatiqErrors():
            self.core.purge(queue_name, ("ready", "delayed", "dead"))

    def flush_all(self) -> None:
        """Drop all messages of all declared queues but those that are running. Raises ConnectionClosed."""
        for queue_name in self.get_declared_queues():
            self.flush(queue_name)

    def join(self, queue_name: str, *, interval: int = 100, timeout: int | None = None) -> None:
        """Wait until no message of `queue_name` is ready, delayed or running; look every `interval` ms (default 100).

        Raises QueueJoinTimeout after `timeout` ms (default: never), QueueNotFound, and ConnectionClosed.
        """
        self._known(queue_name)
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        pause = 0.005
        while True:
            with DramatiqErrors():
                stats = self.core.stats(queue_name)
            if not stats.ready and not stats.delayed and not stats.inflight:
                return
            left = interval / 1000 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise QueueJoinTimeout(queue_name)  # type: ignore[no-untyped-call]
            time.sleep(min(pause, interval / 1000, left))
            pause *= 2

    def _known(self, queue_name: str) -> None:
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)  # type: ignore[no-untyped-call]

    # sending

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Store a message, which is ready after `delay` ms, or at its `eta` option (unix ms), or at once.

        Enqueuing the message that just failed, as Retries does, is one atomic retry of the same job. Raises
        InvalidArgument for a `delay` that is no finite number or over ten years, ConnectionClosed, or StoreError when
        the server refuses; then nothing is lost: a message whose follow-up could not be stored is not acked, but runs
        again.
        """
        retried = self._current.failing(message)
        job_id = retried.lease.job.id if retried else new_id()
        changes: dict[str, Any] = {JOB_ID: job_id}
        if delay is not None:
            changes["eta"] = current_millis() + delay
        message = with_options(message, changes)
        if message.queue_name not in self.queues and (canonical := q_name(message.queue_name)) != message.queue_name:
            # kept from a RedisBroker, which names its delay queue in what it returns; nobody reads that one here
            message = message.copy(queue_name=canonical)
        self.logger.debug("Enqueueing message %r on queue %r.", message.message_id, message.queue_name)
        self.emit_before("enqueue", message, delay)
        if retried:
            self._retry(retried, message, _until_eta(message) if delay is None else delay)
        elif self._store(job_id, message, delay):
            return message
        self.emit_after("enqueue", message, delay)
        return message

    def batch(self) -> AbstractContextManager[None]:
        """`with broker.batch():` what this thread, or this task of an event loop, sends meanwhile is stored together.

        That is done for 200 messages, for 1 MiB, or as one is sent 50 ms after the first, and for the rest as the block
        ends, also by an error. `after_enqueue` is emitted when a message is stored.

        A group's `run` does so by itself. A block in a block is part of it. Raises at its end what `enqueue` does; some
        of the messages may be stored then.
        """
        return batches.gathering(self)

    def _store(self, job_id: str, message: Message[Any], delay: int | None) -> bool:
        """True where a batch has taken it, and tells of it."""
        due: dict[str, Any] = {}
        if delay is not None:
            due["delay"] = _seconds(delay)
        elif _until_eta(message) > 0:
            due["at"] = message.options["eta"] / 1000
        payload, priority = encoded(message), self._priority(message)
        batch = batches.batch_of(self)
        with DramatiqErrors():
            try:
                if batch is not None:
                    spec = JobSpec(payload, id=job_id, priority=priority, headers=_MARK, **due)
                    if batch.add(message, delay, spec):
                        return True
                self.core.enqueue(message.queue_name, payload, id=job_id, priority=priority, headers=_MARK, **due)
            except (Unavailable, StoreError) as error:
                self.not_stored(error)
                raise
        return False

    def not_stored(self, error: RelayError) -> None:
        """What Dramatiq's middleware sends as a message ends could not be stored: the message is to run again."""
        current = self._current.message
        if current is not None and current.pending is None and isinstance(error, (Unavailable, StoreError)):
            # Dramatiq logs what its middleware raises and acks all the same: see RelayConsumer.ack.
            item = self.core.operations.nack_of(current.lease.job, error, 1.0)
            current.pending = item._replace(max_retries=MAX_RETRIES)

    def _retry(self, message: RelayMessage, changed: Message[Any], delay: float) -> None:
        job, nack_of = message.lease.job, self.core.operations.nack_of
        error = changed.options.get("traceback") or safe_repr(message.exception)
        try:
            item = nack_of(job, error, _seconds(delay), payload=encoded(changed))
        except Exception as cause:
            # It cannot be retried as it is now, and Dramatiq would log that and ack it: keep it among the dead.
            told = f"cannot be retried: {safe_repr(cause)}\n{error}"
            message.pending = nack_of(job, told, dead=True, reason="failed")
            raise
        message.pending = item = item._replace(max_retries=MAX_RETRIES)
        with self._errors:
            self._line(job.queue).nack(job, item)
        message.pending = None
        message.settle()

    def _priority(self, message: Message[Any]) -> Any:
        """What is no number, or below 0, is for relay_core to refuse."""
        value = message.options.get(PRIORITY)
        if value is None:
            actor = self.actors.get(message.actor_name)
            value = actor.options.get(PRIORITY) if actor else None
        return min(value, LEVELS - 1) if isinstance(value, int) else 0 if value is None else value

    # receiving

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> RelayConsumer:
        """A consumer of `queue_name` that keeps at most `prefetch` (default 1) messages unsettled, and waits for up to
        `timeout` ms (default 5000) for the next.

        Raises QueueNotFound.
        """
        self._known(queue_name)
        with self._opening:
            if self._heartbeat is None:
                heartbeat = Heartbeat(self.core, lambda: list(self._lines.values()))
                heartbeat.start()  # if there are too many threads just now, the next consumer tries it
                self._heartbeat = heartbeat
        return RelayConsumer(self._line(queue_name), self._errors, prefetch, timeout)

    def _line(self, queue_name: str) -> Line:
        with self._opening:
            if queue_name not in self._lines:
                self._lines[queue_name] = Line(self.core, queue_name, self._gate)
            return self._lines[queue_name]

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Dramatiq's signals. A message whose lease is over when it is about to start is skipped."""
        if signal == "process_message" and isinstance(args[0], RelayMessage) and not args[0].lease.holds():
            self._renew(args[0])
        if signal == "worker_boot":
            self._monitoring.boot(args[0])
        elif signal == "worker_shutdown":
            self._errors.worker_ends(args[0])
        super().emit_before(signal, *args, **kwargs)
        if signal == "process_message":
            self._monitoring.run_started(args[0])
        elif signal == "worker_shutdown":
            self._hand_back(args[0])

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Dramatiq's signals. During `after_process_message`, an enqueue of that message is its retry."""
        if signal in ("process_message", "skip_message"):
            self._monitoring.run_ended(args[0], kwargs.get("exception"))
        elif signal == "worker_shutdown":
            self._errors.worker_ended()
            self._monitoring.shutdown(args[0])
        if signal == "process_message" and isinstance(args[0], RelayMessage):
            current = self._current
            current.message, current.failed = args[0], kwargs.get("exception") is not None
            try:
                super().emit_after(signal, *args, **kwargs)
            finally:
                current.message = None
        elif signal != "skip_message" or not isinstance(args[0], RelayMessage) or not args[0].unheard:
            super().emit_after(signal, *args, **kwargs)

    def _hand_back(self, worker: Worker) -> None:
        """What a worker that ends has fetched and not started. Dramatiq would keep it until the last message is done,
        which may take as long as `--worker-shutdown-timeout`, ten minutes by default."""
        waiting: dict[str, list[Any]] = {}
        for item in iter_queue(worker.work_queue):  # type: ignore[no-untyped-call]
            worker.work_queue.task_done()  # who joins the worker does not wait for it any more
            message = item[1] if isinstance(item, tuple) else item.message  # a tuple before Dramatiq 2.2
            waiting.setdefault(message.queue_name, []).append(message)
        for queue_name, messages in waiting.items():
            try:
                worker.consumers[queue_name].requeue_messages(messages)
            except Exception as error:  # it is to stop all the same, and their leases end
                self.logger.warning("what was fetched of queue %r is not handed back: %s", queue_name, error)

    def held(self) -> int:
        """How many messages this process has claimed and not yet settled."""
        return sum(len(line.leases()) for line in list(self._lines.values()))

    def _renew(self, message: RelayMessage) -> None:
        """A process that slept past its lease starts nothing that may run elsewhere."""
        core = self.core
        if extend(core, lambda jobs: core.drive(core.operations.extend_each(jobs)), [message.lease]):
            message.lease.lost = True  # not so in the store, perhaps: then the lease ends there by itself
        if message.lease.lost:
            message.unheard = True
            raise SkipMessage(f"the lease of job {message.lease.job.id} was lost before it started")

    def close(self) -> None:
        """Send the acks that wait, end the heartbeat and give back the connections."""
        with self._opening:
            heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.stop()
        with DramatiqErrors():
            try:
                for line in list(self._lines.values()):
                    line.flush()
            finally:
                self.core.close()
