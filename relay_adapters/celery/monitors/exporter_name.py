"""Queue lengths in celery-exporter, which asks only transports whose names it knows.

To it relay is an `amqp`: a passive declare tells it what waits in a queue and how many consume it. That is so in a
process that has loaded it, and nowhere else.
"""

from __future__ import annotations

import sys

from kombu.connection import resolve_aliases

from relay_adapters.celery.kombu_alias import NAMES

_MODULE, _ITS = "src.exporter", ("Exporter", "queue_length", "rabbitmq_queue_length")
"""Many projects name a package `src`: this one has these, too."""


def install() -> None:
    """Where this process is a celery-exporter. Repeating it is harmless."""
    module = sys.modules.get(_MODULE)
    if module is not None and all(hasattr(module, name) for name in _ITS):
        resolve_aliases.update(dict.fromkeys(NAMES, "amqp"))
