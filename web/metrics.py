"""Prometheus: what is counted as it happens, and what is read when somebody asks.

Labels are bounded: workflow names beyond `MAX_WORKFLOW_LABELS` become `other`, a route is its pattern, and a code that
is none of gRPC's becomes `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from saga.meter import Meter
from saga.model import SagaStatus, StepAction
from saga.workflow import STATUS_CODES

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_WORKFLOW_LABELS = 200
"""Series are kept for ever, and anyone who may register workflows could make any number of names. A guess."""
SAGA_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60, 300, 1800, 3600, 21600, 86400)
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
GRPC_CODES = frozenset({"OK", *STATUS_CODES})
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

Reading = Callable[[], float | Mapping[str, float]]
"""The value now; with labels: the value by the label's value."""


class PrometheusMeter(Meter):
    """A meter with a registry of its own, so that several can live in one process (tests do that)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._workflows: set[str] = set()
        self._readings = _Readings()
        self.registry.register(self._readings)
        self._started = self._counter("saga_started", "Sagas accepted", "workflow")
        self._finished = self._counter("saga_finished", "Sagas that reached a final state", "workflow", "status")
        self._duration = self._histogram(
            "saga_duration_seconds", "From a saga's creation to its final state", SAGA_SECONDS, "workflow", "status"
        )
        self._attempts = self._counter("saga_attempts", "Calls of participants by gRPC code", "action", "code")
        self._attempt_duration = self._histogram(
            "saga_attempt_duration_seconds", "Calls of participants", CALL_SECONDS, "action"
        )
        self._undo_failures = self._counter(
            "saga_compensation_failures", "Compensations that failed for good: someone has to look", "workflow"
        )
        self._leases_lost = self._counter("saga_leases_lost", "Writes refused because another worker owns the saga")
        self._crashes = self._counter("saga_crashes", "Sagas put aside after an error of the orchestrator itself")
        self._removed = self._counter("saga_removed", "Sagas removed because they had ended long ago (retention_days)")
        self._http = self._counter("saga_http_requests", "HTTP requests answered", "method", "route", "status")
        self._http_duration = self._histogram(
            "saga_http_request_duration_seconds", "HTTP requests", CALL_SECONDS, "method", "route"
        )
        self._grpc = self._counter("saga_grpc_calls", "gRPC calls answered", "method", "code")
        self._grpc_duration = self._histogram("saga_grpc_call_duration_seconds", "gRPC calls", CALL_SECONDS, "method")
        self._open = Gauge("saga_open", "Sagas in the store that have not ended", ["status"], registry=self.registry)

    def render(self) -> bytes:
        """The text a scraper gets."""
        return generate_latest(self.registry)

    def read_gauge(self, name: str, help_text: str, read: Reading, label: str | None = None) -> None:
        """Adds a value that is read at each scrape and may go up and down (`saga_active`: the supervisor's count)."""
        self._readings.add(name, help_text, GaugeMetricFamily, read, label)

    def read_counter(self, name: str, help_text: str, read: Reading, label: str | None = None) -> None:
        """Adds a value that is read at each scrape and only grows (`saga_group_commit_batches`: a store's counter)."""
        self._readings.add(name, help_text, CounterMetricFamily, read, label)

    def set_open(self, counts: Mapping[SagaStatus, int]) -> None:
        """What the store holds of each non-final state now."""
        for status in SagaStatus:
            if not status.is_terminal:
                self._open.labels(status.value).set(counts.get(status, 0))

    # --- saga.meter.Meter ---------------------------------------------------------------------------------------------

    def saga_started(self, workflow_name: str) -> None:
        self._started.labels(self._workflow(workflow_name)).inc()

    def saga_ended(self, workflow_name: str, status: SagaStatus, seconds: float) -> None:
        labels = self._workflow(workflow_name), status.value
        self._finished.labels(*labels).inc()
        self._duration.labels(*labels).observe(seconds)

    def attempt_made(self, action: StepAction, code: str, seconds: float) -> None:
        self._attempts.labels(action.value, code if code in GRPC_CODES else "other").inc()
        self._attempt_duration.labels(action.value).observe(seconds)

    def compensation_failed(self, workflow_name: str) -> None:
        self._undo_failures.labels(self._workflow(workflow_name)).inc()

    def lease_lost(self) -> None:
        self._leases_lost.inc()

    def saga_crashed(self) -> None:
        self._crashes.inc()

    def sagas_removed(self, count: int) -> None:
        self._removed.inc(count)

    def http_request_served(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in HTTP_METHODS else "other"
        self._http.labels(known, route, str(status)).inc()
        self._http_duration.labels(known, route).observe(seconds)

    def grpc_call_served(self, method: str, code: str, seconds: float) -> None:
        self._grpc.labels(method, code).inc()
        self._grpc_duration.labels(method).observe(seconds)

    # ------------------------------------------------------------------------------------------------------------------

    def _workflow(self, name: str) -> str:
        if name in self._workflows:
            return name
        if len(self._workflows) >= MAX_WORKFLOW_LABELS:
            return "other"
        self._workflows.add(name)
        return name

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, help_text, labels, buckets=buckets, registry=self.registry)


class _Readings(Collector):
    """Values that live elsewhere."""

    def __init__(self) -> None:
        self._sources: list[tuple[str, str, type[GaugeMetricFamily | CounterMetricFamily], Reading, str | None]] = []

    def add(
        self,
        name: str,
        help_text: str,
        family: type[GaugeMetricFamily | CounterMetricFamily],
        read: Reading,
        label: str | None,
    ) -> None:
        self._sources.append((name, help_text, family, read, label))

    def collect(self) -> Iterator[Metric]:
        for name, help_text, family, read, label in self._sources:
            metric = family(name, help_text, labels=[label] if label else [])
            value = read()
            for key, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
                metric.add_metric([] if key is None else [key], number)
            yield metric
