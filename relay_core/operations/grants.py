"""How what a script grants becomes a job."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from relay_core import commands
from relay_core.commands import Grant
from relay_core.errors import InvalidRecord, RelayError
from relay_core.job import NO_OPTIONS, Job, Record
from relay_core.keys import QueueKeys
from relay_core.operations.base import Base
from relay_core.operations.steps import Flow, Raw


def fetch(q: QueueKeys, records: Mapping[str, bytes]) -> Flow[dict[str, bytes]]:
    """The same records by id, with their payloads also where those lie apart and are still there."""
    apart = [id for id, record in records.items() if Record.lies_apart(record)]
    payloads = (yield Raw(("HMGET", q.payloads, *apart))) if apart else ()
    return {**records, **{id: records[id] + (payload or b"") for id, payload in zip(apart, payloads, strict=True)}}


class Grants(Base):
    """Reads the rows of leased and of buried jobs."""

    def whole(self, queue: str, grants: Sequence[Grant]) -> Flow[Sequence[Grant]]:
        """The grants of a claim with their payloads, of which scripts hand out no large ones."""
        apart = {grant.id: grant.record for grant in grants if Record.lies_apart(grant.record)}
        if not apart:
            return grants
        try:
            records = yield from fetch(self.settings.keys(queue), apart)
        except RelayError:
            rest = [grant for grant in grants if grant.id not in apart]
            with suppress(RelayError):  # else their leases end by themselves, which counts as a delivery
                tokens = [(grant.id, grant.token) for grant in grants if grant.id in apart]
                yield commands.release(self.settings.keys(queue), tokens)
            if not rest:
                raise
            return rest  # these must reach their worker
        return [grant._replace(record=records.get(grant.id, grant.record)) for grant in grants]

    def job_of(self, queue: str, grant: Grant, now_ms: int, sent: float) -> tuple[Job, str]:
        """The job, and what is wrong with its record or payload, if anything."""
        problem = ""
        try:
            record = Record.unpack(grant.record)
        except InvalidRecord as error:
            record, payload, problem = Record(now_ms, 0, NO_OPTIONS, b""), grant.record, str(error)
        else:
            try:
                payload = self.plugins.decode(record.payload, queue)
            except (Exception, SystemExit) as error:  # a plugin's may fail in any way: only this job is spoiled
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
