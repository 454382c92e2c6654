"""Real Celery workers of every pool under mixed load, while they, their children and the server are killed, and all
connections cut.

Every task is acked late and notes in a file what it did; what was sent is noted here. Neither ledger depends on what
is under test. A task may run twice when the worker that ran it first was killed, frozen, or told to quit, or when the
server went away meanwhile; not after a cut, nor after a warm shutdown, but for the prefork pool's (see `strike`).

With several brokers all have them as a failover list, and go from one to the next as they die.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from celery import Celery

from relay_core import Broker
from relay_core.job import STATES
from tests.servers import Flavour, Server

LEASE = 2.0
FREEZE = 1.5 * LEASE
"""Seconds for which a worker is frozen: its leases run out meanwhile."""

PATIENCE = 8.0
"""Seconds that a worker has to end; at times the prefork pool takes half a minute, on any broker."""

QUEUES = ("soak", "chained")
POOLS = (("prefork", "2"), ("threads", "4"), ("gevent", "8"), ("solo", "1"))
SERVER_SHARE, CUT_SHARE = 0.1, 0.1
"""How many of the blows kill the server, and how many cut all connections to it."""

_APP = '''
import os, random, time
from celery import Celery

app = Celery("soak_app", broker=os.environ["BROKER"])
app.conf.update(
    broker_transport_options={"lease": %(lease)r, "max_deliveries": 1000},
    broker_connection_retry_on_startup=True, broker_connection_max_retries=None, broker_connection_timeout=2,
    task_acks_late=True, task_reject_on_worker_lost=True, task_ignore_result=True, task_default_queue="soak",
)

def note(id, due):
    """One line in one write: id, when it ran, by which worker, how late it was."""
    now = time.time()
    fd = os.open(f"ledger-{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{id} {now:.3f} {os.environ['WORKER']} {now - due:.3f}\\n".encode())
    os.close(fd)

@app.task
def plain(id, due):
    time.sleep(random.expovariate(200))
    note(id, due)

@app.task
def second(id, due):
    note(f"{id}-second", due)

@app.task
def first(id, due):
    """Sends another task to another queue, as chains do."""
    second.apply_async((id, due), queue="chained", countdown=random.choice((None, 0.3)))
    note(id, due)

@app.task(bind=True, max_retries=None)
def moody(self, id, due):
    """Succeeds in its third try."""
    if self.request.retries < 2:
        raise self.retry(args=(id, time.time() + 0.2), countdown=0.2)
    note(id, due)
'''


@dataclass
class Outcome:
    """What the ledgers say. All lists but `twice` are to be empty."""

    sent: int = 0
    blows: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        return not (self.lost or self.early or self.unexplained or self.left or self.findings)

    def __str__(self) -> str:
        blows = ", ".join(f"{count} {what}" for what, count in sorted(self.blows.items()))
        return (
            f"{self.sent} tasks; {blows}: {len(self.lost)} lost, {len(self.twice)} ran twice or more, "
            f"{len(self.unexplained)} of them without a cause, {len(self.early)} early, "
            f"left in the broker: {', '.join(self.left) or 'nothing'}, the audit found {len(self.findings)}"
        ) + "".join(f"\n  {story}" for story in (*self.lost, *self.unexplained))


class _Site:
    """One of the brokers."""

    def __init__(self, stack: ExitStack, flavour: Flavour) -> None:
        # under `everysec` a sync of a slow disk holds back what is written meanwhile, and a kill then loses it
        kept = {"appendonly": "yes", "appendfsync": "no"}
        self.server = stack.enter_context(Server(flavour, options=kept))
        self.broker = stack.enter_context(Broker(self.server.url))

    def pending(self) -> bool:
        return any(self.broker.stats(queue).pending for queue in QUEUES)


@dataclass
class _Worker:
    name: str
    pool: tuple[str, str]
    process: subprocess.Popen[bytes]


class _Crew:
    """One worker per pool; whoever is ended gets a successor."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder, self.count = url, folder, 0
        self.disturbed: list[tuple[float, str]] = []
        """When, and which worker; `*` for all."""
        self.told: list[str] = []
        self.running = [self._start(pool) for pool in POOLS]

    def _start(self, pool: tuple[str, str]) -> _Worker:
        self.count += 1
        name = f"{pool[0]}{self.count}"
        command = [sys.executable, "-m", "celery", "-A", "soak_app", "worker", "-n", f"{name}@soak", "-l", "INFO"]
        command += ["-P", pool[0], "-c", pool[1], "-Q", ",".join(QUEUES)]
        environment = {**os.environ, "BROKER": self.url, "WORKER": name, "C_FORCE_ROOT": "1"}
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        return _Worker(name, pool, process)

    @contextmanager
    def without(self, servers: Sequence[Server]) -> Iterator[None]:
        """While these are away. Of whom that may have struck, nothing is said."""
        if servers:
            self.disturbed.append((time.time(), "*"))
        for server in servers:
            server.kill()
        yield
        for server in servers:
            server.start()
        if servers:
            self.disturbed.append((time.time(), "*"))

    def strike(self) -> str:
        """Do something bad to one of them, and say what."""
        index = random.randrange(len(self.running))
        victim = self.running[index]
        how = random.choice(("kill", "kill", "kill child", "term", "quit", "freeze"))
        if how == "kill child" and victim.pool[0] != "prefork":
            how = "kill"
        # Celery's solo pool cannot cancel its task at SIGQUIT: the task ends as a failure, on any broker
        if how == "quit" and victim.pool[0] == "solo":
            how = "kill"
        # a task that ends in the moment of a warm shutdown may go unnoticed by Celery's prefork pool, on any broker
        if how != "term" or victim.pool[0] == "prefork":
            self.disturbed.append((time.time(), victim.name))
        self.told.append(f"{time.time():.3f} {how} {victim.name}")
        if how == "kill child":
            children = _children(victim.process.pid)
            if children:
                with suppress(ProcessLookupError):
                    os.kill(random.choice(children), signal.SIGKILL)
            return how
        if how == "freeze":
            os.killpg(victim.process.pid, signal.SIGSTOP)
            time.sleep(FREEZE)
            os.killpg(victim.process.pid, signal.SIGCONT)
            return how
        self.running[index] = self._start(victim.pool)
        if how == "kill":
            os.killpg(victim.process.pid, signal.SIGKILL)
        else:
            victim.process.send_signal(signal.SIGTERM if how == "term" else signal.SIGQUIT)
        self._end(victim)
        return how

    def _end(self, worker: _Worker) -> None:
        try:
            worker.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.disturbed.append((time.time(), worker.name))
        with suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait(timeout=10)

    def stop(self) -> None:
        for worker in self.running:
            worker.process.send_signal(signal.SIGTERM)
        for worker in self.running:
            self._end(worker)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def soak(
    seconds: float,
    *,
    flavour: Flavour = "valkey",
    brokers: int = 1,
    rate: int = 60,
    kill_every: float = 3.0,
    keep: Path | None = None,
) -> Outcome:
    """Send, strike and count for so long, then wait until all is done.

    :param brokers: servers in the list of everybody's URL
    :param rate: tasks sent per second
    :param kill_every: mean seconds between blows
    :param keep: where the ledgers and the workers' logs go when it did not end well
    """
    with tempfile.TemporaryDirectory(prefix="relay-celery-soak-") as name:
        folder = Path(name)
        (folder / "soak_app.py").write_text(_APP % {"lease": LEASE})
        with ExitStack() as stack:
            sites = [_Site(stack, flavour) for _ in range(brokers)]
            crew = _Crew(";".join(site.server.url for site in sites), folder)
            outcome = Outcome()
            try:
                sent = _load(sites, crew, outcome, seconds, rate, kill_every)
                _wait_until_done(sites, crew)
            finally:
                crew.stop()
            _judge(outcome, folder, sent, crew.disturbed)
            for broker in [site.broker for site in sites]:
                for queue in QUEUES:
                    stats = broker.stats(queue)
                    counts = {state: getattr(stats, state) for state in STATES}
                    outcome.left += [f"{count} {state} in {queue}" for state, count in counts.items() if count]
                    outcome.findings += [str(finding) for finding in broker.audit(queue).findings]
        if keep is not None and not outcome.well:
            (folder / "blows").write_text("\n".join(crew.told))
            shutil.copytree(folder, keep, dirs_exist_ok=True)
    return outcome


def _load(
    sites: Sequence[_Site], crew: _Crew, outcome: Outcome, seconds: float, rate: int, kill_every: float
) -> dict[str, str]:
    """Send and strike. Answers with the ids that must run, and what each is."""
    app = Celery("soak", broker=crew.url, set_as_current=False)
    app.conf.task_default_queue = "soak"
    sent: dict[str, str] = {}
    end = time.monotonic() + seconds
    strike_at = time.monotonic() + 3.0 + random.expovariate(1 / kill_every)

    def send() -> None:
        """A tenth of a second's tasks."""
        for _ in range(max(1, rate // 10)):
            kind = random.choice(("plain", "plain", "plain", "first", "moody"))
            delay = random.choice((0.0, 0.0, random.uniform(0.1, 5.0)))
            id, due = str(outcome.sent), time.time() + delay
            options = {"countdown": delay} if delay else {}
            app.send_task(f"soak_app.{kind}", (id, due), task_id=f"task{id}", priority=random.randrange(10), **options)
            outcome.sent += 1
            sent[id] = f"{kind}, sent at {time.time():.3f} for {due:.3f}"
            if kind == "first":
                sent[f"{id}-second"] = f"follow-up of {sent[id]}"

    while time.monotonic() < end:
        began = time.monotonic()
        send()
        if time.monotonic() > strike_at:
            chance, server = random.random(), random.choice(sites).server
            if chance < CUT_SHARE:
                server.cli("CLIENT", "KILL", "TYPE", "normal")
                outcome.blows["cut"] += 1
                crew.told.append(f"{time.time():.3f} cut")
            elif chance < CUT_SHARE + SERVER_SHARE:
                with crew.without([server]):
                    back_at = time.monotonic() + random.uniform(0.0, 2.0)
                    while time.monotonic() < back_at:
                        if len(sites) > 1:
                            send()
                        time.sleep(0.1)
                outcome.blows["server"] += 1
                crew.told.append(f"{time.time():.3f} server is back")
            else:
                outcome.blows[crew.strike()] += 1
            strike_at = time.monotonic() + random.expovariate(1 / kill_every)
        time.sleep(max(0.0, 0.1 - (time.monotonic() - began)))
    app.close()
    return sent


def _wait_until_done(sites: Sequence[_Site], crew: _Crew, patience: float = 120.0) -> None:
    """Until no broker holds anything, for at most `patience` seconds: what is left then is told in the outcome. A
    broker whose workers went to another one gets them back while that is away."""
    finish_by = time.monotonic() + patience
    while time.monotonic() < finish_by and any(site.pending() for site in sites):
        for site in filter(_Site.pending, sites):
            with crew.without([other.server for other in sites if other is not site]):
                while time.monotonic() < finish_by and site.pending():
                    time.sleep(0.2)


def _judge(outcome: Outcome, folder: Path, sent: dict[str, str], disturbed: list[tuple[float, str]]) -> None:
    runs: dict[str, list[tuple[float, str, float]]] = defaultdict(list)
    for path in folder.glob("ledger-*"):
        for line in path.read_text().splitlines():
            id, at, worker, late = line.split()
            runs[id].append((float(at), worker, float(late)))
    outcome.lost = [f"task{id}: {sent[id]}" for id in sent if id not in runs]
    # the store counts in whole milliseconds
    outcome.early = [id for id, times in runs.items() if any(late < -0.002 for _, _, late in times)]
    outcome.twice = [id for id, times in runs.items() if len(times) > 1]
    for id in outcome.twice:
        origin = id.removesuffix("-second")
        story = sorted(runs[id] + (runs.get(origin, []) if origin != id else []))
        # a frozen worker may end what it ran after another one did
        workers = {worker for _at, worker, _late in story}
        began, ended = story[0][0] - 3 * LEASE, story[-1][0]
        near = [(at, who) for at, who in disturbed if began <= at <= ended]
        # who was struck after it had sent a follow-up or a retry has noted nothing, and that is sent again
        unnoted = origin != id or sent[origin].startswith("moody")
        if near and (unnoted or any(who == "*" or who in workers for _at, who in near)):
            continue
        told = ", ".join(f"by {worker} at {at - began:.2f} s, {late:.2f} s late" for at, worker, late in story)
        blows = ", ".join(f"{who} at {at - began:.2f} s" for at, who in disturbed if abs(at - began) < 20)
        outcome.unexplained.append(f"task{id}: {sent[origin]}, ran {told}; blows: {blows or 'none'}")
