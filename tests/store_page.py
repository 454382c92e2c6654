"""The generated tables of docs/store.md. `python -m tests.store_page` writes them; a test compares."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from relay_adapters.celery.queues import places
from relay_core import keys
from tests.pages import ROOT

PAGE = ROOT / "docs" / "store.md"
FOLDERS = {"": "relay_core/lua", "Celery: ": "relay_adapters/celery/lua"}


def key_rows() -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of each key, from the docstrings of keys.py and of the Celery adapter's places.py."""
    for module in (keys, places):
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and "prefix" in fields(cls):
                yield from _rows_of(cls)
    yield keys.registry("relay").decode(), *_typed("registry", keys.registry.__doc__)


def fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _rows_of(cls: type) -> Iterator[tuple[str, str, str]]:
    given = {"prefix": "relay", "queue": "mail"}
    made = cls(**{name: given[name] for name in fields(cls) if name in given})
    for name, member in vars(cls).items():
        if isinstance(member, cached_property):
            found, doc = getattr(made, name), member.__doc__
        elif inspect.isfunction(member) and not name.startswith("_"):
            (parameter,) = list(inspect.signature(member).parameters)[1:]
            found, doc = member(made, f"<{parameter}>"), member.__doc__
        else:
            continue
        shown = f"{found[0].decode()}`…`r{len(found) - 1}" if isinstance(found, tuple) else found.decode()
        yield shown, *_typed(f"{cls.__name__}.{name}", doc)


def _typed(name: str, doc: str | None) -> tuple[str, str]:
    """`HASH id -> record` is a HASH, `One LIST of ids` a LIST."""
    match = re.search(r"\b(HASH|ZSET|LIST|SET|STREAM|STRING)\b", doc or "")
    assert match, f"keys.py: {name} does not say what type its key has"
    text = " ".join((doc or "").split())
    meaning = text.removeprefix(match[1]).strip() if text.startswith(match[1]) else text
    return match[1], meaning.replace("->", "→").replace("|", r"\|")


def script_rows() -> Iterator[tuple[str, ...]]:
    """Name, what it does, its moves, its cost and whether it is refused when memory is full, from the headers."""
    for label, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).glob("*.lua")):
            shebang, *lines = file.read_text().splitlines()
            notes = [line[2:].strip() for line in lines[: _end(lines)]]
            text = "\n".join(notes)
            what = re.match(rf"{file.stem}: ((?:.|\n)*?)\n(?=KEYS|ARGV|returns)", text)
            moves = re.search(r"^moves: ((?:.|\n)*?)\s*\|?\s*\bcost (O\((?:.|\n)*)", text, re.MULTILINE)
            assert what, f"{file}: the header does not begin with '{file.stem}: '"
            assert moves, f"{file}: the header has no 'moves: … | cost O(…)'"
            cells = (what[1], moves[1].rstrip(" |"), moves[2])
            refused = "goes on" if "allow-oom" in shebang else "refused"
            yield (
                f"{label}`{file.stem}`",
                *(" ".join(c.split()).replace("->", "→").replace(" |", ";") for c in cells),
                refused,
            )


def _end(lines: list[str]) -> int:
    return next(i for i, line in enumerate(lines) if not line.startswith("--") or line.startswith("--@"))


def tables() -> dict[str, str]:
    """The text between each pair of marks, by the word of its mark."""
    key_lines = [f"| `{name}` | {kind} | {meaning} |" for name, kind, meaning in key_rows()]
    script_lines = [f"| {' | '.join(cells)} |" for cells in script_rows()]
    return {
        "keys": "\n".join(["| Key | Type | Meaning |", "| --- | --- | --- |", *key_lines]),
        "scripts": "\n".join(
            ["| Script | What it does | Moves | Cost | Memory full |", "| --- | --- | --- | --- | --- |", *script_lines]
        ),
    }


def written(text: str) -> str:
    """The page's text with its tables as they should be."""
    for word, table in tables().items():
        mark = f"<!-- {word}: written by python -m tests.store_page -->"
        assert mark in text, f"docs/store.md lacks the line {mark}"
        pattern = re.escape(mark) + r"\n.*?(?=<!-- end -->)"
        text = re.sub(pattern, lambda _m: f"{mark}\n{table}\n", text, count=1, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    Path(PAGE).write_text(written(PAGE.read_text()))
