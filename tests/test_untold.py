"""Whoever finds a job buried may die before it tells of it: another process tells, and once where nothing fails."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator

import pytest

from relay_core import AsyncBroker, Broker, Job, NotYet, commands, hookimpl, scripts
from relay_core.metrics import Recorder
from relay_core.testing import advance
from tests.proxy import Proxy, to_socket
from tests.servers import Server
from tests.test_observation import Recording

LATER = 60.0
"""Seconds after which nobody waits any longer for who found a job buried to tell of it."""


class Mourner:
    """Hears of the dead."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.jobs: list[Job] = []

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None) -> None:
        self.told.append(f"{job.id}: {reason}, {error}")
        self.jobs.append(job)


TOLD = "poison: max_deliveries, delivered 1 times without an answer"


class Site:
    """A queue with a job whose only delivery has ended without an answer, and an operator who hears of nothing."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.operator = Broker(server.url)
        self.keys = self.operator.settings.keys("q")
        self.deliver()

    def deliver(self, id: str = "poison") -> None:
        self.operator.enqueue("q", b"body of " + id.encode(), id=id, max_deliveries=1, headers={"h": "1"})
        assert [job.id for job in self.operator.claim("q")] == [id]
        self.pass_time()

    def pass_time(self) -> None:
        advance(self.operator, LATER, "q")

    def bury(self, how: str = "finish") -> None:
        """As a process does that dies with the reply in its hand."""
        run, keys = self.operator.store.run, self.keys
        if how == "reap":
            assert len(run(commands.reap(keys, max_deliveries=5))[1]) == 1
        else:
            done = run(commands.finish(keys, (), (), 1, 1000, "nonce", max_deliveries=5))
            assert len(done.claim.buried) == 1

    def mourn(self) -> list[str]:
        """What a process hears that claims once."""
        mourner = Mourner()
        with Broker(self.server.url, plugins=[mourner]) as broker:
            assert broker.claim("q") == []
        return mourner.told

    def noted(self) -> int:
        """How many burials are noted that nobody has told of."""
        return int(self.operator.store.raw("ZCARD", self.keys.untold))


@pytest.fixture
def site(server: Server) -> Iterator[Site]:
    site = Site(server)
    yield site
    site.operator.close()


@pytest.fixture
def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim looks after what was not told of, which they else do every few seconds."""
    monkeypatch.setattr("relay_core.operations.burials.LOOK_EVERY", 0.0)


MOVES: dict[str, Callable[[Broker], object]] = {
    "claim": lambda broker: broker.claim("q"),
    "finish": lambda broker: broker.finish("q", count=5),
    "reap": lambda broker: broker.reap("q"),
}
SCRIPT = {"claim": "finish", "finish": "finish", "reap": "reap"}


@pytest.mark.parametrize("move", MOVES)
def test_a_burial_whose_reply_was_lost_is_told_of_later_and_once(site: Site, move: str) -> None:
    mourner = Mourner()
    with Proxy(to_socket(site.server.socket), unix=True) as proxy, Broker(proxy.url, plugins=[mourner]) as broker:
        broker.stats("q")  # the server is found fit
        site.operator.store.raw("SCRIPT", "LOAD", scripts.load(SCRIPT[move]).text)
        proxy.cut_reply(scripts.load(SCRIPT[move]).sha.encode())
        MOVES[move](broker)
        assert not proxy.pending
    assert site.operator.stats("q").dead == 1
    assert mourner.told == []
    assert site.mourn() == []  # who got the reply may be about to tell
    site.pass_time()
    assert site.mourn() == [TOLD]
    site.pass_time()
    assert site.mourn() == []
    assert site.noted() == 0


@pytest.mark.usefixtures("looks_always")
@pytest.mark.parametrize("move", MOVES)
def test_the_client_that_lost_the_reply_tells_itself_with_a_later_move(site: Site, move: str) -> None:
    mourner = Mourner()
    with Proxy(to_socket(site.server.socket), unix=True) as proxy, Broker(proxy.url, plugins=[mourner]) as broker:
        broker.stats("q")
        site.operator.store.raw("SCRIPT", "LOAD", scripts.load(SCRIPT[move]).text)
        proxy.cut_reply(scripts.load(SCRIPT[move]).sha.encode())
        for _ in range(3):
            MOVES[move](broker)
            site.pass_time()
    assert mourner.told == [TOLD]
    (job,) = mourner.jobs
    assert (job.payload, job.headers["h"], job.deliveries) == (b"body of poison", "1", 1)


@pytest.mark.parametrize("how", ["finish", "reap"])
def test_a_burial_whose_finder_died_is_told_of_by_another_process_and_once(site: Site, how: str) -> None:
    site.bury(how)
    assert site.mourn() == []
    site.pass_time()
    assert site.mourn() == [TOLD]
    site.pass_time()
    assert site.mourn() == []


def test_a_claim_that_buries_what_it_has_taken_notes_it_too(site: Site) -> None:
    """A job that is released on its last delivery waits, over its bound, until a claim takes it."""
    site.operator.store.raw("HSET", site.keys.owners, "poison", "1:1:a 0 r")
    site.operator.store.raw("ZREM", site.keys.leases, "poison")
    site.operator.store.raw("RPUSH", site.keys.ready[0], "poison")
    site.bury()
    site.pass_time()
    assert site.mourn() == [TOLD]


def test_under_asyncio_too(site: Site) -> None:
    mourner = Mourner()

    async def claim() -> None:
        async with AsyncBroker(site.server.url, plugins=[mourner]) as broker:
            assert await broker.claim("q") == []

    site.bury()
    site.pass_time()
    asyncio.run(claim())
    assert mourner.told == [TOLD]
    assert site.noted() == 0


def test_who_finds_a_job_buried_and_tells_leaves_no_note(site: Site) -> None:
    assert site.mourn() == [TOLD]
    assert site.noted() == 0
    site.pass_time()
    assert site.mourn() == []


@pytest.mark.usefixtures("looks_always")
def test_a_process_without_a_plugin_for_it_neither_clears_nor_holds_up_what_others_want_to_hear(site: Site) -> None:
    for _ in range(3):
        assert site.operator.claim("q") == []
        assert site.operator.reap("q") == 0
        site.pass_time()
    assert site.operator.stats("q").dead == 1
    assert site.mourn() == [TOLD]


@pytest.mark.usefixtures("looks_always")
def test_to_look_after_burials_is_the_same_on_the_wire_for_all(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    for plugins in ((), (Mourner(),)):
        server.cli("FLUSHALL")
        server.cli("SCRIPT", "FLUSH")
        nonces = itertools.count()
        monkeypatch.setattr("relay_core.operations.claiming.new_nonce", lambda n=nonces: f"n{next(n)}")
        with Recording(server) as proxy, Broker(proxy.url, plugins=plugins) as broker:
            broker.enqueue("q", b"x", id="a")
            broker.ack_many(broker.claim("q"))
            assert (broker.claim("q"), broker.reap("q")) == ([], 0)
            sent.append(proxy.sent)
    assert sent[0] == sent[1]
    assert sent[0].count(scripts.load("finish").sha.encode()) >= 2


def test_the_process_that_takes_a_burial_up_may_die_too(site: Site) -> None:
    site.bury()
    site.pass_time()
    (grant,) = site.operator.store.run(commands.retell(site.keys))
    assert (grant.id, grant.retries) == ("poison", 0)
    assert site.operator.store.run(commands.retell(site.keys)) == []  # it is the one who tells now
    assert site.mourn() == []
    site.pass_time()
    assert site.mourn() == [TOLD]


def test_a_dead_job_that_has_yet_to_be_told_of_is_sound(site: Site) -> None:
    site.bury()
    assert site.operator.store.run(commands.audit(site.keys, ["poison"], repair=True)) == [""]
    assert site.noted() == 1


def test_who_says_twice_that_some_are_not_ready_has_said_it_once(site: Site) -> None:
    site.bury()
    site.pass_time()
    (grant,) = site.operator.store.run(commands.retell(site.keys))
    told = commands.told(site.keys, [(grant.id, grant.token)], by_all=False)
    assert [site.operator.store.run(told) for _ in range(2)] == [1, 0]
    site.pass_time()
    (grant,) = site.operator.store.run(commands.retell(site.keys))
    assert grant.again


def test_a_plugin_that_raises_has_been_told(site: Site) -> None:
    class Troubled:
        @hookimpl
        def relay_job_dead(self) -> None:
            raise RuntimeError("a plugin's own trouble")

    with Broker(site.server.url, plugins=[Troubled()]) as broker:
        broker.claim("q")
    assert site.noted() == 0


class Unready:
    """Says that it cannot do its part, until it can."""

    def __init__(self, ready: bool = False) -> None:
        self.ready = ready
        self.told: list[tuple[str, str, bool]] = []
        self.jobs: list[Job] = []

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, again: bool) -> None:
        self.told.append((job.id, reason, again))
        self.jobs.append(job)
        if not self.ready:
            raise NotYet("its own server is away")


def ask(site: Site, *plugins: object, claims: int = 1) -> None:
    """What a process does that has these plugins."""
    with Broker(site.server.url, plugins=plugins) as broker:
        for _ in range(claims):
            assert broker.claim("q") == []


@pytest.mark.parametrize("move", MOVES)
def test_a_plugin_that_is_not_ready_is_told_again_and_the_others_are_not(site: Site, move: str) -> None:
    unready, mourner = Unready(), Mourner()
    with Broker(site.server.url, plugins=[mourner, unready]) as broker:
        MOVES[move](broker)
    assert (len(unready.told), mourner.told, site.noted()) == (1, [TOLD], 1)
    for unready.ready in (False, False, True):
        assert site.noted() == 1
        advance(site.operator, 600, "q")
        ask(site, unready, mourner)
    assert site.noted() == 0
    site.pass_time()
    ask(site, mourner, unready)
    assert unready.told == [("poison", "max_deliveries", again) for again in (False, True, True, True)]
    assert mourner.told == [TOLD]


def test_a_plugin_that_is_not_ready_is_told_again_by_another_process_and_there_alone(site: Site) -> None:
    first, second, mourner = Unready(), Unready(ready=True), Mourner()
    ask(site, first)
    ask(site, second, mourner)
    assert second.told == []  # it is left to the first for half a minute
    site.pass_time()
    ask(site, mourner)
    assert site.noted() == 1  # a process without such a plugin neither tells nor clears
    site.pass_time()
    ask(site, second, mourner)
    assert (second.told, mourner.told, site.noted()) == ([("poison", "max_deliveries", True)], [], 0)


@pytest.mark.usefixtures("looks_always")
def test_who_is_never_ready_is_told_ever_less_often_and_until_the_job_leaves(site: Site) -> None:
    unready, passed = Unready(), 0
    ask(site, unready)
    died = float(site.operator.store.raw("ZSCORE", site.keys.dead, "poison")) / 1000
    looks = [(0.0, time.time() - died)]
    told = looks[:]
    while passed < 7200:
        advance(site.operator, 10, "q")
        passed += 10
        begun = time.time() + passed - died
        ask(site, unready, claims=3)  # three looks at one time are no three times
        looks.append((begun, time.time() + passed - died))
        if len(unready.told) > len(told):
            told.append(looks[-1])
    # half of the time since its death later, seen in the look after that, however long the looks take
    longest = max(later[1] - before[0] for before, later in itertools.pairwise(looks))
    for nth, (before, later) in enumerate(itertools.pairwise(told)):
        least, most = (30 if nth == 0 else max(30, min(600, seconds / 2)) for seconds in before)
        assert least - 0.01 <= later[1] - before[0]
        assert later[0] - before[1] <= most + longest
    assert len(told) <= 25
    site.operator.purge("q", ["dead"])
    site.pass_time()
    ask(site, unready)
    assert (len(unready.told), site.noted()) == (len(told), 0)


def test_a_plugin_does_its_part_later_and_says_so(site: Site) -> None:
    unready = Unready()
    with Broker(site.server.url, plugins=[unready]) as broker:
        broker.claim("q")
        (job,) = unready.jobs
        assert broker.told(job) is True
        assert broker.told(job) is False
    assert site.noted() == 0
    site.pass_time()
    ask(site, unready)
    assert len(unready.told) == 1


def test_a_plugin_does_its_part_while_it_is_still_being_told(site: Site) -> None:
    """As its thread does that is quicker than the word that it is not done yet."""

    class Quick(Unready):
        @hookimpl
        def relay_job_dead(self, job: Job, again: bool) -> None:
            assert site.operator.told(job) is True
            raise NotYet("another thread does it")

    ask(site, Quick())
    assert site.noted() == 0


def test_under_asyncio_a_plugin_does_its_part_later_too(site: Site) -> None:
    unready = Unready()

    async def claim() -> None:
        async with AsyncBroker(site.server.url, plugins=[unready]) as broker:
            assert await broker.claim("q") == []
            assert site.noted() == 1
            assert await broker.told(unready.jobs[0])

    asyncio.run(claim())
    assert site.noted() == 0


def test_what_a_plugin_did_for_one_burial_does_not_stand_for_the_next_one_of_the_same_job(site: Site) -> None:
    unready, mourner = Unready(), Mourner()
    ask(site, unready)
    site.operator.requeue("q")
    site.operator.claim("q")
    site.pass_time()
    site.bury()
    assert site.operator.told(unready.jobs[0]) is False
    site.pass_time()
    ask(site, unready, mourner)
    assert unready.told[-1] == ("poison", "max_deliveries", False)
    assert mourner.told == [TOLD]


def test_who_takes_no_again_is_told_once_whatever_it_raises(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    class Deaf:
        @hookimpl
        def relay_job_dead(self, job: Job) -> None:
            raise NotYet("never mind")

    ask(site, Deaf())
    assert site.noted() == 0
    assert "raised NotYet, but takes no `again`" in caplog.text


def test_who_says_not_yet_of_a_nack_is_logged_and_the_job_is_dead(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    unready = Unready()
    with Broker(server.url, plugins=[unready]) as broker:
        broker.enqueue("q", b"x", id="refused")
        broker.nack(broker.claim("q")[0], "no", dead=True)
        assert broker.stats("q").dead == 1
        assert broker.store.raw("ZCARD", broker.settings.keys("q").untold) == 0
    assert unready.told == [("refused", "rejected", False)]
    assert "raised" in caplog.text


def test_jobs_that_were_claimed_with_a_burial_reach_their_worker_though_a_plugin_is_not_ready(site: Site) -> None:
    site.operator.enqueue("q", b"next", id="next")
    with Broker(site.server.url, plugins=[Unready()]) as broker:
        (job,) = broker.claim("q", 2)
        assert job.id == "next"
        broker.ack(job)
    assert site.noted() == 1


@pytest.mark.usefixtures("looks_always")
def test_many_of_which_a_plugin_is_not_ready_to_hear_are_asked_for_in_no_hurry(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.operator.enqueue_many("q", [b"x"] * 250)
    assert sum(len(site.operator.claim("q", count)) for count in (200, 50)) == 250
    site.pass_time()
    for _ in range(2):
        site.operator.store.run(commands.reap(site.keys, max_deliveries=1))
    site.pass_time()
    monkeypatch.setattr("relay_core.operations.burials.LOOK_EVERY", 10.0)
    unready = Unready()
    ask(site, unready, claims=20)
    assert len(unready.told) == 100


def test_it_is_counted_once_though_another_plugin_was_not_ready(site: Site) -> None:
    recorder = Recorder()
    for _ in range(3):
        ask(site, recorder, Unready())
        site.pass_time()
    assert recorder.registry.get_sample_value("relay_jobs_dead_total", {"queue": "q"}) == 1


def test_jobs_that_were_claimed_with_a_burial_reach_their_worker_though_nobody_can_be_told(site: Site) -> None:
    site.operator.enqueue("q", b"next", id="next")
    mourner, told = Mourner(), scripts.load("told")
    with (
        Proxy(to_socket(site.server.socket), unix=True) as proxy,
        Broker(proxy.url, plugins=[mourner], retry_for=0.0) as broker,
    ):
        site.operator.store.raw("SCRIPT", "LOAD", told.text)
        broker.stats("q")
        proxy.cut_request(told.sha.encode(), times=5)
        (job,) = broker.claim("q", 2)
        assert job.id == "next"
        site.operator.ack(job)
    assert mourner.told == [TOLD]
    site.pass_time()
    assert site.mourn() == [TOLD]  # nobody knew that it was told of: rather twice than never


def test_many_are_told_of_in_bounded_batches(site: Site) -> None:
    site.operator.enqueue_many("q", [b"x"] * 150)
    assert len(site.operator.claim("q", 150)) == 150
    site.pass_time()
    done = site.operator.store.run(commands.reap(site.keys, max_deliveries=1))
    assert len(done.buried) == 150  # the claim has found the first one
    site.pass_time()
    mourner, batches = Mourner(), []
    with Broker(site.server.url, plugins=[mourner]) as broker:
        for _ in range(3):
            broker.claim("q")
            batches.append(len(mourner.told))
    assert batches == [100, 151, 151]
    assert len(set(mourner.told)) == 151


def test_a_late_word_of_one_burial_does_not_stand_for_the_next_one_of_the_same_job(site: Site) -> None:
    (first,) = site.operator.store.run(
        commands.finish(site.keys, (), (), 1, 1000, "nonce", max_deliveries=5)
    ).claim.buried
    site.operator.requeue("q")
    site.operator.claim("q")
    site.pass_time()
    site.bury()
    assert site.operator.store.run(commands.told(site.keys, [(first.id, first.token)])) == 0
    site.pass_time()
    assert site.mourn() == [TOLD]


def forget(broker: Broker) -> object:
    advance(broker, LATER, "q")
    return broker.store.run(commands.reap(broker.settings.keys("q"), max_deliveries=5, keep_ms=1000))


LEAVES: dict[str, Callable[[Broker], object]] = {
    "requeue": lambda broker: broker.requeue("q", ["poison"]),
    "purge": lambda broker: broker.purge("q", ["dead"]),
    "drop": lambda broker: broker.store.run(commands.drop(broker.settings.keys("q"), ["poison"])),
    "cancel": lambda broker: broker.cancel("q", "poison"),
    "keep_dead": forget,
}


@pytest.mark.parametrize("how", LEAVES)
def test_a_dead_job_that_leaves_takes_its_note_along(site: Site, how: str) -> None:
    site.bury()
    site.deliver("other")
    site.bury()
    assert site.noted() == 2
    LEAVES[how](site.operator)
    # those that take all do so
    assert site.noted() == (0 if how in ("purge", "keep_dead") else 1)
    assert site.operator.audit("q").clean
    site.pass_time()
    site.operator.purge("q", ["ready", "dead"])
    assert site.operator.delete_queue("q")
    assert site.operator.store.raw("KEYS", "*{q:*") == []


def test_a_note_of_a_job_that_is_not_dead_any_more_is_not_told_of(site: Site) -> None:
    """A relay of before knows no notes: its requeue leaves one."""
    site.bury()
    site.operator.requeue("q")
    site.operator.store.raw("ZADD", site.keys.untold, 1, "poison")
    site.operator.store.raw("ZADD", site.keys.untold, 1, "gone")
    mourner = Mourner()
    with Broker(site.server.url, plugins=[mourner]) as broker:
        assert len(broker.claim("q")) == 1
    assert mourner.told == []
    assert site.noted() == 0


def test_where_nobody_wants_to_know_a_bounded_number_of_notes_is_kept_the_latest(site: Site) -> None:
    for at in range(0, 10_000, 1000):
        notes = [arg for n in range(at, at + 1000) for arg in (n, f"old{n}")]
        site.operator.store.raw("ZADD", site.keys.untold, *notes)
    site.bury()
    assert site.noted() == 10_000
    assert site.operator.store.raw("ZSCORE", site.keys.untold, "old0") is None
    assert site.operator.store.raw("ZSCORE", site.keys.untold, "poison") is not None


def test_it_is_counted_once_by_whoever_tells(site: Site) -> None:
    first, second = Recorder(), Recorder()
    site.bury()
    site.pass_time()
    for recorder in (first, second):
        with Broker(site.server.url, plugins=[recorder]) as broker:
            broker.claim("q")
    assert first.registry.get_sample_value("relay_jobs_dead_total", {"queue": "q"}) == 1
    assert second.registry.get_sample_value("relay_jobs_dead_total", {"queue": "q"}) is None
