"""The transport: wakes a Celery event loop by file descriptor, or blocks where there is no loop."""

from __future__ import annotations

import select
import time
from typing import Any

from kombu.transport import virtual

import relay_core
from relay_adapters.celery import channel as channels
from relay_core.connection import Bell
from relay_core.errors import StoreError, Unavailable


class Watch:
    """One channel's wake-ups: a bell on the queues it consumes, armed only while it has credit."""

    def __init__(self, channel: channels.Channel) -> None:
        self.channel = channel
        self.queues: tuple[str, ...] = ()
        self.bell: Bell | None = None
        self.look_at = 0.0
        """Monotonic time of the next look even without a wake-up."""
        self.hungry = True
        """True when there may be messages that no wake-up will tell of: after a time without credit."""

    def deliver(self, woken: bool) -> int:
        """Claim and hand over until there is nothing more, or no more credit: how many messages."""
        delivered = 0
        while True:
            messages, retry_after = self.channel.claim(woken)
            for raw, queue in messages:
                self.channel.connection._deliver(raw, queue)
            delivered += len(messages)
            if not messages or delivered >= 1000 or self.channel.closed:
                longest = self.channel.broker.settings.max_block
                pause = 0.0 if messages else longest if retry_after is None else min(longest, retry_after)
                self.look_at = time.monotonic() + pause
                self.hungry = bool(messages)
                return delivered
            woken = True

    def arm(self) -> Bell | None:
        """Wait for wake-ups where the channel consumes and has credit."""
        queues = self.channel.consumed
        if queues != self.queues and set(queues) != set(self.queues):
            self.close()
        if not queues:
            return None
        if self.bell is None:
            settings = self.channel.broker.settings
            self.bell = self.channel.broker.store.bell([settings.keys(queue).marker for queue in queues])
            self.queues = queues
        if not self.bell.armed and self.channel.qos.room():
            self.bell.arm(self.channel.broker.settings.max_block)
        return self.bell

    def look(self) -> int:
        """What there is to do now, in either kind of loop: how many messages were delivered."""
        channel, bell = self.channel, self.bell
        if channel.closed or not channel.consumed:
            return 0
        channel.keep_alive()
        rung = bell is not None and bell.rung()
        if not channel.qos.room():
            self.hungry = True
            if rung:
                channel.pass_on()
            return 0
        if rung or self.hungry or time.monotonic() >= self.look_at:
            return self.deliver(woken=True)
        return 0

    def close(self) -> None:
        if self.bell is not None:
            self.bell.close()
            self.bell = None
        self.queues = ()
        self.hungry = True


class Transport(virtual.Transport):
    """kombu's transport for `relay://` and its variants."""

    Channel = channels.Channel
    can_parse_url = True
    driver_type = "relay"
    driver_name = "relay-queue"

    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset({"direct", "topic", "fanout"}), heartbeats=False
    )
    connection_errors = (*virtual.Transport.connection_errors, Unavailable)  # type: ignore[assignment]
    channel_errors = (*virtual.Transport.channel_errors, StoreError)  # type: ignore[assignment]

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__(client, **options)
        self._watches: dict[channels.Channel, Watch] = {}
        self._loop: Any = None
        self._readers: dict[int, Watch] = {}
        self._timer: Any = None
        self._timer_at = 0.0

    def driver_version(self) -> str:
        return relay_core.__version__

    def establish_connection(self) -> Any:
        """Raises Unavailable and the like when the server is not there: a channel alone would not notice."""
        connection = super().establish_connection()
        try:
            self._avail_channels[-1].broker.store.raw("PING")
        except BaseException:
            self.close_connection(connection)
            raise
        return connection

    def close_connection(self, connection: Any) -> None:
        self._leave_loop()
        super().close_connection(connection)

    def close_channel(self, channel: channels.Channel) -> None:
        if watch := self._watches.pop(channel, None):
            self._forget_readers(watch)
            watch.close()
        super().close_channel(channel)

    # told by channels

    def consumers_changed(self, channel: channels.Channel) -> None:
        if channel.consumed:
            self._watches.setdefault(channel, Watch(channel))
        elif watch := self._watches.pop(channel, None):
            self._forget_readers(watch)
            watch.close()

    def credit_freed(self, channel: channels.Channel) -> None:
        """An ack made room. On the loop's own thread its next tick sees that; another thread has to wake it."""
        loop = self._loop
        if loop is not None and channel in self._watches:
            loop.call_soon(_nothing)

    # with an event loop

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Called on each connect. The loop's own reset does not clear `on_tick`, so `close_connection` does."""
        self._leave_loop()
        self._loop = loop
        loop.on_tick.add(self._tick)

    def _leave_loop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.on_tick.discard(self._tick)
            for watch in list(self._watches.values()):
                self._forget_readers(watch, loop)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _tick(self) -> None:
        """Before each wait of the loop: look, arm what has credit, and see to the next due time."""
        first: Watch | None = None
        for watch in list(self._watches.values()):
            delivered = watch.look()
            if watch.channel.closed or watch.channel not in self._watches:
                continue
            bell = watch.arm()
            self._read(watch, bell)
            if delivered and bell is not None:
                # what Celery put off with call_soon waits for the next turn, and the loop is about to sleep
                bell.wake()
            if bell is not None and bell.armed and (first is None or watch.look_at < first.look_at):
                first = watch
        if first is not None and first.bell is not None and first.look_at != self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = first.look_at
            self._timer = self._loop.call_later(max(0.0, first.look_at - time.monotonic()), _nothing)
            # the loop reckoned how long to sleep before this tick: let it turn once more
            first.bell.wake()

    def _read(self, watch: Watch, bell: Bell | None) -> None:
        wanted = set(bell.filenos()) if bell is not None else set()
        have = {fd for fd, owner in self._readers.items() if owner is watch}
        for fd in have - wanted:
            self._loop.remove_reader(fd)
            del self._readers[fd]
        for fd in wanted - have:
            self._readers[fd] = watch
            # the work is done by the tick that follows every event
            self._loop.add_reader(fd, self._on_readable, watch)

    def _on_readable(self, watch: Watch) -> None:
        if watch.channel in self._watches:
            watch.look()

    def _forget_readers(self, watch: Watch, loop: Any = None) -> None:
        loop = loop or self._loop
        for fd in [fd for fd, owner in self._readers.items() if owner is watch]:
            del self._readers[fd]
            if loop is not None:
                loop.remove_reader(fd)

    # without one: control clients, gevent, Flower

    def drain_events(self, connection: Any, timeout: float | None = None, **_: Any) -> None:
        """Deliver what there is, or wait for it. Raises socket.timeout."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._look_at_all():
                return
            bells = [bell for watch in list(self._watches.values()) if (bell := watch.arm()) is not None]
            now = time.monotonic()
            ends = [watch.look_at for watch in self._watches.values()]
            until = min([*ends, *([deadline] if deadline is not None else []), now + 1.0])
            filenos = [fd for bell in bells for fd in bell.filenos()]
            if filenos:
                select.select(filenos, [], [], max(0.0, until - now))
            else:
                time.sleep(max(0.0, min(0.1, until - now)))
            if deadline is not None and time.monotonic() >= deadline:
                if self._look_at_all():
                    return
                raise TimeoutError  # which is socket.timeout

    def _look_at_all(self) -> int:
        """Every channel in turn: control messages do not wait for tasks."""
        return sum(watch.look() for watch in list(self._watches.values()))


def _nothing() -> None:
    """Scheduled to make the loop turn once; its tick does the work."""
