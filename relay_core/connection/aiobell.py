"""The bell of the asyncio shell."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from relay_core.connection import clients, forks
from relay_core.connection.absence import Absence
from relay_core.connection.bell import answer_by, block_seconds, cut_error, group_markers, no_answer, refused_error
from relay_core.connection.replies import LOST, NOT_OPENED, Verdict, is_reply, judge_reply
from relay_core.connection.steps import Address
from relay_core.errors import RelayError, Unavailable

if TYPE_CHECKING:
    from relay_core.connection.aio import AsyncStore


GRACE = 0.05
"""Seconds that an event loop which was stopped is given to read what has come meanwhile."""


class AsyncChannel:
    """One connection that blocks on the markers of one server, and the task that reads its reply."""

    missed: RelayError | None = None

    def __init__(self, markers: Sequence[bytes]) -> None:
        self.markers = tuple(markers)
        self.address: Address | None = None
        self.connection: Any = None
        self.reading: asyncio.Task[Any] | None = None
        self.broken = False
        self.answer_by = math.inf
        forks.watch(self)

    def after_fork(self) -> None:
        clients.let_go(self.connection)

    async def close(self) -> None:
        connection, self.connection = self.connection, None
        reading, self.reading, self.broken = self.reading, None, False
        if reading is not None:
            reading.cancel()
        if connection is not None:
            with suppress(Exception):
                await connection.disconnect(nowait=True)


class AsyncBell(Absence[AsyncChannel]):
    """Rings when a marker is set. One task uses it at a time; only `wake` may be called from elsewhere.

    See Bell on what it means to be armed. Made by `AsyncStore.bell`.

    :ivar popped: the markers taken when it rang last, or whose server was back
    """

    def __init__(self, store: AsyncStore, markers: Sequence[bytes]) -> None:
        self._store = store
        self._channels = [AsyncChannel(group) for group in group_markers(store.url, markers)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._woken = self._closed = False
        self.popped: tuple[bytes, ...] = ()
        self._begin(store)

    @property
    def armed(self) -> bool:
        """True while every marker is being waited for that is not put off."""
        return all(one.reading is not None or one.missed is not None for one in self._channels)

    async def arm(self, timeout: float | None) -> None:
        """Start to wait for the markers, where that is not under way already. Connects if need be.

        :param timeout: seconds after which the server gives up, up to 0.1 s late; None for never
        Raises Unavailable and the like at once; the next call connects anew.
        """
        self._come_home()
        idle = [channel for channel in self._channels if channel.reading is None and channel.missed is None]
        if not idle:
            return
        seconds = block_seconds(timeout)
        found = await self._store.find([channel.markers[0] for channel in idle])
        for channel in idle:
            place = found[channel.markers[0]]
            if isinstance(place, RelayError):
                self._miss(channel, place)
                continue
            await self._arm(channel, place, seconds)
            if channel.missed is not None:  # it may have kept this task waiting, and is not to do so again
                found.update({marker: channel.missed for marker, other in found.items() if other == place})

    async def _arm(self, channel: AsyncChannel, address: Address, seconds: str) -> None:
        if channel.address != address or channel.broken:
            await channel.close()
            channel.address = address
        if channel.connection is None:
            made = clients.aio_connection(self._store.url, self._store.settings, address, "bell")
            try:
                await made.connect()
            except BaseException as error:
                with suppress(Exception):
                    await made.disconnect(nowait=True)
                if not isinstance(error, NOT_OPENED):
                    raise
                self._store.doubt(address)
                self._miss(channel, refused_error(error, address), error)
                return
            made.socket_timeout = None  # opened in time; from here on it waits for as long as it takes
            channel.connection = made
        packed = clients.checked_pack(("BZPOPMIN", *channel.markers, seconds))
        try:
            await channel.connection.send_packed_command([packed], check_health=False)
        except BaseException as error:
            await channel.close()
            if not isinstance(error, LOST):
                raise
            self._store.doubt(address)
            self._miss(channel, cut_error(error, address), error)
            return
        channel.answer_by = answer_by(seconds, self._store.settings)
        channel.reading = asyncio.ensure_future(channel.connection.read_response(disconnect_on_error=False))

    def rung(self) -> bool:
        """Take what has come, without waiting. True if a marker was taken, or see Absence.

        False if nothing came, or if the server gave up waiting: then `armed` is False. Raises Unavailable
        when a connection was cut.
        """
        self._come_home()
        self.popped = ()
        for channel in self._channels:
            if channel.reading is not None and channel.reading.done():
                self._take(channel, channel.reading)
        return self._rings()

    def _take(self, channel: AsyncChannel, reading: asyncio.Task[Any]) -> None:
        assert channel.address is not None
        error = asyncio.CancelledError() if reading.cancelled() else reading.exception()
        if error is None:
            channel.reading = None
            if reading.result() is not None:
                self.popped += (reading.result()[0],)
            return
        address = channel.address
        channel.reading, channel.broken = None, True
        self._store.doubt(address)
        # After a move of the slot, the next `arm` asks who has it.
        if is_reply(error) and judge_reply(error, str(address)).verdict is Verdict.MOVED:
            return
        if not isinstance(error, (*LOST, asyncio.CancelledError)):
            raise error
        self._miss(channel, cut_error(error, address), error)

    async def _give_up_overdue(self) -> None:
        """An answer should have come, and has not: the network forgot the connection."""
        late = [one for one in self._channels if one.reading is not None and monotonic() >= one.answer_by]
        if late:
            # after a time in which this process, or the loop, was stopped, the answer may lie in the socket
            await asyncio.wait([one.reading for one in late if one.reading is not None], timeout=GRACE)
        for channel in late:
            if channel.reading is not None and not channel.reading.done():
                assert channel.address is not None
                await channel.close()
                self._store.doubt(channel.address)
                error = no_answer()
                self._miss(channel, cut_error(error, channel.address), error)

    async def wait(self, timeout: float) -> bool:
        """Wait until it rings, `wake` is called or `timeout` seconds have passed.

        BZPOPMIN stays outstanding for the next call when the time is over. May be cancelled.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            await self._give_up_overdue()
            if self.rung():
                return True
            left = deadline - loop.time()
            if left <= 0 or self._woken:
                self._woken = False
                return False
            if not self.armed:
                await self.arm(left)
                continue
            now = monotonic()
            left = min([left, *(one.answer_by - now for one in self._channels if one.reading is not None)])
            self._waiter = loop.create_future()
            reading = [channel.reading for channel in self._channels if channel.reading is not None]
            try:
                await asyncio.wait([*reading, self._waiter], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._waiter = None

    def wake(self) -> None:
        """End a `wait` under way, or the next one. May be called from any thread, at any time."""
        self._woken = True
        self._nudge()

    def _nudge(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._end_wait)

    def _end_wait(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _come_home(self) -> None:
        """Used from another event loop, start anew: the old one's connections cannot be used here."""
        if self._closed:
            raise Unavailable("this bell is closed")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                self._channels = [AsyncChannel(channel.markers) for channel in self._channels]
                self._begin_anew()
            self._loop = loop

    async def close(self) -> None:
        """Close the connections; the server forgets that this bell waited."""
        self._closed = True
        self._store.lookout.forget(self)
        self.wake()
        if self._loop is asyncio.get_running_loop():
            for channel in self._channels:
                await channel.close()
