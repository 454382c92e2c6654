"""What a server that is killed takes with it, and one that is promoted has: as docs/operations.md says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping

import pytest

from relay_core import Broker
from tests.pages import ROOT
from tests.servers import Flavour, Server, eventually

PAGE = (ROOT / "docs" / "operations.md").read_text()
TABLE = re.findall(r"^\| ((?:`appendonly|snapshots|neither).*?) \| (.*?) \| .*? \|$", PAGE, re.MULTILINE)
SETTINGS: dict[str, Mapping[str, str]] = {
    "`appendonly yes`, `appendfsync always`": {"appendonly": "yes", "appendfsync": "always"},
    "`appendonly yes`, `appendfsync everysec`": {"appendonly": "yes", "appendfsync": "everysec"},
    "`appendonly yes`, `appendfsync no`": {"appendonly": "yes", "appendfsync": "no"},
    "snapshots only (`save …`)": {"save": "3600 1000000"},
    "neither": {},
}
KEPT = {"nothing": 15, "all since the last snapshot": 10, "all": 0}
"""What the page says is lost -> how many jobs are kept, of 10 before a snapshot and 5 after it."""


def test_every_row_of_the_page_is_tried() -> None:
    assert [row for row, _lost in TABLE] == list(SETTINGS)


@pytest.mark.parametrize(("row", "lost"), TABLE)
def test_a_killed_server_loses_what_the_page_says_and_nothing_else(flavour: Flavour, row: str, lost: str) -> None:
    with Server(flavour, options=SETTINGS[row]) as server:
        with Broker(server.url) as broker:
            broker.enqueue_many("q", [b"before"] * 10)
            if "save" in SETTINGS[row]:
                server.cli("BGSAVE")
                eventually(lambda: server.info("persistence")["rdb_bgsave_in_progress"] == "0", "snapshot")
            broker.enqueue_many("q", [b"after"] * 5)
        if "everysec" in row:  # a sync of a slow disk holds back what is written meanwhile, as the page says
            eventually(lambda: server.info("persistence")["aof_buffer_length"] == "0", "all to be written")
        server.kill()
        server.start()
        with Broker(server.url) as broker:
            assert broker.stats("q").ready == KEPT[lost]
            assert broker.audit("q").clean


def test_a_snapshot_is_restored_to_an_append_only_server_as_the_page_says(flavour: Flavour) -> None:
    with Server(flavour) as old, Server(flavour) as new:
        with Broker(old.url) as broker:
            broker.enqueue_many("q", [b"x"] * 3)
        old.cli("SAVE")
        new.shutdown()
        shutil.copy(old.folder / "dump.rdb", new.folder)
        new.options["appendonly"] = "yes"
        new.start()
        with Broker(new.url) as broker:
            assert broker.queues() == []  # it begins empty
        new.kill()
        shutil.copy(old.folder / "dump.rdb", new.folder)
        shutil.rmtree(new.folder / "appendonlydir")
        new.options["appendonly"] = "no"
        new.start()
        new.cli("CONFIG", "SET", "appendonly", "yes")
        pending = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
        eventually(lambda: {new.info("persistence")[name] for name in pending} == {"0"}, "the append-only folder")
        new.kill()
        new.options["appendonly"] = "yes"
        new.start()
        with Broker(new.url) as broker:
            assert broker.stats("q").ready == 3
            assert broker.audit("q").clean


def test_an_append_only_folder_is_copied_from_a_running_server_as_the_page_says(flavour: Flavour) -> None:
    with Server(flavour, options={"appendonly": "yes"}) as old, Server(flavour) as new:
        with Broker(old.url) as broker:
            broker.enqueue_many("q", [b"x"] * 3)
        old.cli("CONFIG", "SET", "auto-aof-rewrite-percentage", "0")
        eventually(lambda: old.info("persistence")["aof_rewrite_in_progress"] == "0", "no rewrite")
        new.shutdown()
        shutil.copytree(old.folder / "appendonlydir", new.folder / "appendonlydir")
        new.options["appendonly"] = "yes"
        new.start()
        with Broker(new.url) as broker:
            assert broker.stats("q").ready == 3
            assert broker.audit("q").clean


def test_a_replica_that_is_promoted_has_all_queues_with_their_leases_and_delays(flavour: Flavour) -> None:
    at_once = {"repl-diskless-sync-delay": "0"}
    with Server(flavour, tcp=True, options=at_once) as old, Server(flavour, tcp=True) as new:
        with Broker(old.url, lease=3600) as broker:
            broker.enqueue_many("q", [b"x"] * 3)
            broker.enqueue("q", b"later", delay=3600)
            (held,) = broker.claim("q")
            new.cli("REPLICAOF", "127.0.0.1", str(old.port))
            eventually(lambda: new.info("replication").get("master_link_status") == "up", "first sync")
            assert broker.stats("q").inflight == 1
        new.cli("REPLICAOF", "NO", "ONE")
        with Broker(new.url) as broker:
            stats = broker.stats("q")
            assert (stats.ready, stats.delayed, stats.inflight) == (2, 1, 1)
            broker.ack(held)
            assert broker.audit("q").clean
