"""In which order a channel's queues are asked for messages: kombu's option `queue_order_strategy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kombu.utils.scheduling import CYCLE_ALIASES, cycle_by_name

from relay_core.errors import InvalidArgument


def order_of(strategy: Any) -> Any:
    """A cycle of kombu's: `round_robin` (the default), `priority` (as consumed, the first first), `sorted` by name,
    or the import path of a class of the same shape. Raises InvalidArgument."""
    try:
        return cycle_by_name(strategy)()
    except Exception as error:
        known = ", ".join(sorted(CYCLE_ALIASES))
        raise InvalidArgument(
            f"broker_transport_options['queue_order_strategy'] must be one of {known}, or the path of a class like "
            f"kombu's, got {strategy!r}: {error}"
        ) from error


def in_order(order: Any, queues: Sequence[str]) -> list[str]:
    """The queues in the order in which to ask now; new ones come last."""
    if set(order.items) != set(queues):
        order.update(
            [*(queue for queue in order.items if queue in queues), *(q for q in queues if q not in order.items)]
        )
    return list(order.consume(len(queues)))
