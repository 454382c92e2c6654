"""What all parts of the operations share."""

from __future__ import annotations

from relay_core.operations.settings import Settings
from relay_core.plugins import Plugins

MOST = 10_000
"""Queues of which a process remembers what spares it commands. One that lives for long may meet any number of them."""


class Base:
    """The settings and plugins of a broker, which its operations follow."""

    def __init__(self, settings: Settings, plugins: Plugins) -> None:
        self.settings = settings
        self.plugins = plugins
