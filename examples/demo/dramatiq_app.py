"""Dramatiq actors like any others. Worker: `dramatiq dramatiq_app`; this file as a script enqueues."""

import os
import sys
import time

import dramatiq
import indexing

from relay_adapters.dramatiq import RelayBroker

lease, deliveries = float(os.environ.get("DEMO_LEASE", "15")), int(os.environ.get("DEMO_DELIVERIES", "5"))
dramatiq.set_broker(RelayBroker(url=os.environ["RELAY_URL"], lease=lease, max_deliveries=deliveries))


@dramatiq.actor
def index(path, sent):
    indexing.index_file("dramatiq", path, sent)


@dramatiq.actor(min_backoff=500, max_backoff=1000)
def flaky(key, sent):
    indexing.flaky("dramatiq", key, sent)


@dramatiq.actor
def postponed(key, sent):
    indexing.postponed("dramatiq", key, sent)


@dramatiq.actor
def poison(key):
    time.sleep(0.5)  # Dramatiq's master can wait for ever for a process that dies while it boots
    indexing.poison("dramatiq", key)


if __name__ == "__main__":
    paths, others = indexing.todo(sys.argv)
    for i in range(others):
        flaky.send(f"f{i}", time.time())
        postponed.send_with_options(args=(f"p{i}", time.time()), delay=int(indexing.DELAY * 1000))
    poison.send("x0")
    for path in paths:
        index.send(path, time.time())
