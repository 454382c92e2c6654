"""docs/store.md against keys.py and the Lua headers."""

from __future__ import annotations

from tests.store_page import PAGE, written


def test_the_tables_of_keys_and_scripts_are_those_of_the_code() -> None:
    text = PAGE.read_text()
    assert written(text) == text, "run: python -m tests.store_page"
