"""The mailboxes of kombu's channels over relay against a small model: random histories of two connections, as if of
processes apart, with two channels each. A mailbox is consumed by one of the processes, and used by both.

What a reader has brought to its process cannot be seen from outside: such a copy may be in the store or not.

RELAY_CELERY_MAILBOX_EXAMPLES sets how many histories run (default 100); RELAY_MODEL_SHRINK=1 makes a failing one as
short as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import kombu
import pytest
from amqp.exceptions import NotFound
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import relay_adapters.celery  # noqa: F401 - a bare kombu.Connection does not load kombu's plugins
from relay_core import Broker
from tests.histories import histories
from tests.servers import Server
from tests.test_celery_model import kinds, lines, patterns, picks, prefetches, rarely, reaches, refused

MOST = {"q1": None, "q2": None, "q3": 3}
"""Mailboxes and their x-max-length. The first and the last are consumed by the first process."""
EXCHANGES = ("x1", "x2", "x3")

_histories = count()

queues, exchanges = st.sampled_from([*MOST]), st.sampled_from(EXCHANGES)
keys = st.sampled_from(["", "a", "b", "a.b", "b.b", "a.b.b"])
several = st.lists(st.tuples(keys, queues), min_size=1, max_size=4)
channels, to = st.integers(0, 1), st.sampled_from([*EXCHANGES, ""])
endings = st.sampled_from(["purge", "delete", "recover", "close", "close all", "kill"])

STEPS = (
    ("declare", lines, queues, st.booleans()),
    ("bind", lines, queues, exchanges, patterns, rarely),
    ("publish", lines, to, several),
    ("publish", lines, to, several),
    ("publish", lines, to, several),
    ("get", lines, queues, rarely),
    ("consume", channels, queues, st.booleans(), prefetches),
    ("consume", channels, queues, st.booleans(), prefetches),
    ("cancel", picks),
    ("drain", channels, st.integers(1, 4)),
    ("drain", channels, st.integers(1, 4)),
    ("settle", picks, st.sampled_from(["ack", "ack", "requeue", "reject"])),
    ("settle", picks, st.sampled_from(["ack", "ack", "requeue", "reject"])),
    ("end", lines, queues, endings),
)
"""Methods and their arguments."""


@dataclass(eq=False)
class Copy:
    """One message in one mailbox."""

    queue: str
    body: int
    given: bool = False
    """It may have been brought to the process that consumes."""
    doubtful: bool = False
    """It left the store: it comes only if it was given."""


@dataclass(eq=False)
class Line:
    """A channel: what it consumes, and what it holds."""

    channel: Any
    prefetch: int = 0
    consumers: dict[str, bool] = field(default_factory=dict)
    """Queue -> whether it acks nothing."""
    held: list[tuple[Copy, Any]] = field(default_factory=list)
    inbox: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def credit(self) -> bool:
        return not self.prefetch or len(self.held) < self.prefetch


class Mailboxes(RuleBasedStateMachine):
    server: Server
    engine: Broker

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"mailbox-{next(_histories)}-"
        self.links = [self.link(n) for n in range(2)]
        self.lines = [Line(link.channel()) for link in self.links for _ in range(2)]
        self.ready: dict[str, list[Copy]] = {queue: [] for queue in MOST}
        self.declared: set[str] = set()
        self.bindings: set[tuple[str, str, str]] = set()
        """(queue, exchange, pattern)"""
        self.kinds: dict[str, str] = {}
        self.made = count(1)
        self.cut = [0, 0]
        """How often each connection may be told yet that it was cut."""

    def link(self, n: int) -> kombu.Connection:
        """Connections of another name share nothing."""
        link = kombu.Connection(self.server.url, transport_options={"client_name": f"link-{n}"})
        link.default_channel.attendance.consumer = f"process-{n}"
        return link

    @initialize(
        kinds=st.tuples(kinds, kinds, kinds),
        bound=st.lists(st.tuples(queues, exchanges, patterns), min_size=2, max_size=6),
        consumers=st.lists(st.tuples(channels, queues, st.booleans(), prefetches), min_size=1, max_size=4),
    )
    def begin(self, kinds: tuple[str, ...], bound: list[Any], consumers: list[Any]) -> None:
        """There is something to do from the first step."""
        for exchange, kind in zip(EXCHANGES, kinds, strict=True):
            self.lines[0].channel.exchange_declare(self.prefix + exchange, kind)
            self.kinds[exchange] = kind
        for n, queue in enumerate(MOST):
            self.declare(n, queue, False)
        for n, row in enumerate(bound):
            self.bind(n % 4, *row, False)
        for consumer in consumers:
            self.consume(*consumer)

    @rule(step=st.one_of([st.tuples(st.just(name), *arguments) for name, *arguments in STEPS]))
    def step(self, step: tuple[Any, ...]) -> None:
        """One rule for all, so that each history has all."""
        name, *arguments = step
        getattr(self, name)(*arguments)

    def consumed(self, queue: str) -> bool:
        return any(queue in line.consumers for line in self.lines)

    # what is declared

    def declare(self, n: int, queue: str, passive: bool) -> None:
        name, channel = self.prefix + queue, self.lines[n].channel
        with refused(NotFound, passive and queue not in self.declared):
            arguments = {"x-expires": 600_000, "x-message-ttl": 600_000, "x-max-length": MOST[queue]}
            answer = channel.queue_declare(name, passive, durable=False, auto_delete=True, arguments=arguments)
            self.declared.add(queue)
            self.counted(queue, answer.message_count)

    def counted(self, queue: str, found: int) -> None:
        there = [copy for copy in self.ready[queue] if not copy.doubtful]
        assert sum(not copy.given for copy in there) <= found <= len(there)

    def bind(self, n: int, queue: str, exchange: str, pattern: str, unbind: bool) -> None:
        channel, row = self.lines[n].channel, (queue, exchange, pattern)
        if unbind:
            channel.queue_unbind(self.prefix + queue, self.prefix + exchange, pattern)
            self.bindings.discard(row)
            return
        with refused(NotFound, queue not in self.declared):
            channel.queue_bind(self.prefix + queue, self.prefix + exchange, pattern)
            self.bindings.add(row)

    def end(self, n: int, queue: str, what: str) -> None:
        line, name = self.lines[n], self.prefix + queue
        if what == "purge" and queue in self.declared:
            self.counted(queue, line.channel.queue_purge(name))
            self.drop(queue, len(self.ready[queue]))
        elif what == "delete" and queue in self.declared and not self.consumed(queue):
            self.counted(queue, line.channel.queue_delete(name))
            self.declared.discard(queue)
            self.bindings = {row for row in self.bindings if row[0] != queue}
            self.ready[queue].clear()
        elif what == "recover":
            line.channel.basic_recover(requeue=True)
            for copy, _message in line.held:
                self.put(copy.queue, copy.body)
            line.held.clear()
        elif what == "close":
            line.channel.close()
            self.was_closed(n)
            line = self.lines[n] = Line(self.links[n // 2].channel())
        elif what == "close all":
            self.close_connection(n // 2)
        elif what == "kill":
            self.engine.store.raw("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            self.cut = [2, 2]

    def close_connection(self, link: int) -> None:
        channels = self.links[link].transport.channels
        numbers = sorted((2 * link, 2 * link + 1), key=lambda n: channels.index(self.lines[n].channel), reverse=True)
        self.links[link].close()
        self.links[link], self.cut[link] = self.link(link), 0
        for n in numbers:  # the last one is closed first
            self.was_closed(n)
            self.lines[n] = Line(self.links[link].channel())

    def was_closed(self, n: int) -> None:
        """What was not acked goes back, behind the others."""
        for copy, _message in self.lines[n].held:
            self.put(copy.queue, copy.body)

    # how messages come and go

    def put(self, queue: str, body: int) -> None:
        if queue not in self.declared:
            return
        self.ready[queue].append(Copy(queue, body, given=self.consumed(queue)))
        if (most := MOST[queue]) is not None:
            self.drop(queue, sum(not copy.doubtful for copy in self.ready[queue]) - most)

    def drop(self, queue: str, number: int) -> None:
        """The oldest leave the store."""
        for copy in [copy for copy in self.ready[queue] if not copy.doubtful][: max(0, number)]:
            copy.doubtful = True
            if not copy.given:
                self.ready[queue].remove(copy)

    def received(self, line: Line, queue: str, message: Any, no_ack: bool) -> None:
        """The first that is there: what may have been dropped, and was passed over, was dropped."""
        ready, body = self.ready[queue], message.payload
        while ready and ready[0].body != body and ready[0].doubtful:
            ready.pop(0)
        assert body == (ready[0].body if ready else None), f"{queue}: not {[copy.body for copy in ready]}"
        copy = ready.pop(0)
        if not no_ack:
            line.held.append((copy, message))

    def publish(self, n: int, exchange: str, sent: list[tuple[str, str]]) -> None:
        for key, queue in sent:
            body, name = next(self.made), self.prefix + exchange if exchange else ""
            if not name and queue not in self.declared:
                continue  # it would be a queue of jobs
            rows = [row for row in self.bindings if row[1] == exchange]
            reached = {q for q, x, pattern in rows if reaches(self.kinds[x], pattern, key)} if name else {queue}
            producer = kombu.Producer(self.lines[n].channel)
            producer.publish(body, key if name else self.prefix + queue, exchange=name)
            for q in reached:
                self.put(q, body)

    def get(self, n: int, queue: str, no_ack: bool) -> None:
        """The first that was not given to who consumes."""
        line, ready = self.lines[n], self.ready[queue]
        message = line.channel.basic_get(self.prefix + queue, no_ack=no_ack)
        if message is None:
            assert all(copy.given for copy in ready)
            return
        copy = next(copy for copy in ready if copy.body == message.payload)
        assert not copy.doubtful
        assert all(other.given for other in ready[: ready.index(copy)])
        ready.remove(copy)
        if not no_ack:
            line.held.append((copy, message))

    def consume(self, channel: int, queue: str, no_ack: bool, prefetch: int) -> None:
        line = self.lines[channel + 2 * (queue == "q2")]
        line.prefetch = prefetch
        line.channel.basic_qos(0, prefetch, False)
        if queue in self.declared and not self.consumed(queue):
            line.channel.basic_consume(self.prefix + queue, no_ack, lambda m: line.inbox.append((queue, m)), queue)
            line.consumers[queue] = no_ack
            for copy in self.ready[queue]:
                copy.given = True

    def cancel(self, pick: int) -> None:
        """What it was given, and not handed, waits for the next consumer of its process."""
        consumers = [(line, queue) for line in self.lines for queue in line.consumers]
        if consumers:
            line, queue = consumers[pick % len(consumers)]
            line.channel.basic_cancel(queue)
            del line.consumers[queue]

    def comes(self, line: Line) -> bool:
        """True where something must. Without credit, what waits for it holds up what does not, as on kombu's others."""
        there = any(not copy.doubtful for queue in line.consumers for copy in self.ready[queue])
        return there and (line.credit or all(line.consumers.values()))

    def drain(self, link: int, times: int) -> None:
        """One call brings at most one message of each channel, and waits only where there is none for any."""
        for _ in range(times):
            lines = self.lines[2 * link : 2 * link + 2]
            comes = any(self.comes(line) for line in lines)
            before = {line: line.credit for line in lines}
            cut = False
            try:
                self.links[link].drain_events(timeout=20.0 if comes else 0.0)
            except TimeoutError:
                assert not comes
                return
            except self.links[link].recoverable_connection_errors:
                assert self.cut[link], "only what was cut says so, once for each channel"
                cut, self.cut[link] = True, self.cut[link] - 1
            assert cut or any(line.inbox for line in lines)
            for line in lines:
                assert len(line.inbox) <= 1
                for queue, message in line.inbox:
                    assert line.consumers[queue] or before[line]
                    self.received(line, queue, message, line.consumers[queue])
                line.inbox.clear()
            if cut and times % 2:  # as Celery does; or it goes on
                self.close_connection(link)

    def settle(self, pick: int, how: str) -> None:
        held = [(line, pair) for line in self.lines for pair in line.held]
        if held:
            line, (copy, message) = held[pick % len(held)]
            line.held.remove((copy, message))
            getattr(message, how)()
            if how == "requeue":
                self.put(copy.queue, copy.body)

    def teardown(self) -> None:
        """All that was held goes back, and all that is there comes, once."""
        for link in (0, 1):
            self.close_connection(link)
        for queue in self.declared:
            self.consume(0, queue, True, 0)
        for link in (0, 1):
            while self.comes(self.lines[2 * link]):
                self.drain(link, 1)
            self.drain(link, 1)
        for link in (0, 1):
            self.close_connection(link)
        channel = self.lines[0].channel
        for queue in self.declared:
            self.declare(0, queue, True)
            channel.queue_delete(self.prefix + queue)
        for exchange in self.kinds:
            channel.exchange_delete(self.prefix + exchange)
        for link in self.links:
            link.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_mailboxes_do_what_the_model_does(server: Server) -> None:
    """Histories of 50 steps. A failure prints the one that failed."""
    with Broker(server.url) as engine:
        run_state_machine_as_test(
            type("MailboxesOnServer", (Mailboxes,), {"server": server, "engine": engine}),
            settings=histories("RELAY_CELERY_MAILBOX_EXAMPLES", 100, 50),
        )
