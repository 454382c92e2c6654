"""Time that a queue's past is older by."""

from __future__ import annotations

from relay_core import Broker


def age_by(broker: Broker, queue: str, seconds: int) -> None:
    """Its jobs were stored so long ago, and those that are done were claimed so long ago."""
    keys, store = broker.settings.keys(queue), broker.store
    fields = store.raw("HGETALL", keys.jobs)
    for id, record in fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True):
        born, rest = record.split(b" ", 1)
        store.raw("HSET", keys.jobs, id, b"%d %b" % (int(born) - 1000 * seconds, rest))
    for at, receipt in enumerate(store.raw("LRANGE", keys.finished, 0, -1)):
        rest, claimed = receipt.rsplit(b"t", 1)
        store.raw("LSET", keys.finished, at, b"%bt%x" % (rest, int(claimed, 16) - seconds))
