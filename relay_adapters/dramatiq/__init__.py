"""Dramatiq on relay: `dramatiq.set_broker(RelayBroker(url="relay://localhost:6379/0"))` is the whole change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay_adapters.dramatiq.broker import RelayBroker
    from relay_adapters.dramatiq.burial import WorkerLost

__all__ = ["RelayBroker", "WorkerLost"]


def __getattr__(name: str) -> Any:
    # Every relay Broker loads `plugin` from this package, also where Dramatiq is not installed.
    try:
        if name == "RelayBroker":
            from relay_adapters.dramatiq.broker import RelayBroker

            return RelayBroker
        if name == "WorkerLost":
            from relay_adapters.dramatiq.burial import WorkerLost

            return WorkerLost
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "dramatiq":
            raise
        raise ModuleNotFoundError(
            f"{name} needs Dramatiq ({error}): pip install 'relay-queue[dramatiq]'", name=error.name
        ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
