"""What `relay doctor` asks every sentinel that the URL names: who answers, do they agree, may they fail over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay_core.broker import Broker
from relay_core.cli.finding import Finding
from relay_core.cli.output import as_text, plural


@dataclass(slots=True)
class Said:
    """What one sentinel answered.

    :ivar trouble: why it told nothing; empty where it did
    :ivar primary: `host:port`, or None where it does not know the service
    :ivar quorum: why a failover would not come about; None where it would, or where the sentinel did not say
    :ivar asked: False where its user may not ask for the quorum
    :ivar others: addresses of the other sentinels that it knows
    """

    name: str
    trouble: str = ""
    primary: str | None = None
    quorum: str | None = None
    asked: bool = True
    others: Sequence[str] = field(default=())


def sentinels(broker: Broker, node: str, told: str) -> Iterator[Finding]:
    """Findings on the sentinels of the URL.

    :param node: the primary that the store is used by, `host:port`
    :param told: how the store is reached, to which is added how many sentinels the URL names
    """
    service = broker.url.service
    said = [_said(name, answer) for name, answer in broker.store.ask_sentinels(*_questions(service)).items()]
    yield _named(said, told)
    findings = [*_silent(said), *_ignorant(said, service), *_apart(said, node), *_quorum(said, service)]
    yield from findings
    untold = [one.name for one in said if not one.trouble and not one.asked]
    if untold:
        rights = "+sentinel|ckquorum +sentinel|sentinels"
        detail = f"{', '.join(untold)}: the user may not ask whether a failover would come about; {rights} lets it"
        yield Finding("sentinels", "info", detail)
    elif not findings:
        agree = "agree on the primary, and" if len(said) > 1 else "answers, and"
        see = "see" if len(said) > 1 else "sees"
        yield Finding("sentinels", "ok", f"{plural(len(said), 'sentinel')} {agree} {see} enough others for a failover")


def _questions(service: str) -> tuple[tuple[str, ...], ...]:
    asked = ("GET-MASTER-ADDR-BY-NAME", "CKQUORUM", "SENTINELS")
    return tuple(("SENTINEL", what, service) for what in asked)


def _said(name: str, answer: Sequence[Any] | str) -> Said:
    if isinstance(answer, str):
        return Said(name, answer)
    primary, quorum, others = list(answer)
    said = Said(name)
    if isinstance(primary, Exception):
        said.trouble = str(primary)
    elif isinstance(primary, list) and len(primary) == 2:
        said.primary = f"{as_text(primary[0])}:{as_text(primary[1])}"
    if isinstance(quorum, Exception):
        if _is_forbidden(quorum):
            said.asked = False
        elif said.primary is not None:
            said.quorum = str(quorum)
    if isinstance(others, Exception):
        said.asked = said.asked and not _is_forbidden(others)
    else:
        facts = [dict(zip(map(as_text, row[::2]), map(as_text, row[1::2]), strict=False)) for row in others or ()]
        said.others = [f"{one.get('ip', '?')}:{one.get('port', '?')}" for one in facts]
    return said


def _silent(said: Sequence[Said]) -> Iterator[Finding]:
    silent = [one for one in said if one.trouble]
    if silent:
        # each says with its address what is wrong
        advice = "who starts asks it in vain; bring it back, or name another"
        yield Finding("sentinels", "warn", f"{'; '.join(one.trouble for one in silent)}: {advice}")


def _ignorant(said: Sequence[Said], service: str) -> Iterator[Finding]:
    names = [one.name for one in said if not one.trouble and one.primary is None]
    if names:
        advice = "it watches other servers; name the sentinels that do"
        yield Finding("sentinels", "warn", f"{', '.join(names)}: no service {service!r} is known there: {advice}")


def _apart(said: Sequence[Said], node: str) -> Iterator[Finding]:
    named: dict[str, list[str]] = {}
    for one in said:
        if one.primary is not None:
            named.setdefault(one.primary, []).append(one.name)
    if len(named) > 1:
        listed = "; ".join(f"{primary} say {', '.join(names)}" for primary, names in named.items())
        advice = (
            "after a failover they agree within seconds; where they do not, workers of one store are on two, and "
            "what one of these took is lost: look at SENTINEL MASTERS of each"
        )
        yield Finding("sentinels", "warn", f"they do not agree on the primary: {listed}: {advice}")
    elif named and node not in named:
        (primary,) = named
        detail = f"they now say that the primary is {primary}, and a moment ago it was {node}: a failover; ask again"
        yield Finding("sentinels", "warn", detail)


def _quorum(said: Sequence[Said], service: str) -> Iterator[Finding]:
    for one in said:
        if one.quorum is not None:
            advice = f"when the primary fails nobody takes over; bring the other sentinels of {service!r} back"
            yield Finding("sentinels", "warn", f"{one.name}: {one.quorum}: {advice}")


def _named(said: Sequence[Said], told: str) -> Finding:
    """How many of them the URL names. The others are of no use to who starts while these are away."""
    names, known = [one.name for one in said], list(dict.fromkeys(other for one in said for other in one.others))
    total = max(len(names), 1 + max((len(one.others) for one in said), default=0))
    others = [other for other in known if other not in names]
    told += f"; the URL names {len(names)}" + (f" of {total}" if total > len(names) else "")
    if total > len(names) and others:
        # a sentinel gives addresses as others see them, which may be other ones than the URL has
        more = "the others are" if len(others) == total - len(names) else "all that are known to these are"
        told += f", {more} {', '.join(others)}"
    if len(names) > 1:
        return Finding("topology", "ok", told)
    advice = "who starts while it is away finds no primary; name all sentinels"
    return Finding("topology", "warn", f"{told}: {advice}")


def _is_forbidden(error: Exception) -> bool:
    return "NOPERM" in str(error) or "no permissions" in str(error).lower()
