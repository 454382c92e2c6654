"""Under gevent a thread is a greenlet, and a task that computes without yielding keeps it waiting, the one that keeps
the leases too. So a thread of the system's own extends them while that one is late.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from relay_core import Verdict, commands
from relay_core.commands.moves import MAX_BATCH
from relay_core.connection import SyncStore
from relay_core.errors import RelayError

if TYPE_CHECKING:
    from relay_adapters.celery.holding.held import Held
    from relay_adapters.celery.holding.leases import Leases


_PATIENCE = 2.0
"""Seconds for which the end of the process waits for such a thread."""

_threads: list[tuple[int, Any, Any]] = []
"""Process id of each, and two locks of the system's own: one is released to end it, the other one when it has ended."""


def start(leases: Leases) -> None:
    """Where gevent has replaced Python's threads; else there is nothing to do."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return
    spawn, lock = monkey.get_original("_thread", ["start_new_thread", "allocate_lock"])
    told, ended = lock(), lock()
    told.acquire()
    ended.acquire()
    _threads.append((os.getpid(), told, ended))
    spawn(_work, (weakref.ref(leases), leases.heartbeat.thread, told, ended))


def end() -> None:
    """Before the process ends: a thread that is in gevent's hub just then would take the interpreter with it."""
    for pid, told, ended in _threads:
        if pid == os.getpid():
            with suppress(RuntimeError):  # it was told before
                told.release()
            if ended.acquire(True, _PATIENCE):
                ended.release()


def _work(reference: weakref.ref[Leases], beside: object, told: Any, ended: Any) -> None:
    """For as long as that thread keeps these leases. The sockets of gevent, and so its store, are this thread's own."""
    try:
        _keep(reference, beside, told)
    finally:
        ended.release()


def _keep(reference: weakref.ref[Leases], beside: object, told: Any) -> None:
    store: SyncStore | None = None
    pid, over = os.getpid(), False
    while not over and (leases := reference()) is not None and leases.heartbeat.thread is beside and os.getpid() == pid:
        lease = leases.broker.settings.lease
        if leases.heartbeat.late() > lease / 6:
            with suppress(RelayError):  # the server is away, which the other thread will say
                if store is None:
                    # it tries again soon, and the end of the process waits for it
                    settings = leases.broker.store.settings.impatient(_PATIENCE / 2)
                    store = SyncStore(leases.broker.address(), settings)
                if _extend(leases, store):
                    leases.heartbeat.were_extended()
        del leases
        over = told.acquire(True, lease / 6)
    if store is not None:
        store.close()
        sys.modules["gevent"].get_hub().destroy(destroy_loop=True)


def _extend(leases: Leases, store: SyncStore) -> bool:
    """Whether all could be extended; what the server does not take of one queue holds up no other."""
    queues: dict[str, list[Held]] = defaultdict(list)
    for one in leases.snapshot():
        queues[one.job.queue].append(one)
    batches = [mine[at : at + MAX_BATCH] for mine in queues.values() for at in range(0, len(mine), MAX_BATCH)]
    settings, until = leases.broker.settings, time.monotonic() + leases.broker.settings.lease
    results = store.run_many(
        [
            commands.extend(
                settings.keys(batch[0].job.queue), [(one.job.id, one.job.token) for one in batch], settings.lease_ms
            )
            for batch in batches
        ]
    )
    for batch, result in zip(batches, results, strict=True):
        for one, verdict in zip(batch, () if isinstance(result, RelayError) else result, strict=False):
            if verdict is not Verdict.LOST:
                one.until = max(one.until, until)
    return not any(isinstance(result, RelayError) for result in results)
