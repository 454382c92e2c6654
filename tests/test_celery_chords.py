"""A chord goes on where a worker dies at any moment, with Celery's own claims to its body."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord
from celery.backends.redis import RedisBackend

from relay_adapters.celery.holding import chords
from tests.celery_workers import POOLS, STARTS, CeleryWorker, client_of, lines, results_of
from tests.servers import Server, eventually

LEASE = {"lease": 3.0}

# Celery's own backend, in the test's process, and redis-py 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
    pytest.mark.since("celery", "5.7"),  # before, a header's task that runs again counts twice, and no body is sent
]


def ends_elsewhere(server: Server, folder: Path, pool: str, conf: Mapping[str, Any]) -> None:
    """A chord whose body was being sent when all of a worker was killed."""
    results, conf = results_of(server), {"task_acks_late": True, **conf}
    app = client_of(server.url, folder, results)
    add, count = (app.signature(f"tests.celery_app.{name}") for name in ("add", "count"))
    with CeleryWorker(
        server.url,
        folder,
        *POOLS[pool],
        "--include",
        "tests.celery_dies_at_body",
        results=results,
        options=LEASE,
        conf=conf,
    ) as first:
        whole = chord([add.clone(args=(n, n)) for n in range(3)])(count)
        first.process.wait(30)
    assert lines(folder, "died") == ["body"]
    with CeleryWorker(server.url, folder, *POOLS[pool], name="second", results=results, options=LEASE, conf=conf):
        eventually(lambda: whole.state == "SUCCESS", "the chord's body", 30)
    assert whole.get() == 3
    assert lines(folder, start="chord") == ["chord 3"]
    app.close()


@pytest.mark.parametrize("kind", POOLS)
def test_a_worker_that_was_killed_as_it_sent_a_chords_body_keeps_no_other_from_it(
    server: Server, tmp_path: Path, kind: str
) -> None:
    ends_elsewhere(server, tmp_path, kind, {})


@pytest.mark.parametrize("start", STARTS[1:])
def test_nor_does_a_child_that_was_spawned(server: Server, tmp_path: Path, start: Mapping[str, Any]) -> None:
    ends_elsewhere(server, tmp_path, "prefork", start)


@pytest.mark.parametrize(
    ("url", "seconds"),
    [
        ("relay://127.0.0.1:1", 9),
        ("relay://127.0.0.1:1;relay://127.0.0.1:2", 9),
        ("relay+cluster://127.0.0.1:1,127.0.0.1:2", 9),
        ("redis://127.0.0.1:1/0", 21),
        ("pyamqp://guest:guest@127.0.0.1:1/a/b", 21),
        ("memory://", 21),
    ],
)
def test_an_app_over_another_broker_keeps_celerys_own_claim(
    url: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = RedisBackend._chord_publish_claim_expires
    monkeypatch.setattr(RedisBackend, "_chord_publish_claim_expires", getattr(stock, "relay_stock", stock))
    chords.install()
    with Celery(broker=url, backend="redis://127.0.0.1:1", set_as_current=False) as app:
        app.conf.broker_transport_options = {} if seconds < 21 else {"leases": 3}
        assert app.backend._chord_publish_claim_expires(6, app.signature("count")) == seconds
