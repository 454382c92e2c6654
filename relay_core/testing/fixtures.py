"""Fixtures for pytest: `pytest_plugins = ["relay_core.testing.fixtures"]` in the topmost conftest.py.

Importing this module needs pytest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relay_core.broker import Broker
from relay_core.testing.server import PrivateServer


@pytest.fixture(scope="session")
def relay_server() -> Iterator[PrivateServer]:
    """A server of this test session, `relay_server.url`; under pytest-xdist one for each of its workers."""
    with PrivateServer() as server:
        yield server


@pytest.fixture
def relay_broker(relay_server: PrivateServer) -> Iterator[Broker]:
    """A broker on that server, which is empty when the test begins."""
    relay_server.clear()
    with Broker(relay_server.url) as broker:
        yield broker
