"""kombu's channels under event loops, as Celery's workers drive them, against a model: random histories of two workers.

What is claimed when is not predicted. It is looked up in the store after each step, and has to be what a worker may
claim; and whenever all is done that can be done, nobody waits for anything that is there.

RELAY_CELERY_LOOP_EXAMPLES sets how many histories run (default 20); RELAY_MODEL_SHRINK=1 makes a failing one as short
as it can be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from threading import Thread
from typing import Any

import kombu
import pytest
from celery.worker import state
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from kombu.asynchronous import Hub
from kombu.common import QoS

import relay_adapters.celery  # noqa: F401 - a bare kombu.Connection does not load kombu's plugins
from relay_adapters.celery import transport
from relay_adapters.celery.holding import heartbeat, owed
from relay_adapters.celery.holding.leases import Leases
from relay_adapters.celery.messages.envelope import unpack
from relay_adapters.celery.receiving.qos import BATCH
from relay_core import Broker
from relay_core.operations.settings import Settings
from relay_core.testing import advance
from tests.celery_links import send
from tests.histories import histories
from tests.proxy import Proxy, to_socket
from tests.servers import Server, eventually

QUEUES, NEWS = ("q1", "q2"), "news"
LEASE = 60.0

_histories = count()

workers, queues = st.integers(0, 1), st.sampled_from(QUEUES)
picks, levels = st.integers(0, 20), st.sampled_from([0, 0, 0, 3, 9])
several = st.lists(st.tuples(queues, levels), min_size=3, max_size=10)
endings = st.lists(
    st.tuples(picks, st.sampled_from(["ack", "ack", "ack", "requeue", "reject"]), st.booleans()), min_size=2, max_size=6
)
breaks = st.sampled_from(["cut", "lost reply", "lose", "lose", "close", "expire"])

STEPS = (
    ("publish", several),
    ("publish", several),
    ("turn", workers, st.integers(1, 3)),
    ("turn", workers, st.integers(1, 3)),
    ("start", st.lists(picks, min_size=1, max_size=4)),
    ("start", st.lists(picks, min_size=1, max_size=4)),
    ("settle", endings),
    ("work", workers, endings),
    ("work", workers, endings),
    ("work", workers, endings),
    ("scale", workers, st.integers(-3, 3)),
    ("change", workers, queues),
    ("change", workers, queues),
    ("pause", workers),
    ("rest",),
    ("hurt", workers, queues, breaks),
    ("tell", st.integers(1, 4)),
)
"""Methods and their arguments."""


@dataclass(eq=False)
class Copy:
    """One message."""

    queue: str
    level: int
    place: int | None
    """In the order of its level; 0 once it was handed back, None where its order is not promised."""
    held: Delivery | None = None
    """By whom it is to be had alone."""
    again: bool | None = False
    """Whether it comes as one that was delivered before: it was put back. None: its lease may have been over."""
    over: str = ""
    """What has become of it: acked, dead or, where its lease was over before its ack, either."""


@dataclass(eq=False)
class Delivery:
    """A copy that a worker has in hand. Celery's state takes it for the request of a task."""

    worker: Worker
    copy: Copy
    message: Any
    stale: bool
    """Its lease is over, and others may have it."""
    started: bool = False


@dataclass(eq=False)
class Worker:
    """A Celery worker's consumer, as of a process of its own."""

    name: str
    receive: Callable[[Worker, Any], None]
    proxy: Proxy
    """By which it reaches the server."""
    hears: bool
    """Whether it consumes what is not acked, too."""
    queues: set[str] = field(default_factory=set)
    prefetch: int = 0
    link: Any = None
    has: list[Delivery] = field(default_factory=list)
    """By this connection, and not acked: what uses up credit."""
    most: int = 0
    """How many it may hold: where it may have fewer from now on, what it has held."""

    heard: int = -1
    """What came last of what is not acked."""
    fences: dict[str, int] = field(default_factory=dict)
    """Of each queue, that of what was delivered last."""

    def __post_init__(self) -> None:
        self.hub: Any = Hub()
        self.paused = False
        self.channel: Any = None
        self.leases: Any = None

    def connect(self, news: str, hear: Callable[[Worker, Any], None]) -> None:
        """As Celery's bootsteps do. On the same channel of one of them comes what is not acked."""
        options = {"client_name": self.name, "lease": LEASE, "max_deliveries": 10**6, "retry_for": 10.0}
        self.link = kombu.Connection(self.proxy.url, transport_options=options)
        self.link.ensure_connection(max_retries=20, interval_start=0.05)
        self.channel = self.link.default_channel
        self.channel.attendance.consumer = self.name
        self.leases = self.channel.leases
        self.channel.basic_qos(0, self.prefetch, False)
        consumed = [kombu.Queue(name) for name in sorted(self.queues)]
        self.consumer = kombu.Consumer(self.link, consumed, on_message=lambda m: self.receive(self, m))
        if self.hears:  # a channel whose turn is at such a queue claims nothing ahead
            heard = kombu.Consumer(self.link, [kombu.Queue(news)], no_ack=True, on_message=lambda m: hear(self, m))
            heard.consume()
        self.qos = QoS(lambda prefetch_count: self.consumer.qos(prefetch_count=prefetch_count), self.prefetch)
        self.link.transport.register_with_event_loop(self.link.connection, self.hub)
        self.hub.propagate_errors = self.link.connection_errors
        if not self.paused:
            self.consumer.consume()
        self.loop = self.hub.create_loop()
        self.has, self.most, self.fences, self.heard = [], 0, {}, -1
        assert len(self.hub.on_tick) == 1, "what is closed leaves the loop"

    def turn(self) -> None:
        if self.qos.prev != self.qos.value:
            self.qos.update()
        self.hub.call_later(0.001, lambda: None)
        next(self.loop)

    @property
    def watch(self) -> Any:
        return self.link.transport._watches.get((self.channel, "jobs"))

    @property
    def waiting(self) -> list[tuple[Any, str]]:
        """Claimed, to be acked, and not delivered."""
        rest = self.watch.waiting if self.watch else ()
        return [one for one in rest if not one[1].endswith(NEWS)]

    @property
    def consumes(self) -> set[str]:
        return set() if self.paused else self.queues

    @property
    def credit(self) -> int:
        return max(0, self.qos.value - len(self.has)) if self.qos.value else BATCH


def owes(leases: Leases) -> bool:
    owed = leases.owed
    return bool(owed._acks or owed._releases or owed._refusals or owed._paying or leases._ahead)


class Loops(RuleBasedStateMachine):
    server: Server
    engine: Broker
    proxies: tuple[Proxy, Proxy]

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"loop-{next(_histories)}-"
        self.copies: dict[int, Copy] = {}
        self.places, self.sender = count(1), kombu.Connection(self.server.url)
        self.ready, self.held, self.leased = set[Copy](), set[Copy](), set[Copy]()
        """As the store had them after the last step."""
        self.released: list[int | None] = []
        self.there, self.dead = set[Copy](), set[Copy]()
        self.tokens: set[str] = set()
        """Of all claims that were seen."""
        self.stale: set[str] = set()
        """Of claims whose lease is over."""
        self.running: list[Delivery] = []
        self.workers = [Worker(f"worker-{n}", self.received, proxy, n == 1) for n, proxy in enumerate(self.proxies)]
        self.told, self.heard = count(), list[int]()
        """Of what is not acked."""

    @initialize(
        made=st.lists(st.tuples(st.sets(queues, min_size=1), st.integers(0, 6)), min_size=2, max_size=2), sent=several
    )
    def begin(self, made: list[tuple[set[str], int]], sent: list[tuple[str, int]]) -> None:
        for worker, (consumed, prefetch) in zip(self.workers, made, strict=True):
            worker.queues, worker.prefetch = {self.prefix + queue for queue in consumed}, prefetch
            self.connect(worker)
        self.publish(sent * 2)

    @rule(step=st.one_of([st.tuples(st.just(name), *arguments) for name, *arguments in STEPS]))
    def step(self, step: tuple[Any, ...]) -> None:
        """One rule for all, so that each history has all: hypothesis leaves most rules out of each."""
        name, *arguments = step
        getattr(self, name)(*arguments)

    # what is done

    def publish(self, sent: list[tuple[str, int]]) -> None:
        for queue, level in sent:
            place = next(self.places)
            self.copies[place] = Copy(self.prefix + queue, level, place)
            send(self.sender, place, key=self.prefix + queue, priority=level)

    def tell(self, number: int) -> None:
        for _ in range(number):
            send(self.sender, next(self.told), key=self.prefix + NEWS)

    def hear(self, worker: Worker, message: Any) -> None:
        assert message.payload not in self.heard
        assert message.payload > worker.heard
        worker.heard = message.payload
        self.heard.append(message.payload)

    def connect(self, worker: Worker) -> None:
        worker.connect(self.prefix + NEWS, self.hear)

    def turn(self, n: int, times: int) -> None:
        for _ in range(times):
            worker = self.workers[n]
            try:
                worker.turn()
            except worker.link.connection_errors:
                self.lose(worker)
            self.observe()

    def received(self, worker: Worker, message: Any) -> None:
        copy, token = self.copies[message.payload], worker.leases.get(message.delivery_tag).job.token
        assert copy.queue in worker.consumes
        fence = int(token.split(":")[1])
        assert fence > worker.fences.get(copy.queue, 0), "what was claimed first is delivered first"
        worker.fences[copy.queue] = fence
        assert copy.again in (message.delivery_info["redelivered"], None)
        new = Delivery(worker, copy, message, token in self.stale)
        worker.has.append(new)
        assert worker.qos.prev == 0 or len(worker.has) <= worker.qos.prev
        state.reserved_requests.add(new)
        self.running.append(new)
        if not new.stale:
            copy.over = copy.over.removeprefix("either")
            assert not copy.over, "what is over does not come back"
            assert copy.held is None, "it is another's"
            copy.held = new

    def start(self, picked: list[int]) -> None:
        for pick in picked:
            idle = [one for one in self.running if not one.started]
            if not idle:
                return
            one = idle[pick % len(idle)]
            if one.worker.leases.start(one.message.delivery_tag):
                one.started = True
                state.active_requests.add(one)
            else:
                assert one.stale
                one.worker.leases.hand_back([one.message.delivery_tag], started=True, wait=False)
                self.end(one, "requeue")

    def settle(self, endings: list[tuple[int, str, bool]]) -> None:
        """By the loop's own thread or by one of a pool."""
        for pick, how, elsewhere in endings:
            started = [one for one in self.running if one.started]
            if started:
                self.end(started[pick % len(started)], how, elsewhere)

    def work(self, n: int, endings: list[tuple[int, str, bool]]) -> None:
        """As tasks end, others start, and the loop turns."""
        for ending in endings:
            self.start([ending[0]])
            self.settle([ending])
            self.turn(n, 1)

    def end(self, one: Delivery, how: str, elsewhere: bool = False) -> None:
        has = one in one.worker.has
        self.forget(one)
        if one.stale:
            one.copy.over = one.copy.over or "either"
        elif how != "requeue":
            one.copy.over = "acked" if how == "ack" else "dead"
        else:
            one.copy.place, one.copy.again = None, True
        act = {"ack": one.message.ack, "reject": one.message.reject, "requeue": one.message.requeue}[how]
        thread = Thread(target=act)
        thread.start() if elsewhere else act()
        if elsewhere:
            thread.join()
            assert one.worker.link.transport._awake or not has, "its credit is free, and the loop sleeps on"

    def forget(self, one: Delivery) -> None:
        self.running.remove(one)
        if one in one.worker.has:
            one.worker.has.remove(one)
        if one.copy.held is one:
            one.copy.held = None
        state.reserved_requests.discard(one)
        state.active_requests.discard(one)

    def scale(self, n: int, by: int) -> None:
        """As autoscaling does."""
        qos = self.workers[n].qos
        qos.increment_eventually(by) if by > 0 else qos.decrement_eventually(-by)
        self.workers[n].prefetch = qos.value

    def change(self, n: int, name: str) -> None:
        """`add_consumer` or `cancel_consumer`."""
        self.turn(n, 1)  # a claim may be on its way
        worker, queue = self.workers[n], self.prefix + name
        if queue in worker.queues:
            worker.queues.discard(queue)
            worker.consumer.cancel_by_queue(queue)
        else:
            worker.queues.add(queue)
            worker.consumer.add_queue(kombu.Queue(queue))
            if not worker.paused:
                worker.consumer.consume()

    def pause(self, n: int) -> None:
        worker = self.workers[n]
        worker.paused = not worker.paused
        worker.consumer.cancel() if worker.paused else worker.consumer.consume()

    # what goes wrong

    def hurt(self, n: int, queue: str, how: str) -> None:
        worker = self.workers[n]
        if how == "cut":
            worker.proxy.cut_all()
            self.muddle(worker)
        elif how == "lost reply":
            worker.proxy.cut_reply()
            self.muddle(worker)
        elif how == "lose":
            self.turn(n, 1)
            self.lose(worker)
        elif how == "close":
            self.close(worker)
            self.connect(worker)
        elif how == "expire":
            self.expire(self.prefix + queue)

    def muddle(self, worker: Worker) -> None:
        """A claim that was cut is repeated by whoever comes first."""
        for copy in self.copies.values():
            if copy.queue in worker.queues:
                copy.place = None

    def lose(self, worker: Worker) -> None:
        """Celery forgets what has not started, and connects anew."""
        worker.hub.reset()
        worker.link.collect()
        worker.link.close()
        self.leave(worker)
        self.connect(worker)

    def leave(self, worker: Worker) -> None:
        for one in [one for one in self.running if one.worker is worker and not one.started]:
            self.forget(one)

    def close(self, worker: Worker) -> None:
        """Celery waits for what runs, and closes. What it forgot just before goes back when its process ends."""
        for one in [one for one in self.running if one.worker is worker and one.started]:
            self.end(one, "ack")
        state.should_stop = 0
        try:
            worker.consumer.close()
            worker.link.close()
        finally:
            state.should_stop = None
        left = worker.hub.on_tick or worker.hub.readers
        assert not left, "what is closed leaves the loop"
        self.leave(worker)
        forgotten = transport._forgotten.pop(worker.leases, set())
        eventually(lambda: worker.leases.held.keys() <= forgotten, f"{worker.name} to hand back what it has", 5)
        worker.leases.end()

    def expire(self, queue: str) -> None:
        """Leases of a queue run out, once all acks are told."""
        for worker in self.workers:
            eventually(lambda worker=worker: not worker.leases.owed.acks, "acks to be sent")
        advance(self.engine, 2 * LEASE, [queue])
        for job in self.engine.jobs(queue, "inflight"):
            self.stale.add(str(job.token))
        for copy in self.copies.values():
            if copy.queue == queue and copy not in self.ready:
                copy.place, copy.again = None, copy.again or None
        for one in self.running:
            if one.copy.queue == queue:
                one.stale, one.copy.held = True, None
        for worker in self.workers:
            if worker.watch:
                worker.watch.look_at = 0.0  # time has passed for them, too

    # what holds after every step

    @invariant()
    def nothing_is_lost_and_claims_are_in_order(self) -> None:
        self.observe()

    def observe(self) -> None:
        for worker in self.workers:
            for ahead in list(worker.leases._ahead) if worker.link else ():
                eventually(ahead.arrived, "the reply of a claim that is on its way")
        before, held_before, released = self.ready, self.held, self.released
        self.ready, held = self.look()
        self.held, self.leased = set(held.values()), {copy for token, copy in held.items() if token not in self.stale}
        for copy in self.ready & held_before:
            copy.place = copy.place and 0  # it was handed back
        fences = {token: int(token.split(":")[1]) for token in held.keys() - self.tokens if held[token] in before}
        self.tokens |= held.keys()
        claimed = [held[token] for token in sorted(fences, key=fences.__getitem__)]
        rest = claimed + list(before & self.ready)
        for n, copy in enumerate(claimed):
            for other in rest[n + 1 :]:
                if copy.queue == other.queue and self.released == released:  # else these may be claimed again
                    assert copy.level >= other.level, "higher priorities come first"
                    if copy.level == other.level and copy.place is not None and other.place is not None:
                        assert copy.place <= other.place, "in their order"
        for worker in self.workers:
            if worker.link and worker.qos.prev:
                ahead = worker.watch and worker.watch.ahead
                has = len(worker.has) + len(worker.waiting) + (ahead.room if ahead else 0)
                worker.most = max(worker.qos.prev, min(worker.most, has))
                assert has <= worker.most

    def look(self) -> tuple[set[Copy], dict[str, Copy]]:
        """What is ready, and what is held, by the token of its claim. All is somewhere."""
        for _ in range(5):
            held: dict[str, Copy] = {}
            ready = set[Copy]()
            for queue in (self.prefix + name for name in QUEUES):
                # in this order, for threads may hand back what they hold meanwhile
                held |= {str(job.token): self.copy_of(job) for job in self.engine.jobs(queue, "inflight", 200)}
                ready |= {self.copy_of(job) for job in self.engine.jobs(queue, "ready", 200)}
            held = {token: copy for token, copy in held.items() if copy not in ready}
            self.released = [self.engine.stats(self.prefix + name).counters.get("released") for name in QUEUES]
            self.there = {*ready, *held.values()}
            lost = {copy for copy in self.copies.values() if not copy.over} - self.there
            if not lost:
                break
        assert not lost, ("these are lost", [(copy.queue, copy.place) for copy in lost])
        return ready, held

    def copy_of(self, job: Any) -> Copy:
        return self.copies[int(unpack(job.payload)["body"])]

    # what holds when all is done that can be done

    def rest(self) -> None:
        until = time.monotonic() + 20
        while troubles := self.unrest():
            assert time.monotonic() < until, troubles
            for n in range(2):
                self.turn(n, 1)
        for copy in self.copies.values():
            if copy.over == "either":
                copy.over = "" if copy in self.there else "dead" if copy in self.dead else "acked"

    def unrest(self) -> list[str]:
        owed = [worker.name for worker in self.workers if owes(worker.leases)]  # first: what they tell is seen below
        self.observe()
        dead = [job for name in QUEUES for job in self.engine.jobs(self.prefix + name, "dead", 200)]
        self.dead = {self.copy_of(job) for job in dead}
        mine, troubles = {one.copy for one in self.running}, [f"{name} has not told all" for name in owed]
        for worker in self.workers:
            if any(queue not in worker.consumes for _raw, queue in worker.waiting):
                troubles.append(f"{worker.name} keeps what it does not consume")
            if worker.credit and worker.waiting:
                troubles.append(f"{worker.name} does not deliver")
            if worker.credit and worker.consumes & {copy.queue for copy in self.ready}:
                troubles.append(f"{worker.name} does not claim")
            if worker.hears and worker.credit and self.engine.stats(self.prefix + NEWS).ready:
                troubles.append(f"{worker.name} does not claim what is not acked")
            mine |= {self.copies[int(raw["body"])] for raw, _queue in worker.waiting}
        if self.leased - mine:
            troubles.append("nobody has what is held")
        if {one.copy for one in self.running if not one.stale} - self.held:
            troubles.append("what is running is not held")
        if {copy for copy in self.copies.values() if copy.over in ("acked", "dead")} & self.there:
            troubles.append("what is over is there")
        if {copy for copy in self.copies.values() if copy.over == "dead"} - self.dead:
            troubles.append("what was rejected is not dead")
        return troubles

    def teardown(self) -> None:
        """All that was held goes back, and comes once."""
        for worker in self.workers:
            if worker.link:
                self.close(worker)
                worker.hub.close()
        eventually(lambda: not self.look()[1].keys() - self.stale, "all to be handed back")
        channel = self.sender.default_channel
        channel.queue_delete(self.prefix + NEWS)
        left = []
        for queue in (self.prefix + name for name in QUEUES):
            while (message := channel.basic_get(queue, no_ack=True)) is not None:
                left.append(self.copies[message.payload])
            assert self.engine.audit(queue, repair=False).findings == {}
            stats = self.engine.stats(queue)
            assert (stats.pending, stats.inflight) == (0, 0)
            dead = {self.copy_of(job) for job in self.engine.jobs(queue, "dead", 200)}
            assert len(dead) == stats.dead
            assert all(copy.over in ("dead", "either") for copy in dead)
            self.engine.purge(queue, ["dead"])
            channel.queue_delete(queue)
        assert len(left) == len(set(left))
        assert {copy for copy in self.copies.values() if not copy.over} <= set(left)
        assert not [copy for copy in left if copy.over in ("acked", "dead")]
        self.sender.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_event_loops_do_what_they_promise(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories of 50 steps. A failure prints the one that failed."""
    monkeypatch.setattr(Settings, "max_block", 60.0)  # so that a wake-up that is lost is not made good by a look
    monkeypatch.setattr(transport, "_SETTLE", 0.01)
    at = to_socket(server.socket)
    for module in (heartbeat, owed):
        monkeypatch.setattr(module, "LINGER", 0.1)  # so that acks go with claims, and the thread sends some
    monkeypatch.setattr(
        heartbeat.Heartbeat, "_leave", lambda self, now: 60.0
    )  # both workers have one state of Celery's here
    with (
        Broker(server.url, lease=LEASE, max_deliveries=10**6) as engine,
        Proxy(at, unix=True) as a,
        Proxy(at, unix=True) as b,
    ):
        run_state_machine_as_test(
            type("LoopsOnServer", (Loops,), {"server": server, "engine": engine, "proxies": (a, b)}),
            settings=histories("RELAY_CELERY_LOOP_EXAMPLES", 20, 50),
        )
