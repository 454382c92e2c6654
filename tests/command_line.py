"""`relay` as tests call it: in this process for speed, or as the real command where processes matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from relay_core.cli.app import relay

_SEPARATE: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
"""Before click 8.2 stdout held both."""


class Cli:
    """The command line against one store.

    :param url: goes into RELAY_URL
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def run(self, *args: str, code: int = 0, input: bytes | None = None) -> Result:
        """Run a command; it must end with this exit code, and never by a traceback."""
        result = CliRunner(**_SEPARATE).invoke(relay, args, input=input, env={"RELAY_URL": self.url}, prog_name="relay")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        return result

    def json(self, *args: str, code: int = 0) -> Any:
        """The one document on stdout."""
        return json.loads(self.run(*args, "--json", code=code).stdout)


def environment(url: str | None) -> dict[str, str]:
    """This process's, with RELAY_URL set so, or not at all."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RELAY_URL", "RELAY_PREFIX")}
    return {**inherited, "PYTHONUNBUFFERED": "1", **({} if url is None else {"RELAY_URL": url})}


def spawn(*args: str, url: str | None, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """The real command in a process of its own, its output in pipes."""
    command = [sys.executable, "-m", "relay_core.cli", *args]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment(url), text=True, **(pipes | options))


def finished(process: subprocess.Popen[str], seconds: float = 30.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{process.args!r} did not end within {seconds:g} s:\n{out}\n{err}") from None
    return process.returncode, out, err


@contextmanager
def working(*args: str, url: str, cwd: Path) -> Iterator[Callable[[], tuple[int, str, str]]]:
    """A `relay worker` process. Yields what stops it by SIGTERM and gives its exit code and output."""
    process = spawn("worker", *args, url=url, cwd=cwd)

    def stop() -> tuple[int, str, str]:
        process.send_signal(signal.SIGTERM)
        return finished(process)

    try:
        yield stop
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
