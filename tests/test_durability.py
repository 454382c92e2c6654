"""A repeated enqueue counts as durable only when the job itself was confirmed, not because nothing was written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from relay_core import Broker
from relay_core.errors import NotDurable
from relay_core.keys import ScheduleKeys
from relay_core.settings import StoreSettings
from tests.servers import Flavour, Server, eventually


@pytest.fixture
def replicated(flavour: Flavour) -> Iterator[tuple[Server, Server]]:
    """A primary and its replica, in step."""
    quick = {"repl-diskless-sync-delay": "0"}
    with Server(flavour, tcp=True, options=quick) as primary:
        following = quick | {"replicaof": f"127.0.0.1 {primary.port}"}
        with Server(flavour, tcp=True, options=following) as replica:
            eventually(lambda: "state=online" in primary.info("replication")["slave0"], "replica is in step")
            yield primary, replica


def test_a_repeated_enqueue_waits_for_the_replica_as_the_first_one_did(replicated: tuple[Server, Server]) -> None:
    primary, replica = replicated
    replica.pause()
    for _ in range(2):
        # Each broker has a connection of its own, on which the second one has written nothing yet.
        broker = Broker(primary.url, durability="replica:1", durability_timeout=0.2)
        with pytest.raises(NotDurable):
            broker.enqueue("mail", b"x", id="one")
        broker.close()
    replica.resume()
    with Broker(primary.url, durability="replica:1", durability_timeout=30.0) as broker:
        assert broker.enqueue("mail", b"x", id="one").duplicate
    assert replica.cli("HLEN", "relay:{mail:0}:j") == 1


def test_a_tick_that_is_sent_again_waits_for_the_replica_as_the_first_one_did(
    replicated: tuple[Server, Server], caplog: pytest.LogCaptureFixture
) -> None:
    primary, replica = replicated
    with Broker(primary.url) as plain:
        plain.schedule("nightly", "mail", b"x", every=3600)
    primary.cli("ZADD", ScheduleKeys("relay").next_ticks, 1000, "nightly")
    eventually(lambda: replica.cli("ZSCORE", ScheduleKeys("relay").next_ticks, "nightly") == b"1000", "it is in step")
    replica.pause()
    for times in (1, 2):
        with Broker(primary.url, durability="replica:1", durability_timeout=0.2) as broker:
            broker.run_due()
        assert caplog.text.count("refuses its job") == times
    assert primary.cli("ZSCORE", ScheduleKeys("relay").next_ticks, "nightly") == b"1000", "it is still to be done"
    replica.resume()


def test_a_server_that_syncs_each_second_has_time_for_it() -> None:
    """What Redis 8 takes under `everysec` for each sync is a second and some ms more; two more may pass for one that is
    under way. Shorter than that, and every single enqueue would be told to be none that is durable."""
    assert StoreSettings().durability_timeout > 1 + 2 + 0.5
