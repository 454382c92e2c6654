"""Publishing: a message becomes one job per queue that it reaches, stored before `apply_async` returns."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from relay_adapters.celery.holding import inhand
from relay_adapters.celery.messages import marks
from relay_adapters.celery.messages.dedup import dedup_of
from relay_adapters.celery.messages.due import wait_of
from relay_adapters.celery.messages.envelope import DELIVERED, SINCE, pack
from relay_adapters.celery.messages.freshids import fresh
from relay_adapters.celery.messages.ids import TAKEN, job_id_of
from relay_adapters.celery.messages.protocol import told_of
from relay_adapters.celery.plugin import ADAPTER, HEADER
from relay_adapters.celery.queues.terms import Terms, limits_of
from relay_adapters.celery.sending.batching import Batch
from relay_adapters.celery.sending.groups import gathered_for
from relay_adapters.celery.sending.routing import Routing
from relay_adapters.celery.turning import for_publishers
from relay_core import JobSpec
from relay_core.clock import sent_now
from relay_core.errors import StoreError, Unavailable
from relay_core.job import new_id

_HEADERS = {HEADER: ADAPTER}
_PLAIN = Terms()


class Publishing(Routing):
    """The part of a channel that stores messages."""

    priority_order = "amqp"
    supports_batch_publish = True

    def create_publish_batch(self, max_size: int) -> Batch:
        """What kombu's `Producer.batch` collects messages in."""
        return Batch(lambda: self, max_size)

    @for_publishers
    def basic_publish(self, message: MutableMapping[str, Any], exchange: str, routing_key: str, **options: Any) -> None:
        """Store a message, confirmed. Where it was cut off, kombu or Celery repeats this call: the id stays, and what
        was stored by then is not stored twice."""
        headers, properties, told = message["headers"], message["properties"], told_of(message)
        lease = inhand.lease_here(told)
        # a task's headers stay the same through all that Celery and kombu do to repeat its publish; those of other
        # messages may be the next one's, too, and where there are none kombu makes new ones each time
        kept, own = headers if "task" in headers else properties, told.get("id") if "task" in told else None
        again = kept.pop(marks.TRIED, None)
        if not isinstance(again, marks.Tried) or again.task_id != own:
            again = None  # none, or of another message that had the same headers and another id
        id, since = (fresh(job_id_of(told)), None) if again is None else (again.job_id, again.at)
        message[marks.ID], message[marks.TRIED], sent_at = id, since, sent_now()
        if lease is not None and since is None:
            queues = self._lookup(exchange, routing_key) if exchange else [routing_key]
            self._inplace_augment_message(message, exchange, routing_key)
            if self._moved(lease, queues, message):
                return
        try:
            gathered = gathered_for(self)
            if gathered is not None and marks.BATCH not in message:
                gathered.make_room()
                message[marks.BATCH] = gathered
            super().basic_publish(message, exchange, routing_key, **options)
        except Unavailable as error:
            # what else was asked of the server, such as a queue's terms, says nothing of the message
            if since is not None or (message.get(marks.SENT) and error.maybe_executed) or message.get(marks.STORED):
                kept[marks.TRIED] = marks.Tried(message[marks.ID], sent_at if since is None else since, own)
            raise
        except StoreError as error:
            error.maybe_executed |= since is not None or message.get(marks.STORED, False)
            raise

    def _put(
        self,
        queue: str,
        message: MutableMapping[str, Any],
        level: int | None = None,
        taken: int = 0,
        dedup: bool = True,
        **_: Any,
    ) -> None:
        """Store one job.

        :param level: relay's level; default: by the priority of the message
        :param taken: how many tasks of the same id are known to be there
        :param dedup: False for one that was stored before, in another queue, and is no duplicate of itself
        """
        own = message.get(marks.ID) or job_id_of(told_of(message))
        id = f"{own}~{taken}" if taken else own
        message[marks.ID] = id
        terms = self.topology.terms(queue)
        dies = "expiration" in message["properties"] and terms is not None and terms.dead_exchange is not None
        if terms is not None and dies and not terms.limited:
            self.topology.expect_expired(queue, terms)
        payload, options = pack(message), self._options(message, id, terms, level, dedup)
        # what is more than x-max-length is dropped after each publish
        if (batch := message.get(marks.BATCH)) is not None and (terms is None or terms.length is None):
            batch.add(queue, self.broker.operations.prepare(queue, JobSpec(payload, **options)), message)
            message[marks.STORED] = True
            return
        message[marks.SENT] = True
        if (since := message.get(marks.TRIED)) is not None:
            spec = JobSpec(payload, **options)
            answer = self.broker.drive(self.broker.operations.enqueue(queue, spec, since=since))
        else:
            answer = self.broker.enqueue(queue, payload, **options)
        while answer.duplicate and answer.id == options["id"]:
            # an earlier task of the same id is still there, and this is another one, as Celery understands it
            taken += 1
            options["id"] = message[marks.ID] = f"{own}~{taken}" if taken <= TAKEN else new_id()
            answer = self.broker.enqueue(queue, payload, **options)
        message[marks.STORED] = True

    def _options(
        self, message: MutableMapping[str, Any], id: str, terms: Terms | None, level: int | None, dedup: bool
    ) -> dict[str, Any]:
        """Those of the job that a message becomes in a queue of these terms, as JobSpec takes them."""
        options: dict[str, Any] = {
            "id": id,
            "priority": self.level_of(message, terms) if level is None else level,
            "headers": _HEADERS,
        }
        if wait := wait_of(message):
            options["delay"] = wait
        if terms is not None:
            options |= limits_of(terms)
        # a retry is never a duplicate of what it retries, nor where its body does not tell that it is one
        if dedup and not told_of(message).get("retries") and not inhand.runs_here(message):
            options |= dedup_of(message)
        return options

    def level_of(self, message: MutableMapping[str, Any], terms: Terms | None) -> int:
        """relay's level 0 to 9, 9 first, of a message's priority."""
        given = message["properties"].get("priority")
        priority = int(given) if isinstance(given, int) else 0  # True is 1
        level = (terms or _PLAIN).level(priority)
        return 9 - level if self.priority_order == "redis" else level

    def _moved(self, lease: Any, queues: list[str], message: MutableMapping[str, Any]) -> bool:
        """`self.retry` of a late-acked task: its job goes back to wait with the new message in one move."""
        job = inhand.retried(lease, queues, told_of(message))
        if job is None:
            return False
        terms = self.topology.terms(job.queue)
        if self.level_of(message, terms) != job.priority:
            return False
        wait, properties = wait_of(message), dict(message["properties"])
        properties[DELIVERED] = job.deliveries
        if "expiration" in properties or (terms is not None and terms.ttl is not None):
            properties[SINCE] = self.topology.stored.now_ms() / 1000 + wait
        try:
            return inhand.put_back(self.broker, self.leases, job, pack({**message, "properties": properties}), wait)
        except StoreError as error:
            error.maybe_executed = True  # the delivery is this broker's, and would end at no other
            raise

    def _inplace_augment_message(self, message: Any, exchange: str, routing_key: str) -> None:
        """Neither an encoding of the body nor a delivery tag: a delivery gets its tag when it is claimed."""
        message["properties"]["delivery_info"].update(exchange=exchange, routing_key=routing_key)
