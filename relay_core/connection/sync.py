"""The blocking shell: runs commands on connections that its threads share."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from relay_core.clock import sent_now
from relay_core.commands.command import Arg, Command
from relay_core.connection import attempts, clients, forks
from relay_core.connection.bell import Bell
from relay_core.connection.call import answered, call_for, raw_call
from relay_core.connection.lookout import ASK_EVERY, PATIENCE, Lookout
from relay_core.connection.policy import Policy
from relay_core.connection.pool import Link, Pool
from relay_core.connection.reader import Reader
from relay_core.connection.sender import Sender
from relay_core.connection.steps import Address, Drop, Exchange, Flow, Outcome, Pause, Step
from relay_core.connection.topology import Router
from relay_core.errors import RelayError, Unavailable
from relay_core.settings import StoreSettings, StoreUrl

T = TypeVar("T")
R = TypeVar("R")


class SyncStore:
    """A store, for any number of threads. Opening one does no I/O; a child of fork gets its own connections.

    Raises what the reply means, never an error of redis-py: Unavailable, AuthError, PermissionDenied,
    UnsafeStore, ServerTooOld, LayoutError, StoreError.
    """

    def __init__(self, url: StoreUrl, settings: StoreSettings | None = None, pause: float = 0.0) -> None:
        """:param pause: see Router"""
        self.url = url
        self.settings = settings or StoreSettings()
        clients.check(url, self.settings)
        self._policy = Policy(self.settings)
        self._hurry = threading.local()
        self._router = Router(url, pause)
        self._pools: dict[Address, Pool] = {}
        self._closed = False
        self.lookout = Lookout(partial(SyncStore, url, self.settings.impatient(PATIENCE), ASK_EVERY))
        forks.watch(self)

    def run(self, command: Command[T]) -> T:
        """Run one command and return what its `parse` makes of the reply."""
        started, sent_at = time.monotonic(), sent_now()
        address = self.ready(command, started)
        outcome = None
        if address is not None:
            if wires := command.transaction():
                outcome = answered(self._exchange(address, clients.pack_all(wires), len(wires)), len(wires))
            else:
                outcome = self._exchange(address, [clients.checked_pack(("EVALSHA", *command.wire()))], 1)
            if outcome.failure is None and not isinstance(reply := outcome.replies[0], Exception):
                return command.parse(reply, False)
        return self.settle(command, started, sent_at, address, outcome)

    def ready(self, command: Command[Any], now: float) -> Address | None:
        """The server that a command may be sent to at once, with no other before or after it; None for none."""
        if command.durable and self._policy.confirm:
            return None
        return self._router.ready(command.keys[0], now)

    def settle(
        self,
        command: Command[T],
        started: float,
        sent_at: float,
        address: Address | None = None,
        outcome: Outcome | None = None,
    ) -> T:
        """Bring a command through, sending and repeating it as need be.

        :param started: `time.monotonic()` from which `retry_for` counts
        :param sent_at: `sent_now()` of the first send
        :param outcome: how a first send to that `address` already ended
        """
        call = call_for(command, sent_at)
        first = None if address is None or outcome is None else (address, outcome)
        self._drive(attempts.settle([call], self._router, self._patience(), started, first))
        result: T = call.outcome()
        return result

    def run_many(self, commands: Sequence[Command[T]]) -> list[T | RelayError]:
        """Run commands in one pipeline per server. The errors of single commands stand in their places."""
        calls = [call_for(command) for command in commands]
        self._drive(attempts.settle(calls, self._router, self._patience(), time.monotonic()))
        return [call.result if call.error is None else call.error for call in calls]

    def raw(self, *args: Arg) -> Any:
        """Run a plain command that may be repeated, e.g. `raw("SMEMBERS", key)`. Replies hold bytes."""
        call = raw_call(args)
        self._drive(attempts.settle([call], self._router, self._patience(), time.monotonic()))
        return call.outcome()

    def raw_many(self, wires: Sequence[tuple[Arg, ...]]) -> list[Any]:
        """The same for several, in one pipeline per server. The errors of single commands stand in their places."""
        calls = [raw_call(args) for args in wires]
        self._drive(attempts.settle(calls, self._router, self._patience(), time.monotonic()))
        return [call.result if call.error is None else call.error for call in calls]

    def raw_all(self, *args: Arg) -> dict[str, Any]:
        """The same on every primary of a cluster, by `host:port`; one entry for other stores."""
        flow = attempts.everywhere(args, self._router, self._policy, time.monotonic())
        return {name: call.outcome() for name, call in self._drive(flow).items()}

    def ask_sentinels(self, *questions: tuple[Arg, ...]) -> dict[str, list[Any] | str]:
        """The replies of every sentinel that the URL names, by `host:port`, an error reply as the exception; of one
        that does not answer, or refuses the first question, the text of why. Each has a second."""
        answers: dict[str, list[Any] | str] = {}
        for host, port in self.url.hosts:
            address = Address(host, port)
            outcome = self._perform(Exchange(address, list(questions), sentinel=True))
            assert outcome is not None  # as of every exchange
            answers[str(address)] = self._router.heard(outcome, address)
        return answers

    @contextmanager
    def hurried(self, seconds: float = math.inf, until: Callable[[], float] | None = None) -> Iterator[None]:
        """What this thread runs meanwhile is repeated for so long at most, whatever `retry_for` says: it has others to
        turn to.

        :param until: asked for the monotonic time from which on nothing is repeated. Default: no such time
        """
        before, self._hurry.limits = getattr(self._hurry, "limits", None), (seconds, until)
        try:
            yield
        finally:
            self._hurry.limits = before

    def _patience(self) -> Policy:
        limits: tuple[float, Callable[[], float] | None] | None = getattr(self._hurry, "limits", None)
        return self._policy if limits is None else self._policy.at_most(*limits)

    def bell(self, markers: Sequence[bytes]) -> Bell:
        """A bell that rings when one of the markers is set. It has connections of its own."""
        return Bell(self, markers)

    def sender(self) -> Sender:
        """A sender of commands whose replies are taken later. It has a connection of its own."""
        return Sender(self)

    def reader(
        self, streams: Sequence[bytes], group: str, consumer: str, last: Mapping[bytes, str] | None = None
    ) -> Reader:
        """A reader of streams of one Cluster slot. It has a connection of its own.

        :param last: stream -> id of the entry that arrived last at an earlier reader of this consumer
        """
        return Reader(self, streams, group, consumer, last or {})

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Address | RelayError]:
        """The server of each key, found fit; what stands in the way in its place. Tries once."""
        return self._drive(attempts.find(keys, self._router, self._policy))

    def locate(self, keys: Sequence[bytes]) -> dict[bytes, Address]:
        """The same, but raises what stands in the way."""
        return self._drive(attempts.locate(keys, self._router, self._policy))

    def where(self, key: bytes) -> Address | None:
        """The server of a key, as far as is known without asking."""
        return self._router.address(key)

    def doubt(self, address: Address) -> None:
        """A connection of a bell to that server was lost: ask for the topology before the next command."""
        self._router.doubt(address)

    def doubts(self, address: Address) -> bool:
        """Whether that server was lost, or told to ask elsewhere, and was not found fit since."""
        return address not in self._router.checked

    def close(self) -> None:
        """Close the connections. Commands under way finish; later ones raise Unavailable."""
        self._closed = True
        self.lookout.close()
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def _drive(self, flow: Flow[R]) -> R:
        answer: Outcome | None = None
        try:
            while True:
                answer = self._perform(flow.send(answer))
        except StopIteration as stop:
            result: R = stop.value
            return result

    def _perform(self, step: Step) -> Outcome | None:
        if isinstance(step, Exchange):
            blocks = clients.pack_all(step.wires)
            if step.sentinel:
                link = Link(clients.connection(self.url, self.settings, step.address, "sentinel"))
                try:
                    return link.exchange(blocks, len(step.wires))
                finally:
                    link.close()
            return self._exchange(step.address, blocks, len(step.wires))
        if isinstance(step, Pause):
            time.sleep(step.seconds)
        elif isinstance(step, Drop):
            for address in step.addresses:
                if address in self._pools:
                    self._pools[address].drop()
        return None

    def _exchange(self, address: Address, blocks: list[bytes], count: int) -> Outcome:
        forks.look()
        pool = self._pools.get(address) or self._pool(address)
        link = pool.take()
        if link is None:
            limit = self.settings.max_connections
            return Outcome([], OSError(f"all {limit} connections are in use; raise max_connections"), False)
        try:
            return link.exchange(blocks, count)
        finally:
            pool.give(link)

    def _pool(self, address: Address) -> Pool:
        if self._closed:
            raise Unavailable(f"{self.url.safe()}: this store is closed")
        settings = self.settings
        made = Pool(
            lambda: self.link(address),
            settings.max_connections,
            settings.retry_for,
        )
        return self._pools.setdefault(address, made)

    def link(self, address: Address) -> Link:
        """A connection of the caller's own, which opens when it is used."""
        on_closed = partial(self._router.look_again, address)
        return Link(clients.connection(self.url, self.settings, address, "store"), on_closed)

    def after_fork(self) -> None:
        """In the child: forget the parent's pools, whose locks a thread of the parent may have held."""
        self._pools = {}
