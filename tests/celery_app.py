"""A Celery app for tests: its tasks write a line per run, and are told by arguments how to end.

Settings come from the environment: APP_URL, APP_FOLDER, APP_RESULTS (a result backend), APP_OPTIONS (JSON, transport
options), APP_CONF (JSON, further settings).
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import Reject, Retry

FOLDER = Path(os.environ.get("APP_FOLDER", "."))
NAME = os.environ.get("APP_NAME", "w")

app = Celery("tests.celery_app", broker=os.environ.get("APP_URL", "relay://"), backend=os.environ.get("APP_RESULTS"))
app.conf.update(
    broker_transport_options=json.loads(os.environ.get("APP_OPTIONS", "{}")),
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
    result_expires=600,
    **json.loads(os.environ.get("APP_CONF", "{}")),
)


def note(what: str, name: str = "runs") -> None:
    """Append a line to a file in one write: other processes do too."""
    with open(FOLDER / name, "ab", buffering=0) as file:
        file.write(f"{what}\n".encode())


def wait_for(name: str, seconds: float = 30.0) -> None:
    """Until the test makes that file."""
    deadline = time.monotonic() + seconds
    while not (FOLDER / name).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.01)


@app.task
def add(a: int, b: int) -> int:
    return a + b


@app.task
def run(key: str) -> str:
    note(f"{key} {time.time()} {NAME} {os.getpid()}")
    return key


@app.task(acks_late=True)
def late(key: str) -> str:
    note(f"{key} {time.time()} {NAME} {os.getpid()}")
    return key


@app.task(bind=True, acks_late=True)
def hold(self: Any, key: str, until: str) -> str:
    """Runs until the test makes a file."""
    note(f"{key} {time.time()} {NAME} {os.getpid()} {self.request.delivery_info['redelivered']}", "started")
    wait_for(until)
    note(f"{key} {time.time()} {NAME} {os.getpid()}")
    return key


@app.task(acks_late=True)
def spin(key: str, until: str) -> None:
    """Computes until the test makes a file, and lets no other greenlet run."""
    note(key, "started")
    while not os.path.exists(FOLDER / until):
        pass
    note(key)


@app.task
def hold_early(key: str, until: str) -> str:
    """The same, acked before it runs."""
    note(f"{key} {time.time()} {NAME} {os.getpid()}", "started")
    wait_for(until)
    note(f"{key} {time.time()} {NAME} {os.getpid()}")
    return key


def _again(task: Any, key: str, times: int) -> str:
    note(f"{key} {task.request.id} {task.request.retries}")
    if task.request.delivery_info["redelivered"]:
        note(key, "redelivered")
    if task.request.retries < times:
        raise task.retry(countdown=0.2, max_retries=times)
    return key


@app.task(bind=True, acks_late=True)
def again_late(self: Any, key: str, times: int) -> str:
    return _again(self, key, times)


@app.task(bind=True, acks_late=True)
def again_quietly(self: Any, key: str) -> None:
    """Retries once, and ends as if nothing were the matter."""
    note(key)
    if not self.request.retries:
        self.retry(throw=False, countdown=0.1)


@app.task(bind=True)
def again_early(self: Any, key: str, times: int) -> str:
    return _again(self, key, times)


@app.task(bind=True)
def wait_again(self: Any, key: str) -> None:
    """Its next try is an hour away."""
    note(key)
    raise self.retry(countdown=3600)


def _again_meanwhile(task: Any, key: str) -> None:
    note(key, "started")
    wait_for(f"{key}-send")
    try:
        task.retry(countdown=3600)
    except Retry:
        wait_for(f"{key}-end")
        raise


@app.task(bind=True)
def again_meanwhile_early(self: Any, key: str) -> None:
    """Sends its next try, an hour away, when the test makes a file, and ends at the next one."""
    _again_meanwhile(self, key)


@app.task(bind=True, acks_late=True)
def again_meanwhile_late(self: Any, key: str) -> None:
    """The same, acked late."""
    _again_meanwhile(self, key)


@app.task(bind=True, acks_late=True)
def refuse(self: Any, key: str, requeue: bool) -> str:
    """Rejects itself: for good, or once."""
    note(key)
    if requeue and self.request.delivery_info["redelivered"] is False and not (FOLDER / f"refused-{key}").exists():
        (FOLDER / f"refused-{key}").touch()
        raise Reject("not now", requeue=True)
    if not requeue:
        raise Reject(f"no use for {key}", requeue=False)
    return key


@app.task(acks_late=True, acks_on_failure_or_timeout=False)
def fail(key: str) -> None:
    note(key)
    raise ValueError(f"{key} is wrong")


@app.task(acks_late=True, reject_on_worker_lost=True)
def kill_child(key: str) -> None:
    note(f"{key} {os.getpid()}")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, acks_late=True, retry_on_worker_lost=True, default_retry_delay=0.1)
def retry_lost(self: Any, key: str) -> None:
    """Sends its own next try, and then dies."""
    note(f"{key} {self.request.retries}")
    if not self.request.retries:
        self.retry(countdown=0.1, throw=False)
        os.kill(os.getpid(), signal.SIGKILL)


@app.task
def count(results: list[Any]) -> int:
    note(f"chord {len(results)}")
    return len(results)


@app.task
def mourn(request: Any, error: Any, traceback: Any) -> None:
    """A `link_error` callback."""
    note(f"{request.id} {type(error).__name__}", "mourned")
