"""How to reach a store and how to behave on the way: the broker URL, and the settings that no URL holds."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import quote, unquote

from relay_core.errors import InvalidArgument, InvalidUrl

Topology = Literal["standalone", "unix", "sentinel", "cluster", "embedded"]
Credentials = tuple[str | None, str]

DEFAULT_LEASE = 15.0
"""Seconds for which a claim is sure without a heartbeat."""

PORT = 6379
SENTINEL_PORT = 26379
EMBEDDED_FOLDER = "./.relay"

_WORDS = {"relay": False, "relays": True, "redis": False, "rediss": True, "valkey": False, "valkeys": True}
_KINDS: dict[str, Topology] = {"": "standalone", "unix": "unix", "sentinel": "sentinel", "cluster": "cluster"}
_FORMS = (
    "relay://host:port/db, relays://host:port/db (TLS), relay+unix:///path?db=0, "
    "relay+sentinel://host:port,host:port/service/db, relay+cluster://host:port,host:port "
    "or relay:// (embedded); the first word may be redis or valkey, rediss or valkeys for TLS"
)
_ADVICE = "percent-encode it there: '@' as %40, ':' as %3A, '/' as %2F, '?' as %3F, '#' as %23"

# `ssl_password` may be set in StoreSettings.ssl, not in a URL.
_TLS_OPTIONS = (
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
)
_OPTIONS: dict[Topology, tuple[str, ...]] = {
    "standalone": ("db",),
    "unix": ("db",),
    "sentinel": ("db", "sentinel_username", "sentinel_password"),
    "cluster": (),
    "embedded": ("dir",),
}


@dataclass(frozen=True, repr=False)
class StoreUrl:
    """A broker URL, taken apart. Made by `parse_url`. Neither repr nor str shows a credential.

    :ivar topology: what kind of store it names
    :ivar hosts: `(host, port)` of the server, of the sentinels, or of the cluster nodes to ask first
    :ivar path: unix socket, or data folder of an embedded server
    :ivar db: number of the database, 0 in a cluster
    :ivar service: name under which the sentinels know the primary
    :ivar tls: True for `relays`, `rediss`, `valkeys`
    :ivar ssl: the `ssl_*` options of the URL
    """

    topology: Topology
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    db: int = 0
    service: str = ""
    tls: bool = False
    username: str | None = None
    password: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    ssl: tuple[tuple[str, str | bool], ...] = ()
    word: str = "relay"

    @property
    def several(self) -> bool:
        """Whether queues may lie on several servers, of which one may be away alone."""
        return self.topology == "cluster"

    def safe(self) -> str:
        """The URL with `***` for every credential: fit for logs and messages."""
        kind = "" if self.topology in ("standalone", "embedded") else f"+{self.topology}"
        options: list[tuple[str, str]] = []
        middle = ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.hosts)
        if self.topology == "embedded":
            if self.path != EMBEDDED_FOLDER:
                options.append(("dir", self.path))
        elif self.topology == "unix":
            middle = quote(self.path)
            options.append(("db", str(self.db)))
        elif self.topology == "sentinel":
            middle += f"/{quote(self.service, safe='')}/{self.db}"
        elif self.topology == "standalone":
            middle += f"/{self.db}"
        options += [(name, str(value).lower() if value in (True, False) else str(value)) for name, value in self.ssl]
        options += [
            (name, "***") for name in ("sentinel_username", "sentinel_password") if getattr(self, name) is not None
        ]
        user = "***@" if self.username is not None or self.password is not None else ""
        tail = "&".join(f"{name}={value if value == '***' else quote(value)}" for name, value in options)
        return f"{self.word}{kind}://{user}{middle}" + (f"?{tail}" if tail else "")

    def __str__(self) -> str:
        return self.safe()

    def __repr__(self) -> str:
        return f"StoreUrl({self.safe()!r})"

    def at_socket(self, path: str) -> StoreUrl:
        """The same store, reached at a unix socket: what an embedded URL becomes once its server runs."""
        return replace(self, topology="unix", path=path, hosts=(), word=self.word.removesuffix("s") or "relay")


def parse_url(url: str) -> StoreUrl:
    """Take a broker URL apart, see `StoreUrl` and the README for the forms.

    Raises InvalidUrl, which says what is wrong and never shows a credential.
    """
    if not isinstance(url, str):
        raise InvalidUrl(f"a broker URL must be a str, got {type(url).__name__}")
    scheme, colon, rest = url.strip().partition("://")
    if not colon:
        raise InvalidUrl(f"the broker URL has no '://'; use {_FORMS}")
    word, plus, suffix = scheme.lower().partition("+")
    if word not in _WORDS or (suffix not in _KINDS) or (plus and not suffix):
        raise InvalidUrl(f"unknown scheme {scheme[:40]!r}; use {_FORMS}")
    topology, tls = _KINDS[suffix], _WORDS[word]
    if topology == "unix" and tls:
        raise InvalidUrl(f"{scheme}:// asks for TLS, which a unix socket does not have; use {word[:-1]}+unix://")
    authority, path, query = _split(scheme, rest, topology)
    user, at, hosts = authority.rpartition("@")
    username, password = _credentials(user) if at else (None, None)
    options = _query(scheme, query)
    if topology == "standalone" and not hosts:
        topology = _embedded(scheme, word, bool(at), path)
    _check_options(scheme, topology, tls, options)
    made = StoreUrl(
        topology,
        tls=tls,
        username=username,
        password=password,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
        ssl=tuple((name, _tls_option(name, value)) for name, value in options.items() if name[:4] == "ssl_"),
        word=word,
    )
    if topology == "embedded":
        return replace(made, path=os.path.expanduser(options.get("dir", EMBEDDED_FOLDER)))  # no shell does it in a URL
    if topology == "unix":
        if hosts or path in ("", "/"):
            raise InvalidUrl(
                f"{scheme}:// needs the absolute path of a socket, with three slashes: {scheme}:///run/valkey.sock?db=0"
            )
        return replace(made, path=unquote(path), db=_db(scheme, options.get("db")))
    return replace(made, hosts=_hosts(scheme, topology, hosts), **_service_and_db(scheme, topology, path, options))


def _split(scheme: str, rest: str, topology: Topology) -> tuple[str, str, str]:
    """Authority, path and query. An '@' outside of the authority means an unquoted character before it."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(authority) :]
    path, _, query = tail.partition("?")
    if "@" in (query if topology == "unix" and not authority else tail):
        raise InvalidUrl(f"the {scheme}:// URL has an '@' after its host; if it belongs to a password, {_ADVICE}")
    if "#" in tail:
        raise InvalidUrl(f"the {scheme}:// URL has a '#', which means nothing here; in a path or password, {_ADVICE}")
    return authority, path, query


def _embedded(scheme: str, word: str, credentials: bool, path: str) -> Topology:
    if word != "relay":
        raise InvalidUrl(f"{scheme}:// names no host; add one, or use relay:// for the embedded server")
    if credentials:
        raise InvalidUrl("the URL has a user or password but no host; the embedded server (relay://) has neither")
    if path not in ("", "/"):
        raise InvalidUrl(
            f"the URL has the path {path!r} but no host; use relay://host:port{path}, "
            f"or relay://?dir={path} for an embedded server in that folder"
        )
    return "embedded"


def _credentials(user: str) -> tuple[str | None, str | None]:
    name, colon, secret = user.partition(":")
    return unquote(name) or None, unquote(secret) if colon and secret else None


def _hosts(scheme: str, topology: Topology, text: str) -> tuple[tuple[str, int], ...]:
    default = SENTINEL_PORT if topology == "sentinel" else PORT
    found = tuple(_host(scheme, part.strip(), default) for part in text.split(",") if part.strip())
    if not found:
        raise InvalidUrl(f"{scheme}:// names no host; add them, e.g. {scheme}://host1:{default},host2:{default}")
    if topology == "standalone" and len(found) > 1:
        raise InvalidUrl(
            f"{scheme}:// names {len(found)} hosts, it takes one; "
            f"use {scheme}+cluster:// or {scheme}+sentinel:// for more"
        )
    return found


def _host(scheme: str, text: str, default: int) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]]*))(?::(.*))?", text)
    if match is None:
        raise InvalidUrl(
            f"host {text.partition(':')[0]!r} in the {scheme}:// URL cannot be read; "
            f"put an IPv6 address in brackets, e.g. [::1]:{default}"
        )
    host, port = match[1] or match[2], match[3]
    if not host:
        # What stands there may be a password whose host was forgotten, so it is not shown.
        raise InvalidUrl(f"a host is missing before the ':' in the {scheme}:// URL; write host:port")
    if port is None:
        return unquote(host), default
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        # A text may be a password (user:password without @host), so only numbers are shown.
        shown = f" {port}" if re.fullmatch(r"-?[0-9]{1,6}", port) else ""
        raise InvalidUrl(
            f"port{shown} of host {host!r} in the {scheme}:// URL is not a number from 1 to 65535; "
            f"without one it is {default}, and an IPv6 address stands in brackets"
        )
    return unquote(host), int(port)


def _service_and_db(scheme: str, topology: Topology, path: str, options: Mapping[str, str]) -> dict[str, Any]:
    parts = path.strip("/").split("/") if path.strip("/") else []
    if topology == "cluster":
        if parts and parts != ["0"]:
            raise InvalidUrl(f"{scheme}:// has the path {path!r}, but a cluster has only database 0; leave it out")
        return {}
    service = ""
    if topology == "sentinel":
        service = unquote(parts.pop(0)) if parts else ""
        if not service:
            raise InvalidUrl(
                f"{scheme}:// needs the name under which the sentinels know the primary: {scheme}://host:port/service/0"
            )
    if len(parts) > 1:
        raise InvalidUrl(f"the path {path!r} in the {scheme}:// URL has too many parts; it ends in the database number")
    named, option = (parts[0] if parts else None), options.get("db")
    if named is not None and option is not None and named != option:
        raise InvalidUrl(f"the {scheme}:// URL names two databases, {named!r} and ?db={option!r}; keep one")
    return {"service": service, "db": _db(scheme, option if named is None else named)}


def _db(scheme: str, text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidUrl(f"database {text!r} in the {scheme}:// URL is not a number; use one from 0 up, e.g. 0")
    return int(text)


def _query(scheme: str, query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        if not part:
            continue
        if not equals or not value:
            raise InvalidUrl(f"option {name!r} in the {scheme}:// URL has no value; write ?{name}=...")
        if unquote(name) in found:
            raise InvalidUrl(f"option {name!r} is twice in the {scheme}:// URL; keep one")
        found[unquote(name)] = unquote(value)
    return found


def _check_options(scheme: str, topology: Topology, tls: bool, options: Mapping[str, str]) -> None:
    known = (*_OPTIONS[topology], *(_TLS_OPTIONS if tls else ()))
    for name in options:
        if name in known:
            continue
        if name in _TLS_OPTIONS:
            raise InvalidUrl(
                f"option {name!r} needs TLS, which {scheme}:// is without; "
                "use relays, rediss or valkeys as its first word"
            )
        near = difflib.get_close_matches(name, known, 1)
        advice = f"did you mean {near[0]!r}" if near else f"known here: {', '.join(known) or 'none'}"
        raise InvalidUrl(
            f"unknown option {name!r} in the {scheme}:// URL ({topology}); {advice}. "
            "Timeouts and the like are settings of the broker (in Celery broker_transport_options), not of the URL"
        )


def _tls_option(name: str, value: str) -> str | bool:
    if name == "ssl_check_hostname":
        flags = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() not in flags:
            raise InvalidUrl(f"option ssl_check_hostname must be true or false, got {value!r}")
        return flags[value.lower()]
    if name == "ssl_cert_reqs":
        # Celery users write the names of Python's ssl module.
        level = value.lower().removeprefix("cert_")
        if level not in ("required", "optional", "none"):
            raise InvalidUrl(f"option ssl_cert_reqs must be required, optional or none, got {value!r}")
        return level
    return value


@dataclass(frozen=True, slots=True)
class Durability:
    """What must confirm a write before it counts: `replicas` copies, or the disk of the primary (`aof`)."""

    replicas: int = 0
    aof: bool = False


def parse_durability(text: str) -> Durability:
    """`none`, `replica:N` with N from 1 to 100, or `aof`. Raises InvalidArgument."""
    if text == "none":
        return Durability()
    if text == "aof":
        return Durability(aof=True)
    match = re.fullmatch(r"replica:([1-9]\d?|100)", text) if isinstance(text, str) else None
    if match is None:
        raise InvalidArgument(f'durability must be "none", "replica:N" (N from 1 to 100) or "aof", got {text!r}')
    return Durability(replicas=int(match[1]))


@dataclass(frozen=True)
class StoreSettings:
    """Behaviour of the connections. Times in seconds. Raises InvalidArgument for a value out of range.

    :ivar socket_timeout: how long a reply may take. Default 5
    :ivar connect_timeout: how long a connection may take to open. Default 5
    :ivar retry_for: how long a command is repeated while the server cannot serve it, counted from its first
        send; an attempt under way is not cut short. 0 tries once. Default 10
    :ivar durability: what confirms a stored job: "none", "replica:N" (WAIT) or "aof" (WAITAOF).
        Default "none"
    :ivar durability_timeout: how long that may take before NotDurable is raised. Default 5: under `appendfsync
        everysec` a server syncs a second after its last sync, and waits two more for one that is under way
    :ivar max_connections: connections per server that commands share; a thread that finds all in use waits.
        Blocked waits for work have their own. Default 100
    :ivar credential_provider: called at each connect, returns `(user or None, password)`; wins over the URL
    :ivar ssl: further `ssl_*` arguments of redis-py's SSL connections, e.g. `ssl_min_version`; they win
        over the URL
    :ivar client_name: what CLIENT LIST shows. Default None
    :ivar any_server: take a server as it is, also one that is not fit to keep jobs: to read from it. Default False
    """

    socket_timeout: float = 5.0
    connect_timeout: float = 5.0
    retry_for: float = 10.0
    durability: str = "none"
    durability_timeout: float = 5.0
    max_connections: int = 100
    credential_provider: Callable[[], Credentials] | None = field(default=None, repr=False)
    ssl: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    client_name: str | None = None
    any_server: bool = False

    def __post_init__(self) -> None:
        for name in ("socket_timeout", "connect_timeout", "durability_timeout"):
            _check_seconds(name, getattr(self, name), 0.001)
        _check_seconds("retry_for", self.retry_for, 0.0)
        parse_durability(self.durability)
        limit: object = self.max_connections
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= 100_000:
            raise InvalidArgument(f"max_connections must be an int from 1 to 100000, got {limit!r}")
        provider: object = self.credential_provider
        if provider is not None and not callable(provider):
            kind = type(provider).__name__
            raise InvalidArgument(f"credential_provider must be callable and return (user, password), got a {kind}")
        tls: object = self.ssl
        if not isinstance(tls, Mapping):
            kind = type(tls).__name__
            raise InvalidArgument(
                f"ssl must be a dict of arguments that start with 'ssl_', got a {kind}; "
                "a URL that begins with relays:// turns TLS on"
            )
        for name in tls:
            if not str(name).startswith("ssl_"):
                raise InvalidArgument(f"ssl must hold only arguments that start with 'ssl_', got {name!r}")
        shown: object = self.client_name
        if shown is not None and not (isinstance(shown, str) and re.fullmatch(r"[!-~]{1,255}", shown)):
            raise InvalidArgument(
                f"client_name must be 1 to 255 printable ASCII characters without spaces, got {shown!r}"
            )

    def impatient(self, most: float) -> StoreSettings:
        """For connections of which each command is tried once, and waits for at most so many seconds."""
        connect, answer = (min(most, seconds) for seconds in (self.connect_timeout, self.socket_timeout))
        return replace(self, retry_for=0.0, connect_timeout=connect, socket_timeout=answer, durability="none")


def _check_seconds(name: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 86_400:
        raise InvalidArgument(f"{name} must be a number of seconds from {least:g} to 86400, got {value!r}")
