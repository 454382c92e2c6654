"""`relay worker` and `relay demo`: the commands that run jobs."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from relay_core.broker import Broker
from relay_core.cli import values
from relay_core.cli.completion import queues as queue_names
from relay_core.cli.output import emit, plural
from relay_core.cli.session import Command, Session, pass_session
from relay_core.errors import InvalidArgument, RelayError
from relay_core.retry import RetryPolicy

logger = logging.getLogger("relay.cli")

_RETRY_FOR = 10.0


def load_handler(name: str) -> Callable[..., Any]:
    """The function that `module:handler` names. Raises InvalidArgument that says what is wrong with it.

    The current directory is put on sys.path.
    """
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise InvalidArgument(f"handler {name!r}: write it as module:function, e.g. tasks:handle")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(name, module_name, error) from error
        raise InvalidArgument(
            f"handler {name!r}: there is no module {error.name!r} in {here} or on sys.path; run relay where it lies, "
            "or set PYTHONPATH"
        ) from error
    except Exception as error:
        raise _broken(name, module_name, error) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise InvalidArgument(f"handler {name!r}: module {module_name!r} has no {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise InvalidArgument(f"handler {name!r} is a {type(found).__name__}, not a function that takes a Job")
    handler: Callable[..., Any] = found
    return handler


def _broken(name: str, module: str, error: Exception) -> InvalidArgument:
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        at = f" at {error.filename}:{error.lineno}"
    return InvalidArgument(f"handler {name!r}: importing {module!r} failed with {type(error).__name__}: {error}{at}")


@click.command("worker", cls=Command)
@click.argument("handler", metavar="MODULE:HANDLER")
@click.option(
    "--queue",
    "-q",
    "queues",
    multiple=True,
    required=True,
    shell_complete=queue_names,
    help="A queue to serve; repeatable, first first.",
)
@click.option("--concurrency", "-c", type=int, default=1, show_default=True, help="Handlers at a time.")
@click.option(
    "--grace",
    type=values.duration,
    metavar="DURATION",
    default=30.0,
    show_default=True,
    help="Time for running jobs at a stop.",
)
@click.option(
    "--lease",
    type=values.duration,
    metavar="DURATION",
    default=15.0,
    show_default=True,
    help="Time after which a silent worker's jobs go on.",
)
@click.option(
    "--max-deliveries", type=int, default=5, show_default=True, help="Of a job that names none, until it is dead."
)
@click.option(
    "--max-retries",
    type=int,
    default=20,
    show_default=True,
    help="Failures of a job that names none, until it is dead.",
)
@click.option(
    "--retry-base",
    type=values.duration,
    metavar="DURATION",
    default=1.0,
    show_default=True,
    help="Longest first wait of a failed job; it doubles with each retry.",
)
@click.option(
    "--retry-ceiling",
    type=values.duration,
    metavar="DURATION",
    default=600.0,
    show_default=True,
    help="Longest wait of all of a failed job.",
)
@click.option("--prefetch", type=int, help="Jobs held beyond those that run. Default: 50 ms of work.")
@click.option(
    "--metrics-addr", metavar="HOST:PORT", help="Serve Prometheus metrics there at /metrics. Default: nowhere."
)
@click.option("--schedule", is_flag=True, help="Run the recurring jobs too, as `relay schedule run` does.")
@click.option(
    "--metrics-tasks", type=int, default=0, help="Names of tasks that get a label of their own. Default: 0, no label."
)
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error"), case_sensitive=False),
    default="info",
    show_default=True,
    help="What is logged to stderr.",
)
@pass_session
def worker(
    session: Session,
    handler: str,
    queues: tuple[str, ...],
    concurrency: int,
    grace: float,
    lease: float,
    max_deliveries: int,
    max_retries: int,
    retry_base: float,
    retry_ceiling: float,
    prefetch: int | None,
    metrics_addr: str | None,
    metrics_tasks: int,
    schedule: bool,
    log_level: str,
) -> None:
    """Run a handler on the jobs of some queues until SIGTERM or Ctrl-C, or its terminal closes.

    The handler is a function that takes a relay_core.Job. Returning acks the job; raising retries it. The first
    signal waits for running jobs up to --grace, the second hands them back at once.
    """
    from relay_core.worker import Worker

    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    function = load_handler(handler)
    broker = session.open(
        retry_for=_RETRY_FOR,
        lease=lease,
        max_deliveries=max_deliveries,
        retry=RetryPolicy(base=retry_base, ceiling=retry_ceiling, max_retries=max_retries),
        client_name="relay-worker",
    )
    broker.store.raw("PING")  # a wrong URL ends it here; later on a worker waits for its server
    logger.info("serving %s, %d at a time, on %s", ", ".join(queues), concurrency, broker.url.safe())
    made = Worker(
        broker,
        function,
        queues,
        concurrency=concurrency,
        grace=grace,
        prefetch=prefetch,
        metrics_addr=metrics_addr,
        metrics_tasks=metrics_tasks,
    )
    with _schedules(broker) if schedule else nullcontext():
        processed = made.run()
    logger.info("stopped; %s done", plural(processed, "job"))
    if session.json:
        emit(session, {"queues": list(queues), "processed": processed})


@contextmanager
def _schedules(broker: Broker) -> Iterator[None]:
    """Run the recurring jobs on a thread of their own."""
    from relay_core.schedule import ScheduleRunner

    runner = ScheduleRunner(broker)
    thread = threading.Thread(target=runner.run, name="relay-schedule", daemon=True)
    thread.start()
    try:
        yield
    finally:
        runner.stop()
        thread.join(timeout=1.0)  # one that is held up by its server may be left like this, as a kill would leave it


class JobsLost(RelayError):
    """The demo found that a file was not indexed."""


@click.command("demo", cls=Command)
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep", is_flag=True, help="Leave the demo's folder, with logs and data.")
@click.option(
    "--lease",
    type=values.duration,
    metavar="DURATION",
    default=3.0,
    show_default=True,
    help="Time after which a killed worker's jobs go on.",
)
@pass_session
def demo(session: Session, folder: Path | None, keep: bool, lease: float) -> None:
    """Let Celery, Dramatiq and relay workers index the files of FOLDER while one of them is killed.

    Default: the standard library of the running Python. It uses an embedded server of its own. Exit code 1 when
    anything was lost.
    """
    from rich.console import Console

    from relay_core.cli.demo import run

    outcome = run(folder, keep=keep, lease=lease, console=Console(stderr=session.json))
    if session.json:
        emit(session, outcome.to_json())
    if outcome.problems:
        raise JobsLost(f"the demo lost work or found something wrong: {outcome.problems[0]}")
