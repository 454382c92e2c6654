"""Publishing to fanout exchanges: control, events, gossip."""

from __future__ import annotations

from typing import Any

from relay_adapters.celery.declaring import Declaring


class Fanout(Declaring):
    """The part of a channel that publishes to fanout exchanges."""

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **_: Any) -> None:
        """One job per bound queue: nothing is lost between bind and consume. A queue whose owner is gone expires."""
        queues = sorted({binding.queue for binding in self.topology.table(exchange)})
        gone = self.topology.expired(queues)
        for queue in gone:
            self.queue_delete(queue)
        for queue in queues:
            if queue not in gone:
                self._put(queue, message)
