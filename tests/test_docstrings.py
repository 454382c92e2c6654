"""The docstrings of what users call are its reference: each method has one, and names each parameter it takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import relay_core
from relay_adapters.dramatiq import RelayBroker
from relay_core import AsyncBroker, Broker, JobSpec, RetryPolicy, errors
from relay_core.broker_base import BrokerBase
from relay_core.metrics import DepthCollector, MetricsServer, Recorder
from relay_core.settings import StoreSettings
from relay_core.worker import Reject, Retry, Worker

FACES = (Broker, AsyncBroker, Worker, RetryPolicy, Recorder, RelayBroker, DepthCollector, MetricsServer)
PASSED_ON = {"self", "cls", "args", "kwargs", "kind", "error", "trace"}
"""Names without a meaning of their own: of `__exit__`, and of signals handed on as they are."""
PLAIN = {"queue", "payload", "job", "jobs", "message", "signal"}
"""Names that say all there is to say."""


def methods() -> Iterator[Any]:
    for face in FACES:
        for name, member in inspect.getmembers(face):
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            module = getattr(function, "__module__", "") or ""
            hook = name.startswith("relay_")  # documented by its spec
            if inspect.isfunction(function) and name[0] != "_" and not hook and module.startswith("relay_"):
                yield pytest.param(face, name, function, id=f"{face.__name__}.{name}")


def document(face: type, name: str, function: Callable[..., Any]) -> str:
    """The docstring; `See Broker.x.` stands for that one."""
    text = inspect.getdoc(function) or ""
    if text == f"See Broker.{name}.":
        assert face is AsyncBroker
        return inspect.getdoc(getattr(Broker, name)) or ""
    return text


@pytest.mark.parametrize(("face", "name", "function"), list(methods()))
def test_each_method_has_a_docstring_that_names_its_parameters(
    face: type, name: str, function: Callable[..., Any]
) -> None:
    text = document(face, name, function)
    assert text
    missing = {
        parameter
        for parameter in inspect.signature(function).parameters
        if parameter not in PASSED_ON | PLAIN and not re.search(rf"\b{parameter}\b", text)
    }
    assert missing == set(), text


@pytest.mark.parametrize("function", [BrokerBase, StoreSettings, RetryPolicy, JobSpec, Worker, RelayBroker, Recorder])
def test_each_class_documents_what_it_is_made_with(function: type) -> None:
    text = inspect.getdoc(function) or ""
    documented = set(re.findall(r":(?:param|ivar) (\w+):", text))
    parameters = set(inspect.signature(function).parameters) - {"self", "broker", "handler", "payload"}
    assert parameters - documented == set()


@pytest.mark.parametrize("name", ["socket_timeout", "retry_for", "lease", "grace", "base", "delay"])
def test_the_docstring_of_a_duration_names_its_unit(name: str) -> None:
    found = [
        cls for cls in (BrokerBase, StoreSettings, RetryPolicy, JobSpec, Worker) if f" {name}:" in (cls.__doc__ or "")
    ]
    assert found
    for cls in found:
        (line,) = re.findall(rf":\w+ {name}: (.*)", inspect.getdoc(cls) or "")
        assert "second" in line or "Times in seconds" in (cls.__doc__ or "")


RAISES = {
    "enqueue": {"NotDurable"},
    "enqueue_many": {"NotDurable"},
    "adopt": {"NotDurable"},
    "schedule": {"NotDurable"},
    "ack": {"LeaseLost"},
    "nack": {"LeaseLost"},
}


def test_errors_are_told_of_by_the_class_or_by_the_method() -> None:
    everywhere = inspect.getdoc(Broker) or ""
    for error in (errors.InvalidArgument, errors.Unavailable, errors.StoreError):
        assert error.__name__ in everywhere
    for name, member in inspect.getmembers(Broker, inspect.isfunction):
        told = set(re.findall(r"\b(NotDurable|LeaseLost)\b", inspect.getdoc(member) or "")) if name[0] != "_" else set()
        assert told == RAISES.get(name, set()), name


def test_what_the_package_exports_has_a_docstring() -> None:
    names = [name for name in relay_core.__all__ if not inspect.getdoc(getattr(relay_core, name))]
    assert names == []
    assert Retry.__doc__
    assert Reject.__doc__
