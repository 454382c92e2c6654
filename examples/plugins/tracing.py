"""OpenTelemetry: `Broker(url, plugins=[Tracing()])`, and in Dramatiq `RelayBroker(url=..., plugins=[Tracing()])`.

Needs `pip install opentelemetry-sdk`, and a tracer provider set up as in any other program. The trace context of
whoever enqueues travels in the job's headers, and the run of each delivery is a span beneath it: retries, and runs
after a requeue from the dead, are in the same trace.

For Celery use `opentelemetry-instrumentation-celery`: its context travels in the task's own headers, and its spans are
made where the task runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Token
from typing import Any

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider

from relay_core import Job, hookimpl


class Tracing:
    """A span for each send, and one for each run, which is the current one while the handler runs.

    :param provider: of tracers. Default: the global one
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("relay", tracer_provider=provider)
        self._running: dict[str, tuple[Span, Token[Context]]] = {}

    @hookimpl
    def relay_add_headers(self, queue: str, headers: Mapping[str, str]) -> dict[str, str]:
        """Called before the job is stored: the span has no length, and marks from where the job came."""
        if propagate.get_global_textmap().fields & headers.keys():
            return {}  # the caller passed a context on by itself
        span = self._tracer.start_span(f"{queue} send", kind=SpanKind.PRODUCER, attributes=_attributes(queue))
        added: dict[str, str] = {}
        propagate.inject(added, trace.set_span_in_context(span))
        span.end()
        return added

    @hookimpl
    def relay_run_started(self, job: Job) -> None:
        parent = propagate.extract(job.headers)
        attributes: dict[str, Any] = {
            **_attributes(job.queue),
            "messaging.message.id": job.id,
            "relay.deliveries": job.deliveries,
            "relay.retries": job.retries,
            "relay.wait_seconds": max(0.0, job.claimed_at - job.ready_at),
        }
        span = self._tracer.start_span(f"{job.queue} process", parent, SpanKind.CONSUMER, attributes=attributes)
        self._running[job.token + job.id] = span, context.attach(trace.set_span_in_context(span, parent))

    @hookimpl
    def relay_run_ended(self, job: Job, error: BaseException | None) -> None:
        span, token = self._running.pop(job.token + job.id, (None, None))
        if span is None or token is None:
            return  # Celery's main process tells of ends only
        context.detach(token)
        if error is not None:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, repr(error)))
        span.end()


def _attributes(queue: str) -> dict[str, str]:
    return {"messaging.system": "relay", "messaging.destination.name": queue}
