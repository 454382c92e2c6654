"""What is not installed is named, with what installs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
