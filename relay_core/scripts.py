"""The Lua scripts, read once from the package: one file per move, named as the move."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

_PART = re.compile(r"^--@include (\w+)$", re.MULTILINE)
_NOTE = re.compile(r"^\s*--[^\n]*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """A script ready to send.

    :ivar name: file name without `.lua`, the same word as the move
    :ivar text: what the server gets: parts included, comments left out
    :ivar sha: SHA-1 of `text`, the name EVALSHA wants
    """

    name: str
    text: str
    sha: str


def source(name: str) -> str:
    """The file as it is written, e.g. `source("claim")` or `source("parts/sweep")`."""
    return resources.files("relay_core").joinpath(f"lua/{name}.lua").read_text("utf-8")


@lru_cache(maxsize=None)
def load(name: str) -> Script:
    """The script of that name. `--@include x` lines are replaced by `lua/parts/x.lua`, once each."""
    shebang, _, body = source(name).partition("\n")
    seen: set[str] = set()

    def include(match: re.Match[str]) -> str:
        part = match[1]
        if part in seen:
            return ""
        seen.add(part)
        return _PART.sub(include, source(f"parts/{part}"))

    text = shebang + "\n" + _NOTE.sub("", _PART.sub(include, body))
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())


def names() -> list[str]:
    """Every script's name, sorted."""
    folder = resources.files("relay_core").joinpath("lua")
    return sorted(f.name[:-4] for f in folder.iterdir() if f.name.endswith(".lua"))
