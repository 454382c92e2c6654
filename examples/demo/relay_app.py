"""Relay used directly. Worker: `relay worker relay_app:handle --queue index`; this file as a script enqueues."""

import json
import os
import sys
import time

import indexing

from relay_core import Broker, JobSpec, RetryPolicy


def handle(job):
    """The handler of `relay worker`: a plain function that gets the job."""
    task = json.loads(job.payload)
    if task["name"] == "index":
        indexing.index_file("relay", task["key"], task["sent"])
    elif task["name"] == "flaky":
        indexing.flaky("relay", task["key"], task["sent"])
    elif task["name"] == "postponed":
        indexing.postponed("relay", task["key"], task["sent"])
    else:
        indexing.poison("relay", task["key"])


def spec(name, key, **options):
    return JobSpec(json.dumps({"name": name, "key": key, "sent": time.time()}).encode(), **options)


if __name__ == "__main__":
    paths, others = indexing.todo(sys.argv)
    with Broker(os.environ["RELAY_URL"]) as broker:
        quick = RetryPolicy(base=0.5)
        jobs = [spec("flaky", f"f{i}", retry=quick) for i in range(others)]
        jobs += [spec("postponed", f"p{i}", delay=indexing.DELAY) for i in range(others)]
        jobs += [spec("poison", "x0")]
        # the last are duplicates, and dropped
        jobs += [spec("index", path, dedup_key=path, dedup_for=3600) for path in paths + paths[:others]]
        broker.enqueue_many("index", jobs)
