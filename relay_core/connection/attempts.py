"""Bring calls through: what is sent, repeated, redirected or given up. No I/O; the shells do the steps.

Every call ends with a result or an error. A call that has a good reply is never sent again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

from relay_core.commands import LongWay
from relay_core.commands.command import Arg
from relay_core.connection import fitness
from relay_core.connection.call import Call, answer_of, raw_call
from relay_core.connection.policy import Policy
from relay_core.connection.replies import (
    ELSEWHERE,
    Judgement,
    Verdict,
    judge_connect,
    judge_cut,
    judge_reply,
    was_closed,
)
from relay_core.connection.steps import Address, Drop, Exchange, Flow, Outcome, Pause
from relay_core.connection.topology import Router
from relay_core.errors import NotDurable, RelayError, StoreError, Unavailable

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5


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
        (call, answer_of(outcome.replies[first:end]))
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
