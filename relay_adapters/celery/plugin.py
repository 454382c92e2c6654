"""What relay's tools can read of a Celery task: protocol 2's headers, protocol 1's JSON, never what is pickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relay_adapters.celery.messages.plain import lengthened
from relay_adapters.celery.messages.protocol import protocol_1
from relay_core.hooks import hookimpl
from relay_core.job import Job, JobSummary, StoredJob

if TYPE_CHECKING:
    from relay_core.migration import Source, SourceStore

HEADER, ADAPTER = "relay_adapter", "celery"
"""The header, and its value, of the jobs that this adapter stores."""

_LONGEST = 1024
"""Characters of arguments that are shown."""


@hookimpl
def relay_register_adapter(register: Callable[..., None]) -> None:
    # remote control, its replies and events: one queue per worker, client and monitor
    internal = ("*.celery.pidbox", "celeryev.*")
    register("celery", "Celery(broker='relay://…'), by relay_adapters.celery", internal)


@hookimpl
def relay_describe_job(job: Job | StoredJob) -> JobSummary | None:
    """Name, arguments as the client wrote them (its safe reprs), retries, eta, and the ids around it. A client of
    protocol 1 writes no reprs."""
    options = job.options
    if options.headers.get(HEADER) != ADAPTER:
        return None
    try:
        head, _, body = job.payload.partition(b"\n")
        message = lengthened(json.loads(head))
        headers = message["headers"] or {}
        if "task" not in headers:
            if (task := protocol_1({**message, "body": body})) is None:
                return None
            headers = {**task, "argsrepr": _shown(task.get("args")), "kwargsrepr": _shown(task.get("kwargs"))}
        retries, eta = headers.get("retries"), headers.get("eta")
        told = ("id", "root_id", "parent_id", "group", "origin")
        return JobSummary(
            name=str(headers["task"]),
            args=str(headers.get("argsrepr") or ""),
            kwargs=str(headers.get("kwargsrepr") or ""),
            retries=retries if isinstance(retries, int) else None,
            eta=None if eta is None else str(eta),
            extra={name: headers[name] for name in told if headers.get(name)},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # it is no message, and goes to dead when it is claimed


def _shown(arguments: Any) -> str:
    """As long as Celery's own reprs, which are texts, too."""
    text = "" if arguments is None else repr(arguments)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


@hookimpl
def relay_register_commands(group: Any) -> None:
    """`relay migrate celery-redis`."""
    import click

    from relay_core.migration import Migration

    params = [
        click.Option(
            ["--key-prefix"], default="", metavar="TEXT", help="The global_keyprefix of its broker_transport_options."
        ),
        click.Option(
            ["--sep"],
            metavar="TEXT",
            help="The sep of its broker_transport_options. Default: kombu's own, two control bytes.",
        ),
        click.Option(
            ["--queue", "queues"], multiple=True, metavar="NAME", help="Only this queue; repeatable. Default: all."
        ),
        click.Option(
            ["--unacked"],
            type=click.Choice(("auto", "all", "none")),
            default="auto",
            show_default=True,
            help="What workers hold, ETA tasks included: auto moves it when no worker is connected; all also when some "
            "are, and what they hold may run twice.",
        ),
        click.Option(
            ["--priority-order"],
            type=click.Choice(("redis", "amqp")),
            default="redis",
            show_default=True,
            help="Which priority its messages mean to be first: 0 (redis) or 9 (amqp).",
        ),
    ]
    help = "Move the messages of a Celery app on Redis.\n\nQueued ones with their priorities, unacked and ETA ones."
    group.add_command(Migration("celery-redis", _open_redis, help, params, prefix_of))


def _open_redis(store: SourceStore, **options: Any) -> Source:
    from relay_adapters.celery.redis_source import RedisSource

    return RedisSource(store, **options)


def prefix_of(key_prefix: str = "", **_options: Any) -> str | None:
    """Relay's prefix of an app with this `global_keyprefix`; None: the default."""
    return f"{key_prefix}relay" if key_prefix else None
