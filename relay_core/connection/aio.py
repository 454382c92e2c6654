"""The asyncio shell: the same decisions as the blocking one, awaited."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from relay_core.clock import sent_now
from relay_core.commands.command import Arg, Command
from relay_core.connection import attempts, clients, forks
from relay_core.connection.aiobell import AsyncBell
from relay_core.connection.aiopool import AsyncLink, AsyncPool
from relay_core.connection.call import answered, call_for, raw_call
from relay_core.connection.lookout import ASK_EVERY, PATIENCE, Lookout
from relay_core.connection.policy import Policy
from relay_core.connection.steps import Address, Drop, Exchange, Flow, Outcome, Pause, Step
from relay_core.connection.sync import SyncStore
from relay_core.connection.topology import Router
from relay_core.errors import RelayError, Unavailable
from relay_core.settings import StoreSettings, StoreUrl

T = TypeVar("T")
R = TypeVar("R")


class AsyncStore:
    """A store, for the tasks of one event loop. Opening one does no I/O.

    Used from another loop, or in a child of fork, it leaves the old connections alone and makes new ones.
    Raises what SyncStore raises.
    """

    def __init__(self, url: StoreUrl, settings: StoreSettings | None = None) -> None:
        self.url = url
        self.settings = settings or StoreSettings()
        clients.check(url, self.settings)
        self._policy = Policy(self.settings)
        self._router = Router(url)
        self._pools: dict[Address, AsyncPool] = {}
        self._home: tuple[asyncio.AbstractEventLoop, int] | None = None
        self._closed = False
        self.lookout = Lookout(partial(SyncStore, url, self.settings.impatient(PATIENCE), ASK_EVERY))

    async def run(self, command: Command[T]) -> T:
        """Run one command and return what its `parse` makes of the reply."""
        started, sent_at = time.monotonic(), sent_now()
        address = self._router.ready(command.keys[0], started)
        first = None
        if address is not None and not (command.durable and self._policy.confirm):
            if wires := command.transaction():
                exchanged = await self._exchange(address, clients.pack_all(wires), len(wires))
                outcome = answered(exchanged, len(wires))
            else:
                outcome = await self._exchange(address, [clients.checked_pack(("EVALSHA", *command.wire()))], 1)
            if outcome.failure is None:
                reply = outcome.replies[0]
                if not isinstance(reply, Exception):
                    return command.parse(reply, False)
            first = (address, outcome)
        call = call_for(command, sent_at)
        await self._drive(attempts.settle([call], self._router, self._policy, started, first))
        result: T = call.outcome()
        return result

    async def run_many(self, commands: Sequence[Command[T]]) -> list[T | RelayError]:
        """Run commands in one pipeline per server. The errors of single commands stand in their places."""
        calls = [call_for(command) for command in commands]
        await self._drive(attempts.settle(calls, self._router, self._policy, time.monotonic()))
        return [call.result if call.error is None else call.error for call in calls]

    async def raw(self, *args: Arg) -> Any:
        """Run a plain command that may be repeated, e.g. `raw("SMEMBERS", key)`. Replies hold bytes."""
        call = raw_call(args)
        await self._drive(attempts.settle([call], self._router, self._policy, time.monotonic()))
        return call.outcome()

    async def raw_all(self, *args: Arg) -> dict[str, Any]:
        """The same on every primary of a cluster, by `host:port`; one entry for other stores."""
        flow = attempts.everywhere(args, self._router, self._policy, time.monotonic())
        return {name: call.outcome() for name, call in (await self._drive(flow)).items()}

    def bell(self, markers: Sequence[bytes]) -> AsyncBell:
        """A bell that rings when one of the markers is set. It has connections of its own."""
        return AsyncBell(self, markers)

    async def find(self, keys: Sequence[bytes]) -> dict[bytes, Address | RelayError]:
        """See SyncStore.find."""
        return await self._drive(attempts.find(keys, self._router, self._policy))

    def where(self, key: bytes) -> Address | None:
        """See SyncStore.where."""
        return self._router.address(key)

    def doubt(self, address: Address) -> None:
        """A connection of a bell to that server was lost: ask for the topology before the next command."""
        self._router.doubt(address)

    async def close(self) -> None:
        """Close the connections. Commands under way finish; later ones raise Unavailable."""
        self._closed = True
        self.lookout.close()
        here = self._home == (asyncio.get_running_loop(), os.getpid())
        pools, self._pools = self._pools, {}
        for pool in pools.values() if here else ():
            await pool.close()

    async def _drive(self, flow: Flow[R]) -> R:
        answer: Outcome | None = None
        try:
            while True:
                answer = await self._perform(flow.send(answer))
        except StopIteration as stop:
            result: R = stop.value
            return result

    async def _perform(self, step: Step) -> Outcome | None:
        if isinstance(step, Exchange):
            blocks = clients.pack_all(step.wires)
            if step.sentinel:
                link = AsyncLink(clients.aio_connection(self.url, self.settings, step.address, "sentinel"))
                try:
                    return await link.exchange(blocks, len(step.wires))
                finally:
                    await link.close()
            return await self._exchange(step.address, blocks, len(step.wires))
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
        elif isinstance(step, Drop):
            for address in step.addresses:
                if address in self._pools:
                    await self._pools[address].drop()
        return None

    async def _exchange(self, address: Address, blocks: list[bytes], count: int) -> Outcome:
        home = (asyncio.get_running_loop(), os.getpid())
        if home != self._home:
            forks.look()  # before the pools of a parent are closed in the way of its loop
            self._home, self._pools = home, {}
        pool = self._pools.get(address) or self._pool(address)
        link = await pool.take()
        if link is None:
            limit = self.settings.max_connections
            return Outcome([], OSError(f"all {limit} connections are in use; raise max_connections"), False)
        try:
            return await link.exchange(blocks, count)
        finally:
            await pool.give(link)

    def _pool(self, address: Address) -> AsyncPool:
        if self._closed:
            raise Unavailable(f"{self.url.safe()}: this store is closed")
        settings = self.settings
        self._pools[address] = AsyncPool(
            lambda: AsyncLink(
                clients.aio_connection(self.url, settings, address, "store"),
                partial(self._router.look_again, address),
            ),
            settings.max_connections,
            settings.retry_for,
        )
        return self._pools[address]
