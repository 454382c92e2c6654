"""Celery on relay: `Celery(broker="relay://…")`.

Nothing needs to import this; a program that uses kombu alone, without its serializers, may.
"""

from relay_adapters.celery import kombu_alias

__all__ = ["kombu_alias"]
