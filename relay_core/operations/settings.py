"""What a broker is set to."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from relay_core import keys
from relay_core.errors import InvalidArgument
from relay_core.job import Job
from relay_core.retry import RetryPolicy
from relay_core.validation import MAX_PAYLOAD, seconds, whole

_MAX_BLOCK = 5.0


@dataclass(frozen=True)
class Settings:
    """A broker's settings; see Broker for their meaning."""

    prefix: str = "relay"
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    queue_retry: dict[str, RetryPolicy] = field(default_factory=dict)
    lease: float = 15.0
    max_deliveries: int = 5
    max_payload: int = MAX_PAYLOAD
    keep_dead: float = 7 * 86400.0

    def __post_init__(self) -> None:
        seconds("lease", self.lease, least=0.1, most=86400)
        seconds("keep_dead", self.keep_dead, least=1)
        whole("max_deliveries", self.max_deliveries, least=1, most=10**6)
        whole("max_payload", self.max_payload, least=1, most=512 * 2**20)
        for name, policy in (("retry", self.retry), *((f"queue_retry[{q!r}]", p) for q, p in self.queue_retry.items())):
            if not isinstance(policy, RetryPolicy):
                raise InvalidArgument(f"{name} must be a RetryPolicy, got {policy!r}")
        if (
            not isinstance(self.prefix, str)
            or not self.prefix
            or not self.prefix.isprintable()
            or set(self.prefix) & set("{} ")
        ):
            raise InvalidArgument(f"prefix must be a text without braces or spaces, got {self.prefix!r}")

    @property
    def lease_ms(self) -> int:
        return int(self.lease * 1000)

    @property
    def keep_ms(self) -> int:
        return int(self.keep_dead * 1000)

    @property
    def max_block(self) -> float:
        """Longest wait for a wake-up: short against the lease, so that a dead worker's jobs are seen in time; a little
        different each time, so that workers that began together do not all look together."""
        return min(_MAX_BLOCK, self.lease / 3) * random.uniform(0.9, 1.1)

    def keys(self, queue: str) -> keys.QueueKeys:
        try:
            return keys.queue_keys(self.prefix, queue)
        except TypeError:  # a list or dict cannot even be looked up: say what is wrong with it
            keys.encode_queue(queue)
            raise

    def policy(self, job: Job) -> RetryPolicy:
        if job.options.retry:
            return RetryPolicy.from_dict(job.options.retry)
        return self.queue_retry.get(job.queue, self.retry)

    def is_suspect(self, job: Job) -> bool:
        """True for a claimed job whose deliveries mostly ended with their worker, so that it may be what ended them.

        Whoever runs it holds nothing else meanwhile, so that a poison job takes no neighbour to dead.
        """
        most = job.options.max_deliveries or self.max_deliveries
        return job.deliveries - 1 - job.retries >= max(1, most - 2)
