"""One server per data folder, shared by every process that uses the folder.

The first user starts it, later ones join, and it ends about a second after the last one is gone, however
that one ended. `relay_core.embedded_watch` starts and ends it and explains the locks.

A child of fork does not keep its parent's lease: the descriptor is closed in the child, which takes a lease
of its own with `Lease.renew` at its first use. So a server never stays up for a child that does not use it.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from relay_core import embedded_watch as watch
from relay_core.embedded_binary import ELSEWHERE, INSTALL, find_server_binary, writer_of
from relay_core.errors import EmbeddedError

__all__ = ["Lease", "Status", "acquire", "find_server_binary", "start", "status", "stop"]

PATIENCE = 60.0
"""Seconds to wait for a start. A server with gigabytes of jobs reads its file before it answers."""

# Descriptors of the leases of this process, so that a child of fork can close its copies. The guard is
# held across a fork, so no descriptor is opened and not yet noted at that moment. Who holds it may be given
# a forgotten lease to close by the garbage collector, so it can be taken again.
_held: set[int] = set()
_guard = threading.RLock()


def _after_fork_in_child() -> None:
    global _guard
    for fd in _held:
        os.close(fd)  # without LOCK_UN, which would release the parent's lock too
    _held.clear()
    _guard = threading.RLock()  # a server that forks in C may have Python hear of it only now, when nobody took it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _guard.acquire(),
        after_in_parent=lambda: _guard.release(),
        after_in_child=_after_fork_in_child,
    )


class Lease:
    """Keeps the embedded server up until it is closed or its process ends. Made by `acquire`.

    :ivar directory: the data folder, absolute
    :ivar socket_path: where the server listens; at most 103 bytes long
    """

    def __init__(self, directory: Path, patience: float) -> None:
        self.directory = directory
        self.socket_path = ""
        self._patience = patience
        self._fd = -1
        self._pid = -1

    def renew(self) -> None:
        """Make sure that this process holds the lease and that the server runs.

        Call it after a fork in the child, and when the server cannot be reached: one that was killed is
        started again. Costs about a quarter of a millisecond when all is well. Raises EmbeddedError.
        """
        deadline = time.monotonic() + self._patience
        if self._pid != os.getpid():
            fd = _take_users_lock(self.directory, deadline)
            with _guard:
                mine = self._pid != os.getpid()  # another thread may have been faster
                if mine:
                    self._fd, self._pid = fd, os.getpid()
            if not mine:
                _drop_users_lock(fd)
        self.socket_path = _ensure_server(self.directory, deadline)

    def close(self) -> None:
        """Let go of the server. Closing twice, or in a child of fork, does nothing."""
        with _guard:
            fd, held = self._fd, self._pid == os.getpid()
            self._fd = self._pid = -1
        if held:
            _drop_users_lock(fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a data folder's server.

    :ivar kept: True after `start`: it stays up without users, until `stop`
    :ivar pid: None when it does not run, as the fields below
    :ivar clients: connections open now
    """

    directory: Path
    running: bool
    kept: bool = False
    pid: int | None = None
    socket: str | None = None
    version: str | None = None
    clients: int | None = None


def acquire(directory: Path, *, patience: float = PATIENCE) -> Lease:
    """Start the server of this data folder, or join it, and keep it up until the lease is closed.

    The folder is made if it is missing. Starting takes about a tenth of a second.

    :param patience: seconds to wait for a start, one by another process included
    :raises EmbeddedError: no server for this platform, the folder cannot be used, or the server does not
        start; the message then ends with the server's last log lines
    """
    lease = Lease(_prepare(directory), patience)
    try:
        lease.renew()
    except BaseException:
        lease.close()
        raise
    return lease


def start(directory: Path, *, patience: float = PATIENCE) -> Status:
    """Start the server, or join it, and keep it up without users until `stop`. Raises EmbeddedError."""
    with acquire(directory, patience=patience) as lease:
        try:
            (lease.directory / watch.KEEP).touch(mode=0o600)
        except OSError as error:
            raise _unusable(lease.directory, error) from error
        return status(lease.directory)


def stop(directory: Path, *, patience: float = PATIENCE) -> bool:
    """End the server, users or not; its data stays. False when it did not run.

    The next `acquire` starts it again. Raises EmbeddedError when it does not end within `patience` seconds.
    """
    folder = directory.resolve()
    if sys.platform == "win32" or not (folder / watch.START).exists():
        return False
    deadline = time.monotonic() + patience
    was_running = False
    with _start_lock(folder, deadline):
        while _locked(folder, watch.SERVER) or _locked(folder, watch.WATCH):
            was_running = True
            _tell_to_stop(folder)
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"embedded server of {folder}: it did not stop within {patience:g} s; end process "
                    f"{watch.read_state(str(folder)).get('pid')} yourself, its data is safe in the folder"
                )
            time.sleep(0.02)
    return was_running


def status(directory: Path) -> Status:
    """Whether the server of this folder runs, and where. Changes nothing, needs no lease."""
    folder = directory.resolve()
    if sys.platform == "win32" or not _locked(folder, watch.SERVER):
        return Status(folder, running=False)
    path = _socket_path(folder)
    try:
        text = watch.ask(path, "INFO").decode(errors="replace")
    except OSError:
        text = ""
    info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "valkey_version" in info:
        version: str | None = f"valkey {info['valkey_version']}"
    else:
        version = f"redis {info['redis_version']}" if "redis_version" in info else None
    return Status(
        folder,
        running=True,
        kept=(folder / watch.KEEP).exists(),
        pid=watch.read_state(str(folder)).get("pid"),
        socket=path,
        version=version,
        clients=int(info["connected_clients"]) - 1 if "connected_clients" in info else None,
    )


def _prepare(directory: Path) -> Path:
    if sys.platform == "win32":
        raise EmbeddedError(f"the embedded server does not run on Windows; use WSL, {ELSEWHERE}")
    folder = directory.resolve()
    try:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n")  # jobs are nothing to commit
    except OSError as error:
        raise _unusable(folder, error) from error
    return folder


def _unusable(folder: Path, error: OSError) -> EmbeddedError:
    return EmbeddedError(
        f"embedded server: cannot use the data folder {folder}: {error.strerror}; make it a folder that this "
        f"user can write, name another one, {ELSEWHERE}"
    )


def _locked(folder: Path, name: str) -> bool:
    try:
        return watch.is_locked(str(folder / name))
    except OSError as error:
        raise _unusable(folder, error) from error


def _open_lock(folder: Path, name: str, deadline: float, *, shared: bool, waiting_for: str) -> int:
    fd = -1
    try:
        fd = watch.open_lock(str(folder / name))
        got = watch.wait_lock(fd, deadline - time.monotonic(), shared=shared)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise _unusable(folder, error) from error
    if not got:
        os.close(fd)
        raise EmbeddedError(f"embedded server of {folder}: gave up waiting for {waiting_for}; try again")
    return fd


def _take_users_lock(folder: Path, deadline: float) -> int:
    """Waits while a watcher ends the server; after that nobody ends it behind our back."""
    try:
        with _guard:
            fd = watch.open_lock(str(folder / watch.USERS))
            _held.add(fd)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        got = watch.wait_lock(fd, deadline - time.monotonic(), shared=True)
    except OSError as error:
        _drop_users_lock(fd)
        raise _unusable(folder, error) from error
    if not got:
        _drop_users_lock(fd)
        raise EmbeddedError(f"embedded server of {folder}: gave up waiting for the last one to end; try again")
    return fd


def _drop_users_lock(fd: int) -> None:
    with _guard:
        _held.discard(fd)
        watch.unlock(fd)  # also for copies that a child got by a fork that Python did not see
        os.close(fd)


@contextmanager
def _start_lock(folder: Path, deadline: float) -> Iterator[None]:
    fd = _open_lock(folder, watch.START, deadline, shared=False, waiting_for="another process that starts or stops it")
    try:
        yield
    finally:
        os.close(fd)


def _socket_path(folder: Path) -> str:
    """Where the server of this folder listens; the empty string before the first start with a long path."""
    path = str(folder / watch.SOCKET)
    if len(os.fsencode(path)) <= watch.MAX_SOCKET_BYTES:
        return path
    return str(watch.read_state(str(folder)).get("socket", ""))


def _running_socket(folder: Path) -> str | None:
    """The socket if a server of this very folder answers and a watcher looks after it, else None.

    The lock is asked too: a copied folder may name the socket of the original's server.
    """
    path = _socket_path(folder)
    if path and watch.alive(path) and _locked(folder, watch.SERVER) and _locked(folder, watch.WATCH):
        return path
    return None


def _ensure_server(folder: Path, deadline: float) -> str:
    """The socket of the running server, started if need be. The caller holds the users' lock."""
    path = _running_socket(folder)
    if path is not None:
        return path
    binary = find_server_binary()
    with _start_lock(folder, deadline):
        while True:
            path = _running_socket(folder)
            if path is not None:
                return path
            if not _locked(folder, watch.WATCH):
                if _locked(folder, watch.SERVER):
                    _shut_down(folder)  # its watcher was killed, and nobody else would ever end it
                _start_watcher(folder, binary, deadline)
            elif time.monotonic() > deadline:
                pid = watch.read_state(str(folder)).get("pid")
                raise EmbeddedError(
                    f"embedded server of {folder}: process {pid} runs but does not answer; look at "
                    f"{folder / watch.LOG}, try again later, or run `relay server stop`"
                )
            else:
                time.sleep(0.005)  # another process's start, or the watcher's after a crash


def _start_watcher(folder: Path, binary: Path, deadline: float) -> None:
    """Returns once the server answers, or when another watcher has the folder: look again then.

    Raises EmbeddedError with the server's log when it does not start.
    """
    arguments = [str(folder), str(binary), str(watch.IDLE), str(watch.POLL)]
    script = [sys.executable, "-I", "-S", watch.__file__, *arguments]
    try:
        child = subprocess.Popen(
            script,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,  # a Ctrl-C in the user's terminal is not meant for the server
        )
    except OSError as error:
        raise EmbeddedError(f"embedded server: cannot run {sys.executable!r}: {error.strerror}; {INSTALL}") from error
    with child:  # the watcher goes on in a process of its own; this one ends at once
        assert child.stdout is not None
        report = b""
        pipe = child.stdout.fileno()
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(pipe, 65536) if ready else b""
            report += piece
            if not piece:
                break
    text = report.decode(errors="replace").strip()
    if text not in ("ready", watch.BUSY):
        raise _not_started(folder, text)


def _not_started(folder: Path, report: str) -> EmbeddedError:
    if not report:
        report = f"it did not answer in time; look at {folder / watch.LOG}"
    advice = ""
    if "RDB format version" in report or ("Bad file format" in report and ".rdb" in report):
        wrote, fits = writer_of(folder)
        one = str(fits) if fits else "that one, or a later one of its kind"
        advice = f"\nThe data was written by a server that this one cannot follow{f', {wrote}' if wrote else ''}"
        advice += f": set RELAY_SERVER_BIN to {one}."
    elif "appendonlydir" in report or "AOF" in report:
        advice = (
            f"\nIf the data in {folder} is damaged: copy the folder, then run valkey-check-aof or "
            "redis-check-aof with --fix on the file named above."
        )
    if shutil.disk_usage(folder).free < 1 << 20:
        advice = f"\nThe disk that holds {folder} is full: make room and try again."
    return EmbeddedError(f"embedded server of {folder} did not start: {report}{advice}")


def _tell_to_stop(folder: Path) -> None:
    """Ask the watcher, which ends a server that does not end by itself; without a watcher ask the server."""
    watcher = watch.read_state(str(folder)).get("watcher")
    if watcher and _locked(folder, watch.WATCH):
        try:
            os.kill(watcher, signal.SIGTERM)
        except OSError as error:
            raise _unusable(folder, error) from error
    else:
        _shut_down(folder)


def _shut_down(folder: Path) -> None:
    """Ask the server to end; whether it did is for its lock to tell."""
    with suppress(OSError):
        watch.ask(_socket_path(folder), "SHUTDOWN NOSAVE")  # NOSAVE: no RDB file; the AOF is always flushed
