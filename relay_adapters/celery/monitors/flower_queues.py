"""Queue lengths in Flower, whose `Broker` class knows the URL schemes of its own brokers only.

Flower has no registry to add to, so its class is taught the schemes of relay, once the transport is used in a process
that has loaded Flower. Any other URL goes on to Flower's own code.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterable
from typing import Any

from kombu.connection import Connection

from relay_adapters.celery.options import shared_broker
from relay_core import Broker

logger = logging.getLogger("relay.celery")


class Queues:
    """What Flower asks a broker for."""

    def __init__(self, broker_url: str, *_: Any, **options: Any) -> None:
        connection = Connection(
            broker_url,
            transport_options=dict(options.get("broker_options") or {}),
            ssl=options.get("broker_use_ssl") or False,
        )
        self.broker = shared_broker(connection)

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Lengths as Flower's pages name them: `messages` is what waits, for its time too, and what is worked on."""
        return await asyncio.get_running_loop().run_in_executor(None, _lengths, self.broker, list(names))


def _lengths(broker: Broker, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        stats = broker.stats(name)
        rows.append(
            {
                "name": name,
                "messages": stats.pending,
                "messages_ready": stats.ready,
                "messages_unacknowledged": stats.inflight,
                "messages_delayed": stats.delayed,
                "messages_dead": stats.dead,
            }
        )
    return rows


def install() -> None:
    """Teach the Flower of this process, if there is one. Never raises: Flower without lengths is better than none."""
    module = sys.modules.get("flower.utils.broker")
    if module is None or hasattr(module, "relay_queues"):
        return
    try:
        known = module.Broker
        stock = known.__new__

        def choose(cls: Any, broker_url: str, *args: Any, **options: Any) -> Any:
            if broker_url.partition("://")[0].partition("+")[0] in ("relay", "relays"):
                return Queues(broker_url, *args, **options)
            return stock(cls, broker_url, *args, **options)

        known.__new__ = staticmethod(choose)
        module.__dict__["relay_queues"] = Queues
    except Exception as error:
        logger.warning("this Flower cannot be taught to show relay's queue lengths: %r", error)
