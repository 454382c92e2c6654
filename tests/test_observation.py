"""Promise 11: without plugins nothing changes on the wire, and a plugin that watches or raises changes nothing."""

from __future__ import annotations

import itertools
import re

import pytest

from relay_core import hookimpl
from relay_core.broker import Broker
from relay_core.errors import LeaseLost, RelayError
from relay_core.validation import JobSpec
from tests.proxy import Proxy, to_socket
from tests.servers import Server, eventually


class Recording(Proxy):
    """Keeps every byte that clients send."""

    def __init__(self, server: Server) -> None:
        super().__init__(to_socket(server.socket), unix=True)
        self._data = b""

    @property
    def sent(self) -> bytes:
        """But for the second of each claim, which fencing tokens carry: two recordings need not be of the same one."""
        return re.sub(rb"(:n\d+t)[0-9a-f]{8}\b", rb"\1", self._data)

    def _fault_for(self, data: bytes) -> tuple[str, int]:
        self._data += data
        return super()._fault_for(data)


class Watcher:
    """Implements every notify hook."""

    def __init__(self, error: bool = False) -> None:
        self.seen: list[str] = []
        self.error = error

    def note(self, what: str) -> None:
        self.seen.append(what)
        if self.error:
            raise RuntimeError("a plugin's own trouble")

    @hookimpl
    def relay_job_enqueued(self) -> None:
        self.note("enqueued")

    @hookimpl
    def relay_job_deduplicated(self) -> None:
        self.note("deduplicated")

    @hookimpl
    def relay_job_claimed(self) -> None:
        self.note("claimed")

    @hookimpl
    def relay_job_acked(self) -> None:
        self.note("acked")

    @hookimpl
    def relay_job_retried(self) -> None:
        self.note("retried")

    @hookimpl
    def relay_job_dead(self, reason: str) -> None:
        self.note(f"dead of {reason}")

    @hookimpl
    def relay_jobs_reaped(self) -> None:
        self.note("reaped")

    @hookimpl
    def relay_lease_lost(self, move: str) -> None:
        self.note(f"lost at {move}")


def a_day(broker: Broker) -> list[object]:
    """Some of everything, and what it answered."""
    broker.enqueue_many("q", [JobSpec(b"x", dedup_key=key, priority=3) for key in (None, "k", "k")])
    first, second = broker.claim("q", 5)
    broker.ack(first)
    again = [broker.nack(second, ValueError("no"), delay=0.0)]
    jobs = broker.claim("q", 1)
    broker.extend(jobs)
    verdicts = broker.finish("q", [], [(jobs[0], broker.operations.nack_of(jobs[0], "no", dead=True))], 1)[1]
    return [first.payload, second.id, again, verdicts, broker.requeue("q"), broker.purge("q")]


@pytest.mark.parametrize("error", [False, True], ids=["quiet", "raising"])
def test_a_plugin_that_watches_changes_no_byte_on_the_wire(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: bool
) -> None:
    watcher, records = Watcher(error), []
    for plugins in ((), (watcher,)):
        server.cli("FLUSHALL")
        server.cli("SCRIPT", "FLUSH")
        numbers, nonces = itertools.count(), itertools.count()
        monkeypatch.setattr("relay_core.validation.new_id", lambda n=numbers: f"id{next(n)}")
        monkeypatch.setattr("relay_core.operations.claiming.new_nonce", lambda n=nonces: f"n{next(n)}")
        with Recording(server) as proxy, Broker(proxy.url, plugins=plugins) as broker:
            records.append((a_day(broker), proxy.sent))
    assert records[0] == records[1]
    assert records[0][1].count(b"EVALSHA") > 8
    assert {"enqueued", "deduplicated", "claimed", "acked", "retried", "dead of rejected"} == set(watcher.seen)


def test_an_event_is_told_only_after_its_script_succeeded(server: Server) -> None:
    watcher = Watcher()
    with Broker(server.url, plugins=[watcher], retry_for=0.0, lease=0.1) as broker:
        broker.enqueue("q", b"x")
        (job,) = broker.claim("q")
        eventually(lambda: broker.reap("q"), "the end of the lease")
        for move in (broker.ack, broker.nack):
            with pytest.raises(LeaseLost):
                move(job)
        server.cli("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(RelayError):
            broker.enqueue("q", b"x")
    assert watcher.seen == ["enqueued", "claimed", "reaped", "lost at ack", "lost at nack"]


def test_a_plugin_that_raises_is_logged_and_silences_no_other(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Watcher(error=True), Watcher(error=True)
    with Broker(server.url, plugins=[first, second]) as broker:
        broker.enqueue("q", b"x")
        broker.ack(broker.claim("q")[0])
    assert first.seen == second.seen == ["enqueued", "claimed", "acked"]
    assert caplog.text.count("a plugin's own trouble") >= 6
