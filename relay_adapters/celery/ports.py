"""`kombu.Connection.port`. kombu leaves relay's URLs whole, see Transport.can_parse_url, and would know none."""

from __future__ import annotations

from typing import Any

from relay_adapters.celery.options import is_relay
from relay_core.errors import RelayError
from relay_core.settings import parse_url


class _Port:
    """Of the URL that a connection has, or has switched to, where it is relay's; else as kombu sets it."""

    def __get__(self, connection: Any, owner: Any = None) -> int | None:
        known = {} if connection is None else vars(connection)
        url = str(known.get("hostname") or "")
        return _port_of(url) if is_relay(url) else known.get("port")

    def __set__(self, connection: Any, port: int | None) -> None:
        vars(connection)["port"] = port


def install(kind: Any) -> None:
    """For kombu's Connection. Repeating it is harmless."""
    if not isinstance(vars(kind).get("port"), _Port):
        kind.port = _Port()


def _port_of(url: str) -> int | None:
    """The first one. None for a socket's path, and for what cannot be read."""
    try:
        hosts = parse_url(url).hosts
    except RelayError:
        return None
    return hosts[0][1] if hosts else None
