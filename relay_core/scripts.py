"""The Lua scripts, read once from the package: one file per move, named as the move."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

_PART = re.compile(r"^ *--@include (\w+)$", re.MULTILINE)
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


def source(name: str, package: str = "relay_core") -> str:
    """The file as it is written, e.g. `source("claim")` or `source("parts/sweep")`."""
    return resources.files(package).joinpath(f"lua/{name}.lua").read_text("utf-8")


@cache
def load(name: str, package: str = "relay_core") -> Script:
    """The script of that name. A line `--@include x` is replaced by `lua/parts/x.lua`, the package's or the core's."""
    shebang, _, body = source(name, package).partition("\n")

    def include(match: re.Match[str]) -> str:
        own = resources.files(package).joinpath(f"lua/parts/{match[1]}.lua").is_file()
        return _PART.sub(include, source(f"parts/{match[1]}", package if own else "relay_core"))

    text = shebang + "\n" + _NOTE.sub("", _PART.sub(include, body))
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())


def names(package: str = "relay_core") -> list[str]:
    """Every script's name, sorted."""
    folder = resources.files(package).joinpath("lua")
    return sorted(f.name[:-4] for f in folder.iterdir() if f.name.endswith(".lua"))
