"""What is told when a saga has come to its end, whoever has brought it there: counted, traced, logged."""

from __future__ import annotations

import logging

from saga.meter import Meter
from saga.model import Saga, SagaStatus
from saga.tracing import Tracer, saga_span

log = logging.getLogger("saga.runner")


def note_end(saga: Saga, meter: Meter, tracer: Tracer) -> None:
    """`saga` is terminal, durably, and was not before."""
    lasted = (saga.updated_at - saga.created_at).total_seconds()
    meter.saga_ended(saga.workflow_name, saga.status, lasted)
    if tracer.enabled:
        tracer.keep(saga_span(saga))
    # The end that is hoped for would be a line for each saga there is.
    level = logging.DEBUG if saga.status is SagaStatus.COMPLETED else logging.INFO
    if log.isEnabledFor(level):
        log.log(
            level,
            "saga_ended saga_id=%s workflow=%s status=%s secs=%.3f error=%s",
            *(saga.saga_id, saga.workflow_name, saga.status, lasted, saga.error_message),
        )
