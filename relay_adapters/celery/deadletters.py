"""Messages that a queue does not want any more: expired, dropped, rejected. Where the queue names an exchange for
them they go there, before they leave the queue: a crash in between leaves two copies, never none.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from datetime import datetime, timezone
from typing import Any

from relay_adapters.celery.due import timestamp
from relay_adapters.celery.envelope import head_of, unpack
from relay_adapters.celery.errors import NotFound
from relay_adapters.celery.routing import Routing
from relay_adapters.celery.terms import Terms
from relay_core import Job, commands

logger = logging.getLogger("relay.celery")

LONG_AGO = "1970-01-01T00:00:00+00:00"


class DeadLetters(Routing):
    """The part of a channel that ends messages by the terms of their queue."""

    def expired(self, job: Job, raw: Any) -> bool:
        """True when a claimed message's time is over: then it was dead-lettered or dropped here.

        A Celery task is not dropped: it is delivered as expired, so that the worker stores its result as REVOKED.
        """
        terms = self.topology.terms(job.queue)
        limits = [terms.ttl] if terms is not None and terms.ttl is not None else []
        with_own = (raw.get("properties") or {}).get("expiration")
        if with_own is not None and str(with_own).isdigit():
            limits.append(int(with_own))
        headers = raw.get("headers") or {}
        if not limits or (job.claimed_at - _waits_from(job, headers)) * 1000 <= min(limits):
            return False
        if self.dead_letter(job, "expired"):
            return True
        if "task" in headers:
            # by any clock it is too late: the worker's may differ from the server's
            headers["expires"] = LONG_AGO
            return False
        self.broker.ack(job)
        return True

    def dead_letter(self, job: Job, reason: str) -> bool:
        """Publish a claimed message to its queue's x-dead-letter-exchange, then end it. False when there is none, or
        no queue is bound there: then nothing was done.

        :param reason: rejected, expired or maxlen, as RabbitMQ calls them
        """
        terms = self.topology.terms(job.queue)
        if terms is None or terms.dead_exchange is None:
            return False
        message = unpack(job.payload)
        properties = message["properties"]
        info = properties.setdefault("delivery_info", {})
        key = info.get("routing_key") or "" if terms.dead_key is None else terms.dead_key
        _note_death(message, job.queue, reason, info, job.claimed_at)
        properties.pop("expiration", None)
        info.update(exchange=terms.dead_exchange, routing_key=key)
        try:
            if not self.route(message, terms.dead_exchange, key, level=job.priority):
                logger.warning("message %s of queue %r: %r has no queue for it", job.id, job.queue, terms.dead_exchange)
                return False
        except NotFound as error:
            logger.warning("message %s of queue %r cannot be dead-lettered: %s", job.id, job.queue, error)
            return False
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
        for job in self.broker.claim(queue, min(over, 200)) if over > 0 else ():
            if not self.dead_letter(job, "maxlen"):
                self.broker.ack(job)

    def sweep(self, queue: str, terms: Terms) -> float:
        """End the expired messages at the head of a queue with x-message-ttl: seconds until the next look.

        A task that has nowhere to go stays for the worker that claims it and revokes it, see `expired`.
        """
        ttl = (terms.ttl or 0) / 1000
        while True:
            head = self.broker.jobs(queue, "ready", limit=1)
            if not head or head[0].created_at is None:
                return max(1.0, ttl)
            claimed = self.broker.claim(queue)
            if not claimed:
                return max(1.0, ttl)
            job = claimed[0]
            headers = head_of(job.payload).get("headers") or {}
            left = _waits_from(job, headers) + ttl - job.claimed_at
            if left > 0 or (terms.dead_exchange is None and "task" in headers):
                self.broker.release(job)
                return max(0.05, left) if left > 0 else max(1.0, ttl)
            if not self.dead_letter(job, "expired"):
                self.broker.ack(job)


def _waits_from(job: Job, headers: dict[str, Any]) -> float:
    """Since when a message waits for a worker, by the server's clock: its publish, or the time for which it was set."""
    due = timestamp(headers.get("eta"))
    return job.created_at if due is None else max(job.created_at, due)


def _note_death(message: MutableMapping[str, Any], queue: str, reason: str, info: dict[str, Any], now: float) -> None:
    """Add to the header x-death as RabbitMQ does: one entry per queue and reason, with a count, the last one first."""
    headers = message.setdefault("headers", {})
    deaths = [dict(death) for death in headers.get("x-death") or ()]
    entry = next((death for death in deaths if (death["queue"], death["reason"]) == (queue, reason)), None)
    if entry is None:
        entry = {
            "queue": queue, "reason": reason, "count": 0,
            "exchange": info.get("exchange") or "", "routing-keys": [info.get("routing_key") or ""],
        }  # fmt: skip
    else:
        deaths.remove(entry)
    entry["count"] += 1
    entry["time"] = datetime.fromtimestamp(now, timezone.utc).isoformat()
    headers["x-death"] = [entry, *deaths]
    for name in ("queue", "reason", "exchange"):
        headers.setdefault(f"x-first-death-{name}", entry[name])
