"""relay: a job-queue engine on Redis and Valkey.

>>> from relay_core import Broker
>>> broker = Broker("relay://localhost:6379/0")
>>> broker.enqueue("mail", b"hello")
>>> for job in broker.claim("mail", wait=1.0):
...     broker.ack(job)
"""

from importlib.metadata import PackageNotFoundError, version

from relay_core.async_broker import AsyncBroker
from relay_core.broker import Broker
from relay_core.commands import QueueStats, Verdict
from relay_core.errors import NotYet
from relay_core.hooks import hookimpl
from relay_core.job import Claimed, Enqueued, Job, JobSummary, StoredJob
from relay_core.maintenance import AuditReport
from relay_core.retry import RetryPolicy
from relay_core.validation import JobSpec

try:
    __version__ = version("relay-queue")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

__all__ = [
    "AsyncBroker",
    "AuditReport",
    "Broker",
    "Claimed",
    "Enqueued",
    "Job",
    "JobSpec",
    "JobSummary",
    "NotYet",
    "QueueStats",
    "RetryPolicy",
    "StoredJob",
    "Verdict",
    "hookimpl",
]
