"""One command on its way: what is sent for it now, and what became of it so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from relay_core.clock import sent_now
from relay_core.commands.command import Arg, Command, Transacted
from relay_core.connection.replies import Judgement, Partly
from relay_core.connection.steps import Address, Outcome
from relay_core.errors import RelayError, StoreError
from relay_core.scripts import Script

FREE_TURNS = 5
"""How often a call is repeated at once (script loaded, slot moved) before that counts as trouble."""

_ADVICE = {
    "OOM": "; the server's memory is full: raise maxmemory or let workers catch up",
    "MISCONF": "; the server cannot save to its disk, see its log",
    "NOREPLICAS": "; the server has fewer good replicas than min-replicas-to-write asks for",
    "READONLY": "; it is a replica: the URL, or the sentinels in it, must name the primary",
    "BUSY": "; a script has been running for too long on the server",
}


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


def answered(outcome: Outcome, count: int) -> Outcome:
    """How the one command ended whose wires were so many."""
    outcome.replies = [answer_of(outcome.replies)] if len(outcome.replies) == count else []
    return outcome


def answer_of(replies: Sequence[Any]) -> Any:
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
