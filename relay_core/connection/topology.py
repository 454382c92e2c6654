"""Which server to ask: fixed, as the sentinels say, or by the slot of the key. No I/O."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from typing import Any

from redis.crc import key_slot

from relay_core.connection.replies import Verdict, judge_connect, judge_cut, judge_reply, tls_hint
from relay_core.connection.steps import Address, Drop, Exchange, Flow, Outcome
from relay_core.errors import AuthError, PermissionDenied, RelayError
from relay_core.settings import StoreUrl

SLOTS = 16384
ASK_AGAIN = 1.0
"""Seconds after which the next command asks a sentinel whether the primary is still the same. In a planned
failover the old one takes writes for seconds more, all of which are lost when it becomes a replica."""
MOST_DOUBLINGS = 3
"""How often that is doubled while no sentinel answers: each question to one that is silent holds up a command."""


class Router:
    """What is known of a store's servers. Shared by the threads of a store; each change is one assignment.

    :ivar checked: servers whose version and settings were found fit, see `check`
    :ivar doubtful: True when the topology must be asked for before the next command
    :ivar why: what stood in the way when it was last asked for
    """

    def __init__(self, url: StoreUrl, pause: float = 0.0) -> None:
        """:param pause: seconds for which what the nodes of a cluster said last is believed, even in doubt"""
        self.url = url
        self._pause = pause
        self._believed_until = 0.0
        self.kind = url.topology
        seeds = [Address(host, port) for host, port in url.hosts]
        self._seeds = seeds if self.kind != "unix" else [Address(url.path, 0)]
        fixed = self.kind in ("standalone", "unix")
        self._primary: Address | None = self._seeds[0] if fixed else None
        self._slots: list[Address | None] = []
        self.checked: frozenset[Address] = frozenset()
        self._met_one = False
        self.doubtful = not fixed
        self.why = "not asked yet"
        self._ask_at = math.inf
        self._unheard = 0  # questions in a row that no sentinel answered

    def ready(self, key: bytes, now: float) -> Address | None:
        """The server for a key if it may be used at once, else None. On the path of every command."""
        if self.doubtful or now > self._ask_at:
            return None
        address = self._primary if self._primary is not None else self._slots[key_slot(key)]
        return address if address in self.checked else None

    def address(self, key: bytes | None) -> Address | None:
        """The server for a key, any one for None; None if no server is known to serve it."""
        if self._primary is not None or not self._slots:
            return self._primary
        if key is not None:
            return self._slots[key_slot(key)]
        known = self.primaries()
        return random.choice(known) if known else None

    def primaries(self) -> list[Address]:
        """Every server that takes writes, as far as known."""
        if self._primary is not None:
            return [self._primary]
        return list(dict.fromkeys(address for address in self._slots if address is not None))

    def reason(self) -> str:
        """Why there is no server to ask."""
        return f"{self.url.safe()}: {self.why or 'no node serves the slot of the key'}"

    def found_fit(self, address: Address) -> None:
        self.checked |= {address}
        self._met_one = True

    def hint(self, failure: BaseException) -> str:
        """What to look at where no server of this URL was ever met: they may be spoken to in the wrong way."""
        if self._met_one or self.kind == "unix":
            return ""
        return tls_hint(failure, self.url.tls, "" if self.kind == "standalone" else f"+{self.kind}")

    def look_again(self, address: Address) -> None:
        """A server closed connections that were idle: it may be another one since. The next command looks first."""
        self.checked -= {address}

    def doubt(self, address: Address) -> None:
        """A server was lost or said that it is not the one to ask: look at it and the topology again."""
        self.look_again(address)
        if self.kind in ("sentinel", "cluster"):
            self.doubtful = True
            # Another one shall be asked first: the last one to answer may be behind.
            self._seeds = [*self._seeds[1:], *self._seeds[:1]]

    def moved(self, slot: int, address: Address) -> None:
        """A node said that another one has the slot. An unknown one means that more has changed."""
        if address not in self._slots:
            self.doubtful = True
        slots = list(self._slots) or [None] * SLOTS
        slots[slot] = address
        self._slots = slots

    def discover(self) -> Flow[RelayError | None]:
        """Ask for the topology if it is in doubt. Returns an error that repeating cannot help, else None."""
        again = time.monotonic() > self._ask_at
        if not self.doubtful and not again:
            return None
        if self._slots and time.monotonic() < self._believed_until:
            return None
        before = set(self.primaries())
        error = None
        if not self.doubtful:
            yield from self._ask_one_sentinel()
        elif self.kind == "sentinel":
            error = yield from self._ask_sentinels()
        else:
            error = yield from self._ask_nodes()
        if not self.why:
            gone = before - set(self.primaries())
            self.checked -= gone
            if gone:
                yield Drop(gone)
        return error

    def _ask_one_sentinel(self) -> Flow[None]:
        """Only one, the last that answered: others may be behind it. If it fails, all stays as it is, and the next one
        is asked after a longer while, counted from now: the primary may be well where all sentinels are silent."""
        self._ask_at = time.monotonic() + ASK_AGAIN  # other threads go on meanwhile
        seed = self._seeds[0]
        outcome: Outcome = yield self._sentinel_question(seed)
        reply, _note, _error = self._answer(outcome, seed)
        if isinstance(reply, list) and len(reply) == 2:
            self._named(reply)
        else:
            self._seeds = [*self._seeds[1:], seed]
            self._unheard += 1
            self._ask_at = time.monotonic() + ASK_AGAIN * 2 ** min(self._unheard, MOST_DOUBLINGS)

    def _named(self, reply: list[Any]) -> None:
        """Take in the primary that a sentinel named."""
        self._primary = Address(reply[0].decode(), int(reply[1]))
        self._unheard = 0
        self._ask_at = time.monotonic() + ASK_AGAIN

    def _sentinel_question(self, seed: Address) -> Exchange:
        return Exchange(seed, [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.url.service)], sentinel=True)

    def _ask_sentinels(self) -> Flow[RelayError | None]:
        notes: list[str] = []
        refused: RelayError | None = None
        service = self.url.service
        seeds = list(self._seeds)
        for i, seed in enumerate(seeds):
            outcome: Outcome = yield self._sentinel_question(seed)
            reply, note, error = self._answer(outcome, seed)
            if isinstance(error, (AuthError, PermissionDenied)):
                refused = error
            if isinstance(reply, list) and len(reply) == 2:
                self._named(reply)
                self._seeds = [*seeds[i:], *seeds[:i]]  # those that did not answer last
                self.doubtful, self.why = False, ""
                return None
            notes.append(note or f"{seed}: knows no service {service!r}")
        self.why = "no sentinel names a primary: " + "; ".join(notes)
        return refused

    def _ask_nodes(self) -> Flow[RelayError | None]:
        notes: list[str] = []
        refused: RelayError | None = None
        for node in dict.fromkeys((*_shuffled(self.checked), *self._seeds, *_shuffled(self.primaries()))):
            outcome: Outcome = yield Exchange(node, [("CLUSTER", "SLOTS")])
            reply, note, error = self._answer(outcome, node)
            refused = error or refused
            if isinstance(reply, list) and reply:
                self._slots = _slot_map(reply, node)
                self._believed_until = time.monotonic() + self._pause
                self.doubtful, self.why = False, ""
                return None
            notes.append(note or f"{node}: serves no slots")
        self.why = "no cluster node answers: " + "; ".join(notes)
        return refused

    def heard(self, outcome: Outcome, at: Address) -> list[Any] | str:
        """All replies of one that was asked several things; why it told nothing, where it did not answer the first."""
        _reply, note, error = self._answer(outcome, at)
        if not note:
            return outcome.replies
        return str(error) if isinstance(error, AuthError) else note

    def _answer(self, outcome: Outcome, at: Address) -> tuple[Any, str, RelayError | None]:
        """The reply, what to note in its place, and the error if it is a permanent one."""
        hint = ""
        if outcome.failure is None:
            reply = outcome.replies[0]
            if not isinstance(reply, Exception):
                return reply, "", None
            judged = judge_reply(reply, str(at))
            if self.kind == "sentinel" and "unknown command" in judged.text:
                hint = "; it is no sentinel, whose port is 26379 as a rule, but a server: relay:// is the URL of one"
        else:
            judged = (judge_cut if outcome.sent else judge_connect)(outcome.failure, str(at))
            hint = self.hint(outcome.failure)
        error = judged.error if judged.verdict is Verdict.PERMANENT else None
        if self.kind == "sentinel" and isinstance(error, AuthError):
            advice = "name its own with ?sentinel_username= and sentinel_password= in the URL"
            error = AuthError(f"{at}: the sentinel wants another user name or password ({judged.text}); {advice}")
        return None, f"{at}: {judged.text}{hint}", error


def _shuffled(addresses: Iterable[Address]) -> list[Address]:
    found = list(addresses)
    random.shuffle(found)
    return found


def _slot_map(reply: list[Any], asked: Address) -> list[Address | None]:
    slots: list[Address | None] = [None] * SLOTS
    for low, high, primary, *_replicas in reply:
        # An empty or missing name stands for the host that was asked.
        host = primary[0].decode() if primary[0] else ""
        address = Address(host if host not in ("", "?") else asked.host, int(primary[1]))
        slots[low : high + 1] = [address] * (high + 1 - low)
    return slots
