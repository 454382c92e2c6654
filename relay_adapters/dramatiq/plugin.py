"""What relay itself should know about Dramatiq's jobs. Loaded by every relay Broker: imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from relay_core.hooks import hookimpl
from relay_core.job import Job, JobSummary, StoredJob

if TYPE_CHECKING:
    from relay_core.migration import Source, SourceStore

ADAPTER = "dramatiq"
HEADER = "relay_adapter"
"""The header by which a job is known to be a Dramatiq message."""


@hookimpl
def relay_register_adapter(register: Callable[..., None]) -> None:
    register(ADAPTER, "Dramatiq messages, by relay_adapters.dramatiq.RelayBroker")


@hookimpl
def relay_describe_job(job: Job | StoredJob) -> JobSummary | None:
    """Read a JSON message. One by another encoder is named as such: nothing is unpickled to look at it."""
    if job.options.headers.get(HEADER) != ADAPTER:
        return None
    try:
        message = json.loads(job.payload)
        options = message["options"]
        name = str(message["actor_name"])
        args = ", ".join(repr(arg) for arg in message["args"])
        kwargs = ", ".join(f"{key}={value!r}" for key, value in message["kwargs"].items())
        retries = options.get("retries", 0)
        eta = options.get("eta")
        known = isinstance(eta, (int, float))
        return JobSummary(
            name=name,
            args=args,
            kwargs=kwargs,
            retries=retries if isinstance(retries, int) else None,
            eta=datetime.fromtimestamp(eta / 1000, timezone.utc).isoformat() if known else None,
            extra={"message_id": message["message_id"]},
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError, RecursionError):
        return JobSummary(name="(a message that is not JSON)")


@hookimpl
def relay_register_commands(group: Any) -> None:
    """`relay migrate dramatiq-redis`."""
    import click

    from relay_core.migration import Migration

    params = [
        click.Option(
            ["--namespace"], default="dramatiq", show_default=True, help="The RedisBroker's: what its keys begin with."
        ),
        click.Option(
            ["--heartbeat-timeout"],
            type=click.IntRange(0),
            default=60_000,
            show_default=True,
            metavar="MS",
            help="The RedisBroker's: a worker that was silent for longer is gone, and what it held is moved.",
        ),
        click.Option(
            ["--app"],
            metavar="MODULE",
            help="Imported first: where you set the encoder, if your messages are not JSON.",
        ),
    ]
    help = "Move the messages of Dramatiq's RedisBroker.\n\nQueued, delayed and dead ones, and what dead workers held."
    group.add_command(Migration("dramatiq-redis", _open_redis, help, params))


def _open_redis(store: SourceStore, **options: Any) -> Source:
    from relay_adapters.dramatiq.redis_source import RedisSource

    return RedisSource(store, **options)
