"""A Celery app like any other. Worker: `celery -A celery_app worker`; this file as a script enqueues."""

import os
import sys
import time

import indexing
from celery import Celery

app = Celery("celery_app", broker=os.environ["RELAY_URL"])
app.conf.update(
    broker_transport_options={
        "lease": float(os.environ.get("DEMO_LEASE", "15")),
        "max_deliveries": int(os.environ.get("DEMO_DELIVERIES", "5")),
        "retry": {"base": 0.5},
    },
    task_acks_late=True,
    task_ignore_result=True,
    worker_hijack_root_logger=False,
)


@app.task
def index(path, sent):
    indexing.index_file("celery", path, sent)


@app.task(autoretry_for=(RuntimeError,), default_retry_delay=1, max_retries=5)
def flaky(key, sent):
    indexing.flaky("celery", key, sent)


@app.task
def postponed(key, sent):
    indexing.postponed("celery", key, sent)


@app.task
def slow(key, sent):
    indexing.slow("celery", key, sent)


@app.task(reject_on_worker_lost=True)
def poison(key):
    indexing.poison("celery", key)


if __name__ == "__main__":
    paths, others = indexing.todo(sys.argv)
    slow.delay("s0", time.time())
    poison.delay("x0")
    for i in range(others):
        flaky.delay(f"f{i}", time.time())
        postponed.apply_async((f"p{i}", time.time()), countdown=indexing.DELAY)
    for path in paths + paths[:others]:  # the last are duplicates, and dropped
        index.apply_async((path, time.time()), relay_dedup_key=path, relay_dedup_for=3600)
