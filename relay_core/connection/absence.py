"""What both kinds of bell do about a server of a cluster that is away."""

from __future__ import annotations

import logging
from collections import deque
from typing import Generic, Protocol, TypeVar

from relay_core.connection.lookout import Lookout
from relay_core.connection.steps import Address
from relay_core.errors import RelayError, Unavailable
from relay_core.settings import StoreUrl

logger = logging.getLogger("relay.connection")


class Store(Protocol):
    url: StoreUrl
    lookout: Lookout

    def where(self, key: bytes) -> Address | None: ...


class Waiting(Protocol):
    """A channel of a bell.

    :ivar missed: why its server is away, which is looked out for
    """

    markers: tuple[bytes, ...]
    address: Address | None
    missed: RelayError | None


C = TypeVar("C", bound=Waiting)


class Absence(Generic[C]):
    """In a cluster, a server that is away concerns its own markers only: they are put off, and when it is back the bell
    rings for them, as it may have given them to a connection that was lost. It rings, too, once all servers are away.
    Elsewhere, and for what is no matter of time, it raises.
    """

    _several: bool
    _channels: list[C]
    popped: tuple[bytes, ...]

    def _begin(self, store: Store) -> None:
        self._several, self._lookout, self._where = store.url.several, store.lookout, store.where
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._back: deque[bytes] = deque()
        self._said_lost = False

    @property
    def away(self) -> frozenset[bytes]:
        """The markers that are put off."""
        return frozenset(marker for one in self._channels if one.missed is not None for marker in one.markers)

    @property
    def lost(self) -> RelayError | None:
        """Where all markers are put off: why the first one is."""
        missed = [one.missed for one in self._channels]
        return missed[0] if all(missed) else None

    def _miss(self, channel: C, error: RelayError, cause: BaseException | None = None) -> None:
        """Put off what lies on a server that is away. Raises the error where that is not to be done."""
        if not (self._several and isinstance(error, Unavailable)):
            raise error from cause
        channel.address = channel.address or self._where(channel.markers[0])
        if not self._missing_at(channel.address):
            logger.warning("queues are put off until their server is back, others go on: %s", error)
        self._lookout.miss(channel.markers[0], self)
        channel.missed = error  # at last: what nobody looks out for, as there is no thread to be had, is asked for anew

    def is_back(self, key: bytes) -> None:
        """Called by the lookout, on its thread."""
        self._back.append(key)
        self._nudge()

    def _nudge(self) -> None:
        """Have who waits take up what is back."""
        raise NotImplementedError

    def _rings(self) -> bool:
        """Whether there is news for who waits, now that the channels were looked at; `popped` has what they took."""
        while self._back:
            key = self._back.popleft()
            for channel in self._channels:
                if channel.missed is not None and channel.markers[0] == key:
                    channel.missed = None
                    self.popped += channel.markers
                    if not self._missing_at(channel.address):
                        logger.info("the queues that were put off at %s are taken up again", channel.address)
        said, self._said_lost = self._said_lost, self.lost is not None
        return bool(self.popped) or (self._said_lost and not said)

    def _missing_at(self, address: Address | None) -> bool:
        return any(one.missed is not None and one.address == address for one in self._channels)
