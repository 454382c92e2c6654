"""How long a queue is: what waits for a consumer."""

from __future__ import annotations

from relay_core import Broker


def waiting(broker: Broker, queue: str) -> int:
    """How many messages of a queue of jobs a consumer would get now, whatever their priority.

    Those that wait for their time are none of them, as on other brokers, where a worker has these in its memory: who
    asks wants to know whether the workers keep up. Those that are due are, though no worker is there to see to that.
    """
    stats = broker.stats(queue)
    if stats.next_due_at is None or stats.next_due_at > stats.now:
        return stats.ready
    now_ms = round(stats.now * 1000)
    return stats.ready + int(broker.store.raw("ZCOUNT", broker.settings.keys(queue).delayed, "-inf", now_ms))
