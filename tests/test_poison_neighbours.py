"""A job that kills its worker must not take the jobs that were fetched with it to dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from relay_core import Broker, JobSpec
from tests.servers import Server, eventually


def test_a_poison_job_goes_to_dead_alone(server: Server) -> None:
    with Broker(server.url, lease=0.5) as broker:
        # in front, and fetched together with the poison each time it comes back
        broker.enqueue_many("q", [JobSpec(b"poison", max_deliveries=5)] + [JobSpec(b"innocent")] * 60)
        code = (
            "from relay_core import Broker; from relay_core.worker import Worker; "
            "from tests.poison_handlers import handle; "
            f"Worker(Broker({server.url!r}, lease=0.5), handle, ['q'], concurrency=1, prefetch=40).run()"
        )
        worker = None

        def all_over() -> bool:
            nonlocal worker
            if worker is None or worker.poll() is not None:
                worker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
            return broker.stats("q").pending == 0

        try:
            eventually(all_over, "the queue to be empty", 60)
        finally:
            if worker is not None:
                worker.kill()
                worker.wait()
        assert [job.payload for job in broker.dead("q")] == [b"poison"]
        assert broker.dead("q")[0].deliveries == 5
        assert broker.stats("q").counters["processed"] == 60
        assert broker.audit("q").clean
