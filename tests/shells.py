"""The blocking and the asyncio store behind one blocking face, so that a test can hold for both."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Literal, Protocol

import pytest

from relay_core.commands.command import Arg, Command
from relay_core.connection import AsyncBell, AsyncStore, SyncStore
from relay_core.errors import RelayError
from relay_core.scripts import Script
from relay_core.settings import StoreSettings, StoreUrl, parse_url

Kind = Literal["sync", "async"]
KINDS: tuple[Kind, ...] = ("sync", "async")


class BellFace(Protocol):
    @property
    def popped(self) -> tuple[bytes, ...]: ...

    @property
    def armed(self) -> bool: ...

    @property
    def away(self) -> frozenset[bytes]: ...

    @property
    def lost(self) -> RelayError | None: ...

    def arm(self, timeout: float) -> None: ...

    def rung(self) -> bool: ...

    def wait(self, timeout: float) -> bool: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Face(Protocol):
    """What both stores can do."""

    def run(self, command: Command[Any]) -> Any: ...

    def run_many(self, commands: Sequence[Command[Any]]) -> list[Any]: ...

    def raw(self, *args: Arg) -> Any: ...

    def raw_all(self, *args: Arg) -> dict[str, Any]: ...

    def bell(self, markers: Sequence[bytes]) -> BellFace: ...

    def rest(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class _Blocking(SyncStore):
    def rest(self, seconds: float) -> None:
        """Do nothing for so long."""
        time.sleep(seconds)


class _Awaited:
    """An AsyncStore on an event loop that runs whenever it is called."""

    def __init__(self, url: StoreUrl, settings: StoreSettings) -> None:
        self._loop = asyncio.new_event_loop()
        self._store = AsyncStore(url, settings)

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def run(self, command: Command[Any]) -> Any:
        return self._do(self._store.run(command))

    def run_many(self, commands: Sequence[Command[Any]]) -> list[Any]:
        found: list[Any] = self._do(self._store.run_many(commands))
        return found

    def raw(self, *args: Arg) -> Any:
        return self._do(self._store.raw(*args))

    def raw_all(self, *args: Arg) -> dict[str, Any]:
        found: dict[str, Any] = self._do(self._store.raw_all(*args))
        return found

    def bell(self, markers: Sequence[bytes]) -> _AwaitedBell:
        return _AwaitedBell(self._store.bell(markers), self._loop)

    def rest(self, seconds: float) -> None:
        """Do nothing for so long but what the event loop does in the background."""
        self._do(asyncio.sleep(seconds))

    def close(self) -> None:
        self._do(self._store.close())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


class _AwaitedBell:
    def __init__(self, bell: AsyncBell, loop: asyncio.AbstractEventLoop) -> None:
        self._bell, self._loop = bell, loop

    @property
    def popped(self) -> tuple[bytes, ...]:
        return self._bell.popped

    @property
    def armed(self) -> bool:
        return self._bell.armed

    @property
    def away(self) -> frozenset[bytes]:
        return self._bell.away

    @property
    def lost(self) -> RelayError | None:
        return self._bell.lost

    def arm(self, timeout: float) -> None:
        self._loop.run_until_complete(self._bell.arm(timeout))

    def rung(self) -> bool:
        async def look() -> bool:
            await asyncio.sleep(0.001)  # lets the loop read what has come
            return self._bell.rung()

        return self._loop.run_until_complete(look())

    def wait(self, timeout: float) -> bool:
        return self._loop.run_until_complete(self._bell.wait(timeout))

    def wake(self) -> None:
        self._bell.wake()

    def close(self) -> None:
        self._loop.run_until_complete(self._bell.close())


def open_store(kind: Kind, url: StoreUrl, settings: StoreSettings) -> Face:
    store: Face = _Blocking(url, settings) if kind == "sync" else _Awaited(url, settings)
    return store


Open = Callable[..., Face]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Which store a test is about: both. Import it beside `store_at`."""
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def store_at(kind: Kind) -> Iterator[Open]:
    """`store_at(url, **settings)` opens a store and closes it after the test."""
    opened: list[Face] = []

    def open_at(url: str, **settings: Any) -> Face:
        opened.append(open_store(kind, parse_url(url), StoreSettings(**settings)))
        return opened[-1]

    yield open_at
    for store in opened:
        store.close()


def script(body: str, name: str = "test") -> Script:
    """A script of this body, as the engine would load it."""
    text = f"#!lua\n{body}"
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())


COUNT = script("return redis.call('INCR', KEYS[1])")


def count(key: str = "n", *, durable: bool = False) -> Command[tuple[int, bool]]:
    """Adds one. The result is the number, and whether it was parsed as the reply to a re-send."""
    return Command(COUNT, (key.encode(),), (0,), lambda reply, resent: (reply, resent), resent_at=0, durable=durable)
