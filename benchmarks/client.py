"""What a confirmed publish costs the process that sends it, its system calls included: processor time, which other
programs on the machine can only add to, so the least of many rounds counts."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from tests.servers import Server

KINDS = ("stock", "relay")
TURNS = 3
SENT, ROUNDS = 300, 30

_DRAMATIQ = """
import os
import dramatiq

if os.environ["BROKER"].startswith("redis"):
    from dramatiq.brokers.redis import RedisBroker
    dramatiq.set_broker(RedisBroker(url=os.environ["BROKER"]))
else:
    from relay_adapters.dramatiq import RelayBroker
    dramatiq.set_broker(RelayBroker(url=os.environ["BROKER"]))

@dramatiq.actor
def noop(i):
    pass

send = noop.send
"""

_CELERY = """
import os
from celery import Celery

app = Celery("sender", broker=os.environ["BROKER"])
app.conf.task_ignore_result = True

@app.task
def noop(i):
    pass

send = noop.delay
"""

_MEASURE = """
import time
send(0)
for _ in range({rounds}):
    began = time.process_time()
    for i in range({sent}):
        send(i)
    print((time.process_time() - began) / {sent})
"""


def client(folder: Path) -> Table:
    """Least and median, and how many times less relay's is."""
    table = Table(title=f"Processor time of the sender, µs per publish (least of {TURNS * ROUNDS} rounds; median)")
    for column in ("publish", "stock", "relay", "stock / relay"):
        table.add_column(column, justify="left" if column == "publish" else "right")
    with Server("redis", tcp=True) as server:
        for name, app in (("Celery delay()", _CELERY), ("Dramatiq send()", _DRAMATIQ)):
            file = folder / "sender.py"
            file.write_text(app + _MEASURE.format(rounds=ROUNDS, sent=SENT))
            found: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(TURNS):
                for kind in KINDS:
                    found[kind] += _rounds(file, server, kind)
            least = [min(found[kind]) for kind in KINDS]
            shown = [f"{min(found[kind]):.0f} ({statistics.median(found[kind]):.0f})" for kind in KINDS]
            table.add_row(name, *shown, f"{least[0] / least[1]:.2f}")
    return table


def _rounds(file: Path, server: Server, kind: str) -> list[float]:
    server.cli("FLUSHALL")
    url = server.url if kind == "relay" else f"redis://127.0.0.1:{server.port}/0"
    sender = [sys.executable, str(file)]
    done = subprocess.run(sender, env={**os.environ, "BROKER": url}, capture_output=True, check=True, text=True)
    return [float(line) * 1e6 for line in done.stdout.split()]
