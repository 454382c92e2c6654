"""The transport: wakes a Celery event loop by file descriptor, or blocks where there is no loop."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

from kombu.connection import Connection
from kombu.transport import virtual

import relay_core
from relay_adapters.celery import channel as channels
from relay_adapters.celery import ports
from relay_adapters.celery.errors import REFUSALS, RefusedHere
from relay_adapters.celery.failover import Pace, Refusals, answers, keep_whole
from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.mail.mailwatch import MailWatch
from relay_adapters.celery.messages import freshids, reprs
from relay_adapters.celery.monitors import exporter_name, flower_queues, monitoring
from relay_adapters.celery.options import safe_url, url_of
from relay_adapters.celery.receiving.watch import Watch
from relay_adapters.celery.sending import groups, lookups, producers
from relay_adapters.celery.turning import has_others, of_the_broker, pass_over
from relay_adapters.celery.workers import worker
from relay_adapters.celery.workerstate import shutting_down
from relay_core import Broker
from relay_core.connection import AWAY, readable
from relay_core.errors import StoreError, Unavailable

_SETTLE = 0.25
"""Seconds after a reconnect at which messages that Celery forgot are handed back: by then it knows what runs."""


_TURN = 1.0
"""Seconds, the longest sleep of a loop."""

WATCHES: dict[str, tuple[type[Watch] | type[MailWatch], Callable[[channels.Channel], Collection[str]]]] = {
    "mail": (MailWatch, lambda channel: channel.boxes),
    "jobs": (Watch, lambda channel: channel.consumed),
}
"""What a channel is watched for, and the queues of it for which that is done."""


class Transport(virtual.Transport):
    """kombu's transport for `relay://` and its variants."""

    Channel = channels.Channel
    can_parse_url = True
    """So kombu leaves URLs whole, and its connections know no database of their own; on their port, ports.py. Where it
    takes URLs apart, it knows no `?dir=`, the next one of a failover list inherits the port and database that it leaves
    out from the one before, and the error for a password that is not quoted shows a part of it."""
    driver_type = "redis"
    """Celery asks for `redis` or `amqp` before it turns on mingle and gossip, and for `redis` before it takes
    worker_disable_prefetch; `amqp` would turn on delayed delivery by RabbitMQ's plugin-like exchanges."""
    driver_name = "relay-queue"
    keeps_mail = True
    """Broadcasts wait for a worker that lost its connection."""

    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset({"direct", "topic", "fanout"}), heartbeats=False, batch_publish=True
    )
    # a worker outlives these for a while; who publishes is told at once, see below
    connection_errors = (*virtual.Transport.connection_errors, Unavailable, *REFUSALS)  # type: ignore[assignment]
    channel_errors = (*virtual.Transport.channel_errors, StoreError)  # type: ignore[assignment]
    # without these two, kombu repeats what a channel refused as if the connection had been lost; with AWAY, publishers
    # hear of a result backend in Redis as over kombu's Redis transport
    recoverable_connection_errors = (*virtual.Transport.connection_errors, Unavailable, *AWAY)
    recoverable_channel_errors = ()

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__(client, **options)
        keep_whole(client)
        worker.install()
        flower_queues.install()
        exporter_name.install()
        producers.install(channels.Channel, Transport)
        freshids.install()
        lookups.install()
        reprs.install()
        groups.install(Transport)
        Pace.give(client)
        self._watches: dict[tuple[channels.Channel, str], Watch | MailWatch] = {}
        self._loop: Any = None
        self._loop_thread = 0
        self._readers: dict[int, tuple[Any, Watch | MailWatch]] = {}
        """Number -> the socket that had it when the loop was told to read it, and whose it is."""
        self._timer: Any = None
        self._timer_at = 0.0
        self._spoke: set[Watch | MailWatch] = set()
        """Watches whose descriptors had something to read since the last turn."""
        self._busy: tuple[socket.socket, socket.socket] | None = None
        self._waker: tuple[socket.socket, socket.socket] | None = None
        self._awake = False
        self._hurried = False

    def driver_version(self) -> str:
        return relay_core.__version__

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """The URL for logs, banners and `celery report`."""
        return safe_url(self.client, include_password, mask)

    def establish_connection(self) -> Any:
        """Raises Unavailable and the like when the server is not there: a channel alone would not notice.

        Leases that this process holds are extended first, before anybody's claim finds them at their end.
        """
        monitoring.watch_workers()
        monitoring.count_in_child(self.client)
        pace, refusals = Pace.of(self.client), Refusals.of(self.client)
        if pace is not None:
            pace.wait()
        refusals.check(url_of(self.client))
        pass_over(self.client)
        connection = super().establish_connection()
        try:
            channel = self._avail_channels[-1]
            if pace is not None:
                answers(channel.broker)
                refusals.connected()
            else:
                _ping(channel.broker)
            channel.leases.cut_off = False
            if channel.leases.holding:
                try:
                    channel.leases.heartbeat.extend()
                except Unavailable:
                    if not channel.broker.url.several:
                        raise  # else others of its servers are there, and the thread goes on trying
        except BaseException as error:
            self.close_connection(connection)
            if pace is None and isinstance(error, StoreError):
                raise of_the_broker(self.client, error) from error
            if isinstance(error, StoreError if self._moves_on else REFUSALS):
                raise Unavailable(str(error)) from error  # a worker tries again, or the next one
            raise
        return connection

    @property
    def _moves_on(self) -> bool:
        """Whether a worker consumes from it, which turns to another broker whatever this one refuses. Where there is
        none, it outlives only what somebody may set right."""
        return Pace.of(self.client) is not None and has_others(self.client)

    def close_connection(self, connection: Any) -> None:
        if self._loop is not None:
            for channel in self.channels:
                channel.leases.cut_off = True
        self._leave_loop()
        super().close_connection(connection)

    def close_channel(self, channel: channels.Channel) -> None:
        for kind in WATCHES:
            self._unwatch(channel, kind)
        super().close_channel(channel)

    # told by channels

    def consumers_changed(self, channel: channels.Channel) -> None:
        for kind, (made, queues) in WATCHES.items():
            if not queues(channel):
                self._unwatch(channel, kind)
            elif (channel, kind) not in self._watches:
                self._watches[channel, kind] = made(channel)
            else:
                self._spoke.add(self._watches[channel, kind])

    def consumer_ends(self, channel: channels.Channel, queue: str) -> None:
        """Before its consumer is cancelled. A worker that does so hands back what it has not started."""
        watch = self._watches.get((channel, "jobs"))
        if isinstance(watch, Watch) and not (self.looping or channel.leases.tasks):
            watch.deliver_rest(queue)
        mail = self._watches.get((channel, "mail"))
        if isinstance(mail, MailWatch) and mail.reads(queue):
            self._forget_readers(mail)
            mail.leave(queue)

    def _unwatch(self, channel: channels.Channel, kind: str) -> None:
        if watch := self._watches.pop((channel, kind), None):
            self._forget_readers(watch)
            self._spoke.discard(watch)  # it holds its channel, and where there is no loop no turn empties this
            watch.close()

    def credit_freed(self, channel: channels.Channel) -> None:
        """An ack made room. On the loop's own thread its next tick sees that; another thread has to wake it."""
        if self._loop is not None:
            if threading.get_ident() != self._loop_thread:
                self._wake_loop()
        elif watch := self._watches.get((channel, "jobs")):
            watch.wake()

    def look_within(self, channel: channels.Channel, seconds: float) -> None:
        """A message of the channel comes back by then, and no wake-up will tell of it."""
        if watch := self._watches.get((channel, "jobs")):
            watch.look_at = min(watch.look_at, time.monotonic() + seconds)
            self.credit_freed(channel)

    @property
    def looping(self) -> bool:
        """True while an event loop drives this connection: what is left for its next turn is done soon."""
        return self._loop is not None

    def forget(self, channel: channels.Channel, tags: Iterable[str]) -> None:
        """A channel closes: hand back what was not started. After a lost connection that is known a moment later."""
        if self._loop is None or shutting_down():
            channel.leases.hand_back(tags)
        else:
            _forgotten.setdefault(channel.leases, set()).update(tags)

    # with an event loop

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Called on each connect. The loop's own reset does not clear `on_tick`, so `close_connection` does."""
        self._leave_loop()
        self._loop, self._loop_thread = loop, threading.get_ident()
        self._waker, self._awake = socket.socketpair(), False
        self._waker[0].setblocking(False)
        loop.add_reader(self._waker[0].fileno(), self._woken)
        loop.on_tick.add(self._tick)
        if signals := sys.modules.get("celery.signals"):
            signals.worker_shutting_down.connect(self._told_to_stop)
        if _forgotten:
            loop.call_later(_SETTLE, _hand_back_forgotten)

    def _leave_loop(self) -> None:
        loop = self._loop
        if loop is not None:
            loop.on_tick.discard(self._tick)
            for watch in list(self._watches.values()):
                self._forget_readers(watch)
            self._rest()
            waker, self._waker = self._waker, None
            if waker is not None:
                loop.remove_reader(waker[0].fileno())
                for end in waker:
                    end.close()
            if self._busy is not None:
                for end in self._busy:
                    end.close()
                self._busy = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _tick(self) -> None:
        """Before each wait of the loop."""
        try:
            self._prepare()
        except StoreError as error:
            if not self._moves_on:
                raise
            raise RefusedHere(*error.args) from error

    def _prepare(self) -> None:
        """Look, arm what has credit, and see to the next due time."""
        self._loop_thread, self._awake = threading.get_ident(), False
        busy, first, now = False, None, time.monotonic()
        spoke, self._spoke = self._spoke, set()
        armed: list[Watch | MailWatch] = []
        for watch in list(self._watches.values()):
            asked = watch in spoke
            if asked or not watch.quiet(now):
                delivered = watch.look(asked)
                if watch.channel.closed or watch not in self._watches.values():
                    continue
                watch.arm()
                armed.append(watch)
                self._read(watch)
                # what Celery put off with call_soon waits for the next turn, and the loop is about to sleep
                busy = busy or delivered > 0 or watch.busy
            if first is None or watch.look_at < first:
                first = watch.look_at
        if self._waker is None:
            return  # what was delivered has closed the connection
        for watch in armed:  # not before: until it is armed, nobody knows that another one's servers are there
            self._see_who_is_there(watch)
        self._hurry() if busy else self._rest()
        if first is not None and not busy:
            # once a second at least: an embedded worker is told to stop by a flag that its loop has to look at
            self._turn_at(min(first, now + _TURN))

    def _see_who_is_there(self, watch: Watch | MailWatch) -> None:
        """Raises Unavailable where the servers of all that is waited for are away."""
        if watch.bell is not None and (lost := watch.bell.lost) is not None:
            bells = [other.bell for other in self._watches.values()]
            if all(bell is None or bell.lost is not None for bell in bells):
                raise lost
            if isinstance(watch, MailWatch) and isinstance(lost, Unavailable):
                watch.channel.topology.outage.begin(lost)  # Celery sends events there all the time

    def _turn_at(self, when: float) -> None:
        """Let the loop turn by then. A timer that is due earlier is left alone: its turn sets the next one."""
        now = time.monotonic()
        if self._timer is not None and now < self._timer_at <= when + 0.001:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = max(when, now + 0.001)
        self._timer = self._loop.call_later(self._timer_at - now, _nothing)
        # the loop reckoned how long to sleep before this tick: let it turn once more
        self._hurry()

    def _wake_loop(self) -> None:
        """From another thread. The loops of older kombus sleep on through what they are given by `call_soon`."""
        waker = self._waker
        if waker is not None and not self._awake:
            self._awake = True
            with suppress(OSError):  # it is being closed
                waker[1].send(b"w")

    def _told_to_stop(self, **_: Any) -> None:
        """By a signal: once its handler has run, Python goes on with the loop's sleep."""
        self._wake_loop()

    def _woken(self) -> None:
        if self._waker is not None:
            with suppress(BlockingIOError):
                self._waker[0].recv(16)

    def _hurry(self) -> None:
        """Make the loop turn again at once: a descriptor that always has something to read."""
        if self._busy is None:
            self._busy = socket.socketpair()
            self._busy[1].send(b"b")
        if not self._hurried:
            self._hurried = True
            self._loop.add_reader(self._busy[0].fileno(), _nothing)

    def _rest(self) -> None:
        if self._hurried and self._busy is not None:
            self._hurried = False
            self._loop.remove_reader(self._busy[0].fileno())

    def _read(self, watch: Watch | MailWatch) -> None:
        # the thread that keeps the leases may just have closed one whose reply did not come
        wanted = {fd: (socket, watch) for socket in watch.sockets() if (fd := socket.fileno()) >= 0}
        have = {fd: reader for fd, reader in self._readers.items() if reader[1] is watch}
        if wanted == have:
            return
        for fd, reader in have.items():
            if wanted.get(fd) != reader:  # it may have been closed, and its number be another socket's now
                self._loop.remove_reader(fd)
                del self._readers[fd]
        for fd, reader in wanted.items():
            if fd not in self._readers:
                self._readers[fd] = reader
                # the work is done by the tick that follows every event
                self._loop.add_reader(fd, self._spoke_up, watch)

    def _spoke_up(self, watch: Watch | MailWatch) -> None:
        self._spoke.add(watch)

    def _forget_readers(self, watch: Watch | MailWatch) -> None:
        for fd in [fd for fd, (_socket, owner) in self._readers.items() if owner is watch]:
            del self._readers[fd]
            if self._loop is not None:
                self._loop.remove_reader(fd)

    # without one: control clients, gevent, Flower

    def drain_events(self, connection: Any, timeout: float | None = None, **_: Any) -> None:
        """Deliver what there is, or wait for it. Raises socket.timeout."""
        try:
            self._drain(timeout)
        except StoreError as error:
            if not self._moves_on:
                raise
            raise RefusedHere(*error.args) from error

    def _drain(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._look_at_all():
                return
            bells = [bell for watch in list(self._watches.values()) if (bell := watch.arm()) is not None]
            for watch in list(self._watches.values()):
                self._see_who_is_there(watch)
            if any(watch.starving for watch in list(self._watches.values())):
                continue
            now = time.monotonic()
            ends = [watch.look_at for watch in list(self._watches.values())]
            until = min([*ends, *([deadline] if deadline is not None else []), now + 1.0])
            filenos = [fd for bell in bells for fd in bell.filenos()]
            if filenos:
                readable(filenos, max(0.0, until - now))
            else:
                time.sleep(max(0.0, min(0.1, until - now)))
            if deadline is not None and time.monotonic() >= deadline:
                if self._look_at_all():
                    return
                raise TimeoutError  # which is socket.timeout

    def _look_at_all(self) -> int:
        """Every channel in turn: control messages do not wait for tasks."""
        # no generator: that would make a RuntimeError of a callback's StopIteration
        return sum([watch.look() for watch in list(self._watches.values())])


def _ping(broker: Broker) -> None:
    """Ask any server, for as long as a command is repeated."""
    try:
        broker.store.raw("PING")
    except Unavailable:
        if not broker.url.several:
            raise
        answers(broker)  # that one may be away alone


_forgotten: dict[Leases, set[str]] = {}
"""Messages of lost connections, by the leases that hold them."""


def _hand_back_forgotten() -> None:
    while _forgotten:
        leases, tags = _forgotten.popitem()
        leases.hand_back(tags, wait=False)


# when kombu looks up this module, a connection is being made that will want to know its port
ports.install(Connection)


def _nothing() -> None:
    """Makes the loop turn once; its tick does the work."""
