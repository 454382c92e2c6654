"""A claimed job as Dramatiq's workers see it."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

from dramatiq import worker
from dramatiq.broker import MessageProxy
from dramatiq.encoder import JSONEncoder
from dramatiq.message import Message, get_encoder

from relay_core import Job
from relay_core.commands import Nack

JOB_ID = "relay_job_id"
"""Message option: the id of the job in the store, as `relay job show` takes it."""


class Lease:
    """A job that this process has claimed and not yet settled.

    :ivar until: this process's monotonic clock at which it ends; the heartbeat moves it on
    :ivar lost: True once the store said that the job is no longer ours
    """

    __slots__ = ("job", "lost", "until")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.until = job.expires_at
        self.lost = False

    def holds(self) -> bool:
        return not self.lost and time.monotonic() < self.until


class Holding(dict[str, Lease]):
    """The unsettled leases of one consumer, by token: a job that comes back for its retry is another lease.

    The size is what prefetch limits.

    :ivar closed: True once the consumer is: what is left runs on, and takes slots of its successors
    """

    closed = False


_WORKER_MINDS_ETA = hasattr(worker, "ConsumerThread")
"""Since Dramatiq 2.0 a worker says of an `eta` that is no number that it is none; before, it stumbled over it."""

_arrivals = itertools.count()


class RelayMessage(MessageProxy):
    """A message with its lease.

    :ivar pending: a retry that could not be sent when the message failed; it takes the place of the ack
    :ivar unheard: True where it was skipped before any middleware heard of it, so that none is to hear of its end
    :ivar exception: what the worker reported of the run, or None
    """

    def __init__(self, message: Message[Any], lease: Lease, holding: Holding) -> None:
        super().__init__(message)
        self.lease = lease
        self.pending: Nack | None = None
        self.unheard = False
        self.exception: BaseException | None = None
        self._holding = holding
        self._arrival = next(_arrivals)

    def __lt__(self, other: object) -> bool:
        """Before Dramatiq 2.2 a worker asks messages of one priority which is to run first: the one that came first."""
        return not isinstance(other, RelayMessage) or self._arrival < other._arrival

    @property
    def _message(self) -> Message[Any]:
        return self._proxied

    @_message.setter
    def _message(self, message: Message[Any]) -> None:
        """Set by MessageProxy, and by middleware that puts another one in its place."""
        self._proxied = message
        # Dramatiq looks these up some twenty times for each message, and its proxy finds each the long way
        self.__dict__.update(vars(message))

    @property
    def settled(self) -> bool:
        """Whether the job was acked, nacked, retried or handed back."""
        return self.lease.job.token not in self._holding

    def settle(self) -> bool:
        """Give up the lease, and with it the consumer's slot. False when that was done before."""
        return self._holding.pop(self.lease.job.token, None) is not None

    def stuff_exception(self, exception: BaseException) -> None:
        super().stuff_exception(exception)
        self.exception = exception

    def clear_exception(self) -> None:
        super().clear_exception()
        self.exception = None

    def __del__(self) -> None:
        # What nobody holds any more can never be acked: its lease ends without further heartbeats.
        self.settle()


_to_json = json.JSONEncoder(separators=(",", ":")).encode


def encoded(message: Message[Any] | MessageProxy) -> bytes:
    """`message.encode()`. Dramatiq's own encoder would make a new one of the json module for each message; the text
    that a user's encoder may make is UTF-8, as on Dramatiq's brokers."""
    if type(message) is Message and type(get_encoder()) is JSONEncoder:
        return _to_json(vars(message)).encode()
    body: bytes | str = message.encode()
    return body.encode() if isinstance(body, str) else body


def with_options(message: Message[Any], changes: dict[str, Any]) -> Message[Any]:
    """`message.copy(options=changes)`, which looks up and sets the fields of a message one by one."""
    if type(message) is Message:
        copied: Message[Any] = Message.__new__(Message)
        vars(copied).update(vars(message), options={**message.options, **changes})
        return copied
    return message.copy(options=changes)


_NUMBERS = ("retries", "max_retries", "min_backoff", "max_backoff")
"""Options that Dramatiq counts with: where it cannot, its log says so, and the message that failed is acked."""


def _check(message: Message[Any]) -> None:
    """Raises TypeError for what a decoder lets pass, and what ends the consumer that looks the actor up, or loses a
    message that fails."""
    for name, kind in (("actor_name", str), ("kwargs", dict), ("options", dict)):
        if not isinstance(value := getattr(message, name), kind):
            raise TypeError(f"its {name} is a {type(value).__name__}")
    options = message.options
    if not options:
        return
    for name in _NUMBERS:
        if not isinstance(value := options.get(name), (int, float, type(None))):
            raise TypeError(f"its option {name} is a {type(value).__name__}")
    if (throws := options.get("throws")) and not isinstance(throws, (type, tuple)):
        raise TypeError(f"its option throws is a {type(throws).__name__}, which names no exceptions")


def delivered(job: Job) -> Message[Any]:
    """The message in a job, as a worker is to run it now. Raises dramatiq's DecodeError, or TypeError.

    The store has kept it until it was due, so it carries no `eta`, which would park it in the worker's memory;
    and the queue is the one it came from, by which the worker finds its consumer.
    """
    message: Message[Any] = Message.decode(job.payload)
    _check(message)
    eta = message.options.get("eta")
    if eta is None or isinstance(eta, (int, float)) or not _WORKER_MINDS_ETA:
        message.options.pop("eta", None)
    return message if message.queue_name == job.queue else message.copy(queue_name=job.queue)
