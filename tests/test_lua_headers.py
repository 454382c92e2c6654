"""Every script's header is a contract, held here against its body, its parts and the Python that calls it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import pytest

from relay_core import commands, scripts
from relay_core.clock import sent_now
from relay_core.commands import Ack, Adopted, Command, Nack, NewJob
from relay_core.job import NO_OPTIONS, Record
from relay_core.keys import LAYOUT, QueueKeys, ScheduleKeys, WorkerKeys
from tests.servers import Server

NAMES = scripts.names()
PARTS = sorted(
    entry.name[:-4]
    for entry in resources.files("relay_core").joinpath("lua/parts").iterdir()
    if entry.name[-4:] == ".lua"
)
Q = QueueKeys("relay", "q")
W = WorkerKeys("relay")
S = ScheduleKeys("relay")

# What may be refused when memory is full: what makes the store larger for good.
REFUSED_UNDER_OOM = {"adopt", "enqueue", "enqueue_one", "requeue", "schedule", "tick"}
READ_ONLY = {"due", "list", "roster", "scan", "show", "stats"}
FORBIDDEN = {"KEYS", "SMEMBERS", "SCAN", "SSCAN", "HSCAN", "ZSCAN", "FLUSHDB", "HKEYS", "HVALS"}
# LREM and HGETALL walk a whole key: where that is paid is decided by name.
COSTLY = {"LREM": {"cancel", "audit", "retract"}, "HGETALL": {"stats"}}


@dataclass(frozen=True)
class Header:
    flags: str
    lines: tuple[str, ...]
    body: str

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def highest(self, table: str) -> int:
        return max((last or first for first, last in self.spans(table)), default=0)

    def spans(self, table: str) -> list[tuple[int, int | None]]:
        """Declared indices, as (first, last); last is None for `[n..]`, which has no end."""
        found: list[tuple[int, int | None]] = []
        for first, dots, last in re.findall(table + r"\[(\d+)(\.\.)?(\d+)?\]", self.text):
            found.append((int(first), int(last) if last else None if dots else int(first)))
        return found

    def rest(self) -> int | None:
        """Where ARGV goes on without end, or None."""
        return next((first for first, last in self.spans("ARGV") if last is None), None)

    def keys(self) -> dict[int, tuple[str, str]]:
        """Index -> (last part of the key, type). Of a range `r0..r9` each key by itself."""
        found: dict[int, tuple[str, str]] = {}
        for line in self.lines:
            match = re.match(r"KEYS\[(\d+)(?:\.\.(\d+))?\] (\S+) (HASH|ZSET|LIST) ", line)
            if match:
                first, last = int(match[1]), int(match[2] or match[1])
                for n in range(first, last + 1):
                    found[n] = (match[3].replace("0..r9", str(n - first)), match[4])
        return found


@cache
def header(name: str) -> Header:
    lines = scripts.source(name).split("\n")
    shebang = lines.pop(0) if lines[0].startswith("#!") else ""
    notes = []
    while lines[0].startswith("--") and not lines[0].startswith("--@"):
        notes.append(lines.pop(0)[2:].strip())
    return Header(shebang, tuple(notes), "\n".join(lines))


def without_strings(lua: str) -> str:
    lua = re.sub(r"--[^\n]*", "", lua)
    return re.sub(r"'(?:\\.|[^'\\\n])*'", "''", lua)


def used(name: str, table: str) -> set[int]:
    """Indices that the script uses: literal ones, unpacked ones, and ready lists found by their level."""
    text = without_strings(scripts.load(name).text)
    found = {int(n) for n in re.findall(table + r"\[(\d+)\]", text)}
    for first, last in re.findall(r"unpack\(" + table + r", (\d+)(?:, (\d+))?\)", text):
        found |= set(range(int(first), int(last or first) + 1))
    for base in set(re.findall(table + r"\[(READY|FIRST_LIST)\b", text)):
        match = re.search(rf"local {base} = (\d+)", text)
        assert match, f"{name}: {base} is not set to a number"
        start = int(match[1]) + (base == "FIRST_LIST")
        found |= set(range(start, start + 10))
    return found


def rest_used(name: str) -> set[int]:
    """Where the script begins to take ARGV as rows without end."""
    text = without_strings(scripts.load(name).text)
    patterns = (
        r"unpack\(ARGV, (\d+)\)",
        r"for at = (\d+), #args",
        r"\b(?:ack|nack)\((\d+), ",
        r"items_from = [^\n]*?(\d+)\n",
    )
    return {int(n) for pattern in patterns for n in re.findall(pattern, text)}


# the header against the body


@pytest.mark.parametrize("name", NAMES)
def test_a_script_begins_with_its_shebang_and_says_what_it_does(name: str) -> None:
    found = header(name)
    assert re.fullmatch(r"#!lua( flags=[a-z,-]+)?", found.flags)
    assert re.match(rf"{name}: \w+", found.lines[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_header_states_what_is_returned_what_moves_and_the_cost(name: str) -> None:
    text = header(name).text
    assert re.search(r"^returns \S+", text, re.MULTILINE)
    assert re.search(r"^moves: .+", text, re.MULTILINE)
    assert re.search(r"\bcost O\(", text)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_in_use_is_declared_once_and_every_declared_key_is_used(name: str) -> None:
    declared = [n for first, last in header(name).spans("KEYS") for n in range(first, (last or first) + 1)]
    assert declared == list(range(1, len(declared) + 1))
    assert set(declared) == used(name, "KEYS")


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_in_use_is_declared_once_and_every_declared_one_is_used(name: str) -> None:
    spans = header(name).spans("ARGV")
    rest = header(name).rest()
    fixed = [n for first, last in spans if last is not None for n in range(first, last + 1)]
    assert fixed == list(range(1, len(fixed) + 1))
    assert rest is None or (rest == len(fixed) + 1 and spans[-1] == (rest, None))
    assert set(fixed) == used(name, "ARGV") - ({rest} if rest else set())
    assert rest_used(name) == ({rest} if rest else set())


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_arguments_are_named_at_the_top_and_no_index_appears_later(name: str) -> None:
    lines = header(name).body.strip("\n").split("\n")
    while lines and lines[0].startswith("local "):
        lines.pop(0)
    later = without_strings("\n".join(lines))
    assert not re.findall(r"(?:KEYS|ARGV)\[\d+\]", later)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_knows_no_index_of_a_key_or_argument(part: str) -> None:
    assert not re.findall(r"(?:KEYS|ARGV)\[\d+\]", without_strings(scripts.source(f"parts/{part}")))


@pytest.mark.parametrize("name", NAMES)
def test_only_what_grows_the_store_is_refused_when_memory_is_full(name: str) -> None:
    assert ("allow-oom" in header(name).flags) == (name not in REFUSED_UNDER_OOM)
    assert ("no-writes" in header(name).flags) == (name in READ_ONLY)


@pytest.mark.parametrize("name", NAMES)
def test_no_script_walks_the_keyspace_or_a_whole_key_where_it_must_not(name: str) -> None:
    calls = set(re.findall(r"redis\.p?call\('(\w+)'", scripts.load(name).text))
    assert calls
    assert not calls & FORBIDDEN
    for costly, allowed in COSTLY.items():
        assert costly not in calls or name in allowed
    assert len(re.findall(r"redis\.p?call\(", scripts.load(name).text)) == len(
        re.findall(r"redis\.p?call\('[A-Z]+'", scripts.load(name).text)
    ), "a command whose name is computed"


LUA_WORDS = set(
    re.findall(
        r"\w+",
        "and break do else elseif end false for function if in local nil not or repeat return then true until while",
    )
)
LUA_NAMES = set(
    re.findall(
        r"\w+",
        "redis cjson bit string table math tonumber tostring ipairs pairs next unpack type pcall KEYS ARGV",
    )
)


def declared_names(text: str) -> set[str]:
    """Names after `local`, `for`, and in parameter lists, anywhere in the script."""
    groups = re.findall(r"\blocal (?!function)([\w, ]+)", text)
    groups += re.findall(r"\bfor ([\w, ]+?) (?:=|in)\b", text) + re.findall(r"\bfor (\w+) =", text)
    groups += re.findall(r"\bfunction ?\w*\(([\w, ]*)\)", text) + re.findall(r"\blocal function (\w+)", text)
    return {name.strip() for group in groups for name in group.split(",")}


def plain_names(text: str) -> set[str]:
    """Names in use: one after a dot is a field, one before `=` within braces a table's key."""
    text = re.sub(r"\{[^{}\n]*\}", lambda m: re.sub(r"\b\w+ =", "", m[0]), re.sub(r"\.\w+", "", text))
    return set(re.findall(r"\b[A-Za-z_]\w*\b", text))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_a_script_is_local_or_the_language_s_own(name: str) -> None:
    text = without_strings(scripts.load(name).text.partition("\n")[2])
    known = declared_names(text) | LUA_WORDS | LUA_NAMES
    assert plain_names(text) - known == set()


# parts


@pytest.mark.parametrize("part", PARTS)
def test_a_part_uses_what_it_says_it_uses(part: str) -> None:
    found = header(f"parts/{part}")
    assert re.match(rf"{part}: \w+", found.lines[0])
    uses = named_by(found)
    body = without_strings(re.sub(r"^ *--@include (\w+)$", included, found.body, flags=re.MULTILINE))
    assert [name for name in uses if not re.search(rf"\b{name}\b", body)] == []


def included(match: re.Match[str]) -> str:
    return scripts.source(f"parts/{match[1]}")


def named_by(found: Header) -> list[str]:
    """The names in `uses: a, b (a note), c`, over its continuation lines."""
    match = re.search(r"^uses: ((?:.+\n?)(?:(?!\w+\(|\w+: )[\w, ]+$\n?)*)", found.text, re.MULTILINE)
    return re.findall(r"\w+", re.sub(r"\([^)]*\)", "", match[1])) if match else []


@pytest.mark.parametrize("name", NAMES)
def test_what_a_part_uses_exists_in_every_script_that_includes_it(name: str) -> None:
    text = without_strings(scripts.load(name).text)
    names = declared_names(text)
    missing = {part: [use for use in named_by(header(f"parts/{part}")) if use not in names] for part in parts_of(name)}
    assert {part: gone for part, gone in missing.items() if gone} == {}


def parts_of(name: str) -> set[str]:
    found = set(re.findall(r"^ *--@include (\w+)$", scripts.source(name), re.MULTILINE))
    return found.union(*(parts_of(f"parts/{part}") for part in found))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_names_all_that_it_takes_from_around_it(part: str) -> None:
    found = header(f"parts/{part}")
    body = without_strings(found.body)
    known = declared_names(body) | LUA_WORDS | LUA_NAMES | set(named_by(found))
    for inner in parts_of(f"parts/{part}"):
        known |= declared_names(scripts.source(f"parts/{inner}"))
    assert plain_names(body) - known == set()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_s_functions_are_told_with_the_parameters_they_have(part: str) -> None:
    found = header(f"parts/{part}")
    for name, parameters in re.findall(r"^local function (\w+)\(([^)]*)\)", found.body, re.MULTILINE):
        told = re.search(rf"^(?:defines: )?{name}\(([^)]*)\)", found.text, re.MULTILINE)
        assert told, f"{name} is not told of"
        if name != "parse_owner":
            assert told[1] == parameters


def test_every_part_is_included_somewhere() -> None:
    assert set().union(*(parts_of(name) for name in NAMES)) == set(PARTS)


# the header against the Python that calls it

RECORD = Record.pack(3, NO_OPTIONS, b"x")
Build = Callable[[int], Command[Any]]


def ids(n: int) -> list[str]:
    return [f"id{i}" for i in range(n)]


def pairs(n: int) -> list[tuple[str, str]]:
    return [(id, "1:1:a") for id in ids(n)]


def acks(n: int) -> Sequence[Ack]:
    return [Ack(id, "1:1:a") for id in ids(n)]


def nacks(n: int) -> Sequence[Nack]:
    return [Nack(id, "1:1:a", 0, 3, "max_retries", "") for id in ids(n)]


BUILD: dict[str, Build] = {
    "enqueue": lambda n: commands.enqueue(Q, [NewJob(id, "", "", RECORD) for id in ids(n)]),
    "tidy": lambda n: commands.tidy(Q, ids(n)),
    "retract": lambda n: commands.retract(Q, NewJob("a", "", "", RECORD)),
    "enqueue_one": lambda n: commands.enqueue_one(Q, NewJob("a", "", "", RECORD)),
    "claim": lambda n: commands.claim(Q, 1, 1000, "a", levels="90", acks=acks(n)),
    "claim_one": lambda n: commands.claim_one(Q, 1000, "a", levels="90"),
    "finish": lambda n: commands.finish(Q, acks(n), (), 1, 1000, "a", max_deliveries=5),
    "ack": lambda n: commands.ack(Q, acks(n)),
    "ack_plain": lambda n: commands.ack_plain(Q, acks(n)),
    "nack": lambda n: commands.nack(Q, nacks(n)),
    "extend": lambda n: commands.extend(Q, pairs(n), 1000),
    "release": lambda n: commands.release(Q, pairs(n)),
    "promote": lambda n: commands.promote(Q),
    "reap": lambda n: commands.reap(Q, max_deliveries=5),
    "retell": lambda n: commands.retell(Q),
    "told": lambda n: commands.told(Q, pairs(n)),
    "stats": lambda n: commands.stats(Q),
    "list": lambda n: commands.list_jobs(Q, "ready", 0, 10),
    "show": lambda n: commands.show(Q, ids(n)),
    "requeue": lambda n: commands.requeue(Q, ids(n)),
    "scan": lambda n: commands.scan(Q, (0, ""), 1, 10, records=True),
    "bookmark": lambda n: commands.bookmark(Q, "run", "place"),
    "drop": lambda n: commands.drop(Q, ids(n)),
    "shift": lambda n: commands.shift(Q, 1, leases=True),
    "cancel": lambda n: commands.cancel(Q, ids(n)),
    "purge": lambda n: commands.purge(Q, "ready", 10),
    "delete_queue": lambda n: commands.delete_queue(Q),
    "configure": lambda n: commands.configure(Q, dict.fromkeys(ids(n), "1")),
    "adopt": lambda n: commands.adopt(Q, [Adopted(id, "ready", 0, "", "", "", RECORD) for id in ids(n)]),
    "audit": lambda n: commands.audit(Q, ids(n), repair=True),
    "beat": lambda n: commands.beat(W, "a", {}, age_ms=0, alive_ms=1000),
    "roster": lambda n: commands.roster(W),
    "schedule": lambda n: commands.schedule(S, "a", b"", b"{}", 1),
    "unschedule": lambda n: commands.unschedule(S, "a"),
    "retire": lambda n: commands.retire(Q, "a", 1),
    "due": lambda n: commands.due(S),
    "advance": lambda n: commands.advance(S, "a", b"{}", 1, 2),
    "tick": lambda n: commands.tick(Q, "a", 1, NewJob("a@1", "", "", RECORD)),
}
WORDS = {"two": 2, "three": 3, "four": 4, "seven": 7}
LETTERS = {
    "o": Q.owners, "j": Q.jobs, "l": Q.leases, "e": Q.errors, "u": Q.dedup, "t": Q.dedup_expiry, "f": Q.finished,
    "s": Q.counters, "m": Q.marker, "c": Q.config, "d": Q.delayed, "x": Q.dead,
    "k": Q.ticks, "b": Q.bulk, "g": Q.untold, "y": Q.payloads, "w": W.alive, "i": W.about, "p": S.plans,
    "n": S.next_ticks, "a": S.alarm,
    **{f"r{level}": key for level, key in enumerate(Q.ready)},
}  # fmt: skip


def test_every_script_has_a_builder() -> None:
    assert sorted(BUILD) == NAMES
    assert {name: build(1).script.name for name, build in BUILD.items()} == {name: name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_builder_passes_the_keys_of_the_header_in_its_order(name: str) -> None:
    command = BUILD[name](1)
    at_hand = {
        "enqueue": (9, (Q.ready[3],)),
        "enqueue_one": (3, (Q.ready[3],)),
        "retract": (2, (Q.ready[3],)),
        "claim": (7, (Q.ready[9], Q.ready[0])),
        "claim_one": (5, (Q.ready[9], Q.ready[0])),
    }
    if name in at_hand:
        # they name only the lists of the levels at hand, so that each is declared
        fixed, lists = at_hand[name]
        assert command.keys[fixed:] == lists
        assert command.keys[:fixed] == tuple(LETTERS[header(name).keys()[n][0]] for n in range(1, fixed + 1))
        return
    assert len(command.keys) == header(name).highest("KEYS")
    assert command.keys == tuple(LETTERS[letter] for _n, (letter, _type) in sorted(header(name).keys().items()))


@pytest.mark.parametrize("name", NAMES)
def test_the_builder_passes_as_many_arguments_as_the_header_declares(name: str) -> None:
    none, one, two = (len(BUILD[name](n).args) for n in range(3))
    rest = header(name).rest()
    if rest is None:
        assert none == one == two == header(name).highest("ARGV")
        return
    assert none == rest - 1
    assert two - one == one - none
    per_row = re.search(rf"ARGV\[{rest}\.\.\] (\w+) per ", header(name).text)
    assert one - none == (WORDS[per_row[1]] if per_row else 1)
    if name == "finish":
        assert len(commands.finish(Q, (), nacks(1), 1, 1000, "a", max_deliveries=5).args) - none == WORDS["seven"]


@pytest.mark.parametrize("name", NAMES)
def test_the_type_of_a_key_is_the_same_in_every_header_and_in_keys_py(name: str) -> None:
    for letter, kind in header(name).keys().values():
        if letter == "LIST":
            continue
        place = "ready" if letter[0] == "r" else next(p for p, key in _places().items() if key == LETTERS[letter])
        owner = WorkerKeys if letter in "wi" else ScheduleKeys if letter in "pna" else QueueKeys
        doc = getattr(owner, place).func.__doc__
        assert re.search(rf"\b{kind}\b", doc), f"{letter}: {doc}"


def _places() -> dict[str, bytes]:
    return {
        name: getattr(keys, name)
        for keys in (Q, W, S)
        for name, value in vars(type(keys)).items()
        if name != "ready" and hasattr(value, "func")
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_flag_of_a_re_send_is_the_argument_that_the_header_calls_so(name: str) -> None:
    command = BUILD[name](1)
    match = re.search(r"ARGV\[(\d+)\] 0, or ms since an earlier send that may have run", header(name).text)
    assert command.resent_at == (int(match[1]) - 1 if match else None)
    if match:
        at = 2 + len(command.keys) + int(match[1]) - 1
        assert command.wire()[at] == 0
        assert 5000 < int(command.wire(sent_now() - 5)[at]) < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_version_goes_where_the_header_says(name: str) -> None:
    if "ARGV[1] layout version" in header(name).text:
        assert BUILD[name](1).args[0] == LAYOUT


@pytest.mark.parametrize("name", NAMES)
def test_the_server_compiles_the_script(name: str, server: Server) -> None:
    script = scripts.load(name)
    assert server.cli("SCRIPT", "LOAD", script.text) == script.sha.encode()
