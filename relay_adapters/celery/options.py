"""From Celery's settings to a relay broker, which the connections of one process share."""

from __future__ import annotations

import difflib
import logging
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from kombu.utils.imports import symbol_by_name

from relay_adapters.celery.outcomes.burial import Burial
from relay_adapters.celery.plugin import prefix_of
from relay_adapters.celery.workerstate import is_worker
from relay_core import Broker, RetryPolicy
from relay_core.connection import forks
from relay_core.errors import InvalidArgument, InvalidUrl, RelayError
from relay_core.settings import DEFAULT_LEASE, parse_url

logger = logging.getLogger("relay.celery")

_WHERE = "broker_transport_options"

_BROKER_OPTIONS = frozenset(
    {
        "prefix", "lease", "max_deliveries", "max_payload", "keep_dead", "durability", "durability_timeout",
        "socket_timeout", "connect_timeout", "retry_for", "max_connections", "client_name", "plugins",
    }
)  # fmt: skip

_ADAPTER_OPTIONS = frozenset(
    {
        "retry",
        "queue_retry",
        "priority_order",
        "queue_order_strategy",
        "visibility_timeout",
        "deadletter_queue",
        "metrics_addr",
        "metrics_tasks",
        "credential_provider",
        "global_keyprefix",
        "socket_connect_timeout",
    }
)

_ELSEWHERE = frozenset(
    {
        # kombu's own, and the publish retry policy, which kombu puts there itself
        "max_retries", "interval_start", "interval_step", "interval_max", "retry_errors", "errback", "on_revive",
        "timeout", "confirm_publish", "confirm_timeout", "body_encoding", "polling_interval", "client_properties",
        # of kombu's redis and amqp transports, where they mean what relay does without, or by other means
        "ack_emulation", "fanout_prefix", "fanout_patterns", "sep", "priority_steps",
        "unacked_key", "unacked_index_key", "unacked_mutex_key", "unacked_mutex_expire", "unacked_restore_limit",
        "unacked_restore_interval", "unacked_restore_throttle", "reauth_check_interval", "sentinel_fanout_compat",
        "socket_keepalive", "socket_keepalive_options",
        "retry_on_timeout", "health_check_interval", "master_name", "sentinel_kwargs", "min_other_sentinels",
        "login_method", "read_timeout", "write_timeout", "queue_name_prefix", "heartbeat", "channel_max", "frame_max",
        "locale", "on_blocked", "on_unblocked", "socket_settings",
        "max_client_connections", "keyprefix_queue", "keyprefix_fanout", "connection_errors",
    }
)  # fmt: skip

RETRY_FOR = 2.0
"""Seconds for which a command is repeated before Celery's own handling of a lost connection takes over."""

RETRY_IN_LIST = 0.25
"""The same where that has another broker to turn to. Workers leave the one that is away at once, and the tasks of
producers that are much later would lie where nobody looks."""

_shared: dict[tuple[str, str], Broker] = {}
_lock = forks.Lock()
_said: set[tuple[int, str]] = set()


def is_relay(url: str) -> bool:
    """Whether this is a URL of a broker of relay's."""
    return url.startswith(("relay:", "relays:", "relay+", "relays+"))


def url_of(client: Any) -> str:
    """The URL that a kombu Connection was given, or has switched to."""
    hostname = str(client.hostname or "")
    if is_relay(hostname):
        url = hostname
    elif client.uri_prefix and hostname.find("://") >= 0:
        url = f"{client.uri_prefix}+{hostname}"
    else:
        url = _from_parts(client, hostname)
    return _secured(client, url)


def urls_of(client: Any) -> list[str]:
    """Those of relay's that it may switch to, its own among them."""
    return [_secured(client, str(url)) for url in client.alt or () if is_relay(str(url))] or [url_of(client)]


def _secured(client: Any, url: str) -> str:
    return url.replace("relay", "relays", 1) if client.ssl and url.startswith(("relay:", "relay+")) else url


def _from_parts(client: Any, hostname: str) -> str:
    """Of a connection that was given host, port and the like apart."""
    password = client.password() if callable(client.password) else client.password
    login = ""
    if client.userid or password:
        login = f"{quote(client.userid or '', safe='')}:{quote(password or '', safe='')}@"
    port = f":{client.port}" if client.port else ""
    path = (client.virtual_host or "").strip("/")
    return f"relay://{login}{hostname}{port}" + (f"/{path}" if path else "")


def safe_url(client: Any, include_password: bool, mask: str) -> str:
    """The URL for people."""
    url = url_of(client)
    return url if include_password else safe_text(url, mask)


def safe_text(url: str, mask: str = "**") -> str:
    """A relay URL without its credentials. One that cannot be read is not shown: a password may be anywhere in it."""
    try:
        return parse_url(url).safe().replace("***", mask)
    except RelayError:
        return f"{url.partition('://')[0]}://{mask}"


def options_of(client: Any) -> dict[str, Any]:
    """What of `broker_transport_options`, `broker_use_ssl` and the credential provider is for the broker.

    Raises InvalidArgument, which names the option.
    """
    given: Mapping[str, Any] = client.transport_options or {}
    _check_names(given)
    options = {name: value for name, value in given.items() if name in _BROKER_OPTIONS}
    if "prefix" not in given and (prefix := prefix_of(given.get("global_keyprefix") or "")) is not None:
        options["prefix"] = _checked(prefix)
    if "connect_timeout" not in given and given.get("socket_connect_timeout") is not None:
        options["connect_timeout"] = given["socket_connect_timeout"]
    options.setdefault("retry_for", RETRY_IN_LIST if len(client.alt or ()) > 1 else RETRY_FOR)
    if "retry" in given:
        options["retry"] = _policy("['retry']", given["retry"])
    if "queue_retry" in given:
        if not isinstance(given["queue_retry"], Mapping):
            raise InvalidArgument(f"{_WHERE}['queue_retry'] must map queues to policies, got {given['queue_retry']!r}")
        options["queue_retry"] = {q: _policy(f"['queue_retry'][{q!r}]", p) for q, p in given["queue_retry"].items()}
    order = given.get("priority_order", "amqp")
    if order not in ("amqp", "redis"):
        wanted = "'amqp' (9 first) or 'redis' (0 first)"
        raise InvalidArgument(f"{_WHERE}['priority_order'] must be {wanted}, got {order!r}")
    if "priority_steps" in given and "priority_order" not in given:
        say_once(
            f"{_WHERE}['priority_steps'] is of kombu's Redis transport, where priority 0 is first; on relay 9 is "
            "first, unless you set 'priority_order': 'redis'; setting 'amqp' keeps it so, and ends this warning"
        )
    _check_timeouts(given)
    if isinstance(client.ssl, Mapping):
        options["ssl"] = _tls(client.ssl)
    provider = given.get("credential_provider")
    if provider is None:
        provider = getattr(client, "credential_provider", None)  # older kombu has none
    if provider is not None:
        options["credential_provider"] = _provider(provider)
    return options


def _checked(prefix: str) -> str:
    """Apps that kombu's redis transport keeps apart by a key prefix stay apart."""
    if not prefix.isprintable() or set(prefix) & set("{} "):
        raise InvalidArgument(
            f"{_WHERE}['global_keyprefix'] becomes the beginning of relay's prefix, which has no braces or spaces, got "
            f"{prefix.removesuffix('relay')!r}; give 'prefix' instead"
        )
    return prefix


def _check_names(given: Mapping[str, Any]) -> None:
    known = _BROKER_OPTIONS | _ADAPTER_OPTIONS
    for name in given:
        if name == "visibility_timeout":
            say_once(
                f"{_WHERE}['visibility_timeout'] has no effect on relay: a worker extends the leases of its messages "
                "for as long as it lives, and a dead worker's tasks run elsewhere once they end; see 'lease'",
                # it matters to workers: cron sends mail of what a script prints, as a warning is where nothing logs,
                # and a scheduler that forks to send would say it with each batch
                logging.WARNING if is_worker() else logging.DEBUG,
            )
        if name in known or name in _ELSEWHERE:
            continue
        near = difflib.get_close_matches(name, sorted(known), 1, 0.75)
        if near:
            raise InvalidArgument(f"{_WHERE} has no option {name!r}; did you mean {near[0]!r}?")
        say_once(f"{_WHERE}[{name!r}] is not known to relay, and has no effect; known: {', '.join(sorted(known))}")


def _check_timeouts(given: Mapping[str, Any]) -> None:
    """On Redis they may be as long as one likes."""
    lease = given.get("lease", DEFAULT_LEASE)
    for name in ("socket_timeout", "connect_timeout", "socket_connect_timeout"):
        seconds = given.get(name)
        if isinstance(seconds, (int, float)) and isinstance(lease, (int, float)) and seconds >= lease:
            say_once(
                f"{_WHERE}[{name!r}] is {seconds:g} s, and 'lease' {lease:g} s: where the network goes silent, a "
                "worker's leases run out before it knows, and its tasks run elsewhere, too; make it shorter"
            )


def say_once(text: str, level: int = logging.WARNING) -> None:
    """Log it, once per process, and again where it has become more urgent."""
    if (level, text) not in _said:
        _said.add((level, text))
        logger.log(level, text)


def _policy(where: str, value: Any) -> RetryPolicy:
    if isinstance(value, RetryPolicy):
        return value
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{_WHERE}{where} must be a dict or a RetryPolicy, got {value!r}")
    known = RetryPolicy.__slots__
    for field in value:
        if field not in known:
            raise InvalidArgument(f"{_WHERE}{where} has no field {field!r}; known: {', '.join(known)}")
    try:
        return RetryPolicy(**value)
    except InvalidArgument as error:
        raise InvalidArgument(f"{_WHERE}{where}: {error}") from error


def _tls(given: Mapping[str, Any]) -> dict[str, Any]:
    """`broker_use_ssl`, with redis-py's names or those of Python's ssl module."""
    renamed = {"keyfile": "ssl_keyfile", "certfile": "ssl_certfile", "ca_certs": "ssl_ca_certs"}
    found = {renamed.get(n, n if n.startswith("ssl_") else f"ssl_{n}"): value for n, value in given.items()}
    level = found.get("ssl_cert_reqs")
    if isinstance(level, ssl.VerifyMode):
        found["ssl_cert_reqs"] = level.name.removeprefix("CERT_").lower()
    elif isinstance(level, str):
        found["ssl_cert_reqs"] = level.removeprefix("CERT_").lower()
    return found


_providers: dict[Any, tuple[Any, Any]] = {}


def _provider(given: Any) -> Any:
    """What is called at each connect, the same each time for the same provider, which may be one that has no hash."""
    key = given if isinstance(given, str) else id(given)
    if key not in _providers:
        if len(_providers) >= 100:  # of a program that makes one per app
            _providers.clear()
        _providers[key] = given, _called(given)  # kept, so that no other one has its id
    return _providers[key][1]


def _called(given: Any) -> Any:
    """redis-py's providers, which kombu takes, have a method; both kinds may be named by their dotted path, as kombu
    allows."""
    if isinstance(given, str):
        given = symbol_by_name(given)()
    method = getattr(given, "get_credentials", None)
    if method is None:
        return given

    def credentials() -> tuple[str | None, str]:
        found = method()
        return (None, found[0]) if len(found) == 1 else (found[0], found[1])

    return credentials


def broker_at(url: str, options: Mapping[str, Any]) -> Broker:
    """One broker per URL and options in a process. It is safe in threads and after a fork.

    Raises InvalidArgument and InvalidUrl.
    """
    key = (url, repr(sorted(options.items())))
    with _lock:
        if key not in _shared:
            burial = Burial()
            try:
                burial.broker = Broker(url, **{**options, "plugins": (*options.get("plugins", ()), burial)})
                _shared.setdefault(key, burial.broker)  # a signal's handler may have been faster
            except InvalidUrl:
                raise
            except InvalidArgument as error:
                raise InvalidArgument(f"{_WHERE}: {error}") from error
        return _shared[key]


def shared_broker(client: Any) -> Broker:
    """The broker of a connection."""
    return broker_at(url_of(client), options_of(client))
