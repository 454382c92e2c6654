"""docs/settings.md against the code: a row for each option and no other, the code's defaults, bounds that hold."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay_adapters.celery import options as celery_options
from relay_adapters.dramatiq import RelayBroker
from relay_core import Broker, JobSpec, RetryPolicy
from relay_core.broker_base import BrokerBase
from relay_core.errors import InvalidArgument, InvalidUrl
from relay_core.maintenance import limits
from relay_core.settings import StoreSettings, parse_url
from relay_core.worker import Worker
from tests.pages import ROOT

PAGE = (ROOT / "docs" / "settings.md").read_text()
UNSET = object()


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    lines = re.findall(r"^\| (.*) \|$", section(title), re.MULTILINE)
    return [re.split(r" \| ?", line) for line in lines][2:]


def parameters(function: Callable[..., Any], *but: str) -> dict[str, Any]:
    """Names and defaults of what a caller may give."""
    found = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p.default for p in found if p.kind in kinds and p.name not in ("self", *but)}


def fields(cls: type, *but: str) -> dict[str, Any]:
    """Names and defaults of a dataclass."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        found[field.name] = dict(field.default_factory()) if made else field.default  # type: ignore[misc]
    return {name: default for name, default in found.items() if name not in but}


def worker(**options: Any) -> None:
    Worker(Broker("relay://"), print, ["q"], **options)


def dramatiq_broker(**options: Any) -> None:
    RelayBroker(**options)


def job(**options: Any) -> None:
    if "dedup_for" in options:
        options["dedup_key"] = "k"
    JobSpec(b"", **options).stored(b"")


def limit(**options: Any) -> None:
    if "burst" in options:
        options["rate"] = 1.0
    limits(**{"rate": None, "burst": None, "max_inflight": None, **options})


TABLES: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "Broker": (parameters(BrokerBase.__init__), Broker),
    "Connection": (fields(StoreSettings, "durability"), Broker),
    "RetryPolicy": (fields(RetryPolicy), RetryPolicy),
    "A job": (fields(JobSpec, "payload"), job),
    "Limits of a queue": (parameters(Broker.limit, "queue"), limit),
    "Worker": (parameters(Worker.__init__, "broker", "handler", "queues"), worker),
    "RelayBroker (Dramatiq)": (parameters(RelayBroker.__init__), dramatiq_broker),
}
CHECKED_LATER = {"metrics_tasks"}
"""Looked at when metrics are served, not before."""


@pytest.mark.parametrize("title", TABLES)
def test_each_option_has_a_row_with_the_default_of_the_code(title: str) -> None:
    told = {name.strip("`"): cell for name, _unit, cell, *_rest in rows(title)}
    assert {name: ast.literal_eval(cell.strip("`")) for name, cell in told.items()} == TABLES[title][0]


def bounds() -> Iterator[Any]:
    """Each bound on the page: the table, the option, the last good value and the first bad one."""
    for title in TABLES:
        for name, unit, _default, cell, *_rest in rows(title):
            found = re.fullmatch(r"(?:at least )?`([\d.]+)`(?: to `([\d.]+)`)?", cell)
            if not found or name.strip("`") in CHECKED_LATER:
                continue
            whole = unit in ("count", "bytes") or (title, name) == ("A job", "`priority`")
            for text, up in ((found[1], -1), (found[2], 1)):
                if text is not None:
                    good = int(text) if whole else float(text)
                    bad = good + up if whole else good + up * max(abs(good) * 0.01, 1e-6)
                    yield pytest.param(title, name.strip("`"), good, bad, id=f"{title}-{name}-{good:g}")


@pytest.mark.parametrize(("title", "name", "good", "bad"), list(bounds()))
def test_the_bounds_of_the_page_are_those_of_the_code(title: str, name: str, good: float, bad: float) -> None:
    build = TABLES[title][1]
    build(**{name: good})
    with pytest.raises(InvalidArgument, match=name):
        build(**{name: bad})


def test_the_options_of_celery_are_on_the_page() -> None:
    told = {name for cell, _meaning in rows("Celery: `broker_transport_options`") for name in re.findall(r"\w+", cell)}
    assert told == celery_options._BROKER_OPTIONS | celery_options._ADAPTER_OPTIONS
    retried = f"`retry_for` is {celery_options.RETRY_FOR:g} s by default, and {celery_options.RETRY_IN_LIST:g} s where"
    assert retried in section("Celery: `broker_transport_options`")


def test_the_urls_on_the_page_are_understood() -> None:
    forms = [name for cell, _meaning in rows("Broker URLs") for name in re.findall(r"`(.*?)`", cell)]
    for form in [*forms, *re.findall(r"relay\+?\w*://user\S*(?=`)", section("Broker URLs"))]:
        parse_url(
            form.replace(":port", ":6379").replace(":p", ":6379" if ":p%" not in form else ":p").replace("/db", "/0")
        )
    for word in re.findall(r"`(?:\?)?(ssl_\w+|sentinel_\w+)=?`", section("Broker URLs")):
        scheme = "relays+sentinel://h/s/0"
        parse_url(f"{scheme}?{word}={'true' if 'check' in word else 'none'}")
    with pytest.raises(InvalidUrl):
        parse_url("relays+sentinel://h/s/0?ssl_nonsense=1")


def test_the_environment_variables_on_the_page_are_all_that_the_code_reads() -> None:
    named = {cell.strip("`") for cell, _meaning in rows("Environment variables")}
    code = "".join(p.read_text() for folder in ("relay_core", "relay_adapters") for p in (ROOT / folder).rglob("*.py"))
    assert set(re.findall(r'"((?:RELAY|PROMETHEUS)_[A-Z_]+)"', code)) - {"RELAY_LAYOUT"} == named
