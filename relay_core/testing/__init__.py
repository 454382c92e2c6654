"""For tests of applications: a private server, queues that are drained in line, time that passes at once, assertions.

`pytest_plugins = ["relay_core.testing.fixtures"]` in a conftest.py gives the fixtures `relay_server` and
`relay_broker`. Nothing here is loaded unless it is imported. Never use it on a server with real jobs.
"""

from relay_core.testing.assertions import assert_dead, assert_enqueued, assert_nothing_enqueued, enqueued
from relay_core.testing.drain import Drained, NotDrained, drain
from relay_core.testing.server import PrivateServer
from relay_core.testing.times import advance

__all__ = [
    "Drained",
    "NotDrained",
    "PrivateServer",
    "advance",
    "assert_dead",
    "assert_enqueued",
    "assert_nothing_enqueued",
    "drain",
    "enqueued",
]
