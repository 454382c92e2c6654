"""A gevent worker: nothing that it holds runs elsewhere while its task does not yield, and control reaches it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from celery.utils.nodenames import gethostname

from relay_core import Broker
from tests.celery_workers import CeleryWorker, client_of, lines
from tests.servers import Server, eventually

LEASE = 0.6


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_the_leases_of_a_gevent_worker_are_kept_while_a_task_does_not_yield(tcp_server: Server, tmp_path: Path) -> None:
    client = client_of(tcp_server.url, tmp_path)
    flags = ("-P", "gevent", "-c", "1", "--prefetch-multiplier", "2")
    with (
        Broker(tcp_server.url, lease=60.0) as other,
        CeleryWorker(tcp_server.url, tmp_path, *flags, options={"lease": LEASE}) as worker,
    ):
        leases = other.settings.keys("celery").leases
        ids = [client.send_task("tests.celery_app.spin", ["spins", "go"]).id]
        eventually(lambda: lines(tmp_path, "started"), "the task to compute")
        extended: set[float] = set()

        def kept() -> bool:
            assert other.claim("celery") == [], "another worker has got it"
            extended.add(float(tcp_server.cli("ZSCORE", leases, ids[0])))
            return len(extended) > 8

        eventually(kept, "its lease to be extended again and again")
        (tmp_path / "go").touch()
        eventually(lambda: other.stats("celery").pending == 0, "it to be done")
        assert lines(tmp_path, "started") == ["spins"]
        # the greenlet that keeps the leases has them again
        client.send_task("tests.celery_app.late", ["after"])
        eventually(lambda: lines(tmp_path, start="after"), "the next task")
        assert not worker.logged("s late")
    client.close()


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_control_reaches_a_gevent_worker_that_lost_the_connection_for_it_alone(
    tcp_server: Server, tmp_path: Path
) -> None:
    """Celery gives it one of its own there, and nothing else notices that it is gone."""
    client = client_of(tcp_server.url, tmp_path)
    flags = ("-P", "gevent", "-c", "1", "--without-gossip", "--without-mingle")
    with CeleryWorker(tcp_server.url, tmp_path, *flags) as worker:

        def listening() -> list[str]:
            clients = tcp_server.cli("CLIENT", "LIST").decode().splitlines()
            return [one.split()[0].removeprefix("id=") for one in clients if " cmd=xreadgroup " in one]

        eventually(lambda: len(listening()) == 1, "it to listen for commands, and nobody else")
        (lost,) = listening()
        tcp_server.cli("CLIENT", "KILL", "ID", lost)
        eventually(lambda: lost not in listening(), "that connection to be gone")
        assert client.control.ping([f"w@{gethostname()}"], timeout=20, limit=1), "it does not hear"
        assert not worker.logged("Connection to broker lost"), "the loss of another connection had it listen again"
        assert worker.stop() == 0
    client.close()


_HOLDS_SOMETHING = """
import gevent.monkey
gevent.monkey.patch_all()
import atexit, sys
from relay_adapters.celery.holding import greenbeat
from relay_adapters.celery.holding.leases import leases_of
from relay_core import Broker

atexit.register(lambda: print([ended.acquire(False) for _pid, _told, ended in greenbeat._threads]))
broker = Broker(sys.argv[1], lease=3600.0)
broker.enqueue("q", b"")
leases_of(broker).add("1.x", broker.claim("q")[0])
"""


@pytest.mark.parametrize("flavour", ["valkey"], indirect=True)
def test_the_thread_beside_gevents_has_ended_before_python_does(tcp_server: Server) -> None:
    """Where it is in gevent's hub just then, it takes the interpreter with it."""
    command = [sys.executable, "-c", _HOLDS_SOMETHING, tcp_server.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[-2] == "[True]"
