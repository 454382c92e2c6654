"""Every error that relay raises on purpose.

Each message says what happened, to which thing, and what to do next; the facts are attributes too.
"""

from __future__ import annotations


class RelayError(Exception):
    """Base of every error raised by relay."""


class InvalidArgument(RelayError, ValueError):
    """A value given by the caller cannot be used; nothing was stored."""


class InvalidUrl(InvalidArgument):
    """A broker URL names an unknown scheme, port, option or an incomplete address."""


class InvalidRecord(RelayError):
    """A record in the store does not decode; that one job goes to dead, its neighbours run."""


class LeaseLost(RelayError):
    """The token is not the current one: the lease expired and the job moved on. Nothing was changed."""

    def __init__(self, queue: str, job_id: str, move: str) -> None:
        self.queue = queue
        self.job_id = job_id
        self.move = move
        super().__init__(
            f"job {job_id} in queue {queue!r}: its lease was lost before the {move}; "
            "another worker has it or finished it. Extend the lease while the job runs, or raise `lease`"
        )

    def __reduce__(self) -> tuple[type[LeaseLost], tuple[str, str, str]]:
        return (LeaseLost, (self.queue, self.job_id, self.move))


class JobNotFound(RelayError):
    """No job of this id is in the queue: it was never stored, or it finished."""


class StoreError(RelayError):
    """The server refused a command for good; repeating it cannot help.

    :ivar maybe_executed: True when an earlier send of it, or a part of it, may have run all the same
    """

    maybe_executed = False


class AuthError(StoreError):
    """Wrong user or password."""


class PermissionDenied(StoreError):
    """The user's ACL lacks a command, key pattern or channel that relay needs."""


class UnsafeStore(StoreError):
    """The server may evict keys, so it could lose jobs: `maxmemory-policy` must be `noeviction`."""


class LayoutError(StoreError):
    """The store was written by a newer relay than this one."""


class ServerTooOld(StoreError):
    """The server lacks what relay needs: Redis 7.0 or Valkey 7.2."""


class Unavailable(RelayError, ConnectionError):
    """The server could not serve within the set time.

    :ivar maybe_executed: True when the command may have run although no reply came back. Repeating
        it with the same job id or token is safe: every move of relay is idempotent.
    :ivar answered: True when the server is there, and said that it could not
    """

    def __init__(self, message: str, *, maybe_executed: bool = False, answered: bool = False) -> None:
        self.maybe_executed = maybe_executed
        self.answered = answered
        super().__init__(message)


class NotDurable(RelayError):
    """The job is stored, but fewer replicas or disks than asked confirmed it within the time.

    Repeating the enqueue with the same id stores nothing twice.
    """


class PluginError(RelayError):
    """A plugin cannot be registered: a misspelt hook name, or an async implementation."""


class NotYet(RelayError):
    """Raised by a plugin's `relay_job_dead` that could not do its part: a server of its own is away, or it does it on a
    thread of its own, which calls `Broker.told` when that is done. It is told again, see docs/hooks.md.
    """


class EmbeddedError(RelayError):
    """The embedded server cannot run here, or did not start."""
