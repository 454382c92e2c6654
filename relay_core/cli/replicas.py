"""What `relay doctor` looks at where there is more than one server: who leads, who follows, who may fail over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from relay_core.broker import Broker
from relay_core.cli.finding import Finding
from relay_core.cli.output import as_text, plural
from relay_core.cli.sentinels import sentinels
from relay_core.errors import StoreError

Infos = Mapping[str, Mapping[str, str]]
"""The fields of INFO of each primary, by `host:port`."""

_SLOTS = 16384

_LONELY = ("localhost", "127.", "::1")


def topology(broker: Broker, infos: Infos) -> Iterator[Finding]:
    """How the store is reached, and whether it is whole."""
    url = broker.url
    tls = ", over TLS" if url.tls else ""
    if url.several:
        yield from _cluster(broker, tls)
        return
    ((node, info),) = infos.items()
    if "sentinel" in (info.get("server_mode"), info.get("redis_mode")):
        yield Finding(
            "topology", "error", f"this is a sentinel, which keeps no jobs; use relay+sentinel://{node}/SERVICE"
        )
        return
    if info.get("role", "master") != "master":
        at = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        yield Finding(
            "topology", "error", f"this server is a replica of {at} and takes no writes; use its primary's URL"
        )
        return
    if url.topology == "sentinel":
        told = f"the primary of {url.service!r} is {node}, as sentinels say{tls}"
        yield from sentinels(broker, node, told)
    elif url.topology == "embedded":
        kept = "it ends with its last user unless `relay server start` keeps it"
        detail = f"the embedded server of {url.path}: for one machine, {kept}"
        yield Finding("topology", "info", detail)
    elif url.topology == "unix":
        yield Finding("topology", "ok", "one server, over its unix socket")
    elif not url.tls and not url.hosts[0][0].startswith(_LONELY):
        advice = "passwords and payloads can be read on the way; relays:// uses TLS"
        yield Finding("topology", "info", f"one server, not encrypted: {advice}")
    else:
        yield Finding("topology", "ok", f"one server{tls}")


def _cluster(broker: Broker, tls: str) -> Iterator[Finding]:
    ranges: list[Any] = broker.store.raw("CLUSTER", "SLOTS")
    covered = sum(int(high) - int(low) + 1 for low, high, *_nodes in ranges)
    replicas: dict[str, int] = {}
    for _low, _high, primary, *others in ranges:
        name = f"{as_text(primary[0])}:{int(primary[1])}"
        replicas[name] = max(replicas.get(name, 0), len(others))
    told = f"a cluster of {len(replicas)} {'primary' if len(replicas) == 1 else 'primaries'}{tls}"
    if covered < _SLOTS:
        advice = "queues in the others cannot be used; look at CLUSTER NODES"
        yield Finding("topology", "error", f"{told}: {covered} of {_SLOTS} slots are served: {advice}")
    else:
        yield Finding("topology", "ok", f"{told}, all {_SLOTS} slots are served")
    alone = [name for name, count in replicas.items() if not count]
    if alone:
        advice = "when one fails, its queues stand still until it is back; give each a replica"
        yield Finding("replication", "warn", f"without a replica: {', '.join(alone)}: {advice}")


def replication(broker: Broker, infos: Infos) -> Iterator[Finding]:
    """Whether acknowledged jobs have gone elsewhere when a primary fails."""
    needed = broker.url.topology in ("sentinel", "cluster")
    limits = _limits(broker, infos)
    for node, info in infos.items():
        at = f"{node}: " if len(infos) > 1 else ""
        count = int(info.get("connected_slaves", 0))
        if not count:
            if broker.url.topology == "sentinel":
                advice = "when it fails there is nothing to fail over to; add one"
                yield Finding("replication", "warn", f"{at}no replica is connected: {advice}")
            continue  # a primary of a cluster is told of with the slots
        behind = [name for name, state in _replicas(info) if state != "online"]
        least = limits.get(node)
        told = f"{at}{plural(count, 'replica')}"
        if least is not None and int(info.get("min_slaves_good_slaves", count)) < least:
            advice = "every write is refused; bring replicas up, or lower min-replicas-to-write"
            yield Finding("replication", "error", f"{told}, but min-replicas-to-write is {least}: {advice}")
        elif behind:
            advice = "it gets a copy now, or cannot; look at its log"
            yield Finding("replication", "warn", f"{told}, not in sync: {', '.join(behind)}: {advice}")
        elif least == 0 and needed:
            advice = (
                "a primary that is cut off goes on taking jobs, which are lost when it is replaced; set "
                "min-replicas-to-write 1, min-replicas-max-lag 10. Broker(durability='replica:1') waits for a replica"
            )
            yield Finding("replication", "warn", f"{told}, min-replicas-to-write is 0: {advice}")
        else:
            said = "cannot be read" if least is None else f"is {least}"
            yield Finding("replication", "ok", f"{told} in sync, min-replicas-to-write {said}")


def _replicas(info: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Address and state of each, of lines such as `slave0:ip=…,port=…,state=online,…`."""
    for name, value in info.items():
        if re.fullmatch(r"slave\d+", name):
            facts = dict(part.split("=", 1) for part in value.split(",") if "=" in part)
            yield f"{facts.get('ip', '?')}:{facts.get('port', '?')}", facts.get("state", "unknown")


def _limits(broker: Broker, infos: Infos) -> Mapping[str, int]:
    """min-replicas-to-write by node; without those that do not tell."""
    if not any(int(info.get("connected_slaves", 0)) for info in infos.values()):
        return {}
    try:
        replies = broker.store.raw_all("CONFIG", "GET", "min-replicas-to-write")
        return {node: int(reply[1]) for node, reply in replies.items() if len(reply) == 2}
    except StoreError:  # managed servers and narrow users may not read the configuration
        return {}
