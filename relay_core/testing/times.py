"""Time that passes at once."""

from __future__ import annotations

from collections.abc import Sequence

from relay_core import commands
from relay_core.broker import Broker
from relay_core.broker_base import names
from relay_core.validation import seconds


def advance(broker: Broker, by: float, queues: Sequence[str] | str | None = None, *, leases: bool = True) -> None:
    """Let `by` seconds pass in these queues, or in all: what falls due in that time is due now.

    Delayed jobs and retries come nearer, leases run out, dead jobs get older, timed dedup keys become free, and a rate
    limit's bucket fills. Recurring jobs go by the server's clock and are not moved.

    :param leases: False: delayed jobs and limits alone
    """
    ms = round(seconds("by", by) * 1000)
    for name in broker.queues() if queues is None else names(queues):
        broker.store.run(commands.shift(broker.settings.keys(name), ms, leases=leases))
