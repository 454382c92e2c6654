"""The channel: kombu's interface on one side, relay's moves on the other. Its parts are modules of their own."""

from __future__ import annotations

from collections import deque
from typing import Any

from kombu.transport import virtual

from relay_adapters.celery.holding.leases import leases_of
from relay_adapters.celery.mail.mailing import Mailing
from relay_adapters.celery.monitors.client import Client
from relay_adapters.celery.options import shared_broker
from relay_adapters.celery.receiving.consuming import Consuming, Receiver
from relay_adapters.celery.receiving.order import order_of
from relay_adapters.celery.receiving.qos import QoS
from relay_adapters.celery.sending.publishing import Publishing
from relay_adapters.celery.sending.upkeep import attendance_of


class Channel(Mailing, Consuming, Publishing):
    """One kombu channel. Its queues are relay queues, its messages jobs, its delivery tags leases."""

    QoS = QoS
    supports_fanout = True
    queue_order_strategy: Any = "round_robin"
    from_transport_options = (*virtual.Channel.from_transport_options, "priority_order", "queue_order_strategy")  # type: ignore[assignment]

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection, **options)
        self.broker = shared_broker(connection.client)
        self.leases = leases_of(self.broker)
        self.attendance = attendance_of(self.broker)
        self.topology = self.attendance.topology
        self.order = order_of(self.queue_order_strategy)
        self.boxes = {}
        self.mail = deque()
        self._held = {}
        self._used = {}
        self._unacked: set[str] = set()
        self._no_ack: set[str] = set()
        self._simple: set[str] = set()
        self.events = {"basic_return": set()}
        self._receivers: dict[str, dict[str, Receiver]] = {}

    @property
    def client(self) -> Client:
        """For programs that ask kombu's Redis transport how long a queue is."""
        return Client(self.broker)

    def basic_publish(self, message: Any, exchange: str, routing_key: str, **options: Any) -> None:
        """Store a message; a text or bytes, as `celery amqp basic.publish` gives it, becomes one."""
        if isinstance(message, (str, bytes)):
            message = self.prepare_message(message, content_type="text/plain", content_encoding="utf-8")
        super().basic_publish(message, exchange, routing_key, **options)
