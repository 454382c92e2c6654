"""How what a script grants becomes a job."""

from __future__ import annotations

import time

from relay_core.commands import Grant
from relay_core.errors import InvalidRecord
from relay_core.job import NO_OPTIONS, Job, Record
from relay_core.operations.base import Base


class Grants(Base):
    """Reads the rows of leased and of buried jobs."""

    def job_of(self, queue: str, grant: Grant, now_ms: int, sent: float) -> tuple[Job, str]:
        """The job, and what is wrong with its record or payload, if anything."""
        problem = ""
        try:
            record = Record.unpack(grant.record)
            payload = self.plugins.decode(record.payload, queue)
        except InvalidRecord as error:
            record, payload, problem = Record(now_ms, 0, NO_OPTIONS, b""), grant.record, str(error)
        except (Exception, SystemExit) as error:  # a plugin's decoding may fail in any way: only this job is spoiled
            payload, problem = record.payload, f"payload does not decode: {error!r}"
        job = Job(
            id=grant.id,
            queue=queue,
            payload=payload,
            created_at=record.created_ms / 1000,
            claimed_at=now_ms / 1000,
            priority=record.priority,
            deliveries=int(grant.token.partition(":")[0] or 0),
            retries=grant.retries,
            token=grant.token,
            expires_at=sent + self.settings.lease,
            claimed_monotonic=time.monotonic(),
            options=record.options,
        )
        return job, problem
