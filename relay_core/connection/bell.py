"""The file-descriptor shell: waits for a wake marker on connections that a loop can select on."""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from relay_core.commands.command import Arg
from relay_core.connection import clients, forks
from relay_core.connection.absence import Absence
from relay_core.connection.replies import (
    LOST,
    NOT_OPENED,
    Judgement,
    Verdict,
    is_reply,
    judge_connect,
    judge_cut,
    judge_reply,
)
from relay_core.connection.steps import Address
from relay_core.errors import InvalidArgument, RelayError, Unavailable
from relay_core.settings import StoreSettings, StoreUrl

if TYPE_CHECKING:
    from relay_core.connection.sync import SyncStore

LONGEST_BLOCK = 86_400.0
SERVER_LATE = 1.0
"""Seconds by which a server may be late to give up: one that looks at its clients once a second (`hz 1`) is."""


def block_seconds(timeout: float | None) -> str:
    """A timeout as BZPOPMIN takes it: 0 is for ever there, so it stands for None only."""
    if timeout is None:
        return "0"
    if math.isnan(timeout):
        raise InvalidArgument("timeout must be a number of seconds, got NaN")
    return f"{min(max(timeout, 0.001), LONGEST_BLOCK):.3f}"


def answer_by(timeout: str, settings: StoreSettings) -> float:
    """Monotonic time by which the answer to a blocking command that begins now must be there, if only to say that the
    server gave up. After that the connection is lost, though nothing says so: the network has forgotten it."""
    seconds = float(timeout)
    return monotonic() + seconds + SERVER_LATE + settings.socket_timeout if seconds else math.inf


def group_markers(url: StoreUrl, markers: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """The markers that one connection can wait for together."""
    if not markers:
        raise InvalidArgument("a bell needs at least one marker")
    once = tuple(dict.fromkeys(markers))
    # In a cluster each marker is in a slot of its own, and a command takes keys of one slot only.
    return [(marker,) for marker in once] if url.several else [once]


def refused_error(error: BaseException, address: Address) -> RelayError:
    """What to raise when the connection cannot be opened."""
    return _raised(judge_connect(error, str(address)), address)


def cut_error(error: BaseException, address: Address) -> RelayError:
    """What to raise when the connection broke, or the server answered with an error."""
    if is_reply(error):
        return _raised(judge_reply(error, str(address)), address)
    return _raised(judge_cut(error, str(address)), address)


def _raised(judged: Judgement, address: Address) -> RelayError:
    if judged.verdict is Verdict.PERMANENT and judged.error is not None:
        return judged.error
    return Unavailable(f"{address}: {judged.text}")


class Channel:
    """One connection that blocks on the markers of one server."""

    missed: RelayError | None = None
    """Why its server is away, which is looked out for."""

    def __init__(self, markers: Sequence[bytes]) -> None:
        self.markers = tuple(markers)
        self.address: Address | None = None
        self.armed = False
        self.answer_by = math.inf
        self.connection: Any = None
        forks.watch(self)

    def after_fork(self) -> None:
        self.close()  # redis-py closes the child's copy only

    @property
    def socket(self) -> Any:
        return clients.socket_of(self.connection)

    def overdue(self) -> bool:
        """Whether the answer should have come, and has not. In that order: this process may have been stopped for
        minutes, and finds both the time over and the answer in its socket."""
        return self.armed and monotonic() >= self.answer_by and not readable([self.socket.fileno()], 0)

    def close(self) -> None:
        connection, self.connection, self.armed = self.connection, None, False
        if connection is not None:
            with suppress(*LOST):
                connection.disconnect()


class Bell(Absence[Channel]):
    """Rings when a marker is set. One thread uses it at a time; only `wake` may be called from others.

    While it is armed, BZPOPMIN is outstanding at the server: a marker that it takes is this bell's to look
    after, so keep it armed only while somebody waits. Made by `SyncStore.bell`.

    :ivar popped: the markers taken when it rang last, or whose server was back
    """

    def __init__(self, store: SyncStore, markers: Sequence[bytes]) -> None:
        self._store = store
        self._channels = [Channel(group) for group in group_markers(store.url, markers)]
        self._closed = self._forked = False
        self._wake_in, self._wake_out = _wake_pair()
        self.popped: tuple[bytes, ...] = ()
        self._begin(store)
        forks.watch(self)

    def after_fork(self) -> None:
        self._forked = True  # its channels hear of it, too

    @property
    def armed(self) -> bool:
        """True while every marker is being waited for that is not put off. No more once an answer is overdue: `arm` and
        `rung` tell why."""
        return all((one.armed and not one.overdue()) or one.missed is not None for one in self._channels)

    def arm(self, timeout: float | None) -> None:
        """Start to wait for the markers, where that is not under way already. Connects if need be.

        :param timeout: seconds after which the server gives up, up to 0.1 s late; None for never
        Raises Unavailable and the like at once, also for an answer that is overdue; the next call connects anew.
        """
        self._renew()
        for channel in self._channels:
            if channel.overdue():
                self._give_up(channel, no_answer())
        idle = [channel for channel in self._channels if not channel.armed and channel.missed is None]
        if not idle:
            return
        found = self._store.find([channel.markers[0] for channel in idle])
        for channel in idle:
            place = found[channel.markers[0]]
            if isinstance(place, RelayError):
                self._miss(channel, place)
                continue
            self._arm(channel, place, block_seconds(timeout))
            if channel.missed is not None:  # it may have kept this thread waiting, and is not to do so again
                found.update({marker: channel.missed for marker, other in found.items() if other == place})

    def put_off(self, marker: bytes, error: Unavailable) -> bool:
        """Who asked the server of a marker has found it away. False where there are no others to turn to meanwhile."""
        if self._several:
            where = self._store.where(marker)
            # one that answers may refuse what is asked of this queue alone, whose slot is on its way elsewhere
            away = where is not None and self._store.doubts(where)
            for channel in self._channels:
                if marker in channel.markers or (away and where == self._store.where(channel.markers[0])):
                    channel.close()
                    channel.address = where
                    self._miss(channel, error)
        return self._several

    def _question(self, channel: Channel, timeout: str) -> tuple[Arg, ...]:
        """What blocks at the server until there is something to tell."""
        return ("BZPOPMIN", *channel.markers, timeout)

    def _heard(self, reply: Any) -> None:
        """Take in the answer."""
        self.popped += (reply[0],)

    def _tolerates(self, error: BaseException, address: Address) -> bool:
        """True for an answer after which the next `arm` asks anew: the slot has moved, and it asks who has it."""
        return is_reply(error) and judge_reply(error, str(address)).verdict is Verdict.MOVED

    def _arm(self, channel: Channel, address: Address, timeout: str) -> None:
        if channel.address != address:
            channel.close()
            channel.address = address
        if channel.connection is None:
            made = clients.connection(self._store.url, self._store.settings, address, "bell")
            try:
                made.connect()
            except BaseException as error:
                with suppress(*LOST):
                    made.disconnect()
                if not isinstance(error, NOT_OPENED):
                    raise
                self._store.doubt(address)
                self._miss(channel, refused_error(error, address), error)
                return
            channel.connection = made
        packed = clients.checked_pack(self._question(channel, timeout))
        try:
            channel.connection.send_packed_command([packed], check_health=False)
            channel.answer_by = answer_by(timeout, self._store.settings)
            channel.armed = True
        except BaseException as error:
            self._give_up(channel, error)

    def _give_up(self, channel: Channel, error: BaseException) -> None:
        """Close a connection that is lost, or of which nobody knows what comes next."""
        address = channel.address
        assert address is not None
        channel.close()
        if not isinstance(error, LOST):
            raise error
        self._store.doubt(address)
        self._miss(channel, cut_error(error, address), error)

    def sockets(self) -> list[Any]:
        """What to select on for reading: the connections that are armed, and the one of `wake`."""
        self._renew()
        return [channel.socket for channel in self._channels if channel.armed] + [self._wake_in]

    def filenos(self) -> list[int]:
        """Their numbers."""
        return [socket.fileno() for socket in self.sockets()]

    def rung(self) -> bool:
        """Read what has come, without blocking. True if a marker was taken, or see Absence.

        False if nothing came, or if the server gave up waiting: then `armed` is False. Raises Unavailable
        when a connection was cut, or an answer is overdue.
        """
        self._renew()
        self._drain()
        return self._look()

    def _look(self) -> bool:
        self.popped = ()
        for channel in self._channels:
            if channel.armed:
                self._read(channel)
        return self._rings()

    def _read(self, channel: Channel) -> None:
        connection, address = channel.connection, channel.address
        assert address is not None
        try:
            if channel.overdue():
                raise no_answer()
            if not connection.can_read(timeout=0):
                return
            reply = connection.read_response(disconnect_on_error=False)
            channel.armed = False
            if reply is not None:
                self._heard(reply)
        except BaseException as error:
            if not self._tolerates(error, address):
                self._give_up(channel, error)
                return
            channel.close()
            self._store.doubt(address)

    def wait(self, timeout: float) -> bool:
        """Block this thread until it rings, `wake` is called or `timeout` seconds have passed.

        Punctual to about a millisecond: the server's own timeouts come up to 0.1 s late on an idle server, so
        the wait ends here and BZPOPMIN stays outstanding for the next call.
        """
        deadline = monotonic() + timeout
        while True:
            self._renew()
            if self._look():
                return True
            now = monotonic()
            left = deadline - now
            if left <= 0:
                return False
            if not self.armed:
                self.arm(left)
                continue
            left = min([left, *(channel.answer_by - now for channel in self._channels if channel.armed)])
            if self._wake_in.fileno() in readable(self.filenos(), left):
                self._drain()
                return self._look()

    def wake(self) -> None:
        """End a `wait` of another thread, or the next one. May be called from any thread, at any time."""
        with suppress(OSError):  # full: it will wake up anyway. Closed: nobody waits
            self._wake_out.send(b"w")

    _nudge = wake

    def _drain(self) -> None:
        with suppress(OSError):
            self._wake_in.recv(4096)

    def _renew(self) -> None:
        """In a child of fork: leave the parent's connections alone and start anew."""
        forks.look()
        if self._closed:
            raise Unavailable("this bell is closed")
        if self._forked:
            self._forked = False
            self._begin_anew()
            self._channels = [Channel(channel.markers) for channel in self._channels]
            self._wake_in, self._wake_out = _wake_pair()

    def close(self) -> None:
        """Close the connections; the server forgets that this bell waited."""
        self._closed = True
        self._store.lookout.forget(self)
        for channel in self._channels:
            channel.close()
        self._wake_in.close()
        self._wake_out.close()


def no_answer() -> TimeoutError:
    return TimeoutError("the server has not answered in time; the network may have forgotten the connection")


def _wake_pair() -> tuple[socket.socket, socket.socket]:
    """What `wake` writes to, and what the one who waits reads."""
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    return pair


def readable(filenos: list[int], timeout: float) -> list[int]:
    """Those with something to read, within so many seconds. Looked up late, for gevent's sake."""
    if hasattr(select, "poll"):  # without the limit of select to small numbers
        poller = select.poll()
        for fileno in filenos:
            poller.register(fileno, select.POLLIN)
        return [fileno for fileno, _event in poller.poll(max(0, timeout) * 1000)]
    return select.select(filenos, [], [], timeout)[0]
