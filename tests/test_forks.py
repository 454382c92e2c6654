"""A child of fork lets go of its parent's connections, and the parent goes on as if there were no child."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys

import pytest

from relay_core.connection import AsyncStore
from relay_core.settings import StoreSettings, parse_url
from tests import c_forks
from tests.servers import Server, eventually
from tests.shells import count


def test_the_event_loop_of_the_parent_still_hears_its_server(server: Server) -> None:
    """Both processes have the same selector: what the child closes in the loop's way is lost to the parent."""
    store = AsyncStore(parse_url(server.url), StoreSettings(socket_timeout=5, retry_for=0))

    async def child_ended(child: int) -> int:
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            await asyncio.sleep(0.01)
        return os.waitstatus_to_exitcode(ended[1])

    async def main() -> None:
        await asyncio.gather(store.run(count()), store.run(count()))
        bell = store.bell([b"m"])
        await bell.arm(100)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if asyncio.run(store.run(count("child"))) == (1, False) else 2
                gc.collect()
            finally:
                os._exit(code)
        assert await child_ended(child) == 0
        server.cli("ZADD", "m", "1", "x")
        assert await bell.wait(5)
        numbers = await asyncio.gather(*(store.run(count()) for _ in range(3)))
        assert sorted(numbers) == [(3, False), (4, False), (5, False)]
        await bell.close()
        await store.close()

    asyncio.run(main())


def test_the_connections_of_a_dead_parent_end_although_its_child_lives(server: Server) -> None:
    """The child never uses the store: it must let go at once, or the server goes on waking the dead parent."""

    def clients() -> int:
        return int(server.info("clients")["connected_clients"])

    before = clients()
    ready, go = os.pipe()
    parent = os.fork()
    if parent == 0:
        code = 1
        try:

            async def main() -> None:
                store = AsyncStore(parse_url(server.url), StoreSettings())
                await store.run(count())
                bell = store.bell([b"m"])
                await bell.arm(100)
                if os.fork() == 0:
                    os.close(go)
                    os.read(ready, 1)  # until the test ends
                os._exit(0)

            asyncio.run(main())
        finally:
            os._exit(code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0
        eventually(lambda: clients() <= before, "server forgets the parent", 10)
    finally:
        os.close(go)
        os.close(ready)


@pytest.mark.parametrize("what", c_forks.CHILD)
def test_a_child_that_python_hears_nothing_of(server: Server, what: str) -> None:
    run = subprocess.run([sys.executable, "-m", "tests.c_forks", what, server.url], timeout=90, check=False)
    assert run.returncode == 0
