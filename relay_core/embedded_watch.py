"""The process that starts the embedded server of one data folder and ends it after its last user.

`relay_core.embedded` runs this file as a script, `python -I -S embedded_watch.py FOLDER BINARY IDLE POLL`,
so it imports the standard library only and is up in about 30 ms. It works inside the data folder by relative
names: a folder that is deleted and made again is never mixed up with its successor.

Four lock files, taken with flock, which the kernel releases however their holder ends:

- `users.lock`: shared by every user; exclusive by the watcher while it ends the server. A user that comes
  meanwhile waits, then finds no server and starts one.
- `start.lock`: exclusive by the process that starts or stops the server, so that one at a time does.
- `watch.lock`: exclusive by the watcher, for its life.
- `server.lock`: exclusive by the server itself, which inherits the descriptor, for its life. Whatever is
  killed in whatever order, two servers never write the same files.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from typing import Any

if sys.platform != "win32":  # importable everywhere; `relay_core.embedded` refuses Windows by name
    import fcntl

USERS, START, WATCH, SERVER = "users.lock", "start.lock", "watch.lock", "server.lock"
STATE, KEEP, LOG, SOCKET = "server.json", "keep", "server.log", "server.sock"

MAX_SOCKET_BYTES = 103
"""Longest socket path that every platform takes: sun_path has 104 bytes on macOS, one of them the end."""

POLL = 0.25
"""Seconds between two looks at the locks and the server. A look costs about 30 microseconds."""

IDLE = 1.0
"""Seconds without a user after which the server goes, so that a few commands in a row share one start."""

STOP_PATIENCE = 10.0
"""Seconds that a server gets to end by itself before it is killed; what it has acknowledged is in the AOF."""

BUSY = "another watcher has the folder"
"""Report of a watcher that came too late: an earlier starter was killed, its watcher was not up yet."""

LOG_LIMIT = 1 << 20
"""Bytes of log above which the next start moves it aside."""


def open_lock(path: str) -> int:
    """A descriptor of the lock file, closed in every process that is exec'd."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock if it is free. Raises OSError where the file system has no flock."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_lock(fd: int, seconds: float, *, shared: bool = False) -> bool:
    """Take the lock, looking again every 5 ms. Never blocks in flock: gevent could not switch there."""
    deadline = time.monotonic() + seconds
    while not try_lock(fd, shared=shared):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def unlock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_UN)


def is_locked(path: str) -> bool:
    """Whether some process holds the lock. Takes it for an instant, so whoever wants it must try again."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd)
    finally:
        os.close(fd)


def ask(path: str, command: str, timeout: float = 1.0) -> bytes:
    """Send one inline command over the unix socket and return the reply without its framing.

    Errors come back as text with the leading `-`; nothing at all means that the server hung up.
    Raises OSError when it cannot be reached or does not answer within `timeout` seconds.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        sock.sendall(command.encode() + b"\r\n")
        with sock.makefile("rb") as reply:
            line = bytes(reply.readline()).rstrip(b"\r\n")
            size = int(line[1:]) if line.startswith(b"$") else -1
            return bytes(reply.read(size)) if size >= 0 else line


def alive(path: str) -> bool:
    """Whether a server answers there and has its data in memory; any error but LOADING is an answer."""
    try:
        reply = ask(path, "PING")
    except OSError:
        return False
    return bool(reply) and not reply.startswith(b"-LOADING")


def read_state(folder: str = ".") -> dict[str, Any]:
    """What the watcher wrote: `pid` and `socket` of the server, `watcher` of itself; empty before a start."""
    try:
        with open(os.path.join(folder, STATE), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _remove(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # gone already, or the folder was deleted under us
            os.unlink(path)


def _choose_socket(folder: str) -> str:
    """`server.sock` in the data folder, or a short path in a private temporary folder if that is too long."""
    if len(os.fsencode(os.path.join(folder, SOCKET))) <= MAX_SOCKET_BYTES:
        return SOCKET
    state = read_state()
    last = os.path.dirname(str(state.get("socket", "")))
    # Left by a watcher that was killed. A copy of the folder names the original's, hence the check.
    if state.get("folder") == folder and last and _is_private(last):
        return os.path.join(last, SOCKET)
    import tempfile

    made = tempfile.mkdtemp(prefix="relay-")
    if len(os.fsencode(os.path.join(made, SOCKET))) > MAX_SOCKET_BYTES:
        os.rmdir(made)
        made = tempfile.mkdtemp(prefix="relay-", dir="/tmp")
    return os.path.join(made, SOCKET)


def _is_private(folder: str) -> bool:
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def server_arguments(folder: str, sock: str) -> list[str]:
    """The server's settings. Nothing is read from a configuration file of the machine."""
    settings = {
        "port": "0",
        "unixsocket": sock,
        "unixsocketperm": "700",
        "dir": ".",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": "",
        "proc-title-template": f"{{title}} {folder}",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def _end_with_watcher() -> None:
    """Runs in the server's process before exec: SIGTERM if the watcher is killed. Linux only; elsewhere the
    next user finds a server without a watcher and replaces it."""
    with contextlib.suppress(ImportError, AttributeError):  # a Python built without ctypes
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


class Watcher:
    """Owns one server process. The current directory is the data folder.

    :param idle: see IDLE
    :param poll: see POLL
    """

    def __init__(self, folder: str, binary: str, idle: float, poll: float) -> None:
        self.folder = folder
        self.binary = binary
        self.idle = idle
        self.poll = poll
        self.socket = _choose_socket(folder)
        self.users = open_lock(USERS)
        self.server: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.idle_since: float | None = None
        self.log_start = 0
        self._note(None)  # whatever is noted there is of a former watcher

    def _note(self, pid: int | None) -> None:
        note = {"folder": self.folder, "pid": pid, "socket": self.socket, "watcher": os.getpid()}
        with open(STATE + ".new", "w", encoding="utf-8") as file:
            json.dump(note, file)
        os.replace(STATE + ".new", STATE)

    def start(self) -> str:
        """Start the server and wait until its data is in memory. Returns why not, or an empty string."""
        lock = open_lock(SERVER)
        if not wait_lock(lock, STOP_PATIENCE):
            os.close(lock)
            return "a former server of this folder is still running and does not end"
        with open(LOG, "ab") as log:
            self.log_start = log.tell()
            try:
                self.server = subprocess.Popen(
                    [self.binary, *server_arguments(self.folder, self.socket)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    preexec_fn=_end_with_watcher if sys.platform == "linux" else None,
                )
            except OSError as error:
                return f"{self.binary} cannot be run: {error.strerror}"
            finally:
                os.close(lock)
        self.started = look = time.monotonic()
        self._note(self.server.pid)
        while self.server.poll() is None:
            if alive(self.socket):
                return ""
            if time.monotonic() - look > self.poll:
                look = time.monotonic()
                if self.unused():
                    return "it did not answer while anybody waited"
            time.sleep(0.003)
        return f"{self.binary} ended with status {self.server.returncode}\n{self.log_tail()}"

    def log_tail(self) -> str:
        """The last lines that the server of this start wrote."""
        with open(LOG, "rb") as file:
            file.seek(self.log_start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-12:])

    def unused(self) -> bool:
        """Whether there has been no user for long enough. If so, `users.lock` stays held, so nobody joins."""
        if os.path.exists(KEEP) or not try_lock(self.users):
            self.idle_since = None
            return False
        now = time.monotonic()
        if self.idle_since is None:
            self.idle_since = now
        if now - self.idle_since >= self.idle:
            return True
        unlock(self.users)
        return False

    def watch(self) -> None:
        """Return once nobody uses the server any more, it was told to stop, or it cannot be kept up."""
        assert self.server is not None
        while not self.unused():
            time.sleep(self.poll)
            code = self.server.poll()
            if code == 0:  # SHUTDOWN or SIGTERM: somebody wanted that
                return
            if code is not None and (time.monotonic() - self.started < IDLE or self.start()):
                return  # it dies at once; the next user starts it and sees why

    def stop(self) -> None:
        """End the server in order: its data is on disk when this returns."""
        if self.server is None:
            return
        deadline = time.monotonic() + STOP_PATIENCE
        if self.server.poll() is None:
            self.server.terminate()
        while self.server.poll() is None:
            if time.monotonic() > deadline:
                self.server.kill()
            time.sleep(0.005)
        _remove(self.socket, STATE, KEEP)
        if os.path.isabs(self.socket):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self.socket))


def _report(text: str) -> None:
    """Tell the process that started us, which reads to the end of the pipe; it may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, text.encode())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)


def main(folder: str, binary: str, idle: str, poll: str) -> None:
    """Start the server, report `ready` or the reason why not on standard output, then watch."""
    if os.fork():
        os._exit(0)  # nobody has to wait for the watcher: init adopts it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # `stop`, or the machine goes down
    os.umask(0o077)
    os.chdir(folder)
    lock = open_lock(WATCH)
    if not wait_lock(lock, 0.1):  # longer than anybody holds it just to look
        _report(BUSY)
        return
    _remove(KEEP)
    if os.path.exists(LOG) and os.path.getsize(LOG) > LOG_LIMIT:
        os.replace(LOG, LOG + ".1")
    watcher = Watcher(folder, binary, float(idle), float(poll))
    try:
        problem = watcher.start()
        _report(problem or "ready")
        if not problem:
            watcher.watch()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        watcher.stop()
        os.close(lock)  # before users.lock: whoever waits for that one may start at once


if __name__ == "__main__":
    main(*sys.argv[1:])
