"""The real Prometheus for tests, on a loopback port and in a folder of its own; and promtool."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.servers import MissingServer, eventually, free_port


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingServer(f"no {name} here: run tools/setup-servers")
    return found


def promtool(*args: str, input: str = "", cwd: Path | None = None) -> None:
    """Run it; what it finds wrong, or warns of, is an AssertionError."""
    done = subprocess.run(
        [program("promtool"), *args], input=input, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), done.stderr


class Prometheus:
    """`with Prometheus(folder) as one:`, where `folder` holds a `prometheus.yml`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        for _ in range(5):
            address = f"127.0.0.1:{free_port()}"
            self.url = f"http://{address}"
            command = [
                program("prometheus"), "--config.file=prometheus.yml", f"--storage.tsdb.path={self.folder / 'data'}",
                f"--web.listen-address={address}", "--log.level=warn",
            ]  # fmt: skip
            with open(self.folder / "prometheus.log", "ab") as log:
                self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
            process = self._process
            eventually(lambda p=process: p.poll() is not None or self._ready(), "start of Prometheus")
            if process.poll() is None:
                return self
        raise RuntimeError((self.folder / "prometheus.log").read_text())

    def __exit__(self, *error: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)

    def _ready(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as reply:
            return bool(reply.status == 200)

    def ask(self, path: str, **query: str) -> Any:
        """The `data` of an answer of its API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            document = json.load(reply)
        assert document["status"] == "success", document
        return document["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression is now, one value per series."""
        return [float(row["value"][1]) for row in self.ask("query", query=expression)["result"]]

    def firing(self) -> dict[str, dict[str, str]]:
        """Labels of the alerts that fire, by name."""
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert["labels"] for alert in alerts if alert["state"] == "firing"}
