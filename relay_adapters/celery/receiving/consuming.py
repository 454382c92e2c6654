"""Consuming: jobs are claimed while there is credit, and become messages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from queue import Empty
from typing import Any, NamedTuple

from relay_adapters.celery.messages import due
from relay_adapters.celery.messages.envelope import DELIVERED, unpack
from relay_adapters.celery.messages.tags import new_tag
from relay_adapters.celery.receiving.ahead import Ahead
from relay_adapters.celery.receiving.order import in_order
from relay_adapters.celery.receiving.settling import Settling
from relay_core import Job
from relay_core.connection import Bell, Sender
from relay_core.errors import RelayError, Unavailable

logger = logging.getLogger("relay.celery")

Delivery = tuple[Any, str]
"""A message as kombu's channels take it, and the queue that it came from."""


class Receiver(NamedTuple):
    """A consumer: what it is handed, and how."""

    callback: Callable[[Any], object]
    no_ack: bool
    simple: bool


class Consuming(Settling):
    """The part of a channel that claims."""

    _no_ack: set[str]
    _simple: set[str]
    _receivers: dict[str, dict[str, Receiver]]
    order: Any
    boxes: dict[str, Any]
    bell: Bell | None = None
    """Of the queues that it consumes from. It puts off those whose server is away alone."""

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any) -> None:
        super().basic_consume(queue, no_ack, callback, consumer_tag, **options)
        made = Receiver(self.connection._callbacks[queue], no_ack, _is_simple(callback))
        self._receivers.setdefault(queue, {})[consumer_tag] = made
        self._latest_changed(queue)
        self.connection.consumers_changed(self)

    def basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        try:
            if queue is not None and not self.closed and self.connection is not None:
                self.connection.consumer_ends(self, queue)
        finally:
            super().basic_cancel(consumer_tag)
        if queue is not None:
            receivers = self._receivers.get(queue, {})
            receivers.pop(consumer_tag, None)
            if not receivers:  # as of a client that asks many questions, each with a queue for the answers
                self._receivers.pop(queue, None)
            self._latest_changed(queue)
        if self.connection is not None:
            self.connection.consumers_changed(self)

    def _latest_changed(self, queue: str) -> None:
        """Who is handed what comes from a queue decides whether it will be acked."""
        latest = next(reversed(self._receivers.get(queue, {}).values()), None)
        for queues, holds in ((self._no_ack, latest and latest.no_ack), (self._simple, latest and latest.simple)):
            queues.add(queue) if holds else queues.discard(queue)

    def deliver(self, raw: Any, queue: str) -> None:
        """Hand a message to a consumer of this channel, the latest of its queue. kombu's transports know the latest of
        the whole connection, whose channel does not hold what this one has claimed."""
        tag = raw["properties"]["delivery_tag"]
        if queue in self._no_ack and tag in self._unacked:
            self._done_with(tag)  # it was claimed for another one
        if receivers := [*self._receivers.get(queue, {}).values()]:
            receivers[-1].callback(raw)
        else:  # two had one tag, and one of them ended
            self.connection._deliver(raw, queue)

    @property
    def singly(self) -> bool:
        """Whether it claims one message at a time where no event loop drives it: what is over once it is claimed would
        be lost if it were not delivered, and who reads a SimpleQueue takes one of what others read, too."""
        return bool(self._no_ack or self._simple)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The queues of jobs that this channel consumes from."""
        return tuple(dict.fromkeys(queue for queue in self._active_queues if queue not in self.boxes))

    def claim(self, room: int, rang: set[str], ahead: Ahead | None = None) -> tuple[list[Delivery], float | None]:
        """Claim up to `room` messages, and send the acks that are pending in the same round trip.

        Answers with the messages, and seconds until the next look makes sense, None: only a wake-up will tell. A
        message that may kill this process comes without the others, which are handed back. A queue whose server is away
        alone is put off.

        :param rang: queues whose wake-up may have been taken and is to be passed on; those it was passed on of leave it
        :param ahead: what `claim_ahead` made, if it did: of its queue nothing more is claimed
        """
        found: list[Delivery] = []
        again: float | None = None
        failed: RelayError | None = None
        left = list(self._there(in_order(self.order, self.consumed)))
        if ahead is not None:
            left = [ahead.queue, *(queue for queue in left if queue != ahead.queue)]
        while left:
            queue, tags = left.pop(0), list[str]()
            try:
                if ahead is None:
                    jobs = self._claim_one(queue, room - len(found), queue in rang)
                    rang.discard(queue)
                else:
                    taken, ahead = ahead, None
                    jobs, tags = taken.take(), taken.tags
                if jobs.retry_after is not None:
                    again = min(jobs.retry_after, jobs.retry_after if again is None else again)
                if jobs:
                    self.order.rotate(queue)
                enough = self._receive(jobs, tags, found)
            except RelayError as error:
                rang.add(queue)  # what was claimed ahead was to pass it on
                if isinstance(error, Unavailable) and self._put_off(queue, error):
                    left = list(self._there(left))
                    continue
                if found:
                    failed = error
                    break
                if isinstance(error, Unavailable):
                    raise
                failed = failed or error  # it may be alone with that
            except BaseException:  # what a signal's handler raises, or gevent's Timeout: nobody will deliver it
                self.take_back(found, wait=False)
                raise
            else:
                if enough or len(found) >= room:
                    break
        if failed is None:
            return found, again
        if not found:
            raise failed
        return found, 0.0  # what is held by now must be delivered; the next claim meets the error again

    def claim_ahead(self, room: int, sender: Sender, rang: set[str]) -> Ahead | None:
        """Send a claim of up to `room` messages of the queue whose turn it is, for `claim` to go on with. None where
        what is claimed of it ends at once, or no server is there.

        :param rang: as of `claim`
        """
        queue = next(iter(self._there(in_order(self.order, self.consumed))), None)
        if queue is None or queue in self._no_ack:
            return None
        ahead = Ahead(self.leases, sender, queue, room, queue in rang, self.credit_freed)
        rang.discard(queue)
        return ahead

    @property
    def there(self) -> Sequence[str]:
        """The consumed queues but those that are put off."""
        return self._there(self.consumed)

    def _there(self, queues: Sequence[str]) -> Sequence[str]:
        away = self.bell.away if self.bell is not None else None
        return [queue for queue in queues if self.marker(queue) not in away] if away else queues

    def _put_off(self, queue: str, error: Unavailable) -> bool:
        return self.bell is not None and self.bell.put_off(self.marker(queue), error)

    def marker(self, queue: str) -> bytes:
        return self.broker.settings.keys(queue).marker

    def _receive(self, jobs: Sequence[Job], tags: Sequence[str], found: list[Delivery]) -> bool:
        """Add the messages of jobs to what was found. True when a suspect among them keeps the others away.

        :param tags: by which the leases hold them, those that were not handed back meanwhile; none: they do not yet
        """
        suspects: list[Delivery] = []
        pairs = list(zip_longest(jobs, tags))
        for at, (job, tag) in enumerate(pairs, 1):
            if tag is not None and self.leases.get(tag) is None:
                continue
            try:
                raw = self._received(job, tag)
            except BaseException as error:
                logger.warning("message %s of queue %r could not be taken in: %r", job.id, job.queue, error)
                self._give_up(tag, pairs[at:])
                raise
            if raw is not None:
                found.append((raw, job.queue))
                if self.leases.apart.concerns(job):
                    suspects.append(found[-1])
        if not suspects and not self.leases.apart.shut:
            return False
        found[:] = self._set_apart(found, suspects)
        return True

    def _give_up(self, failed: str | None, rest: Sequence[tuple[Job, str | None]]) -> None:
        """A message could not be taken in. Its lease ends by itself, and that counts as a delivery, lest it comes again
        for ever; those that were claimed with it are handed back."""
        if failed is not None:
            self.leases.pop(failed)
        tags = []
        for job, tag in rest:
            if tag is None:
                tag = new_tag(job)
                self.leases.add(tag, job)
            tags.append(tag)
        self.leases.hand_back(tags, wait=False)

    def _set_apart(self, found: list[Delivery], suspects: list[Delivery]) -> list[Delivery]:
        """Keep one suspect, or none where this process has one, and what was acked at once; hand back the others."""
        tags = [raw["properties"]["delivery_tag"] for raw, _queue in found]
        held = {tag for tag in tags if self.leases.get(tag) is not None}
        kept = [delivery for delivery, tag in zip(found, tags, strict=True) if tag not in held]
        for delivery in suspects[:1]:
            tag = delivery[0]["properties"]["delivery_tag"]
            if tag in held and self.leases.apart.take(tag, self.credit_freed):
                kept.append(delivery)
        self.take_back([delivery for delivery in found if delivery not in kept])
        return kept

    def _claim_one(self, queue: str, room: int, woken: bool) -> Any:
        flows, acks = self.broker.operations, self.leases.owed.take_acks(queue)
        if not acks:
            return self.broker.drive(flows.claim((queue,), room, 0.0, woken))
        try:
            acked, _, jobs = self.broker.drive(flows.finish(queue, [held.job for held in acks], (), room, woken))
        except BaseException:
            self.leases.unsent(acks)
            raise
        self.leases.sent(acks, acked)
        return jobs

    def pass_on(self, rang: set[str]) -> None:
        """Wake-ups came that this channel has no credit for: let another worker have them. None of them is left.

        :param rang: as of `claim`
        """
        for queue in self.there:
            if queue not in rang:
                continue
            try:
                self.broker.drive(self.broker.operations.finish(queue, (), (), 0, woken=True))
            except Unavailable as error:
                if not self._put_off(queue, error):
                    raise
            rang.discard(queue)
        rang.clear()  # the bell rings for a queue that is put off once its server is back

    def _received(self, job: Job, tag: str | None = None, asked: bool = False) -> Any:
        """The message of a job; None where it ended here.

        :param tag: by which the leases hold it. Default: they do not yet
        :param asked: for by `basic_get`, which says itself whether it will be acked; a consumer has said that before
        """
        held, tag = tag is not None, tag or new_tag(job)
        raw = self._message(job, tag)
        if raw is not None and (asked or job.queue not in self._no_ack):
            self._unacked.add(tag)
            if not held:
                self.leases.add(tag, job)
            return raw
        if raw is not None:
            self.broker.ack(job)
        if held:
            self.leases.pop(tag)
        return raw

    def _message(self, job: Job, tag: str) -> Any:
        """As Celery is to see it; None for one that does not decode, or is no longer wanted."""
        try:
            raw = unpack(job.payload)
        except ValueError as error:
            logger.error("message %s of queue %r does not decode and goes to dead: %s", job.id, job.queue, error)
            self.broker.nack(job, error, dead=True, reason="undecodable")
            return None
        if self.expired(job, raw):
            return None
        properties = raw["properties"]
        properties["delivery_tag"] = tag
        before = job.deliveries - properties.pop(DELIVERED, 0) - 1
        info = properties["delivery_info"] = properties.get("delivery_info") or {}
        info["redelivered"] = before > 0
        if before > 0 and (terms := self.topology.terms(job.queue)) is not None and terms.quorum:
            raw["headers"] = {**(raw.get("headers") or {}), "x-delivery-count": before}
        due.run_now(raw)
        return raw

    def take_back(self, deliveries: list[Delivery], wait: bool = True) -> None:
        """Claimed, and not delivered: hand them back, see `Leases.hand_back`."""
        tags = [raw["properties"]["delivery_tag"] for raw, _queue in deliveries]
        self._unacked.difference_update(tags)
        self.leases.hand_back(tags, wait=wait)

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        while jobs := self.broker.claim(queue):
            if (raw := self._received(jobs[0], asked=True)) is not None:
                return raw
            # that one had expired: the next one may not
        raise Empty

    def basic_get(self, queue: str, no_ack: bool = False, **options: Any) -> Any:
        self._use(queue, self.topology.terms(queue))
        message = super().basic_get(queue, no_ack, **options)
        if message is not None and no_ack:
            self._done_with(message.delivery_tag)
        return message

    def _done_with(self, tag: str) -> None:
        """Ack what is handed to who does not. A server that is not there is told later: to raise that would keep the
        message from its receiver, and it would be acked all the same."""
        with suppress(Unavailable):
            self.settle(tag)


def _is_simple(callback: Any) -> bool:
    """Whether it fills the buffer of a kombu SimpleQueue."""
    simple = sys.modules.get("kombu.simple")
    consumer = getattr(callback, "__self__", None)
    owners = [getattr(one, "__self__", None) for one in getattr(consumer, "callbacks", None) or ()]
    return simple is not None and any(isinstance(owner, simple.SimpleBase) for owner in owners)
