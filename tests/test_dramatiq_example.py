"""examples/dramatiq: the same application, unchanged, on Dramatiq's RedisBroker and on relay."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.servers import Server

FOLDER = Path(__file__).parents[1] / "examples" / "dramatiq"
MAILS = 20


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["redis"], indirect=True)
def test_the_example_runs_unchanged_on_the_redis_broker_and_on_relay(server: Server, tmp_path: Path) -> None:
    brokers = {"redis": f"unix://{server.socket}", "relay": server.url}
    with ExitStack() as stack:
        askers = {}
        for broker, url in brokers.items():
            env = {**os.environ, "BROKER": broker, "BROKER_URL": url, "PYTHONDONTWRITEBYTECODE": "1"}
            log = stack.enter_context(open(tmp_path / broker, "wb"))
            command = [
                str(Path(sysconfig.get_path("scripts"), "dramatiq")),
                "app",
                "--processes",
                "1",
                "--threads",
                "4",
            ]
            worker = subprocess.Popen(command, cwd=FOLDER, env=env, stdout=log, stderr=log)
            stack.callback(_end, worker)
            askers[broker] = subprocess.Popen(
                [sys.executable, "app.py", str(MAILS)], cwd=FOLDER, env=env, stdout=subprocess.PIPE, text=True
            )
        for broker, asker in askers.items():
            out, _err = asker.communicate(timeout=60)
            assert asker.returncode == 0, broker
            assert "all done after" in out
    for broker in brokers:
        told = (tmp_path / broker).read_text()
        mails = re.findall(r"delivered to reader(\d+)@example\.org", told)  # the lines of two threads may run together
        assert sorted(map(int, mails)) == list(range(MAILS))
        assert f"{MAILS} mails were sent" in told


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(20)
    worker.kill()
