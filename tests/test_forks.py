"""A child of fork lets go of its parent's connections, and the parent goes on as if there were no child."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from relay_core.connection import AsyncStore, forks
from relay_core.settings import StoreSettings, parse_url
from tests import c_forks
from tests.forking import child_of, code_of
from tests.servers import Server, eventually
from tests.shells import count


def test_the_event_loop_of_the_parent_still_hears_its_server(server: Server) -> None:
    asyncio.run(c_forks.both_hear(server.url, os.fork))


def test_a_child_may_bear_its_parents_process_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a container, that of a new namespace of process ids, has the number 1 in both."""
    owner, here = c_forks.Owner(), os.getpid()
    owner.go.set()
    forks.watch(owner)
    monkeypatch.setattr(os, "getpid", lambda: here)
    assert code_of(child_of(lambda: owner.calls == 1)) == 0
    assert owner.calls == 0


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
