"""What all parts of the operations share."""

from __future__ import annotations

from relay_core.operations.settings import Settings
from relay_core.plugins import Plugins


class Base:
    """The settings and plugins of a broker, which its operations follow."""

    def __init__(self, settings: Settings, plugins: Plugins) -> None:
        self.settings = settings
        self.plugins = plugins
