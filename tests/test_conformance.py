"""One suite for every face of relay: the promises, whoever asks. See tests/faces for what each face says for itself.

Jobs are sent and run in the face's own words; what came of them is read from the store. After each test the
auditor must find nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from relay_core import Broker
from relay_core.commands import QueueStats
from tests.faces import FACES, having
from tests.faces.elsewhere import Elsewhere
from tests.faces.face import QUEUE, Face, Failed, Rejected, Run, Taker, Terms
from tests.proxy import Proxy, to_socket
from tests.servers import Flavour, Server, eventually

SHORT = Terms(lease=1.0, max_deliveries=2)
"""For tests that let a lease end. Heartbeats come every third of it."""

Make = Callable[..., Face]


@pytest.fixture
def flavour() -> Flavour:
    """One is enough: what differs between servers is tested below the faces."""
    return "valkey"


@pytest.fixture(params=list(FACES))
def kind(request: pytest.FixtureRequest) -> type[Face]:
    return FACES[request.param]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What is closed at the end of the test, before the audit."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def operator(server: Server) -> Iterator[Broker]:
    """Looks at the store from outside. Audits it when everything else has ended."""
    with Broker(server.url) as broker:
        yield broker
        report = broker.audit(QUEUE, repair=False)
        assert report.clean, report.findings


@pytest.fixture
def make(kind: type[Face], server: Server, operator: Broker, opened: ExitStack) -> Make:
    def make(terms: Terms = Terms(), url: str | None = None) -> Face:  # noqa: B008 - it is frozen
        face = kind(url or server.url, terms)
        opened.callback(face.close)
        return face

    return make


@pytest.fixture
def face(make: Make) -> Face:
    return make()


@pytest.fixture
def short(make: Make) -> Face:
    """With leases that end while one waits, and dead after two deliveries without an answer."""
    return make(SHORT)


@pytest.fixture
def elsewhere(opened: ExitStack) -> Callable[[Face], Elsewhere]:
    def start(face: Face) -> Elsewhere:
        made = Elsewhere(face)
        opened.callback(made.close)
        return made

    return start


@pytest.fixture
def taker(opened: ExitStack) -> Callable[[Face], Taker]:
    def take(face: Face) -> Taker:
        made = face.taker()
        opened.callback(made.close)
        return made

    return take


class Notes:
    """A handler that notes its runs, and what time it was."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.times: dict[str, float] = {}

    def __call__(self, run: Run) -> None:
        self.times[run.body] = time.monotonic()
        self.runs.append(run)

    @property
    def bodies(self) -> list[str]:
        return [run.body for run in self.runs]


@pytest.fixture
def notes() -> Notes:
    return Notes()


def stats(operator: Broker) -> QueueStats:
    return operator.stats(QUEUE)


def depths(operator: Broker) -> tuple[int, int, int, int]:
    found = stats(operator)
    return found.ready, found.delayed, found.inflight, found.dead


def counted(operator: Broker, *names: str) -> tuple[int, ...]:
    counters = stats(operator).counters
    return tuple(counters.get(name, 0) for name in names)


def all_over(operator: Broker, dead: int = 0) -> None:
    """Wait until nothing is left but the dead."""
    eventually(lambda: depths(operator) == (0, 0, 0, dead), f"an end of everything but {dead} dead jobs")


# 1. at least once, and once where nothing fails


def test_each_job_runs_once_whether_it_was_there_before_the_worker_or_came_later(
    face: Face, operator: Broker, notes: Notes
) -> None:
    for n in range(20):
        face.send(f"before {n}")
    with face.working(notes, concurrency=3):
        eventually(lambda: len(notes.runs) >= 20, "the runs of what was there")
        for n in range(20):
            face.send(f"later {n}")
        all_over(operator)
    assert sorted(notes.bodies) == sorted(f"{when} {n}" for when in ("before", "later") for n in range(20))
    assert {run.retries for run in notes.runs} == {0}
    assert counted(operator, "enqueued", "claimed", "processed", "reaped") == (40, 40, 40, 0)


def test_the_job_of_a_killed_process_runs_elsewhere_when_its_lease_is_over(
    short: Face, operator: Broker, notes: Notes, elsewhere: Callable[[Face], Elsewhere]
) -> None:
    short.send("held")
    doomed = elsewhere(short)
    assert doomed.take() == "held"
    with short.working(notes):
        short.send("free")
        eventually(lambda: "free" in notes.bodies, "a run of the job that nobody held")
        # its ack may still be on its way
        eventually(lambda: depths(operator) == (0, 0, 1, 0) or "held" in notes.bodies, "one job is held elsewhere")
        doomed.kill()
        all_over(operator)
    assert sorted(notes.bodies) == ["free", "held"]
    assert counted(operator, "processed") == (2,)
    assert counted(operator, "reaped") >= (1,)


# 2. fencing


def test_a_process_that_slept_past_its_lease_changes_nothing_and_the_new_holder_finishes(
    make: Make,
    short: Face,
    operator: Broker,
    elsewhere: Callable[[Face], Elsewhere],
    taker: Callable[[Face], Taker],
) -> None:
    short.send("x")
    sleeper = elsewhere(short)
    assert sleeper.take() == "x"
    sleeper.sleep()
    holder = taker(make())
    assert holder.take(30) == "x"
    (before,) = operator.jobs(QUEUE, "inflight")
    sleeper.wake()
    assert sleeper.ack() == short.tells_lost
    after = operator.show(QUEUE, before.id)
    assert after is not None
    assert (after.state, after.deliveries) == ("inflight", 2)
    assert counted(operator, "processed") == (0,)
    assert holder.ack() == ""
    assert depths(operator) == (0, 0, 0, 0)
    assert counted(operator, "processed") == (1,)


@pytest.mark.parametrize("kind", having("heartbeat"), indirect=True)
def test_a_run_longer_than_its_lease_is_nobody_else_s(short: Face, operator: Broker) -> None:
    over = threading.Event()
    runs: list[Run] = []

    def handle(run: Run) -> None:
        runs.append(run)
        assert over.wait(60)

    short.send("long")
    with short.working(handle):
        eventually(lambda: runs, "the run")
        try:
            assert operator.claim(QUEUE, wait=2.5 * SHORT.lease) == []  # the passing of time is what is tested
        finally:
            over.set()
        all_over(operator)
    assert len(runs) == 1
    assert counted(operator, "processed", "reaped") == (1, 0)


# 3. deliveries are bounded, and only those without an answer count


def test_a_job_that_kills_its_workers_is_dead_after_max_deliveries_and_others_run(
    short: Face, operator: Broker, notes: Notes, elsewhere: Callable[[Face], Elsewhere]
) -> None:
    short.send("poison")
    for _ in range(SHORT.max_deliveries):
        doomed = elsewhere(short)
        assert doomed.take() == "poison"
        doomed.kill()
    short.send("good")
    with short.working(notes):
        all_over(operator, dead=1)
    assert notes.bodies == ["good"]
    (dead,) = operator.dead(QUEUE)
    assert (dead.reason, dead.deliveries) == ("max_deliveries", SHORT.max_deliveries)


def test_a_job_that_is_handed_back_was_not_delivered(
    face: Face, operator: Broker, taker: Callable[[Face], Taker]
) -> None:
    face.send("x")
    hand = taker(face)
    for _ in range(face.terms.max_deliveries + 1):
        assert hand.take(30) == "x"
        hand.hand_back()
        assert depths(operator) == (1, 0, 0, 0)
    (job,) = operator.claim(QUEUE)
    assert job.deliveries == 1
    operator.ack(job)


# 4. time, order, limits


def test_a_delay_waits_in_the_store_and_is_never_cut_short(face: Face, operator: Broker, notes: Notes) -> None:
    with face.working(notes):
        sent = time.monotonic()
        face.send("later", delay=0.7)
        face.send("now")
        eventually(lambda: "now" in notes.bodies, "a run of what is not delayed")
        assert depths(operator)[1] == 1 or "later" in notes.bodies  # the ack of the other one may be on its way
        all_over(operator)
    assert notes.bodies == ["now", "later"]
    assert notes.times["later"] - sent > 0.69  # the store counts in whole milliseconds


def test_the_most_urgent_runs_first_and_the_oldest_among_equals(face: Face, operator: Broker, notes: Notes) -> None:
    for body, priority in (("low", 0), ("middle", 5), ("high", 9), ("low too", 0), ("high too", 9)):
        face.send(body, priority=priority)
    with face.working(notes):
        all_over(operator)
    assert notes.bodies == ["high", "high too", "middle", "low", "low too"]


def test_a_paused_queue_takes_jobs_and_gives_none_until_it_is_resumed(
    face: Face, server: Server, operator: Broker, notes: Notes
) -> None:
    face.pause()
    with face.working(notes):
        face.send("x")
        eventually(lambda: int(server.info("clients")["blocked_clients"]) > 0, "a worker that waits")
        assert (notes.runs, depths(operator)) == ([], (1, 0, 0, 0))
        face.resume()
        all_over(operator)
    assert notes.bodies == ["x"]


def test_no_more_jobs_are_held_than_max_inflight_allows_however_many_threads_there_are(
    face: Face, operator: Broker
) -> None:
    held: list[int] = []

    def handle(run: Run) -> None:
        held.append(stats(operator).inflight)

    operator.limit(QUEUE, max_inflight=2)
    for n in range(12):
        face.send(str(n))
    with face.working(handle, concurrency=4):
        all_over(operator)
    assert len(held) == 12
    assert max(held) <= 2


def test_waiting_jobs_are_counted_and_purged(face: Face, operator: Broker, notes: Notes) -> None:
    for n in range(5):
        face.send(str(n))
    face.send("later", delay=3600)
    assert face.waiting() == 6
    face.purge()
    assert face.waiting() == 0
    assert depths(operator) == (0, 0, 0, 0)
    with face.working(notes):
        face.send("after")
        all_over(operator)
    assert notes.bodies == ["after"]


@pytest.mark.parametrize("kind", having("dedup"), indirect=True)
def test_a_job_of_a_key_that_is_taken_is_dropped_until_the_first_is_done(
    face: Face, operator: Broker, notes: Notes
) -> None:
    for body, key in (("x", "k"), ("x again", "k"), ("y", "other")):
        face.send_once(body, key)
    with face.working(notes):
        all_over(operator)
        face.send_once("x once more", "k")
        all_over(operator)
    assert notes.bodies == ["x", "y", "x once more"]
    assert counted(operator, "enqueued", "deduplicated") == (3, 1)


@pytest.mark.parametrize("kind", having("dedup answer"), indirect=True)
def test_a_duplicate_is_answered_with_the_id_of_the_original(face: Face) -> None:
    first = face.send_once("x", "k")
    assert face.send_once("x again", "k") == first
    assert face.send_once("y", "other") != first


# 5. failures


def test_a_failed_job_keeps_its_identity_and_counts_its_retries(face: Face, operator: Broker) -> None:
    runs: list[Run] = []

    def handle(run: Run) -> None:
        runs.append(run)
        if run.body == "flaky" and run.retries < 2:
            raise Failed("not yet")

    face.send("flaky")
    face.send("steady")
    with face.working(handle):
        all_over(operator)
    flaky = [run for run in runs if run.body == "flaky"]
    assert [run.retries for run in flaky] == [0, 1, 2]
    assert len({run.id for run in flaky}) == 1
    assert len(runs) == 4
    assert operator.dead(QUEUE) == []


def test_a_job_whose_retries_are_used_up_is_dead_with_its_reason(face: Face, operator: Broker) -> None:
    runs: list[Run] = []

    def handle(run: Run) -> None:
        runs.append(run)
        raise Failed("never")

    face.send("hopeless")
    with face.working(handle):
        all_over(operator, dead=1)
    assert [run.retries for run in runs] == [0, 1, 2]
    (dead,) = operator.dead(QUEUE)
    assert dead.reason == face.failed
    assert dead.error


def test_a_rejected_job_is_dead_at_once_with_its_reason(face: Face, operator: Broker) -> None:
    runs: list[Run] = []

    def handle(run: Run) -> None:
        runs.append(run)
        raise Rejected("not for me")

    face.send("odd")
    with face.working(handle):
        all_over(operator, dead=1)
    assert len(runs) == 1
    (dead,) = operator.dead(QUEUE)
    assert dead.reason == face.rejected
    assert dead.error


def test_a_job_that_cannot_be_decoded_is_dead_and_its_neighbours_run(
    face: Face, operator: Broker, notes: Notes
) -> None:
    face.send("before")
    face.send_garbage()
    face.send("after")
    with face.working(notes):
        all_over(operator, dead=1)
    assert notes.bodies == ["before", "after"]
    (dead,) = operator.dead(QUEUE)
    assert dead.reason == "undecodable"
    assert dead.error


# 6. the connection breaks


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(to_socket(server.socket), unix=True) as proxy:
        yield proxy


def test_a_send_whose_request_or_reply_is_lost_stores_one_job(
    make: Make, proxy: Proxy, operator: Broker, notes: Notes
) -> None:
    face = make(url=proxy.url)
    face.send("first")
    proxy.cut_reply(b"EVALSHA")
    face.send("reply lost")
    proxy.cut_request(b"EVALSHA")
    face.send("request lost")
    assert proxy.pending == 0
    assert counted(operator, "enqueued") == (3,)
    with face.working(notes):
        all_over(operator)
    assert notes.bodies == ["first", "reply lost", "request lost"]


def test_connections_cut_in_the_middle_of_work_lose_no_job_and_finish_each_once(
    make: Make, proxy: Proxy, operator: Broker
) -> None:
    face = make(url=proxy.url)
    runs: list[str] = []

    def handle(run: Run) -> None:
        runs.append(run.body)
        if len(runs) in (5, 15):
            proxy.cut_all()
        if len(runs) == 10:
            proxy.cut_reply(b"EVALSHA")  # of a claim, an ack or both

    for n in range(25):
        face.send(str(n))
    with face.working(handle):
        all_over(operator)
        face.send("afterwards")
        all_over(operator)
    assert set(runs) == {*map(str, range(25)), "afterwards"}
    assert counted(operator, "enqueued", "processed") == (26, 26)
