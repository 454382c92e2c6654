"""Consuming from mailboxes: control, replies, events. Their messages are taken when they come, without a lease."""

from __future__ import annotations

import logging
from collections import deque
from queue import Empty
from typing import Any

from relay_adapters.celery.messages.envelope import unpack
from relay_adapters.celery.queues import moves
from relay_adapters.celery.queues.declaring import Declaring
from relay_adapters.celery.queues.terms import Terms
from relay_adapters.celery.workerstate import is_worker
from relay_core.commands import Command
from relay_core.errors import RelayError
from relay_core.job import new_id

logger = logging.getLogger("relay.celery")


class Mailing(Declaring):
    """The part of a channel that consumes from mailboxes. Stands before the parts that know queues of jobs only.

    :ivar boxes: the mailboxes that this channel consumes from
    :ivar mail: what has come and was not handed over yet: (queue, seat, id, message), see Attendance.sit
    """

    boxes: dict[str, Terms]
    mail: deque[tuple[str, int, str, bytes]]
    _held: dict[str, tuple[str, bytes]]
    _no_ack: set[str]

    @property
    def _declares_later(self) -> bool:
        """A worker goes on meanwhile. It has a new mailbox for what others tell with each connection."""
        return is_worker()

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **options: Any) -> None:
        terms = self.topology.terms(queue, fresh=True) or Terms()
        if terms.mailbox:
            self.boxes[queue] = terms
        try:
            self.attendance.join(id(self), queue, terms)
            super().basic_consume(queue, no_ack, callback, consumer_tag, **options)
        except BaseException:
            if queue not in self._active_queues:  # nor by another consumer of this channel
                self.boxes.pop(queue, None)
                self.attendance.part(id(self), queue)
            raise

    def basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        if queue is None or self._active_queues.count(queue) != 1:
            super().basic_cancel(consumer_tag)
            return
        self.boxes.pop(queue, None)
        try:
            super().basic_cancel(consumer_tag)
        finally:
            # now that it reads no more: another channel may at once read by the same name
            self.attendance.part(id(self), queue)

    def next_mail(self) -> tuple[Any, str] | None:
        """The next (raw message, queue) that may be handed over: acknowledged ones wait for credit, others do not."""
        while self.mail:
            queue, seat, id, packed = self.mail[0]
            if queue in self.boxes and queue not in self._no_ack and not self.qos.can_consume():
                return None
            self.mail.popleft()
            if queue not in self.boxes:
                continue  # cancelled in this very moment
            self.attendance.received(queue, seat, id)
            raw = self._opened(queue, packed)
            if raw is not None:
                return raw, queue
        return None

    def _opened(self, queue: str, packed: bytes, asked: bool = False) -> Any:
        try:
            raw = unpack(packed)
            tag = f"m{new_id()}"  # and the id in the store of what is put back, among those of other processes
            raw["properties"]["delivery_tag"] = tag
        except (ValueError, KeyError, TypeError) as error:
            logger.error("a message of queue %r does not decode and is dropped: %s", queue, error)
            return None
        if asked or queue not in self._no_ack:
            self._held[tag] = (queue, packed)
        return raw

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        terms = self._mailbox(queue)
        if terms is None:
            return super()._get(queue, timeout)
        packed = self.broker.store.run(moves.take(self.topology.places, queue, terms.ttl or 0))
        raw = self._opened(queue, packed, asked=True) if packed is not None else None
        if raw is None:
            raise Empty
        return raw

    def settle(self, tag: str) -> None:
        if self._held.pop(tag, None) is None:
            super().settle(tag)  # type: ignore[misc]

    def refuse(self, tag: str, requeue: bool) -> None:
        """Reject: a mailbox's message that is requeued goes to its end."""
        held = self._held.get(tag)
        if held is None:
            super().refuse(tag, requeue)  # type: ignore[misc]
            return
        if requeue:
            for command in self._back(tag, *held):
                self.broker.store.run(command)  # where the server is not there, it is kept until the channel closes
        self._held.pop(tag, None)

    def _back(self, tag: str, queue: str, packed: bytes) -> list[Command[list[int]]]:
        """What puts it at the end of its mailbox, where that is still there."""
        terms = self._mailbox(queue)
        if terms is None:
            return []
        return [moves.publish(self.topology.places, "", "", tag, packed, [(queue, terms.ttl or 0, terms.most)])]

    def basic_recover(self, requeue: bool = False) -> Any:
        """What was not acked goes back to its mailbox, in its order; kombu asks for the last one first."""
        if requeue:
            for tag in list(self._held):
                self.refuse(tag, True)
        return super().basic_recover(requeue)

    def close(self) -> None:
        """What was not acked goes back to its mailbox, where the server is there."""
        held, self._held = self._held, {}
        try:
            back = [command for tag, one in held.items() for command in self._back(tag, *one)]
            failed = [one for one in self.broker.store.run_many(back) if isinstance(one, RelayError)]
        except RelayError as error:
            failed = [error] * len(held)
        if failed:
            logger.warning(
                "%d messages of mailboxes that were not acked are lost with their channel: %s", len(failed), failed[0]
            )
        super().close()
