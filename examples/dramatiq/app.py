"""A newsletter: the same application on Dramatiq's RedisBroker and on relay. BROKER chooses, see README.md."""

from __future__ import annotations

import os
import random
import sys
import time

import dramatiq
from dramatiq.middleware import CurrentMessage

if os.environ.get("BROKER", "relay") == "redis":
    from dramatiq.brokers.redis import RedisBroker

    broker: dramatiq.Broker = RedisBroker(url=os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
else:
    from relay_adapters.dramatiq import RelayBroker

    broker = RelayBroker(url=os.environ.get("BROKER_URL", "relay://"))

broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)


@dramatiq.actor(min_backoff=100, max_backoff=1000)
def deliver(address: str) -> None:
    """One mail in five meets a mail server that is busy, and is retried."""
    message = CurrentMessage.get_current_message()
    if random.random() < 0.2:
        raise ConnectionError(f"the mail server of {address} is busy")
    retries = message.options.get("retries", 0) if message else 0
    print(f"delivered to {address}" + (f" after {retries} retries" if retries else ""), flush=True)


@dramatiq.actor(max_retries=0, queue_name="reports")
def report(mails: int) -> None:
    """Runs a little after the mails went out."""
    print(f"{mails} mails were sent", flush=True)


@dramatiq.actor
def newsletter(mails: int) -> None:
    """Fans out into one message per mail, and a report that waits."""
    for number in range(mails):
        deliver.send(f"reader{number}@example.org")
    report.send_with_options(args=(mails,), delay=3000)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    newsletter.send(count)
    print(f"asked for {count} mails, waiting for them")
    started = time.monotonic()
    for queue in ("default", "reports"):
        broker.join(queue, timeout=60_000)
    print(f"all done after {time.monotonic() - started:.1f} s")
