"""What `relay doctor` looks at. Each check says what it found, and what to do when that is not well."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from relay_core import commands, keys
from relay_core.broker import Broker
from relay_core.cli import replicas
from relay_core.cli.finding import Finding
from relay_core.cli.output import age, plural
from relay_core.cli.version import server_version
from relay_core.errors import (
    EmbeddedError,
    PermissionDenied,
    RelayError,
    ServerTooOld,
    StoreError,
    Unavailable,
    UnsafeStore,
)
from relay_core.job import new_id
from relay_core.operations import Operations
from relay_core.plugins import Plugins
from relay_core.validation import JobSpec

_FULL = 0.9
"""Part of maxmemory in use from which on it is worth a warning."""

_CLOCK_OFF = 1.0
"""Seconds of difference between the clocks that are worth a mention."""


def examine(broker: Broker) -> Iterator[Finding]:
    """All checks, the ones that others need first. Raises Unavailable or EmbeddedError when there is no server."""
    began = time.monotonic()
    try:
        broker.store.raw("PING")
    except (Unavailable, EmbeddedError):
        raise
    except RelayError as error:
        yield from _refused(error)
        return
    yield Finding("reachable", "ok", f"{broker.address().safe()} answered in {age(time.monotonic() - began)}")
    try:
        infos = {node: _facts(reply) for node, reply in broker.store.raw_all("INFO").items()}
    except StoreError as error:
        yield Finding("server", "error", str(error))
        return
    whole = True
    for finding in _attempt("topology", replicas.topology(broker, infos)):
        whole = whole and finding.level != "error"
        yield finding
    yield from _attempt("server", _servers(broker, infos))
    for finding in _attempt("replication", replicas.replication(broker, infos)):
        whole = whole and finding.level != "error"
        yield finding
    if not whole:
        yield Finding("other checks", "info", "not made: mend the error above and ask again")
        return
    yield from _attempt("clock", _clocks(broker))
    yield from _attempt("layout", _layouts(broker))
    yield from _attempt("write", _round_trip(broker))


def _attempt(name: str, check: Iterator[Finding]) -> Iterator[Finding]:
    """A check that the server refuses is an error of its own; the next ones are made all the same."""
    try:
        yield from check
    except StoreError as error:
        yield Finding(name, "error", str(error))


def _refused(error: RelayError) -> Iterator[Finding]:
    """The store itself refuses servers that are not fit, before any other command."""
    names: tuple[tuple[type[RelayError], str], ...] = (
        (UnsafeStore, "eviction"),
        (ServerTooOld, "version"),
        (PermissionDenied, "permission"),
    )
    name = next((name for kind, name in names if isinstance(error, kind)), "reachable")
    if name != "reachable":
        yield Finding("reachable", "ok", "the server answers")
    yield Finding(name, "error", str(error))
    yield Finding("other checks", "info", "not made: mend the error above and ask again")


def _servers(broker: Broker, infos: replicas.Infos) -> Iterator[Finding]:
    for node, info in infos.items():
        at = f"{node}: " if len(infos) > 1 else ""
        mode = info.get("server_mode") or info.get("redis_mode", "unknown")
        yield Finding("version", "ok", f"{at}{server_version(_text(info))}, mode {mode}")
        yield _eviction(at, info)
        yield _memory(at, info)
        yield from _persistence(broker, at, node, info)


def _facts(reply: Any) -> dict[str, str]:
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
    return dict(re.findall(r"^(\w+):(.*?)\r?$", text, re.MULTILINE))


def _text(info: Mapping[str, str]) -> bytes:
    return "\n".join(f"{name}:{value}" for name, value in info.items() if name.endswith("_version")).encode()


def _eviction(at: str, info: Mapping[str, str]) -> Finding:
    policy = info.get("maxmemory_policy")
    if policy is None:
        return Finding("eviction", "warn", f"{at}the server does not tell its maxmemory-policy; it must be noeviction")
    if policy != "noeviction":
        advice = "the server may evict jobs; set maxmemory-policy to noeviction"
        return Finding("eviction", "error", f"{at}maxmemory-policy is {policy}: {advice}")
    return Finding("eviction", "ok", f"{at}maxmemory-policy is noeviction")


def _memory(at: str, info: Mapping[str, str]) -> Finding:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    told = f"{at}{used / 2**20:.1f} MiB in use"
    if not most:
        return Finding("memory", "ok", f"{told}, no maxmemory")
    told += f" of maxmemory {most / 2**20:.1f} MiB"
    if used > _FULL * most:
        advice = "soon enqueue will be refused; raise maxmemory, or work the queues off"
        return Finding("memory", "warn", f"{told}: {advice}")
    return Finding("memory", "ok", told)


def _persistence(broker: Broker, at: str, node: str, info: Mapping[str, str]) -> Iterator[Finding]:
    saves: str | None
    failed = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    if failed:
        detail = f"{at}{' and '.join(failed)}: {info[failed[0]]}; look at the server's log and its disk"
        yield Finding("persistence", "error", detail)
        return
    if info.get("aof_enabled") == "1":
        yield Finding("persistence", "ok", f"{at}appendonly is on")
        return
    try:
        saves = broker.store.raw_all("CONFIG", "GET", "save")[node][1].decode()
    except StoreError:  # managed servers and narrow users may not read the configuration
        saves = None
    if saves:
        advice = "a crash loses what came since the last save; set appendonly yes"
        yield Finding("persistence", "warn", f"{at}appendonly is off, save is {saves!r}: {advice}")
    elif saves is None:
        yield Finding("persistence", "warn", f"{at}appendonly is off, save cannot be read; set appendonly yes")
    else:
        advice = "a restart of the server loses all jobs; set appendonly yes"
        yield Finding("persistence", "warn", f"{at}appendonly and save are off: {advice}")


def _clocks(broker: Broker) -> Iterator[Finding]:
    before = time.time()
    replies = broker.store.raw_all("TIME")
    half = (time.time() - before) / 2
    for node, reply in replies.items():
        at = f"{node}: " if len(replies) > 1 else ""
        server = float(reply[0]) + float(reply[1]) / 1e6
        off = server - (before + half)
        told = f"{at}the server's clock is {age(abs(off))} {'ahead of' if off > 0 else 'behind'} this machine's"
        if abs(off) > _CLOCK_OFF + half:
            told += "; relay goes by the server's, only --at and logs are affected"
        yield Finding("clock", "info", told)


def _layouts(broker: Broker) -> Iterator[Finding]:
    names = broker.queues()
    newer = []
    for name in names:
        found = broker.store.raw("HGET", broker.settings.keys(name).config, "v")
        version = int(found or keys.LAYOUT)
        if version > keys.LAYOUT:
            newer.append(f"{name!r} has layout {version}")
    if newer:
        advice = "it was written by a newer relay; upgrade this one"
        yield Finding("layout", "error", f"{', '.join(newer)}, this relay knows {keys.LAYOUT}: {advice}")
    else:
        yield Finding("layout", "ok", f"{plural(len(names), 'queue')}, none of a layout newer than {keys.LAYOUT}")


def _round_trip(broker: Broker) -> Iterator[Finding]:
    """One job through a queue of its own, which is emptied again: shows that the user may do what workers do.

    Without plugins: one that routes jobs elsewhere would put this one among real ones. The queue is not registered,
    so that no `relay stats` ever shows it.
    """
    plain = Operations(broker.settings, Plugins(installed=False))
    queue = f"relay-doctor-{new_id()}"
    q = broker.settings.keys(queue)
    began = time.monotonic()
    try:
        broker.store.run(commands.enqueue(q, [JobSpec(b"doctor").stored(b"doctor")]))
        jobs = broker.drive(plain.claim([queue]))
        verdicts = broker.drive(plain.ack_many(jobs))
        took = time.monotonic() - began
        if verdicts == [commands.Verdict.DONE]:
            yield Finding("write", "ok", f"a job was stored, claimed and acked in {age(took)}")
        else:
            yield Finding("write", "error", f"a job was stored, but not claimed and acked: {jobs.limited or verdicts}")
    except (StoreError, Unavailable) as error:
        broker.store.raw("PING")  # a server that is away is another finding than one whose memory is full
        yield Finding("write", "error", f"a job could not be stored, claimed and acked: {error}")
    try:
        _empty(broker, q)
    except StoreError as error:
        yield Finding("write", "warn", f"the queue of this check, {queue!r}, could not be emptied: {error}")


def _empty(broker: Broker, q: keys.QueueKeys) -> None:
    """Without DEL, which relay needs nowhere else: a narrow user has no right to it. Empty keys are gone."""
    for pairs in (q.config, q.counters, q.jobs, q.owners):
        if fields := broker.store.raw("HGETALL", pairs)[::2]:
            broker.store.raw("HDEL", pairs, *fields)
    for items in (q.finished, *q.ready):
        broker.store.raw("LTRIM", items, 1, 0)
    for scores in (q.marker, q.leases):
        broker.store.raw("ZPOPMIN", scores)
