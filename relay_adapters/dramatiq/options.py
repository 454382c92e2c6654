"""Options of Dramatiq's RedisBroker and RabbitmqBroker, and what stands for them here."""

from __future__ import annotations

from collections.abc import Iterable

from relay_core.broker_base import OPTIONS
from relay_core.options import refuse_unknown

_OWN = ("middleware", "plugins", "metrics_addr", "metrics_tasks")

_URL = "write it into url: relay://user:password@host:port/db"
_BY_ITSELF = "leave it out: leases that are over end by themselves, within a second"
_RETRY = "commands are repeated for retry_for seconds"

_INSTEAD = {
    **dict.fromkeys(("host", "port", "db", "username", "password"), _URL),
    "unix_socket_path": "write it into url: relay+unix:///path?db=0",
    **dict.fromkeys(("client", "connection_pool"), "relay makes its own connections: give url"),
    "namespace": "it is prefix here",
    "heartbeat_timeout": "it is lease here, in seconds",
    "dead_message_ttl": "it is keep_dead here, in seconds",
    **dict.fromkeys(("maintenance_chance", "requeue_deadline", "requeue_interval"), _BY_ITSELF),
    "socket_connect_timeout": "it is connect_timeout here",
    **dict.fromkeys(("retry_on_timeout", "retry_on_error"), _RETRY),
    **dict.fromkeys(("socket_keepalive", "socket_keepalive_options"), "leave it out: TCP keepalive is on"),
    "health_check_interval": "leave it out: a connection is looked at before it is used after a rest",
}

_OF_RABBITMQ = {
    "max_priority": "leave it out: broker_priority goes from 0 to 9, and what is over 9 counts as 9",
    "confirm_delivery": "leave it out: a send returns when the store has the message, and durability asks for more",
    "parameters": "give url; several servers are relay+sentinel:// or relay+cluster://",
    "virtual_host": "prefix keeps brokers apart here",
    "credentials": _URL,
    "heartbeat": "leave it out: leases are extended by themselves, see lease",
    **dict.fromkeys(("connection_attempts", "retry_delay", "blocked_connection_timeout"), _RETRY),
    "ssl_options": "write relays:// in url, and what else it takes as ssl={'ssl_ca_certs': ...}",
}


def check_options(given: Iterable[str]) -> None:
    """Raises TypeError for an option that is none, with relay's counterpart of one of Dramatiq's brokers."""
    for name in given:
        if name in OPTIONS:
            continue
        if name in _OF_RABBITMQ:
            raise TypeError(f"RelayBroker has no option {name!r} of RabbitmqBroker; {_OF_RABBITMQ[name]}")
        if name.startswith("ssl_"):
            raise TypeError(f"RelayBroker has no option {name!r}; write it as ssl={{{name!r}: ...}}")
        if name in _INSTEAD:
            raise TypeError(f"RelayBroker has no option {name!r} of RedisBroker; {_INSTEAD[name]}")
        refuse_unknown("RelayBroker", [name], OPTIONS.union(_OWN))
