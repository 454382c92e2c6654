"""Messages that a queue does not want any more: expired, dropped, rejected. Where the queue names an exchange for
them they go there, before they leave the queue: a crash in between leaves two copies, never none.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from relay_adapters.celery.errors import MailboxesAway, NotFound
from relay_adapters.celery.messages.due import run_now, timestamp
from relay_adapters.celery.messages.envelope import DELIVERED, SINCE, head_of, unpack
from relay_adapters.celery.messages.protocol import change_protocol_1, protocol_1, told_of
from relay_adapters.celery.options import say_once
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.sending.routing import Routing
from relay_core import Job, commands
from relay_core.commands.moves import MAX_BATCH
from relay_core.errors import InvalidArgument, RelayError, Unavailable
from relay_core.job import Claimed, StoredJob

logger = logging.getLogger("relay.celery")

SWEEP = 100
"""Most messages that one sweep ends: who sweeps has others to look after."""

SWEEP_FOR = 0.5
"""Seconds after which a sweep leaves the rest for the next one."""

AGAIN = 0.05
"""Seconds until the next sweep where this one left something."""

_SELDOM = 5.0
"""Seconds until the next look at a queue whose head has time, or that has consumers: either may change."""

_PAGE = 20
"""Messages read at a time, and claimed but for those that nobody can read."""

_END_OF_TIME = 2.0**43
"""Unix seconds."""

_MILLISECONDS = re.compile("[0-9]{1,18}")

LONG_AGO = "1970-01-01T00:00:00+00:00"


class DeadLetters(Routing):
    """The part of a channel that ends messages by the terms of their queue."""

    def expired(self, job: Job, raw: Any) -> bool:
        """True when a claimed message's time is over: then it was dead-lettered or dropped here.

        A Celery task is not dropped: it is delivered as expired, so that the worker stores its result as REVOKED.
        """
        if _left(job, raw, self.topology.terms(job.queue), job.claimed_at) >= 0:
            return False
        if self.dead_letter(job, "expired"):
            return True
        # where its own time is not over by the clock here, by any it is too late: that may differ from the server's
        if "task" in (headers := raw.get("headers") or {}):
            if not _is_over(headers.get("expires")):
                headers["expires"] = LONG_AGO
            return False
        if (task := protocol_1(raw)) is not None:
            if not _is_over(task.get("expires")):
                change_protocol_1(raw, task, expires=LONG_AGO)
            return False
        self.broker.ack(job)
        return True

    def dead_letter(self, job: Job, reason: str) -> bool:
        """Publish a claimed message to its queue's x-dead-letter-exchange, then end it. False when there is none, or
        no queue there takes it: then nothing was done.

        :param reason: rejected, expired or maxlen, as RabbitMQ calls them
        """
        terms = self.topology.terms(job.queue)
        if terms is None or terms.dead_exchange is None:
            return False
        message = unpack(job.payload)
        run_now(message)  # it has waited for its time, and does not do so again where a client's clock is ahead
        properties = message["properties"]
        info = properties["delivery_info"] = properties.get("delivery_info") or {}
        key = info.get("routing_key") or "" if terms.dead_key is None else terms.dead_key
        _note_death(message, job.queue, reason, info, job.claimed_at, properties.pop("expiration", None))
        info.update(exchange=terms.dead_exchange, routing_key=key)
        try:
            if not self.route(message, terms.dead_exchange, key, level=job.priority, dedup=False):
                logger.warning("message %s of queue %r: %r has no queue for it", job.id, job.queue, terms.dead_exchange)
                return False
        except (NotFound, InvalidArgument) as error:  # the latter: with its x-death it is too large
            logger.warning("message %s of queue %r cannot be dead-lettered: %s", job.id, job.queue, error)
            return False
        except MailboxesAway as error:  # the message stays, and is no event that may be kept for later
            raise Unavailable(str(error)) from error
        self.broker.ack(job)
        return True

    def _bound(self, queue: str, terms: Terms | None) -> None:
        """After a publish: drop, or dead-letter, what is more than x-max-length."""
        if terms is None or terms.length is None:
            return
        if terms.dead_exchange is None:
            self.broker.store.run(commands.purge(self.broker.settings.keys(queue), "ready", 200, keep=terms.length))
            return
        over = self.broker.stats(queue).ready - terms.length
        claimed = self.broker.claim(queue, min(over, 200)) if over > 0 else Claimed()
        for at, job in enumerate(claimed):
            with self._back_unless_done(claimed[at:]):
                if not self.dead_letter(job, "maxlen"):
                    self.broker.ack(job)

    def sweep(self, queue: str, terms: Terms) -> float:
        """End the expired messages at the head of a queue, some at a time: seconds until the next look.

        A task that has nowhere to go stays for the worker that claims it and revokes it, see `expired`. Where only
        messages have time limits, the queue's consumers see to them: their heads are not read for nothing.
        """
        idle, ends = max(1.0, (terms.ttl or 0) / 1000), time.monotonic() + SWEEP_FOR
        if terms.ttl is None and self.topology.stored.consumers(queue):
            return _SELDOM
        for _ in range(SWEEP // _PAGE):
            over, left = self._over(queue, terms)
            if not over:
                return idle if left is None else max(AGAIN, min(left, max(idle, _SELDOM)))
            found = self.broker.claim(queue, over)
            claimed = [job for job in found if not _is_riddle(job, terms)]
            if len(claimed) < len(found):
                self.broker.release([job for job in found if job not in claimed])
            if not claimed:  # the queue's limits allow of no more
                return idle
            for at, job in enumerate(claimed):
                # the head may have changed since it was looked at
                message = _read(job)
                stays = _is_a_workers(message, terms) or _left(job, message, terms, job.claimed_at) > 0
                if stays or (at and time.monotonic() >= ends):
                    self.broker.release(claimed[at:])
                    return AGAIN
                with self._back_unless_done(claimed[at:]):
                    self._end_expired(job)
        return AGAIN

    @contextmanager
    def _back_unless_done(self, claimed: Sequence[Job]) -> Iterator[None]:
        """The first of these is ended here. Where the server is full or away all go back, uncounted: however long that
        lasts, no message is to go to dead for it."""
        try:
            yield
        except Unavailable:
            with suppress(RelayError):
                self.broker.release(claimed)
            raise

    def _over(self, queue: str, terms: Terms) -> tuple[int, float | None]:
        """How many messages at a queue's head have expired, one page at most, and seconds until the next one does.

        Those before and in between of which nobody can tell are counted: as many as one claim takes are looked past.
        """
        seen, over, now = 0, 0, 0.0
        while seen < MAX_BATCH:
            page = self.broker.jobs(queue, "ready", limit=_PAGE, skip=seen)
            now = now or (self.topology.stored.now_ms() / 1000 if page else 0.0)
            for at, job in enumerate(page, seen + 1):
                if _is_riddle(job, terms):
                    continue
                message = _read(job)
                if job.created_at is None or _is_a_workers(message, terms):
                    return over, None
                left = _left(job, message, terms, now)
                if left > 0:
                    return over, left
                over = at
            seen += len(page)
            if over or len(page) < _PAGE:
                return over, None
        say_once(
            f"the first {seen} messages of queue {queue!r} are none that this process can read, and those behind them "
            "do not expire before somebody takes these out"
        )
        return 0, _SELDOM

    def _end_expired(self, job: Job) -> None:
        try:
            head_of(job.payload)
        except ValueError as error:
            self.broker.nack(job, error, dead=True, reason="undecodable")
            return
        if not self.dead_letter(job, "expired"):
            self.broker.ack(job)


def _left(job: Job | StoredJob, message: MutableMapping[str, Any], terms: Terms | None, now: float) -> float:
    """Seconds until a message expires, by its queue's terms or its own `expiration`, at the server's time `now`."""
    limits = [terms.ttl] if terms is not None and terms.ttl is not None else []
    own = (message.get("properties") or {}).get("expiration")
    if own is not None and _MILLISECONDS.fullmatch(str(own)):
        limits.append(int(own))
    return _waits_from(job, message, now) + min(limits) / 1000 - now if limits else math.inf


def _read(job: Job | StoredJob) -> MutableMapping[str, Any]:
    try:
        return unpack(job.payload)
    except ValueError:
        return {}


def _is_riddle(job: Job | StoredJob, terms: Terms) -> bool:
    """True for what does not decode, where a message's own limit alone could say that it expires: it is left to its
    consumer, and holds up none that comes after it."""
    return terms.ttl is None and not _read(job)


def _is_a_workers(message: MutableMapping[str, Any], terms: Terms) -> bool:
    """True for a task that has nowhere to go when it expires: the worker that claims it revokes it."""
    return terms.dead_exchange is None and "task" in told_of(message)


def _waits_from(job: Job | StoredJob, message: MutableMapping[str, Any], now: float) -> float:
    """Since when a message that is due waits for a worker, by the server's clock: its publish, a retry that put it
    back, or the time for which it was set."""
    options, properties = job.options, message.get("properties") or {}
    since = properties.get(SINCE)
    # compared before it is converted, which an int of hundreds of digits cannot be
    if not isinstance(since, (int, float)) or not 0 < since < _END_OF_TIME:
        since = 0.0
        if DELIVERED in properties:  # put back where no limit was known: only the clock of its worker tells
            due = timestamp(told_of(message).get("eta")) or 0.0
            since = due if due <= now else 0.0
    return max((job.created_at or 0.0) + (options.delay_ms or 0) / 1000, (options.at_ms or 0) / 1000, float(since))


def _is_over(expires: Any) -> bool:
    """Whether a worker here takes a task that has this for expired."""
    ends = timestamp(expires)
    return ends is not None and ends < time.time()


def _note_death(
    message: MutableMapping[str, Any], queue: str, reason: str, info: dict[str, Any], now: float, expiration: Any
) -> None:
    """Add to the header x-death as RabbitMQ does: one entry per queue and reason, with a count, the last one first."""
    headers = message["headers"] = message.get("headers") or {}
    told = headers.get("x-death")
    deaths = [dict(death) for death in told if isinstance(death, dict)] if isinstance(told, list) else []
    entry = next((death for death in deaths if (death.get("queue"), death.get("reason")) == (queue, reason)), None)
    if entry is None:
        entry = {
            "queue": queue, "reason": reason, "count": 0,
            "exchange": info.get("exchange") or "", "routing-keys": [info.get("routing_key") or ""],
        }  # fmt: skip
    else:
        deaths.remove(entry)
    count = entry.get("count")
    entry["count"] = (count if isinstance(count, int) else 0) + 1
    entry["time"] = datetime.fromtimestamp(int(now), timezone.utc).replace(tzinfo=None)  # as py-amqp reads it
    if expiration is not None:
        entry["original-expiration"] = str(expiration)
    headers["x-death"] = [entry, *deaths]
    for name in ("queue", "reason", "exchange"):
        headers.setdefault(f"x-first-death-{name}", entry[name])
