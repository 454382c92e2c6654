"""The file-descriptor shell over streams: waits for their entries on a connection that a loop can select on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from relay_core.commands.command import Arg
from relay_core.connection.bell import Bell, Channel
from relay_core.connection.replies import is_reply
from relay_core.connection.steps import Address

if TYPE_CHECKING:
    from relay_core.connection.sync import SyncStore

MOST = 100
"""Entries of one stream in one answer."""


class Entry(NamedTuple):
    """One entry of a stream: its key, its id and its fields and values in turn."""

    stream: bytes
    id: str
    fields: Sequence[bytes]


class Reader(Bell):
    """Reads new entries of streams for a consumer of the group of each stream. Made by `SyncStore.reader`.

    An entry whose answer is lost with the connection is read again over the next one, from the entries that the
    store holds as delivered; the ones that arrived are not. So is what an earlier reader of the same consumer left.
    To acknowledge entries is the caller's business.

    :ivar last: stream -> id of the last entry that arrived
    :ivar gone: True when a stream or its group was not there, until the next `arm`
    """

    def __init__(
        self, store: SyncStore, streams: Sequence[bytes], group: str, consumer: str, last: Mapping[bytes, str]
    ) -> None:
        super().__init__(store, streams)
        self._channels = [Channel(tuple(dict.fromkeys(streams)))]  # in a cluster, one slot has them all
        self._who = ("GROUP", group, consumer)
        self.last = dict(last)
        self.gone = False
        self._entries: list[Entry] = []
        self._unsure = True

    def arm(self, timeout: float | None) -> None:
        self.gone = False
        super().arm(timeout)

    def read(self) -> list[Entry]:
        """What has come, without blocking. Raises Unavailable when the connection was cut."""
        self.rung()
        entries, self._entries = self._entries, []
        return entries

    def _question(self, channel: Channel, timeout: str) -> tuple[Arg, ...]:
        ask = ("XREADGROUP", *self._who, "COUNT", MOST)
        if self._unsure:
            # answers at once: what was delivered to this consumer after the last that arrived
            return (*ask, "STREAMS", *channel.markers, *(self.last.get(key, "0") for key in channel.markers))
        block = str(round(float(timeout) * 1000))
        return (*ask, "BLOCK", block, "STREAMS", *channel.markers, *[">"] * len(channel.markers))

    def _heard(self, reply: Any) -> None:
        self._unsure = False
        streams = reply.items() if isinstance(reply, Mapping) else reply
        for stream, entries in streams:
            for id, fields in entries:
                text = id.decode()
                if fields is not None:  # one that was deleted since
                    self._entries.append(Entry(stream, text, fields))
                    self.popped += (stream,)
                self.last[stream] = text  # at last: who is interrupted before reads it again

    def _tolerates(self, error: BaseException, address: Address) -> bool:
        if is_reply(error) and str(error).startswith(("NOGROUP", "UNBLOCKED", "WRONGTYPE")):
            self.gone = True
            return True
        self._unsure = True  # a tolerated error, too, closes the connection
        return super()._tolerates(error, address)

    def _give_up(self, channel: Channel, error: BaseException) -> None:
        self._unsure = True
        super()._give_up(channel, error)
