"""kombu's channels over relay against a small model of AMQP: random histories of two connections, as if of processes
apart, with two channels each.

What a channel claims ahead for its consumers is looked up, not predicted: it has to be the head of its queue.

RELAY_CELERY_MODEL_EXAMPLES sets how many histories run (default 80); RELAY_MODEL_SHRINK=1 makes a failing one as short
as it can be.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import kombu
import pytest
from amqp.exceptions import NotFound, PreconditionFailed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import relay_adapters.celery  # noqa: F401 - a bare kombu.Connection does not load kombu's plugins
from relay_adapters.celery.receiving.qos import BATCH
from relay_core import Broker
from relay_core.operations.settings import Settings
from tests.histories import histories
from tests.servers import Server, eventually

QUEUES = ("q1", "q2", "q3")

_histories = count()

lines, queues, exchanges = st.integers(0, 3), st.sampled_from(QUEUES), st.sampled_from(["x1", "x2"])
kinds = st.sampled_from(["direct", "topic", "fanout"])
patterns = st.sampled_from(["", "a", "b", "a.b", "*", "#", "a.*", "*.b", "a.#", "#.b", "*.#"])
messages = st.tuples(
    st.sampled_from(["", "a", "b", "a.b", "b.b", "a.b.b"]), queues, st.sampled_from([None, None, 0, 3, 9, 12])
)
rarely = st.sampled_from([False, False, False, True])
several = st.lists(messages, min_size=1, max_size=4)
picks, prefetches = st.integers(0, 20), st.integers(0, 4)
endings = st.sampled_from(["", "", "purge", "delete queue", "delete exchange", "recover", "close", "close all"])

STEPS = (
    ("declare_queue", lines, queues, st.booleans()),
    ("declare_exchange", lines, exchanges, kinds, rarely),
    ("bind", lines, queues, exchanges, patterns, rarely),
    ("end", lines, queues, exchanges, st.booleans(), st.booleans(), endings),
    ("publish", lines, st.sampled_from(["x1", "x2", ""]), several),
    ("publish", lines, st.sampled_from(["x1", "x2", ""]), several),
    ("get", lines, queues, rarely),
    ("consume", lines, queues, rarely, prefetches),
    ("cancel", picks),
    ("drain", st.integers(0, 1), st.integers(1, 4)),
    ("drain", st.integers(0, 1), st.integers(1, 4)),
    ("settle", picks, st.sampled_from(["ack", "ack", "multiple", "requeue", "reject"])),
    ("settle", picks, st.sampled_from(["ack", "ack", "multiple", "requeue", "reject"])),
)
"""Methods and their arguments; what ends a lot is one of them, so that there is a lot."""


@dataclass(eq=False)
class Copy:
    """One message in one queue."""

    queue: str
    body: int
    level: int
    claimed: int = 0
    """When it was claimed last: what goes back goes in this order."""
    requeued: bool = False
    """By its consumer. What goes back because its channel closes is not marked as redelivered."""


@dataclass(eq=False)
class Line:
    """A channel: what it consumes, and what it holds."""

    channel: Any
    prefetch: int = 0
    consumers: dict[str, bool] = field(default_factory=dict)
    """Queue -> whether it acks nothing."""
    waiting: list[Copy] = field(default_factory=list)
    """Claimed for its consumers, and not delivered yet."""
    held: list[tuple[Copy, Any]] = field(default_factory=list)
    """Delivered and not acked. Those of `basic_get` use up credit, too, as on all of kombu's virtual transports."""
    inbox: list[tuple[str, Any]] = field(default_factory=list)
    """What came just now, with its queue."""

    @property
    def credit(self) -> int:
        return max(0, self.prefetch - len(self.held)) if self.prefetch else BATCH

    @property
    def room(self) -> int:
        """How many it may claim: one at a time where one of its consumers acks nothing."""
        return 0 if self.waiting else min(1 if any(self.consumers.values()) else BATCH, self.credit)


def matches(pattern: list[str], words: list[str]) -> bool:
    """As the topic exchange of AMQP has it."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(matches(pattern[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and matches(pattern[1:], words[1:])


def reaches(kind: str, pattern: str, key: str) -> bool:
    wanted, words = (text.split(".") if text else [] for text in (pattern, key))
    # a fanout's binding that has a wildcard sees what matches it, which is relay's own
    if kind == "topic" or (kind == "fanout" and {"*", "#"} & {*wanted}):
        return matches(wanted, words)
    return kind == "fanout" or pattern == key


def refused(error: type[Exception], when: bool) -> AbstractContextManager[Any]:
    return pytest.raises(error) if when else nullcontext()


class Channels(RuleBasedStateMachine):
    server: Server
    engine: Broker

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"model-{next(_histories)}-"
        self.links = [self.link(n) for n in range(2)]
        self.lines = [Line(link.channel()) for link in self.links for _ in range(2)]
        self.ready: dict[str, list[Copy]] = {queue: [] for queue in QUEUES}
        """In the order in which they are claimed."""
        self.dead = dict.fromkeys(QUEUES, 0)
        self.declared: set[str] = set()
        self.exchanges: dict[str, str] = {}
        self.bindings: set[tuple[str, str, str]] = set()
        """(queue, exchange, pattern)"""
        self.made, self.claims = count(1), count(1)

    def link(self, n: int) -> kombu.Connection:
        """Connections of another name share nothing."""
        link = kombu.Connection(self.server.url, transport_options={"client_name": f"link-{n}"})
        link.default_channel.attendance.consumer = f"process-{n}"
        return link

    @initialize(
        kind=kinds,
        bound=st.lists(st.tuples(queues, exchanges, patterns), min_size=2, max_size=6),
        consumers=st.lists(st.tuples(lines, queues, rarely, st.integers(0, 4)), min_size=1, max_size=5),
        sent=st.lists(messages, min_size=8, max_size=12),
    )
    def begin(self, kind: str, bound: list[Any], consumers: list[Any], sent: list[Any]) -> None:
        """There is something to do from the first step, and both connections know the exchanges."""
        for queue in QUEUES:
            self.declare_queue(0, queue, False)
        self.declare_exchange(0, "x1", "topic", False)
        self.declare_exchange(0, "x2", kind, False)
        for n, row in enumerate(bound):
            self.bind(n % 4, *row, False)
        for consumer in consumers:
            self.consume(*consumer)
        for n, exchange in enumerate(("x1", "x2", "", "x1", "x2")):
            self.publish(n % 4, exchange, sent[2 * n : 2 * n + 2])

    @rule(step=st.one_of([st.tuples(st.just(name), *arguments) for name, *arguments in STEPS]))
    def step(self, step: tuple[Any, ...]) -> None:
        """One rule for all, so that each history has all: hypothesis leaves most rules out of each."""
        name, *arguments = step
        getattr(self, name)(*arguments)

    # what is declared

    def declare_queue(self, line: int, queue: str, passive: bool) -> None:
        with refused(NotFound, passive and queue not in self.declared):
            answer = self.lines[line].channel.queue_declare(self.prefix + queue, passive=passive)
            assert answer.message_count == len(self.ready[queue])
            self.declared.add(queue)

    def declare_exchange(self, line: int, exchange: str, kind: str, passive: bool) -> None:
        known = self.exchanges.get(exchange)
        with (
            refused(NotFound, passive and known is None),
            refused(PreconditionFailed, not passive and known not in (None, kind)),
        ):
            self.lines[line].channel.exchange_declare(self.prefix + exchange, kind, passive=passive)
            self.exchanges.setdefault(exchange, kind)

    def bind(self, line: int, queue: str, exchange: str, pattern: str, unbind: bool) -> None:
        channel, row = self.lines[line].channel, (queue, exchange, pattern)
        if unbind:
            channel.queue_unbind(self.prefix + queue, self.prefix + exchange, pattern)
            self.bindings.discard(row)
            return
        with refused(NotFound, exchange not in self.exchanges or queue not in self.declared):
            channel.queue_bind(self.prefix + queue, self.prefix + exchange, pattern)
            self.bindings.add(row)

    def end(self, line: int, queue: str, exchange: str, if_unused: bool, if_empty: bool, what: str) -> None:
        if what == "purge":
            assert self.lines[line].channel.queue_purge(self.prefix + queue) == len(self.ready[queue])
            self.ready[queue].clear()
        elif what == "delete queue":
            self.delete_queue(self.lines[line].channel, queue, if_unused, if_empty)
        elif what == "delete exchange":
            used = any(row[1] == exchange for row in self.bindings)
            with refused(PreconditionFailed, if_unused and used):
                self.lines[line].channel.exchange_delete(self.prefix + exchange, if_unused=if_unused)
                self.exchanges.pop(exchange, None)
                self.bindings = {row for row in self.bindings if row[1] != exchange}
        elif what == "recover":
            self.lines[line].channel.basic_recover(requeue=True)
            for copy, _message in reversed(self.lines[line].held):
                self.put_back([copy])
            self.lines[line].held.clear()
        elif what == "close":
            self.lines[line].channel.close()
            self.was_closed(line)
            self.lines[line].channel = self.links[line // 2].channel()
        elif what == "close all":
            self.close_connection(line // 2)

    def delete_queue(self, channel: Any, queue: str, if_unused: bool, if_empty: bool) -> None:
        """What its consumers hold stays theirs, and may come back to it, where AMQP would drop it."""
        used, waiting = any(queue in line.consumers for line in self.lines), len(self.ready[queue])
        if used and not if_unused:
            return  # its consumers would go on and declare it again, where RabbitMQ cancels them
        if not used and queue in self.declared:
            look = lambda: channel.queue_declare(self.prefix + queue, passive=True)  # noqa: E731
            eventually(lambda: not look().consumer_count, "its consumers to be gone")
        stays = used or (if_empty and waiting) or not (waiting or queue in self.declared)
        answer = channel.queue_delete(self.prefix + queue, if_unused=if_unused, if_empty=if_empty)
        assert answer == (None if stays else waiting)
        if not stays:
            self.declared.discard(queue)
            self.ready[queue].clear()
            self.bindings = {row for row in self.bindings if row[0] != queue}

    def close_connection(self, link: int) -> None:
        channels = self.links[link].transport.channels
        numbers = sorted((2 * link, 2 * link + 1), key=lambda n: channels.index(self.lines[n].channel), reverse=True)
        self.links[link].close()
        self.links[link] = self.link(link)
        for n in numbers:  # the last one is closed first
            self.was_closed(n)
            self.lines[n].channel = self.links[link].channel()

    def was_closed(self, n: int) -> None:
        self.put_back([*self.lines[n].waiting, *(copy for copy, _message in self.lines[n].held)])
        self.lines[n] = Line(None)

    # how messages come and go

    def put(self, copy: Copy) -> None:
        """Behind all of its priority, and of higher ones."""
        ready = self.ready[copy.queue]
        ready.insert(sum(other.level >= copy.level for other in ready), copy)

    def put_back(self, copies: list[Copy]) -> None:
        """Before all of its priority."""
        for copy in sorted(copies, key=lambda copy: copy.claimed, reverse=True):
            ready = self.ready[copy.queue]
            ready.insert(sum(other.level > copy.level for other in ready), copy)

    def take(self, queue: str) -> Copy:
        copy = self.ready[queue].pop(0)
        copy.claimed = next(self.claims)
        return copy

    def delivered(self, line: Line, copy: Copy, message: Any, no_ack: bool) -> None:
        assert (message.payload, message.delivery_info["redelivered"]) == (copy.body, copy.requeued)
        if not no_ack:
            line.held.append((copy, message))

    def publish(self, line: int, exchange: str, sent: list[tuple[str, str, int | None]]) -> None:
        """Straight to a queue, without an exchange: one that nobody has declared keeps it, where AMQP would drop it."""
        for key, queue, priority in sent:
            body, name = next(self.made), self.prefix + exchange if exchange else ""
            rows = [row for row in self.bindings if row[1] == exchange]
            reached = {q for q, x, pattern in rows if reaches(self.exchanges[x], pattern, key)} if name else {queue}
            with refused(NotFound, bool(name) and exchange not in self.exchanges):
                producer = kombu.Producer(self.lines[line].channel)
                producer.publish(body, key if name else self.prefix + queue, exchange=name, priority=priority)
            for q in reached:
                self.put(Copy(q, body, min(9, priority or 0)))

    def get(self, n: int, queue: str, no_ack: bool) -> None:
        message = self.lines[n].channel.basic_get(self.prefix + queue, no_ack=no_ack)
        assert (message is None) == (not self.ready[queue])
        if message is not None:
            self.delivered(self.lines[n], self.take(queue), message, no_ack)

    def consume(self, n: int, queue: str, no_ack: bool, prefetch: int) -> None:
        line = self.lines[n]
        line.prefetch = prefetch
        line.channel.basic_qos(0, prefetch, False)
        if queue in self.declared and queue not in line.consumers:
            line.channel.basic_consume(self.prefix + queue, no_ack, lambda m: line.inbox.append((queue, m)), queue)
            line.consumers[queue] = no_ack

    def cancel(self, pick: int) -> None:
        """It gets what is on its way, as its credit allows."""
        consumers = [(line, queue) for line in self.lines for queue in line.consumers]
        if not consumers:
            return
        line, queue = consumers[pick % len(consumers)]
        rest = [copy for copy in line.waiting if copy.queue == queue]
        wanted = rest[: line.credit]
        line.channel.basic_cancel(queue)
        for copy, (_queue, message) in zip(wanted, line.inbox, strict=True):
            self.delivered(line, copy, message, False)
        line.inbox.clear()
        self.put_back(rest[len(wanted) :])
        line.waiting = [copy for copy in line.waiting if copy.queue != queue]
        del line.consumers[queue]

    def drain(self, link: int, times: int) -> None:
        """One call brings at most one message of each channel, and waits only where there is none for any."""
        for _ in range(times):
            lines = self.lines[2 * link : 2 * link + 2]
            comes = any(
                (line.waiting and line.credit) or (line.room and any(self.ready[queue] for queue in line.consumers))
                for line in lines
            )
            with refused(TimeoutError, not comes):
                self.links[link].drain_events(timeout=20.0 if comes else 0.0)
            claimed = {line: self.newly_claimed(line) for line in lines}
            rows = sorted(row for found in claimed.values() for row in found)
            taken = [self.take(queue) for queue, _body in rows]
            assert rows == sorted((copy.queue, copy.body) for copy in taken), "these are the heads of their queues"
            for line, found in claimed.items():
                copies = [copy for copy in taken if (copy.queue, copy.body) in found]
                for queue in QUEUES:
                    in_order = [copy.body for copy in copies if copy.queue == queue]
                    assert [body for q, body in found if q == queue] == in_order
                line.waiting += sorted(copies, key=lambda copy: found.index((copy.queue, copy.body)))
                for queue, message in line.inbox:
                    self.delivered(line, line.waiting.pop(0), message, line.consumers[queue])
                line.inbox.clear()

    def newly_claimed(self, line: Line) -> list[tuple[str, int]]:
        """(queue, body) of what was delivered just now or waits, but for what waited before."""
        watch = line.channel.connection._watches.get((line.channel, "jobs"))
        waiting = watch.waiting if watch is not None else ()
        seen = [(queue, message.payload) for queue, message in line.inbox]
        seen += [(queue.removeprefix(self.prefix), int(raw["body"])) for raw, queue in waiting]
        before = len(line.waiting)
        assert seen[:before] == [(copy.queue, copy.body) for copy in line.waiting], "what waits stays in its order"
        assert len(seen) - before <= line.room
        assert len(line.inbox) <= 1
        return seen[before:]

    def settle(self, pick: int, how: str) -> None:
        held = [(line, pair) for line in self.lines for pair in line.held]
        if not held:
            return
        line, (copy, message) = held[pick % len(held)]
        before = line.held.index((copy, message))
        del line.held[0 if how == "multiple" else before : before + 1]
        if how == "requeue":
            message.requeue()
            copy.requeued = True
            self.put(copy)  # behind the others, as relay's retries: RabbitMQ has it come before them
        elif how == "reject":
            message.reject()
            self.dead[copy.queue] += 1
        else:
            message.ack(multiple=how == "multiple")  # of all before it, as over AMQP and no transport of kombu's own

    # what holds after every step

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        held = [copy for line in self.lines for copy in (*line.waiting, *(copy for copy, _message in line.held))]
        for queue, ready in self.ready.items():
            stats = self.engine.stats(self.prefix + queue)
            levels = [sum(copy.level == level for copy in ready) for level in range(10)]
            assert [*stats.ready_by_level] == levels
            assert stats.inflight == sum(copy.queue == queue for copy in held)
            assert (stats.delayed, stats.dead) == (0, self.dead[queue])

    def teardown(self) -> None:
        """All that was held goes back, and comes in its order."""
        for link in (0, 1):
            self.close_connection(link)
        channel = self.lines[0].channel
        bindings = {row for row in channel.list_bindings() if row[0].startswith(self.prefix)}
        assert bindings == {(self.prefix + queue, self.prefix + x, key) for queue, x, key in self.bindings}
        for queue in QUEUES:
            for _ in range(len(self.ready[queue]) + 1):
                self.get(0, queue, True)
            assert self.engine.audit(self.prefix + queue, repair=False).findings == {}
            assert self.engine.purge(self.prefix + queue, ["dead"]) == self.dead[queue]
            channel.queue_delete(self.prefix + queue)
        for exchange in self.exchanges:
            channel.exchange_delete(self.prefix + exchange)
        for link in self.links:
            link.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_channels_do_what_the_model_does(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories of 50 steps. A failure prints the one that failed."""
    # a link that does not drain may take the wake-up of the one that does, which then looks after so many seconds
    monkeypatch.setattr(Settings, "max_block", 0.02)
    with Broker(server.url) as engine:
        run_state_machine_as_test(
            type("ChannelsOnServer", (Channels,), {"server": server, "engine": engine}),
            settings=histories("RELAY_CELERY_MODEL_EXAMPLES", 80, 50),
        )
