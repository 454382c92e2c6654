"""What became of each job, as JSON lines: `Broker(url, plugins=[AuditLog("/var/log/relay/audit.jsonl")])`.

One line per move that the store confirmed, written whole, so that any number of processes and threads may share the
file. Payloads are never written. A rotated file is noticed: the next line goes into a new one.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from relay_core import Job, hookimpl


class AuditLog:
    """What cannot be written, because the disk is full say, is logged by relay to `relay.plugins`; the job goes on.

    :param path: of the file; its folder must be there
    :param headers: names of headers that are written too, such as a tenant or a user
    :param errors: write what failed jobs reported. Default True; errors may hold what must not be written down
    :param sync: let the disk confirm each line before the move's caller goes on. Default False
    """

    def __init__(
        self, path: str | Path, *, headers: Sequence[str] = (), errors: bool = True, sync: bool = False
    ) -> None:
        self.path = Path(path)
        self._headers = tuple(headers)
        self._errors = errors
        self._sync = sync
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._file: int | None = None
        self._identity: tuple[int, int] | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)
        self._open()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # a thread of the parent may hold the old one

    def _open(self) -> int:
        """The file, opened anew where it was rotated away."""
        try:
            found = os.stat(self.path)
            identity = found.st_dev, found.st_ino
        except FileNotFoundError:
            identity = None
        if self._file is None or identity != self._identity:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            found = os.fstat(self._file)
            self._identity = found.st_dev, found.st_ino
        return self._file

    def _write(self, event: str, queue: str, headers: Mapping[str, str] | None = None, **facts: Any) -> None:
        line = {
            "at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "event": event,
            "queue": queue,
            **{name: value for name, value in facts.items() if value is not None},
            "host": self._host,
            "pid": os.getpid(),
        }
        kept = {name: headers[name] for name in self._headers if name in headers} if headers else {}
        if kept:
            line["headers"] = kept
        data = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            file = self._open()
            os.write(file, data)  # one call with O_APPEND: lines of several processes do not mix
            if self._sync:
                os.fsync(file)

    def _of(self, event: str, job: Job, **facts: Any) -> None:
        if facts.get("error") and not self._errors:
            facts["error"] = "(not written)"
        counts = {"deliveries": job.deliveries, "retries": job.retries}
        self._write(event, job.queue, job.headers, id=job.id, **counts, **facts)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    @hookimpl
    def relay_job_enqueued(self, queue: str, id: str, delay: float, headers: Mapping[str, str]) -> None:
        self._write("enqueued", queue, headers, id=id, delay=round(delay, 3) or None)

    @hookimpl
    def relay_job_deduplicated(self, queue: str, id: str, dedup_key: str | None) -> None:
        self._write("deduplicated", queue, id=id, dedup_key=dedup_key)

    @hookimpl
    def relay_job_claimed(self, job: Job) -> None:
        self._of("claimed", job)

    @hookimpl
    def relay_job_acked(self, job: Job, latency: float) -> None:
        self._of("acked", job, latency=round(latency, 3))

    @hookimpl
    def relay_job_retried(self, job: Job, delay: float, error: str | None) -> None:
        self._of("retried", job, delay=round(delay, 3), error=error)

    @hookimpl
    def relay_job_dead(self, job: Job, reason: str, error: str | None) -> None:
        self._of("dead", job, reason=reason, error=error)

    @hookimpl
    def relay_jobs_reaped(self, queue: str, count: int) -> None:
        self._write("reaped", queue, count=count)

    @hookimpl
    def relay_lease_lost(self, queue: str, id: str, move: str) -> None:
        self._write("lease_lost", queue, id=id, move=move)
