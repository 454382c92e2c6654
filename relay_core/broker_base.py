"""What both brokers are made of, without I/O: the settings, the plugins, the flows, and where the server is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from relay_core import embedded
from relay_core.connection import forks
from relay_core.errors import InvalidArgument
from relay_core.job import Job
from relay_core.operations import Operations, Settings
from relay_core.options import refuse_unknown
from relay_core.plugins import Plugins
from relay_core.retry import RetryPolicy
from relay_core.schedule.plan import Schedule
from relay_core.settings import DEFAULT_LEASE, StoreSettings, StoreUrl, parse_url
from relay_core.validation import MAX_PAYLOAD, JobSpec

_NOTICE = "relay: using the embedded server in {} (give a URL such as relay://localhost:6379/0 for another)"


class BrokerBase:
    """What both brokers are made of. Building one does no I/O: the first call connects.

    :param url: `relay://host:port/db`, `relays://` (TLS), `relay+unix:///path?db=0`,
        `relay+sentinel://h1:p,h2:p/service/db`, `relay+cluster://h1:p,h2:p`, or `relay://` for the embedded
        server in `./.relay`; `redis` and `valkey` are accepted as the first word too
    :param prefix: what every key begins with. Default `relay`
    :param plugins: objects with hook implementations, see relay_core/hooks.py
    :param retry: when failed jobs run again. Default: exponential, full jitter, base 1 s, ceiling 10 min
    :param queue_retry: a policy of its own for some queues
    :param lease: seconds for which a claimed job is hidden. Default 15. Extend it every third of that
    :param max_deliveries: deliveries without an answer after which a job goes to dead. Default 5
    :param max_payload: bytes, after the plugins' encoding. Default 16 MiB
    :param keep_dead: seconds for which dead jobs are kept. Default 7 days
    :param durability: `none`, `replica:N` (WAIT) or `aof` (WAITAOF): what confirms an enqueue
    :param quiet: do not print the notice about the embedded server
    :param connection: further settings of the connection, see relay_core/settings.py StoreSettings
    """

    def __init__(
        self,
        url: str = "relay://",
        *,
        prefix: str = "relay",
        plugins: Iterable[object] = (),
        retry: RetryPolicy | None = None,
        queue_retry: Mapping[str, RetryPolicy] | None = None,
        lease: float = DEFAULT_LEASE,
        max_deliveries: int = 5,
        max_payload: int = MAX_PAYLOAD,
        keep_dead: float = 7 * 86400.0,
        durability: str = "none",
        quiet: bool = False,
        **connection: Any,
    ) -> None:
        refuse_unknown(type(self).__name__, connection, OPTIONS)
        self.url: StoreUrl = parse_url(url)
        if queue_retry is not None and not isinstance(queue_retry, Mapping):
            raise InvalidArgument(f"queue_retry must map queues to RetryPolicies, got {queue_retry!r}")
        self.settings = Settings(
            prefix=prefix,
            retry=RetryPolicy() if retry is None else retry,
            queue_retry=dict(queue_retry or {}),
            lease=lease,
            max_deliveries=max_deliveries,
            max_payload=max_payload,
            keep_dead=keep_dead,
        )
        self.plugins = Plugins(plugins)
        self.operations = Operations(self.settings, self.plugins)
        self.operations.several = self.url.several
        self._store_settings = StoreSettings(durability=durability, **connection)
        self._quiet = quiet
        # the folder stays the same when this process goes to another one
        self._directory = Path(self.url.path or ".relay").absolute() if self.url.topology == "embedded" else None
        self._lease: embedded.Lease | None = None
        self._opening = forks.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url.safe()!r})"

    def address(self) -> StoreUrl:
        """Where the server is; starts the embedded one, or joins it."""
        if self._directory is None:
            return self.url
        if self._lease is not None:
            # after a fork the child takes a share of its own, and a server that died is started again
            self._lease.renew()
        else:
            self._lease = embedded.acquire(self._directory)
            if not self._quiet:
                print(_NOTICE.format(self._directory), file=sys.stderr)
        return self.url.at_socket(self._lease.socket_path)


_SETTINGS = [field.name for field in fields(StoreSettings)]
OPTIONS = frozenset(["url", *(BrokerBase.__init__.__kwdefaults__ or {}), *_SETTINGS])
"""Names of all that can be given to a broker."""

_JOB_OPTIONS = [field.name for field in fields(JobSpec) if field.name != "payload"]
_NACK_OPTIONS = ("dead", "reason", "payload", "error", "delay")
_SCHEDULE_OPTIONS = [field.name for field in fields(Schedule) if field.name not in ("name", "queue", "payload")]


def job_spec(payload: bytes, options: Mapping[str, Any]) -> JobSpec:
    """Of what was given to `enqueue`. Raises TypeError for an option that is none."""
    refuse_unknown("enqueue", options, _JOB_OPTIONS)
    return JobSpec(payload, **options)


def nack_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was given to `nack`. Raises TypeError for an option that is none."""
    refuse_unknown("nack", options, _NACK_OPTIONS)
    return options


def schedule_of(name: str, queue: str, payload: bytes, options: Mapping[str, Any]) -> Schedule:
    """Of what was given to `schedule`. Raises TypeError for an option that is none."""
    refuse_unknown("schedule", options, _SCHEDULE_OPTIONS)
    return Schedule(name, queue, payload, **options)


def names(queues: Iterable[str] | str) -> Sequence[str]:
    """Of one queue or of several, in whatever they come: a claim that waits goes through them again and again."""
    if isinstance(queues, str):
        return (queues,)
    try:
        return tuple(queues)
    except TypeError:
        raise InvalidArgument(f"queues must be a name or a list of names, got {queues!r}") from None


def as_jobs(jobs: Job | Sequence[Job]) -> Sequence[Job]:
    return (jobs,) if isinstance(jobs, Job) else jobs
