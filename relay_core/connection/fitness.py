"""Whether a server is fit to keep jobs: its version, and that it never throws keys away."""

from __future__ import annotations

import re

from relay_core.errors import RelayError, ServerTooOld, StoreError, UnsafeStore
from relay_core.settings import Durability

QUESTION = ("INFO",)
_REDIS, _VALKEY, _WAITAOF = (7, 0), (7, 2), (7, 2)


def unfit(info: bytes, at: str, durability: Durability) -> RelayError | None:
    """What is wrong with the server that answered INFO so, or None."""
    facts = dict(re.findall(r"^([a-z_]+):(.*?)\r?$", info.decode("utf-8", "replace"), re.MULTILINE))
    # Valkey also reports the Redis version that it started from.
    name = "Valkey" if "valkey_version" in facts else "Redis"
    version = facts.get("valkey_version") or facts.get("redis_version", "0")
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if number < (_VALKEY if name == "Valkey" else _REDIS):
        return ServerTooOld(f"{at}: this is {name} {version}; relay needs Redis 7.0 or Valkey 7.2, or newer")
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        return UnsafeStore(
            f"{at}: maxmemory-policy is {policy!r}, so the server may evict jobs; set it to noeviction "
            "(CONFIG SET maxmemory-policy noeviction, and in the configuration file), or give jobs a server of their "
            "own where this one is a cache, too"
        )
    if durability.aof and number < _WAITAOF:
        return ServerTooOld(f'{at}: durability="aof" needs Redis 7.2 or Valkey 7.2, this is {name} {version}')
    if durability.aof and facts.get("aof_enabled") == "0":
        return StoreError(f'{at}: durability="aof" needs the setting appendonly yes, which is off on the server')
    return None
