"""Credit: how many messages a channel may hold."""

from __future__ import annotations

from kombu.transport import virtual

BATCH = 50
"""Most messages claimed at a time."""


class QoS(virtual.QoS):
    """Acks and rejects work from any thread, also after the channel was closed."""

    # what is unacked lies in the store, and a channel that closes hands it back: see Channel.close
    restore_at_shutdown = False

    def ack(self, delivery_tag: str) -> None:
        try:
            self.channel.settle(delivery_tag)
        finally:
            self._freed(delivery_tag)

    def given_until(self, delivery_tag: str) -> list[str]:
        """The tags of this message and of those that the channel was given before it and that are not settled."""
        given = [tag for tag in tuple(self._delivered) if tag not in self._dirty]
        return given[: given.index(delivery_tag) + 1] if delivery_tag in given else [delivery_tag]

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            self.channel.refuse(delivery_tag, requeue)
        finally:
            self._freed(delivery_tag)

    def _freed(self, delivery_tag: str) -> None:
        """Also where the server could not be told: the channel holds it no more, and would wait for that credit for
        ever."""
        self._quick_ack(delivery_tag)
        self.channel.credit_freed()

    def room(self, waiting: int = 0) -> int:
        """How many messages may be claimed now. Celery replaces `can_consume` at run time: ask, never remember.

        :param waiting: messages that were claimed and not delivered yet
        """
        if self.channel.leases.apart.shut or not self.can_consume():
            return 0
        if "can_consume" in vars(self):
            return 0 if waiting else 1
        most, connection = self.can_consume_max_estimate(), self.channel.connection
        most = BATCH if most is None else min(BATCH, int(most))
        if connection is not None and not connection.looping and self.channel.singly:
            most = min(1, most)
        return max(0, most - waiting)
