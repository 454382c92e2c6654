"""Bring commands through: what is sent, repeated, redirected or given up. No I/O; the shells do the steps.

Every call ends with a result or an error. A call that has a good reply is never sent again.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from relay_core.clock import sent_now
from relay_core.commands import LongWay
from relay_core.commands.command import Arg, Command, Transacted
from relay_core.connection import fitness
from relay_core.connection.replies import (
    ELSEWHERE,
    Judgement,
    Partly,
    Verdict,
    judge_connect,
    judge_cut,
    judge_reply,
    was_closed,
)
from relay_core.connection.steps import Address, Drop, Exchange, Flow, Outcome, Pause
from relay_core.connection.topology import Router
from relay_core.errors import NotDurable, RelayError, StoreError, Unavailable
from relay_core.scripts import Script
from relay_core.settings import Durability, StoreSettings, parse_durability

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5
FREE_TURNS = 5
"""How often a call is repeated at once (script loaded, slot moved) before that counts as trouble."""

_WAIT = {True: "WAITAOF", False: "WAIT"}
_ADVICE = {
    "OOM": "; the server's memory is full: raise maxmemory or let workers catch up",
    "MISCONF": "; the server cannot save to its disk, see its log",
    "NOREPLICAS": "; the server has fewer good replicas than min-replicas-to-write asks for",
    "READONLY": "; it is a replica: the URL, or the sentinels in it, must name the primary",
    "BUSY": "; a script has been running for too long on the server",
}


class Policy:
    """What the settings say about repeating and confirming."""

    def __init__(self, settings: StoreSettings) -> None:
        """
        :ivar confirm: the command that asks for the confirmation of what was just written; None for none
        """
        self.retry_for = settings.retry_for
        self._until: Callable[[], float] = lambda: math.inf
        self.any_server = settings.any_server
        self.durability: Durability = parse_durability(settings.durability)
        self.timeout = settings.durability_timeout
        wait_ms = max(1, round(settings.durability_timeout * 1000))
        self.confirm: tuple[Arg, ...] | None = None
        if self.durability.aof:
            self.confirm = (_WAIT[True], 1, 0, wait_ms)
        elif self.durability.replicas:
            self.confirm = (_WAIT[False], self.durability.replicas, wait_ms)

    def at_most(self, seconds: float, until: Callable[[], float] | None = None) -> Policy:
        """The same, but that commands are repeated for so long at most, and until that monotonic time, which is asked
        for each time, for it may change."""
        other = copy.copy(self)
        other.retry_for = min(self.retry_for, seconds)
        other._until = until or self._until
        return other

    def left(self, started: float, now: float) -> float:
        """Seconds for which a command that was first sent then is still repeated."""
        return min(started + self.retry_for, self._until()) - now

    def unconfirmed(self, reply: Any, at: Address) -> NotDurable | None:
        """The error for an answer to `confirm` that falls short, else None."""
        if isinstance(reply, Exception):
            return NotDurable(f"{at}: stored, but {_WAIT[self.durability.aof]} was refused: {reply}")
        if self.durability.aof:
            if reply[0] >= 1:
                return None
            return NotDurable(f"{at}: stored, but not on the server's disk within {self.timeout:g} s")
        if reply >= self.durability.replicas:
            return None
        return NotDurable(
            f"{at}: stored, but only {reply} of {self.durability.replicas} replicas confirmed it "
            f"within {self.timeout:g} s"
        )


class Call:
    """One command on its way.

    :ivar transaction: the better way to send it, see `Command.transaction`, where there is one
    :ivar key: what it is routed by; None for any server
    :ivar target: the one server it is for, whatever its key
    :ivar again: True once it came to nothing
    :ivar ask_at: the server that a migrating slot's next send goes to
    :ivar load: True when its script goes along with the next send
    :ivar trouble: why the last send came to nothing; empty if it may be repeated at once
    :ivar answered: True where it was the server that said so
    :ivar resent: True once an earlier send may have run
    :ivar follows: True where an earlier command may have done the same
    :ivar sent_at: `sent_now()` of the first send
    :ivar result: what `parse` made of the reply, once `done`
    :ivar error: what to raise instead, once `done`
    """

    __slots__ = (
        "again",
        "answered",
        "ask_at",
        "done",
        "durable",
        "error",
        "follows",
        "free_turns",
        "key",
        "load",
        "parse",
        "resent",
        "result",
        "script",
        "sent_at",
        "target",
        "transaction",
        "trouble",
        "wire",
    )

    def __init__(
        self,
        wire: Callable[[float | None], tuple[Arg, ...]],
        parse: Callable[[Any, bool], Any],
        *,
        key: bytes | None = None,
        script: Script | None = None,
        durable: bool = False,
        target: Address | None = None,
        sent_at: float | None = None,
        follows: bool = False,
        transaction: Callable[[float | None, bool], list[tuple[Arg, ...]] | None] = lambda _since, _again: None,
    ) -> None:
        self.wire, self.parse, self.key, self.script, self.durable = wire, parse, key, script, durable
        self.target, self.follows, self.transaction = target, follows, transaction
        self.sent_at = sent_now() if sent_at is None else sent_at
        self.resent = self.again = self.done = self.load = self.answered = False
        self.ask_at: Address | None = None
        self.result: Any = None
        self.error: RelayError | None = None
        self.free_turns = FREE_TURNS
        self.trouble = ""

    def wires(self) -> list[tuple[Arg, ...]]:
        """All that is to be sent now."""
        since = self.sent_at if self.resent else None
        if self.ask_at is not None:
            return [("ASKING",), self.wire(since)]  # which is good for one command only
        return self.transaction(since, self.again) or [self.wire(since)]

    def succeed(self, reply: Any) -> None:
        self.done = True
        try:
            self.result = self.parse(reply, self.resent)
        except RelayError as error:
            self.error = error

    def outcome(self) -> Any:
        """The result; raises the error in its place."""
        if self.error is not None:
            raise self.error
        return self.result

    def fail(self, error: RelayError) -> None:
        self.done, self.error = True, error
        if isinstance(error, StoreError) and (self.resent or self.follows):
            error.maybe_executed = True

    def blocked(self, judged: Judgement, at: Address) -> None:
        """Note why it must be repeated after a pause."""
        self.answered = bool(judged.code)
        advice = _ADVICE.get(judged.code, "")
        self.trouble = f"{at}: {judged.text}{advice}"

    def redirected(self, judged: Judgement, at: Address) -> None:
        """Note that it may be repeated at once, unless that goes on for too long."""
        self.free_turns -= 1
        if self.free_turns < 0:
            self.blocked(judged, at)


def call_for(command: Command[Any], sent_at: float | None = None) -> Call:
    """:param sent_at: `sent_now()` of its first send. Default: now"""
    return Call(
        lambda since: ("EVALSHA", *command.wire(since)),
        command.parse,
        key=command.keys[0] if command.keys else None,
        script=command.script,
        durable=command.durable,
        sent_at=sent_at,
        follows=command.since is not None,
        transaction=command.transaction,
    )


def raw_call(args: tuple[Arg, ...], target: Address | None = None) -> Call:
    """A plain command; it is routed by its second word, as most commands name their key there."""
    key = args[1] if len(args) > 1 else None
    return Call(
        lambda since: args,
        lambda reply, resent: reply,
        key=key.encode() if isinstance(key, str) else key if isinstance(key, bytes) else None,
        target=target,
    )


def everywhere(args: tuple[Arg, ...], router: Router, policy: Policy, started: float) -> Flow[dict[str, Call]]:
    """The same plain command on every primary; by address."""
    probe = raw_call(("PING",))
    yield from settle([probe], router, policy, started)
    if probe.error is not None:
        return {"": probe}
    calls = {str(address): raw_call(args, address) for address in router.primaries()}
    yield from settle(list(calls.values()), router, policy, started)
    return calls


def find(keys: Iterable[bytes], router: Router, policy: Policy) -> Flow[dict[bytes, Address | RelayError]]:
    """The server for each key, found fit; what stands in the way in its place. Tries once."""
    error = yield from router.discover()
    found: dict[bytes, Address | RelayError] = {}
    looked_at: dict[Address, Address | RelayError] = {}
    for key in keys:
        address = router.address(key)
        if error is not None or address is None:
            found[key] = error or Unavailable(router.reason())
            continue
        if address not in looked_at:
            judged = yield from _look_at(address, router, policy)
            looked_at[address] = address
            if judged is not None:
                looked_at[address] = judged.error or Unavailable(f"{address}: {judged.text}")
        found[key] = looked_at[address]
    return found


def locate(keys: Iterable[bytes], router: Router, policy: Policy) -> Flow[dict[bytes, Address]]:
    """The same, but raises what stands in the way."""
    found: dict[bytes, Address] = {}
    for key, place in (yield from find(keys, router, policy)).items():
        if isinstance(place, RelayError):
            raise place
        found[key] = place
    return found


def settle(
    calls: Sequence[Call],
    router: Router,
    policy: Policy,
    started: float,
    first: tuple[Address, Outcome] | None = None,
) -> Flow[None]:
    """Send and repeat until every call is done, or until `policy.retry_for` has passed since `started`.

    :param started: `time.monotonic()` of the first send
    :param first: how a first send of the calls to that server already ended
    """
    pause = FIRST_PAUSE
    if first is None:
        yield from _round(calls, router, policy)
    else:
        pairs = list(zip(calls, first[1].replies, strict=False))
        yield from _take_in(calls, pairs, first[1], first[0], router)
    while pending := [call for call in calls if not call.done]:
        if any(call.trouble for call in pending):
            now = time.monotonic()
            left = policy.left(started, now)
            if left <= 0:
                for call in pending:
                    if call.trouble:
                        call.fail(_given_up(call, now - started))
                continue
            yield Pause(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(LONGEST_PAUSE, 2 * pause)
        for call in pending:
            call.again = True
        yield from _round(pending, router, policy)


def _given_up(call: Call, seconds: float) -> Unavailable:
    done = "it may have been executed" if call.resent else "it was not executed"
    tried = f"tried for {seconds:.1f} s, " if seconds >= 0.05 else ""
    return Unavailable(f"{call.trouble} ({tried}{done})", maybe_executed=call.resent, answered=call.answered)


def _round(calls: Sequence[Call], router: Router, policy: Policy) -> Flow[None]:
    """One send of each call, grouped by server."""
    for call in calls:
        call.trouble, call.answered = "", False
    error = yield from router.discover()
    if error is None and router.kind == "cluster" and not router.checked:
        error = yield from _look_at_all(router, policy)
    groups: dict[Address, list[Call]] = {}
    for call in calls:
        address = call.ask_at or call.target or router.address(call.key)
        if error is not None:
            call.fail(error)
        elif address is None:
            call.trouble = router.reason()
            router.doubtful = True
        else:
            groups.setdefault(address, []).append(call)
    # one that is in doubt may keep its callers waiting, those of the others too
    for address, group in sorted(groups.items(), key=lambda item: item[0] not in router.checked):
        judged = yield from _look_at(address, router, policy)
        if judged is None:
            yield from _send(address, group, router, policy)
            continue
        for call in group:
            if judged.verdict is Verdict.PERMANENT and judged.error is not None:
                call.fail(judged.error)
            else:
                call.blocked(judged, address)


def _look_at_all(router: Router, policy: Policy) -> Flow[RelayError | None]:
    """Look at all primaries of a cluster, as any may hold a queue later. Those that are down come later."""
    for address in router.primaries():
        judged = yield from _look_at(address, router, policy)
        if judged is not None and judged.error is not None:
            router.checked = frozenset()
            return judged.error
    return None


def _look_at(address: Address, router: Router, policy: Policy) -> Flow[Judgement | None]:
    """Find out once whether a server is fit. None if it is."""
    if policy.any_server or address in router.checked:
        return None
    outcome: Outcome = yield Exchange(address, [fitness.QUESTION])
    if outcome.failure is not None:
        yield from _lost(address, router)
        if outcome.sent and was_closed(outcome.failure):
            # It was an idle connection that the server had closed, most likely: a new one tells.
            outcome = yield Exchange(address, [fitness.QUESTION])
    if outcome.failure is not None:
        judged = (judge_cut if outcome.sent else judge_connect)(outcome.failure, str(address))
        if judged.verdict is Verdict.PERMANENT:
            return judged
        # The question changes nothing, whether it was executed or not.
        return judged._replace(verdict=Verdict.NOT_EXECUTED, text=judged.text + router.hint(outcome.failure))
    reply = outcome.replies[0]
    if isinstance(reply, Exception):
        return judge_reply(reply, str(address))
    error = fitness.unfit(reply, str(address), policy.durability)
    if error is not None:
        return Judgement(Verdict.PERMANENT, str(error), error=error)
    router.found_fit(address)
    return None


def _send(address: Address, group: Sequence[Call], router: Router, policy: Policy) -> Flow[None]:
    """One pipeline to one server: scripts it lacks, the calls, and the request for confirmation."""
    wires: list[tuple[Arg, ...]] = []
    spans: list[tuple[Call, int, int]] = []
    for script in {call.script.sha: call.script for call in group if call.load and call.script}.values():
        wires.append(("SCRIPT", "LOAD", script.text))
    ahead = len(wires)
    for call in group:
        first = len(wires)
        wires += call.wires()
        spans.append((call, first, len(wires)))
    confirm = policy.confirm if any(call.durable for call in group) else None
    if confirm is not None:
        wires.append(confirm)
    outcome: Outcome = yield Exchange(address, wires)
    for reply in outcome.replies[:ahead]:
        judged = judge_reply(reply, str(address)) if isinstance(reply, Exception) else None
        if judged is not None and judged.verdict is Verdict.PERMANENT and judged.error is not None:
            for call in group:
                if call.load:
                    call.fail(judged.error)
    pairs = [
        (call, _answer(outcome.replies[first:end]))
        for call, first, end in spans
        if end <= len(outcome.replies) and not call.done
    ]
    if confirm is None:
        yield from _take_in(group, pairs, outcome, address, router)
    elif len(outcome.replies) < len(wires):
        # Executed or not, nothing tells that it was confirmed: repeat it, which stores nothing twice.
        unsure = [(call, reply) for call, reply in pairs if isinstance(reply, Exception) or not call.durable]
        yield from _take_in(group, unsure, outcome, address, router)
    else:
        yield from _take_in(group, pairs, outcome, address, router, policy.unconfirmed(outcome.replies[-1], address))


def answered(outcome: Outcome, count: int) -> Outcome:
    """How the one command ended whose wires were so many."""
    outcome.replies = [_answer(outcome.replies)] if len(outcome.replies) == count else []
    return outcome


def _answer(replies: Sequence[Any]) -> Any:
    """The reply that counts, of those to the wires of one call: the last, or what kept a transaction from all of it."""
    if len(replies) < 3:
        return replies[-1]  # before it may be that to ASKING
    done = replies[-1]
    if isinstance(done, Exception):
        return next(reply for reply in replies if isinstance(reply, Exception))
    for reply in done:
        if isinstance(reply, Exception):
            return Partly(reply)
    return Transacted(done)


def _take_in(
    group: Sequence[Call],
    pairs: Sequence[tuple[Call, Any]],
    outcome: Outcome,
    address: Address,
    router: Router,
    unconfirmed: NotDurable | None = None,
) -> Flow[None]:
    """Hand the replies to their calls, and note for the calls without one what to do about it."""
    lost = outcome.failure is not None
    unanswered = dict.fromkeys(group)
    for call, reply in pairs:
        del unanswered[call]
        asked, call.load, call.ask_at = call.ask_at, False, None
        if isinstance(reply, Exception):
            judged = judge_reply(reply, str(address))
            lost |= judged.code in ELSEWHERE
            if judged.verdict is Verdict.NO_SCRIPT:
                call.ask_at = asked  # the script is missing there, so it must be loaded there
            _judge(call, judged, address, router)
        else:
            call.succeed(reply)
            # a script that did nothing has stored nothing to confirm
            if unconfirmed is not None and call.durable and not isinstance(call.result, LongWay):
                call.fail(unconfirmed)
    if outcome.failure is not None:
        judged = (judge_cut if outcome.sent else judge_connect)(outcome.failure, str(address))
        for call in unanswered:
            if not call.done:
                call.ask_at = None
                _judge(call, judged, address, router)
    if lost:
        yield from _lost(address, router)


def _lost(address: Address, router: Router) -> Flow[None]:
    router.doubt(address)
    yield Drop((address,))


def _judge(call: Call, judged: Judgement, address: Address, router: Router) -> None:
    verdict = judged.verdict
    if verdict is Verdict.NO_SCRIPT and call.script is not None:
        call.load = True
        call.redirected(judged, address)
    elif judged.slot is not None and router.kind == "cluster":
        slot, host, port = judged.slot
        owner = Address(host or address.host, port)
        if verdict is Verdict.MOVED:
            router.moved(slot, owner)
        else:
            call.ask_at = owner
        call.redirected(judged, address)
    elif verdict is Verdict.NOT_EXECUTED or verdict is Verdict.UNKNOWN:
        call.resent |= verdict is Verdict.UNKNOWN
        call.blocked(judged, address)
    else:
        call.fail(judged.error or StoreError(f"{address}: {judged.text}"))
