"""Where handlers run: threads for plain functions, one event loop for coroutine functions."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from relay_core.job import Job
from relay_core.plugins import Plugins
from relay_core.worker.handlers import Handler, check_result
from relay_core.worker.held import Held
from relay_core.worker.outcome import Outcome

logger = logging.getLogger("relay.worker")

Done = Callable[[Outcome], None]


class Pool(Protocol):
    """Runs at most `concurrency` jobs at a time; more wait their turn."""

    def submit(self, job: Job) -> None: ...

    def close(self) -> None:
        """Start nothing more. Running handlers are not waited for; coroutines are cancelled."""


class ThreadPool:
    """Daemon threads, so that a handler that never returns cannot keep the process from ending."""

    def __init__(self, handler: Handler, concurrency: int, held: Held, done: Done, plugins: Plugins) -> None:
        self._handler = handler
        self._held = held
        self._done = done
        self._plugins = plugins
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"relay-handler-{i}", daemon=True) for i in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._held.start(job):
                continue
            self._plugins.notify("relay_run_started", job=job)
            began = time.monotonic()
            error: BaseException | None = None
            try:
                check_result(self._handler, self._handler(job))
            except BaseException as raised:  # SystemExit in a handler is a failed job, not the end of the worker
                error = raised
            if os.getpid() != self._pid:
                _end_child(job, error)
            seconds = time.monotonic() - began
            self._plugins.notify("relay_run_ended", job=job, seconds=seconds, error=error)
            self._done(Outcome(job, error, seconds))


def _end_child(job: Job, error: BaseException | None) -> NoReturn:
    """A handler that forked has ended in its child, which has no worker around it and whose parent may wait for it."""
    code = error.code if isinstance(error, SystemExit) else error is not None
    if error is not None and not isinstance(error, SystemExit):
        logger.error("a child that the handler of job %s forked has failed", job.id, exc_info=error)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code if isinstance(code, int) else code is not None)


class LoopPool:
    """One event loop on a thread of its own."""

    def __init__(self, handler: Handler, concurrency: int, held: Held, done: Done, plugins: Plugins) -> None:
        self._handler: Callable[[Job], Coroutine[Any, Any, Any]] = handler
        self._held = held
        self._done = done
        self._plugins = plugins
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Semaphore(concurrency)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="relay-loop", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        asyncio.run_coroutine_threadsafe(self._work(job), self._loop)

    def _run(self) -> None:
        """The loop, which SystemExit in any task of a handler's stops, as does a handler that stops it; closed at its
        end."""
        while not self._closing:
            try:
                self._loop.run_forever()
            except BaseException:
                logger.exception("a task has ended the event loop of the handlers, which goes on")
        self._loop.close()

    def close(self) -> None:
        self._closing = True

        def cancel() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_soon(self._loop.stop)

        with suppress(RuntimeError):  # a handler has just stopped the loop, which is closed by now
            self._loop.call_soon_threadsafe(cancel)
        self._thread.join(timeout=1.0)

    async def _work(self, job: Job) -> None:
        async with self._turn:
            if not self._held.start(job):
                return
            self._plugins.notify("relay_run_started", job=job)
            began = time.monotonic()
            error: BaseException | None = None
            try:
                result = await self._handler(job)
                if not isinstance(result, asyncio.Future):  # such as a task, which runs by itself
                    check_result(self._handler, result)
            except BaseException as raised:
                error = raised
            seconds = time.monotonic() - began
            self._plugins.notify("relay_run_ended", job=job, seconds=seconds, error=error)
            if self._closing and isinstance(error, asyncio.CancelledError):
                raise error  # the worker ends: the job is handed back, and not told of as ended
            self._done(Outcome(job, error, seconds))
