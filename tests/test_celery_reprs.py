"""The text of a task's arguments is the one that Celery writes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from decimal import Decimal
from enum import IntEnum
from typing import Any

import pytest
from celery import Celery
from celery.app import trace
from hypothesis import given
from hypothesis import strategies as st

from relay_adapters.celery.messages import reprs

with Celery("reprs", broker="relay://127.0.0.1:1", set_as_current=False).connection_for_write() as connection:
    OURS: Any = connection.transport and sys.modules["celery.app.amqp"].saferepr  # type: ignore[attr-defined]
STOCK = OURS.relay_stock

values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=8))
flat = st.one_of(
    values,
    st.lists(values, max_size=4),
    st.lists(values, max_size=4).map(tuple),
    st.dictionaries(st.one_of(st.text(), st.integers(), st.none()), values, max_size=4),
)
deep = st.one_of(flat, st.lists(flat, max_size=3), st.dictionaries(st.text(), flat, max_size=3))


@given(deep, st.one_of(st.none(), st.integers(-2, 80)), st.one_of(st.none(), st.integers(-1, 3)))
def test_it_is_celerys_whatever_the_value_and_the_bounds(value: Any, most: int | None, levels: int | None) -> None:
    assert OURS(value, most, maxlevels=levels) == STOCK(value, most, maxlevels=levels)


class Level(IntEnum):
    LOW = 1


class Text(str):
    def replace(self, *args: Any) -> str:  # type: ignore[override]
        raise AssertionError("it is not asked")


@pytest.mark.parametrize(
    "value",
    [
        (Level.LOW, Text("x")),
        {Level.LOW: Text("x")},
        OrderedDict(a=1),
        (Decimal("1.50"), 1j, range(3)),
        ({1}, frozenset(), set()),
        [["a"], ("b",), {"c": None}],
        "it's",
        ("line\nbreak", "quote'", 'double"', "é", "\udc80"),
    ],
    ids=repr,
)
def test_values_of_other_types_are_left_to_celery(value: Any) -> None:
    def outcome(function: Any) -> Any:
        try:
            return function(value, 1024)
        except AssertionError as error:
            return str(error)

    assert outcome(OURS) == outcome(STOCK)


def test_numbers_and_texts_are_not_left_to_celery() -> None:
    def stock(*_args: Any) -> str:
        raise AssertionError("it was left to Celery")

    ours = reprs._joining(stock)
    assert ours((1, 2.5, None, True, "it's"), 1024, maxlevels=3) == "(1, 2.5, None, True, 'it\\'s')"
    assert ours({"user": 7, "name": "x"}, 1024) == "{'user': 7, 'name': 'x'}"
    assert [ours(value, 10) for value in ((), {}, [], (1,), [1])] == ["()", "{}", "[]", "(1,)", "[1]"]


def test_installing_it_again_changes_nothing() -> None:
    reprs.install()
    assert sys.modules["celery.app.amqp"].saferepr is OURS  # type: ignore[attr-defined]
    assert trace.saferepr.relay_stock is STOCK  # type: ignore[attr-defined]
