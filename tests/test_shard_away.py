"""One server of a cluster is away: workers go on with the queues of the others, and with its own once it is back."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import kombu
import pytest
from kombu.exceptions import OperationalError

from relay_adapters.celery.errors import MailboxesAway
from relay_adapters.celery.queues.outage import Outage
from relay_adapters.celery.sending import routing
from relay_core import AsyncBroker, Broker, Job
from relay_core.connection import SyncStore
from relay_core.errors import Unavailable
from relay_core.keys import queue_keys
from relay_core.settings import StoreSettings, parse_url
from relay_core.worker import Worker
from tests.celery_links import BOX, Inbox, link, send
from tests.celery_workers import POOLS, CeleryWorker, client_of, lines
from tests.servers import Server, eventually
from tests.shells import Open, kind, store_at  # noqa: F401 (fixtures)
from tests.topologies import Cluster

pytestmark = pytest.mark.slow

MAIL = b"relay:{celery}:x"
"""A key beside those of the workers' mailboxes."""


@pytest.fixture(scope="module")
def clusters() -> Iterator[Cluster]:
    """A cluster that goes on without a server that nobody replaces."""
    options = {"cluster-require-full-coverage": "no", "cluster-replica-no-failover": "yes"}
    with Cluster(options=options) as cluster:
        yield cluster


@pytest.fixture
def parted(clusters: Cluster) -> Cluster:
    clusters.reset()
    return clusters


def server_of(cluster: Cluster, key: bytes) -> Server:
    return cluster.primary_of(cluster.slot_of(key))


def queue_at(cluster: Cluster, server: Server) -> str:
    """A queue that lies there."""
    return next(name for n in range(1000) if queue_is_at(cluster, server, name := f"q{n}"))


def queue_is_at(cluster: Cluster, server: Server, name: str) -> bool:
    return server_of(cluster, queue_keys("relay", name).marker) is server


def two_without_mail(cluster: Cluster) -> tuple[Server, Server]:
    """Servers that keep no mailboxes of Celery's workers."""
    first, second = (server for server in cluster.nodes[:3] if server is not server_of(cluster, MAIL))
    return first, second


def lose(server: Server, how: str) -> None:
    server.kill() if how == "killed" else server.pause()


def regain(server: Server, how: str) -> None:
    server.start() if how == "killed" else server.resume()


def looks_out() -> bool:
    return any(thread.name == "relay-lookout" for thread in threading.enumerate())


@pytest.fixture
def apart(parted: Cluster) -> tuple[Server, str, str]:
    """A server, a queue that lies there, and one that lies elsewhere."""
    server, other = two_without_mail(parted)
    return server, queue_at(parted, server), queue_at(parted, other)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_bell_rings_for_the_servers_that_are_there_and_for_one_that_is_back(
    parted: Cluster, apart: tuple[Server, str, str], store_at: Open, how: str
) -> None:
    server, *queues = apart
    gone, there = (queue_keys("relay", queue).marker for queue in queues)
    bell = store_at(parted.url, socket_timeout=1.0).bell([gone, there])
    eventually(lambda: not bell.wait(0.01) and bell.armed, "it to be armed")
    lose(server, how)
    try:
        eventually(lambda: not bell.wait(0.01) and bell.away == {gone}, "it to be missed")
        for _ in range(9):
            server_of(parted, there).cli("ZADD", there, 0, "w")
            assert bell.wait(30)
            assert bell.popped == (there,)
        assert bell.away == {gone}
        assert bell.lost is None
    finally:
        regain(server, how)
    assert bell.wait(60)
    assert bell.popped == (gone,)
    assert not bell.away
    parted.wait_until_ok()
    server.cli("ZADD", gone, 0, "w")
    assert bell.wait(30)
    assert bell.popped == (gone,)
    bell.close()
    eventually(lambda: not looks_out(), "nobody to look out any more")


def test_a_bell_of_which_all_servers_are_away_rings_once(
    parted: Cluster, apart: tuple[Server, str, str], store_at: Open
) -> None:
    server, gone, _there = apart
    bell = store_at(parted.url).bell([queue_keys("relay", gone).marker])
    assert not bell.wait(0.01)
    lose(server, "killed")
    try:
        assert bell.wait(30)
        assert bell.popped == ()
        assert isinstance(bell.lost, Unavailable)
        assert not bell.wait(0.01)
        assert bell.armed, "there is nothing to be armed"
    finally:
        regain(server, "killed")
    assert bell.wait(60)
    assert bell.lost is None
    bell.close()


def test_where_no_thread_can_be_had_nothing_is_put_off_that_nobody_looks_out_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = SyncStore(parse_url("relay+cluster://127.0.0.1:1"), StoreSettings(retry_for=0.0))
    bell = store.bell([b"m"])

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            bell.arm(1)
    assert not bell.away
    bell.arm(1)
    assert bell.away == {b"m"}
    assert looks_out()
    bell.close()
    store.close()


def test_who_finds_a_server_away_has_all_its_queues_put_off(parted: Cluster, apart: tuple[Server, str, str]) -> None:
    server, gone, there = apart
    same = next(name for n in range(1000) if queue_is_at(parted, server, name := f"other{n}"))
    with Broker(parted.url, retry_for=0.0) as broker:
        markers = [broker.settings.keys(queue).marker for queue in (gone, same, there)]
        bell = broker.store.bell(markers)
        lose(server, "killed")
        try:
            with pytest.raises(Unavailable) as raised:
                broker.claim(gone)
            assert bell.put_off(markers[0], raised.value)
            assert bell.away == set(markers[:2])
        finally:
            regain(server, "killed")
        eventually(lambda: bell.wait(1) and not bell.away, "both to be back", 60)
        bell.close()


def test_a_queue_that_is_on_its_way_elsewhere_holds_up_no_other_of_its_server(
    parted: Cluster, apart: tuple[Server, str, str]
) -> None:
    """While its keys are parted, each of its scripts is refused with TRYAGAIN, though the server is there."""
    source, moving, there = apart
    same = next(name for n in range(1000) if queue_is_at(parted, source, name := f"other{n}"))
    slot = parted.slot_of(queue_keys("relay", moving).marker)
    target = server_of(parted, queue_keys("relay", there).marker)
    done: list[str] = []
    with Broker(parted.url, lease=60.0) as broker, Broker(parted.url) as other:
        other.enqueue(moving, b"")
        target.cli("CLUSTER", "SETSLOT", str(slot), "IMPORTING", source.cli("CLUSTER", "MYID"))
        source.cli("CLUSTER", "SETSLOT", str(slot), "MIGRATING", target.cli("CLUSTER", "MYID"))
        keys = source.cli("CLUSTER", "GETKEYSINSLOT", str(slot), "99")
        source.cli("MIGRATE", "127.0.0.1", str(target.port), keys[0], "0", "5000")
        worker = Worker(broker, lambda job: done.append(job.queue), [moving, same])
        working = threading.Thread(target=worker.run)
        working.start()
        try:
            for n in range(1, 4):
                other.enqueue(same, b"")
                eventually(lambda n=n: done == [same] * n, "the next job")
        finally:
            for key in source.cli("CLUSTER", "GETKEYSINSLOT", str(slot), "99"):
                source.cli("MIGRATE", "127.0.0.1", str(target.port), key, "0", "5000")
            parted.hand_over(slot, source, target)
            eventually(lambda: moving in done, "what has moved")
            worker.stop()
            working.join(60)
    assert not working.is_alive()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_idle_worker_goes_on_without_a_server(
    parted: Cluster, apart: tuple[Server, str, str], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    server, gone, there = apart
    done: list[str] = []
    with Broker(parted.url, socket_timeout=1.0, lease=1.5) as broker, Broker(parted.url) as other:
        worker = Worker(broker, lambda job: done.append(job.queue), [gone, there])
        working = threading.Thread(target=worker.run)
        working.start()
        try:
            other.enqueue(gone, b"")
            eventually(lambda: done == [gone], "the worker to be at work")
            lose(server, how)
            eventually(lambda: "are put off" in caplog.text, "the worker to notice", 60)
            for n in range(1, 10):
                other.enqueue(there, b"")
                eventually(lambda n=n: done[1:] == [there] * n, "the next job")
            regain(server, how)
            parted.wait_until_ok()
            other.enqueue(gone, b"")
            eventually(lambda: done[-1] == gone, "it to be taken up again")
            tries = [record for record in caplog.records if "cannot be reached" in record.getMessage()]
            assert len(tries) <= 2, "one by one it is asked only once it answers"
        finally:
            regain(server, how) if not server.running or how == "stopped" else None
            worker.stop()
            working.join(60)
    assert not working.is_alive()


@pytest.mark.parametrize("face", ["blocking", "asyncio"])
def test_a_claim_that_waits_hears_of_the_servers_that_are_there(
    parted: Cluster, apart: tuple[Server, str, str], face: str
) -> None:
    server, gone, there = apart

    async def claim() -> list[Job]:
        async with AsyncBroker(parted.url, lease=60.0) as broker:
            return await broker.claim([gone, there], wait=60.0)

    def claim_blocking() -> list[Job]:
        with Broker(parted.url, lease=60.0) as broker:
            return broker.claim([gone, there], wait=60.0)

    with Broker(parted.url) as other, ThreadPoolExecutor(1) as pool:
        claiming = pool.submit(claim_blocking if face == "blocking" else lambda: asyncio.run(claim()))
        for queue in (gone, there):
            at = server_of(parted, queue_keys("relay", queue).marker)
            eventually(lambda at=at: at.info("clients")["blocked_clients"] == "1", "it to wait")
        lose(server, "killed")
        try:
            eventually(looks_out, "it to notice")
            other.enqueue(there, b"")
            assert [job.queue for job in claiming.result(60)] == [there]
        finally:
            regain(server, "killed")


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent"])
def test_a_celery_worker_goes_on_without_a_server(parted: Cluster, tmp_path: Path, pool: str, how: str) -> None:
    server, other = two_without_mail(parted)
    gone, there = queue_at(parted, server), queue_at(parted, other)
    client = client_of(parted.url, tmp_path)

    def run(queue: str, key: str) -> None:
        client.send_task("tests.celery_app.run", (key,), queue=queue)
        eventually(lambda: lines(tmp_path, start=f"{key} "), f"run of {key}")

    with CeleryWorker(parted.url, tmp_path, *POOLS[pool], "-Q", f"{gone},{there}") as worker:
        run(gone, "first")
        run(there, "second")
        lose(server, how)
        try:
            for n in range(30):
                run(there, f"there-{n}")
        finally:
            regain(server, how)
        parted.wait_until_ok()
        run(gone, "again")
        assert not worker.logged("Connection to broker lost"), worker.text
        assert worker.stop() == 0
    client.close()


def test_a_celery_worker_starts_without_a_server(
    parted: Cluster, apart: tuple[Server, str, str], tmp_path: Path
) -> None:
    server, away, there = apart
    client = client_of(parted.url, tmp_path)
    flags = ("-P", "solo", "-Q", f"{away},{there}")
    with CeleryWorker(parted.url, tmp_path, *flags) as before:
        assert before.stop() == 0  # the queues are known
    lose(server, "killed")
    with CeleryWorker(parted.url, tmp_path, *flags) as worker:
        for queue, key in ((there, "there"), (away, "again")):
            if queue == away:
                regain(server, "killed")
                parted.wait_until_ok()
            client.send_task("tests.celery_app.run", (key,), queue=queue)
            eventually(lambda: lines(tmp_path, start=f"{key} "), f"run of {key}")  # noqa: B023
        assert worker.stop() == 0
    client.close()


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent"])
def test_a_celery_worker_goes_on_without_the_server_of_the_mailboxes(
    parted: Cluster, tmp_path: Path, pool: str, how: str
) -> None:
    """Where exchanges and queues are declared, too."""
    server = server_of(parted, MAIL)
    there = queue_at(parted, two_without_mail(parted)[0])
    client = client_of(parted.url, tmp_path)

    def run(key: str) -> None:
        client.send_task("tests.celery_app.run", (key,), queue=there)
        eventually(lambda: lines(tmp_path, start=f"{key} "), f"run of {key}")

    def answered() -> bool:
        with suppress(OperationalError):  # what sends in a process of a worker hears that they are back a moment later
            return bool(client.control.ping(timeout=1, limit=1))
        return False

    with CeleryWorker(parted.url, tmp_path, *POOLS[pool], "-Q", there) as worker:
        run("first")
        assert client.control.ping(timeout=20, limit=1)
        lose(server, how)
        try:
            for n in range(30):
                run(f"without-{n}")
                time.sleep(0.1)  # longer than what is read of a queue is believed, in all
        finally:
            regain(server, how)
        parted.wait_until_ok()
        run("again")
        eventually(answered, "an answer")
        assert not worker.logged("Connection to broker lost"), worker.text
        assert worker.stop() == 0
    client.close()


@pytest.mark.parametrize(("pool", "how"), [("prefork", "killed"), ("solo", "stopped"), ("gevent", "killed")])
def test_a_celery_worker_connects_anew_while_the_server_of_the_mailboxes_is_away(
    parted: Cluster, tmp_path: Path, pool: str, how: str
) -> None:
    server, other = server_of(parted, MAIL), two_without_mail(parted)[0]
    there = queue_at(parted, other)
    client = client_of(parted.url, tmp_path)

    def sent(key: str) -> bool:
        with suppress(OperationalError):  # the servers have not agreed again on who is there
            return bool(client.send_task("tests.celery_app.run", (key,), queue=there))
        return False

    def run(key: str) -> None:
        eventually(lambda: sent(key), "it to be sent", 60)
        eventually(lambda: lines(tmp_path, start=f"{key} "), f"run of {key}", 60)

    def answered() -> bool:
        with suppress(OperationalError):
            return bool(client.control.ping(timeout=1, limit=1))
        return False

    with CeleryWorker(parted.url, tmp_path, *POOLS[pool], "-Q", there) as worker:
        run("first")
        lose(server, how)
        try:
            run("without")
            lose(other, "killed")
            try:
                eventually(lambda: worker.logged("Connection to broker lost"), "the worker to lose its connection", 60)
            finally:
                regain(other, "killed")
            for n in range(10):
                run(f"anew-{n}")
        finally:
            regain(server, how)
        parted.wait_until_ok()
        run("again")
        eventually(answered, "an answer")
        assert worker.stop() == 0
    client.close()


def test_a_declaration_counts_the_messages_of_a_queue_whose_server_cut_the_connection(
    parted: Cluster, apart: tuple[Server, str, str]
) -> None:
    server, queue, _there = apart
    with link(parted.url) as connection:
        channel = connection.default_channel
        kombu.Queue(queue)(channel).declare()
        send(connection, 1, key=queue)
        server.cli("CLIENT", "KILL", "TYPE", "normal")
        assert channel.queue_declare(queue).message_count == 1


def test_who_knew_its_queues_declares_and_consumes_them_while_their_server_is_away(parted: Cluster) -> None:
    server, other = server_of(parted, MAIL), two_without_mail(parted)[0]
    names = [name for n in range(1000) if queue_is_at(parted, other, name := f"q{n}")]
    queues = [
        kombu.Queue("box", kombu.Exchange("told", "fanout"), **BOX),
        kombu.Queue(names[0], expires=60),
        kombu.Queue(names[1], kombu.Exchange("copies", "fanout"), expires=60),
    ]
    with link(parted.url, lease=60.0, retry_for=0.0) as connection:
        first = Inbox(connection, *queues, no_ack=True)
        send(connection, 0, key=names[0])
        send(connection, 0, "copies")
        first.wait(2)
        first.channel.close()
        lose(server, "killed")
        try:
            with connection.clone() as anew:
                inbox = Inbox(anew, *queues, no_ack=True)
                send(anew, 1, key=names[0])
                assert inbox.wait(1) == [1]
                send(anew, 2, "copies")
                assert inbox.wait(2) == [1, 2]
                assert inbox.channel.basic_get(names[0]) is None
        finally:
            regain(server, "killed")
        parted.wait_until_ok()


def test_an_outage_that_ends_as_it_begins_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with Broker("relay+cluster://127.0.0.1:1") as broker:
        outage = Outage(broker, MAIL)
        monkeypatch.setattr(broker.store.lookout, "miss", lambda key, one: one.is_back(key))
        outage.begin(Unavailable("away"))
        outage.check()


def test_an_outage_that_nobody_can_look_out_for_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_key: bytes, _one: Outage) -> None:
        raise RuntimeError("can't start new thread")

    with Broker("relay+cluster://127.0.0.1:1") as broker:
        outage = Outage(broker, MAIL)
        monkeypatch.setattr(broker.store.lookout, "miss", refuse)
        with pytest.raises(RuntimeError):
            outage.begin(Unavailable("away"))
        outage.check()


@pytest.mark.parametrize("worker", [True, False])
def test_a_worker_waits_for_no_mailbox_that_is_known_to_be_away(
    parted: Cluster, monkeypatch: pytest.MonkeyPatch, worker: bool
) -> None:
    """Its events go by a connection of their own, which no loop drives: one that hangs would hold it up with each."""
    monkeypatch.setattr(routing, "is_worker", lambda: worker)
    with link(parted.url, lease=60.0, retry_for=0.0) as connection, connection.channel() as channel:
        exchange = kombu.Exchange("told", "fanout")
        kombu.Queue(
            "box", exchange, durable=False, auto_delete=True, message_ttl=60, expires=60, channel=channel
        ).declare()
        producer, asked = connection.Producer(exchange=exchange, auto_declare=False), list[object]()
        producer.publish({})
        outage = channel.topology.outage
        monkeypatch.setattr(channel.broker.store.lookout, "miss", lambda _key, _one: None)
        outage.begin(Unavailable("away"))
        stock = channel.broker.store.run
        monkeypatch.setattr(channel.broker.store, "run", lambda *args: asked.append(args) or stock(*args))
        if worker:
            with pytest.raises(MailboxesAway):
                producer.publish({})
        else:
            producer.publish({})
        assert bool(asked) is not worker
        outage.is_back(MAIL)


def test_a_celery_worker_asks_a_server_that_is_away_for_one_of_its_queues_only(
    parted: Cluster, apart: tuple[Server, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs would keep it waiting for each."""
    server, gone, there = apart
    same = next(name for n in range(1000) if queue_is_at(parted, server, name := f"other{n}"))
    with link(parted.url, lease=60.0, retry_for=0.0) as connection:
        inbox = Inbox(connection, *(kombu.Queue(queue) for queue in (gone, same, there)))
        inbox.quiet()
        asked, stock = list[str](), inbox.channel._claim_one
        monkeypatch.setattr(
            inbox.channel, "_claim_one", lambda queue, *rest: asked.append(queue) or stock(queue, *rest)
        )
        lose(server, "killed")
        try:
            assert inbox.channel.claim(9, set()) == ([], None)
        finally:
            regain(server, "killed")
        assert len(asked) == 2
        assert there in asked
        parted.wait_until_ok()


def test_what_a_celery_worker_hands_back_waits_for_no_other_server(
    parted: Cluster, apart: tuple[Server, str, str]
) -> None:
    server, gone, there = apart
    with Broker(parted.url) as broker, link(parted.url, lease=60.0, retry_for=0.0) as connection:
        inbox = Inbox(connection, kombu.Queue(gone), kombu.Queue(there))
        for queue in (gone, there):
            send(connection, queue, key=queue)
        inbox.wait(2)
        done, unwanted = (inbox.messages[inbox.bodies.index(queue)] for queue in (gone, there))
        leases = inbox.channel.leases
        lose(server, "killed")
        try:
            leases.ack_later(done.delivery_tag)
            eventually(lambda: leases.owed.away, "its ack to be refused")
            leases.hand_back([unwanted.delivery_tag])
            eventually(lambda: broker.stats(there).ready == 1, "it to be back")
        finally:
            regain(server, "killed")
        parted.wait_until_ok()
        eventually(lambda: not leases.owed.acks, "the ack to be sent")
