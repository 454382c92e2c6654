"""A shop: the same application on redis://, amqp:// and relay://. BROKER_URL chooses, see README.md.

Nothing of relay is imported, and no setting is for one broker only.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from celery import Celery, chain, chord, group
from kombu import Exchange, Queue

app = Celery("app", broker=os.environ.get("BROKER_URL", "relay://"))
app.conf.update(
    # results go to files, so that the example needs no server but the broker's
    result_backend=Path(os.environ.get("RESULTS", "results")).absolute().as_uri(),
    broker_connection_retry_on_startup=True,
    task_queues=[
        Queue("celery", Exchange("celery"), routing_key="celery"),
        Queue("mail", Exchange("mail", type="topic"), routing_key="mail.#"),
    ],
    task_routes={"app.confirm": {"queue": "mail", "routing_key": "mail.confirmation"}},
    beat_schedule={"stocktaking": {"task": "app.stocktaking", "schedule": 5.0}},
)
Path(app.conf.result_backend.removeprefix("file://")).mkdir(exist_ok=True)


@app.task(bind=True, max_retries=8, acks_late=True)
def charge(self: Any, order: int) -> int:
    """One payment in five meets a bank that is busy, and is retried; after a crash it runs again."""
    if random.random() < 0.2:
        raise self.retry(exc=ConnectionError("the bank is busy"), countdown=random.uniform(0.1, 0.5))
    print(f"order {order}: charged" + (f" after {self.request.retries} retries" if self.request.retries else ""))
    return order


@app.task
def pack(order: int) -> int:
    print(f"order {order}: packed")
    return order


@app.task
def confirm(order: int) -> int:
    """Runs from another queue, by a topic exchange."""
    print(f"order {order}: confirmed by mail")
    return order


@app.task
def close(orders: list[int]) -> int:
    """The body of a chord: once, when all orders are through."""
    print(f"{len(orders)} orders are closed")
    return len(orders)


@app.task
def remind(order: int) -> None:
    print(f"order {order}: please rate it")


@app.task
def stocktaking() -> None:
    """Sent by `celery beat`."""
    print("stock was taken")


def main(orders: int) -> None:
    started = time.monotonic()
    through = group(chain(charge.s(n), pack.s(), confirm.s()) for n in range(orders))
    closed = chord(through)(close.s())
    remind.apply_async((0,), countdown=2)
    print(f"sent {orders} orders, waiting for them")
    print(f"{closed.get(timeout=120)} orders are done after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
