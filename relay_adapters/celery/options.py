"""From Celery's settings to a relay broker, which the connections of one process share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from relay_core import Broker, RetryPolicy
from relay_core.errors import InvalidArgument

logger = logging.getLogger("relay.celery")

_BROKER_OPTIONS = frozenset(
    {
        "prefix", "lease", "max_deliveries", "max_payload", "keep_dead", "durability", "durability_timeout",
        "socket_timeout", "connect_timeout", "retry_for", "max_connections", "client_name", "plugins",
    }
)  # fmt: skip

RETRY_FOR = 2.0
"""Seconds for which a command is repeated before Celery's own handling of a lost connection takes over."""

_shared: dict[tuple[Any, ...], Broker] = {}
_lock = threading.Lock()


def url_of(client: Any) -> str:
    """The URL that a kombu Connection was given."""
    hostname = client.hostname or ""
    if client.uri_prefix:
        url = f"{client.uri_prefix}+{hostname}"
    elif "://" in hostname:
        url = hostname
    else:
        login = (
            f"{quote(client.userid or '', safe='')}:{quote(client.password or '', safe='')}@" if client.userid else ""
        )
        port = f":{client.port}" if client.port else ""
        path = (client.virtual_host or "").strip("/")
        url = f"relay://{login}{hostname}{port}" + (f"/{path}" if path else "")
    if client.ssl and url.startswith(("relay:", "relay+")):
        url = url.replace("relay", "relays", 1)
    return url


def broker_options(client: Any) -> dict[str, Any]:
    """What of `broker_transport_options` and `broker_use_ssl` is for the broker. Raises InvalidArgument."""
    given: Mapping[str, Any] = client.transport_options or {}
    options = {name: value for name, value in given.items() if name in _BROKER_OPTIONS}
    options.setdefault("retry_for", RETRY_FOR)
    retry = given.get("retry")
    if isinstance(retry, Mapping):
        options["retry"] = RetryPolicy.from_dict(retry)
    elif retry is not None:
        if not isinstance(retry, RetryPolicy):
            raise InvalidArgument(f"broker_transport_options['retry'] must be a dict or RetryPolicy, got {retry!r}")
        options["retry"] = retry
    order = given.get("priority_order", "amqp")
    if order not in ("amqp", "redis"):
        raise InvalidArgument(f"broker_transport_options['priority_order'] must be 'amqp' or 'redis', got {order!r}")
    if "visibility_timeout" in given:
        logger.debug("visibility_timeout is not needed: leases are extended for as long as a worker lives")
    if isinstance(client.ssl, Mapping):
        options["ssl"] = {name if name.startswith("ssl_") else f"ssl_{name}": v for name, v in client.ssl.items()}
    if client.credential_provider is not None:
        options["credential_provider"] = client.credential_provider
    return options


def shared_broker(client: Any) -> Broker:
    """One broker per URL and options in a process. It is safe in threads and after a fork."""
    url, options = url_of(client), broker_options(client)
    key = (url, repr(sorted(options.items(), key=lambda pair: pair[0])))
    with _lock:
        if key not in _shared:
            _shared[key] = Broker(url, **options)
        return _shared[key]
