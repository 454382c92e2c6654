"""What one check of `relay doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "info", "warn", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """:ivar name: what was checked
    :ivar detail: what was found; for a warning or an error also what to do
    """

    name: str
    level: Level
    detail: str
