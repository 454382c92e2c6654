"""The worker runtime for handlers that are plain callables."""

from relay_core.worker.outcome import Reject, Retry
from relay_core.worker.worker import Worker

__all__ = ["Reject", "Retry", "Worker"]
