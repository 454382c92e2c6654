"""The headers of the Celery adapter's scripts, held against their bodies and the Python that calls them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from relay_adapters.celery.queues import moves
from relay_adapters.celery.queues.places import Places
from relay_core import scripts
from relay_core.clock import sent_now
from relay_core.commands import Command
from tests.servers import Server

NAMES = scripts.names(moves.PACKAGE)
P = Places("relay")
LETTERS = {
    "x": (P.exchanges, "exchanges"), "q": (P.queues, "queues"), "e": (P.ends, "ends"), "s": (P.limited, "limited"),
    "v": (P.versions, "versions"), "t": (P.bindings("x1"), "bindings"), "w": (P.bound("q1"), "bound"),
    "c": (P.consumers("q1"), "consumers"), "b": (P.box("q1"), "box"),
}  # fmt: skip
FORBIDDEN = {"KEYS", "SMEMBERS", "SCAN", "HGETALL", "HKEYS", "XRANGE"}

TOUCHED = moves.Touched("q1", 0, -1, "", "")
BUILD: dict[str, Any] = {
    "declare": lambda n: moves.declare(P, "q1", "", "", idle_ms=0, mailbox=False, process="", limited=False),
    "bind": lambda n: moves.bind(P, "x1", "q1", "", ""),
    "unbind": lambda n: moves.unbind(P, "x1", "q1", "", ""),
    "delete": lambda n: moves.delete(P, "q1", "", [("x1", "")] * n),
    "discard": lambda n: moves.discard(P, "x1", False, [("q1", "")] * n),
    "publish": lambda n: moves.publish(P, "x1", "", "", b"", [("q1", 0, 1)] * n),
    "touch": lambda n: moves.touch(P, "", 0, [TOUCHED] * n),
    "leave": lambda n: moves.leave(P, "q1", "", 0),
    "take": lambda n: moves.take(P, "q1", 0),
}
WORDS = {"one": 1, "two": 2, "four": 4, "five": 5}


def header(name: str) -> str:
    lines = scripts.source(name, moves.PACKAGE).split("\n")
    assert lines[0] == "#!lua flags=allow-oom"  # what it stores is bounded, and workers must go on when memory is full
    notes = []
    for line in lines[1:]:
        if not line.startswith("-- "):
            break
        notes.append(line[3:].strip())
    return "\n".join(notes)


def spans(name: str, table: str) -> list[tuple[int, bool]]:
    """Indices in a header, as (first, goes on without end)."""
    return [(int(n), bool(dots)) for n, dots in re.findall(table + r"\[(\d+)(\.\.)?\]", header(name))]


def declared_letters(name: str) -> list[str]:
    """The last parts of the keys, in order; those of the rows after the fixed ones."""
    return re.findall(r"(?:KEYS\[\d+(?:\.\.)?\] (?:two per queue: )?|\|\n)(\w) (?:HASH|ZSET|SET|STREAM) ", header(name))


def test_every_script_has_a_builder_of_its_name() -> None:
    assert sorted(BUILD) == NAMES
    assert {name: build(1).script.name for name, build in BUILD.items()} == {name: name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_the_script_does_answers_and_costs(name: str) -> None:
    text = header(name)
    assert re.match(rf"{name}: \w+", text)
    assert re.search(r"^returns \S+", text, re.MULTILINE)
    assert re.search(r"^moves: .+\bcost O\(", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", ["KEYS", "ARGV"])
def test_indices_are_declared_in_order_and_as_many_as_the_builder_passes(name: str, table: str) -> None:
    found = spans(name, table)
    assert [n for n, _open in found] == list(range(1, len(found) + 1))
    assert not any(goes_on for _n, goes_on in found[:-1])

    def passed(n: int) -> int:
        command: Command[Any] = BUILD[name](n)
        return len(command.keys if table == "KEYS" else command.args)

    goes_on = found[-1][1]
    assert passed(0) == len(found) - goes_on if goes_on else passed(1) == len(found)
    if goes_on:
        rows = re.search(table + r"\[\d+\.\.\] (?:(\w+) per |.*, one per )", header(name))
        assert rows
        assert passed(2) - passed(1) == passed(1) - passed(0) == WORDS.get(rows[1] or "one", 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_builder_passes_the_keys_that_the_header_names_with_their_types(name: str) -> None:
    letters = declared_letters(name)
    assert list(BUILD[name](1).keys) == [LETTERS[letter][0] for letter in letters]
    for letter, kind in re.findall(r"\b(\w) (HASH|ZSET|SET|STREAM) ", header(name)):
        doc = getattr(Places, LETTERS[letter][1])
        doc = (doc.func if hasattr(doc, "func") else doc).__doc__
        assert doc.startswith(kind)


@pytest.mark.parametrize("name", NAMES)
def test_indices_stand_at_the_top_only_and_no_whole_key_is_walked(name: str) -> None:
    body = scripts.source(name, moves.PACKAGE).partition("\nlocal ")[2]
    later = re.split(r"\n(?!local |  )", body, maxsplit=1)[1]
    assert not re.findall(r"(?:KEYS|ARGV)\[\d+\]", later)
    calls = set(re.findall(r"redis\.call\('(\w+)'", scripts.load(name, moves.PACKAGE).text))
    assert calls
    assert not calls & FORBIDDEN


@pytest.mark.parametrize("name", NAMES)
def test_the_server_compiles_the_script(name: str, server: Server) -> None:
    script = scripts.load(name, moves.PACKAGE)
    assert server.cli("SCRIPT", "LOAD", script.text) == script.sha.encode()


def test_the_flag_of_a_re_send_is_where_the_header_says() -> None:
    command = BUILD["publish"](1)
    assert "ARGV[1] 0, or ms since an earlier send that may have run" in header("publish")
    assert command.resent_at == 0
    assert command.wire()[2 + len(command.keys)] == 0
    assert int(command.wire(sent_now())[2 + len(command.keys)]) > 0
