"""Prometheus: what is counted as it happens, and what is read when somebody asks.

Labels are bounded: names that users make (workflows, methods of participants) beyond the first `MAX_NAMES` become
`other`, a route is its pattern, and a code that is none of gRPC's becomes `other`. `docs/metrics.md` says what each
metric means; a test compares the two.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Gauge, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from saga.admission import REASONS
from saga.meter import Meter
from saga.model import SagaStatus, StepAction, StepStatus
from saga.ports import UndoDebt
from saga.workflow import STATUS_CODES

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_NAMES = 200
"""Series are kept for ever, and anyone who may register workflows could make any number of names. A guess."""
OTHER = "other"
SAGA_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60, 300, 1800, 3600, 21600, 86400)
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COMMIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GRPC_CODES = frozenset({"OK", *STATUS_CODES})
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

Reading = Callable[[], float | Mapping[str, float]]
"""The value now; with labels: the value by the label's value."""

Name = TypeVar("Name", bound=Hashable)


class _Bounded(Generic[Name]):
    """The first `MAX_NAMES` names that are seen keep theirs; all others share one."""

    def __init__(self, other: Name) -> None:
        self._other = other
        self._known: set[Name] = set()

    def __call__(self, name: Name) -> Name:
        if name in self._known:
            return name
        if len(self._known) >= MAX_NAMES:
            return self._other
        self._known.add(name)
        return name


class _Count:
    """One series of a counter."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.created = time.time()

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def tell(self, metric: Metric, labels: dict[str, str]) -> None:
        metric.add_sample(f"{metric.name}_total", labels, self.value)
        metric.add_sample(f"{metric.name}_created", labels, self.created)


class _Spread:
    """One series of a histogram."""

    __slots__ = ("bounds", "counts", "created", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.created = time.time()

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def tell(self, metric: Metric, labels: dict[str, str]) -> None:
        counted = 0
        for bound, count in zip((*self.bounds, inf), self.counts, strict=True):
            counted += count
            le = floatToGoString(bound)  # type: ignore[no-untyped-call]  # the library has no types here
            metric.add_sample(f"{metric.name}_bucket", {**labels, "le": le}, counted)
        metric.add_sample(f"{metric.name}_count", labels, counted)
        metric.add_sample(f"{metric.name}_sum", labels, self.total)
        metric.add_sample(f"{metric.name}_created", labels, self.created)


Series = TypeVar("Series", bound=_Count | _Spread)


class _Family(Collector, Generic[Series]):
    """A metric and its series by the values of their labels.

    In place of the library's own, which take locks to count one thing: a worker counts and is scraped on one thread.
    What a step pays for its metrics is half of what it was with those, about one part in a hundred of the step.
    """

    def __init__(self, kind: str, name: str, help_text: str, labels: Sequence[str], make: Callable[[], Series]) -> None:
        self._kind = kind
        self._name = name
        self._help = help_text
        self._labels = labels
        self._make = make
        self._series: dict[tuple[str, ...], Series] = {}

    def __call__(self, *labels: str) -> Series:
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = self._make()
        return series

    def collect(self) -> Iterator[Metric]:
        metric = Metric(self._name, self._help, self._kind)
        for labels, series in self._series.items():
            series.tell(metric, dict(zip(self._labels, labels, strict=True)))
        yield metric


class PrometheusMeter(Meter):
    """A meter with a registry of its own, so that several can live in one process (tests do that)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._workflow = _Bounded(OTHER)
        self._called = _Bounded((OTHER, OTHER))
        self._readings = _Readings()
        self.registry.register(self._readings)
        ProcessCollector(registry=self.registry)
        self._build = Info("saga_build", "What runs here: release, Python and kind of store", registry=self.registry)
        # --- sagas
        self._started = self._counter("saga_started", "Sagas accepted", "workflow")
        self._refused = self._counter(
            "saga_starts_refused", "Starts turned away because the store does not keep up", "reason"
        )
        for reason in REASONS:
            self._refused(reason)  # told as none until there is one
        self._finished = self._counter("saga_finished", "Sagas that reached a final state", "workflow", "status")
        self._duration = self._histogram(
            "saga_duration_seconds", "From a saga's creation to its final state", SAGA_SECONDS, "workflow", "status"
        )
        self._steps = self._counter(
            "saga_steps", "Steps and compensations that came to an end", "workflow", "action", "status"
        )
        self._undo_failures = self._counter(
            "saga_compensation_failures", "Compensations that failed for good: someone has to look", "workflow"
        )
        # --- calls of participants
        self._attempts = self._counter("saga_attempts", "Calls of participants by gRPC code", "action", "code")
        self._attempt_duration = self._histogram(
            "saga_attempt_duration_seconds", "Calls of participants", CALL_SECONDS, "action"
        )
        self._calls = self._counter(
            "saga_participant_calls", "Calls of each participant by gRPC code", "service", "method", "code"
        )
        self._call_duration = self._histogram(
            "saga_participant_call_duration_seconds", "Calls of each participant", CALL_SECONDS, "service", "method"
        )
        # --- this worker
        self._claimed = self._counter("saga_claimed", "Sagas taken from the store to be run here")()
        self._freed = self._counter("saga_freed", "Sagas taken from workers whose lease had ended")()
        self._worker_leases_lost = self._counter(
            "saga_worker_leases_lost", "Times this worker could not renew its lease and gave up all its sagas"
        )()
        self._leases_lost = self._counter("saga_leases_lost", "Writes refused because another worker owns the saga")()
        self._crashes = self._counter("saga_crashes", "Sagas put aside after an error of the orchestrator itself")()
        self._removed = self._counter(
            "saga_removed", "Sagas removed because they had ended long ago (retention_days)"
        )()
        # --- the store
        self._batch_rows = self._histogram(
            "saga_group_commit_batch_rows", "Moves and creations in a transaction", BATCH_ROWS, "lane"
        )
        self._batch_duration = self._histogram(
            "saga_group_commit_duration_seconds", "Transactions of the group commit", COMMIT_SECONDS, "lane"
        )
        self._batch_failures = self._counter(
            "saga_group_commit_failures", "Transactions that failed as a whole: the database was away", "lane"
        )
        self._open = self._gauge("saga_open", "Sagas in the store that have not ended", "status")
        self._undo_debt = self._gauge(
            "saga_undo_debt", "Effects that should be undone and are not, in the store", "workflow", "state"
        )
        self._undo_debt_oldest = self._gauge(
            "saga_undo_debt_oldest_seconds", "How long ago the saga that has owed longest began to undo", "workflow"
        )
        self._counted_at = self._gauge(
            "saga_store_counted_timestamp_seconds", "When the store last told what it holds (saga_open, saga_undo_debt)"
        )
        # --- the doors
        self._http = self._counter("saga_http_requests", "HTTP requests answered", "method", "route", "status")
        self._http_duration = self._histogram(
            "saga_http_request_duration_seconds", "HTTP requests", CALL_SECONDS, "method", "route"
        )
        self._grpc = self._counter("saga_grpc_calls", "gRPC calls answered", "method", "code")
        self._grpc_duration = self._histogram("saga_grpc_call_duration_seconds", "gRPC calls", CALL_SECONDS, "method")

    def render(self) -> bytes:
        """The text a scraper gets."""
        return generate_latest(self.registry)

    def tell_build(self, **facts: str) -> None:
        """What `saga_build_info` says of this process."""
        self._build.info(facts)

    def read_gauge(self, name: str, help_text: str, read: Reading, label: str | None = None) -> None:
        """Adds a value that is read at each scrape and may go up and down (`saga_active`: the supervisor's count)."""
        self._readings.add(name, help_text, GaugeMetricFamily, read, label)

    def read_counter(self, name: str, help_text: str, read: Reading, label: str | None = None) -> None:
        """Adds a value that is read at each scrape and only grows (`saga_outbox_published`: the relay's counter)."""
        self._readings.add(name, help_text, CounterMetricFamily, read, label)

    def expect_lane(self, name: str) -> None:
        """From now on tells of a lane's failures, none yet: a series that begins with its first one hides it from
        `increase`."""
        self._batch_failures(name)

    def set_store_counts(self, open_sagas: Mapping[SagaStatus, int], debts: Sequence[UndoDebt]) -> None:
        """What the store holds now: sagas of each non-final state, and the undo debt of each workflow."""
        for status in SagaStatus:
            if not status.is_terminal:
                self._open.labels(status.value).set(open_sagas.get(status, 0))
        self._undo_debt.clear()
        self._undo_debt_oldest.clear()
        oldest: dict[str, float] = {}
        for debt in debts:
            workflow = self._workflow(debt.workflow_name)
            self._undo_debt.labels(workflow, "failed").inc(debt.failed)
            self._undo_debt.labels(workflow, "pending").inc(debt.pending)
            oldest[workflow] = max(oldest.get(workflow, 0.0), debt.oldest_secs)
        for workflow, seconds in oldest.items():
            self._undo_debt_oldest.labels(workflow).set(seconds)
        self._counted_at.set(time.time())

    # --- saga.meter.Meter ---------------------------------------------------------------------------------------------

    def saga_started(self, workflow_name: str) -> None:
        workflow = self._workflow(workflow_name)
        self._started(workflow).inc()
        self._undo_failures(workflow)  # told as none until there is one

    def start_refused(self, reason: str) -> None:
        self._refused(reason).inc()

    def saga_ended(self, workflow_name: str, status: SagaStatus, seconds: float) -> None:
        workflow = self._workflow(workflow_name)
        self._finished(workflow, status).inc()
        self._duration(workflow, status).observe(seconds)

    def attempt_made(self, action: StepAction, service: str, method: str, code: str, seconds: float) -> None:
        code = code if code in GRPC_CODES else OTHER
        self._attempts(action, code).inc()
        self._attempt_duration(action).observe(seconds)
        service, method = self._called((service, method))
        self._calls(service, method, code).inc()
        self._call_duration(service, method).observe(seconds)

    def step_ended(self, workflow_name: str, action: StepAction, status: StepStatus) -> None:
        self._steps(self._workflow(workflow_name), action, status).inc()

    def compensation_failed(self, workflow_name: str) -> None:
        self._undo_failures(self._workflow(workflow_name)).inc()

    def sagas_claimed(self, count: int) -> None:
        self._claimed.inc(count)

    def sagas_freed(self, count: int) -> None:
        self._freed.inc(count)

    def worker_lease_lost(self) -> None:
        self._worker_leases_lost.inc()

    def lease_lost(self) -> None:
        self._leases_lost.inc()

    def saga_crashed(self) -> None:
        self._crashes.inc()

    def sagas_removed(self, count: int) -> None:
        self._removed.inc(count)

    def batch_written(self, lane: str, rows: int, seconds: float) -> None:
        self._batch_rows(lane).observe(rows)
        self._batch_duration(lane).observe(seconds)

    def batch_failed(self, lane: str) -> None:
        self._batch_failures(lane).inc()

    def http_request_served(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in HTTP_METHODS else OTHER
        self._http(known, route, str(status)).inc()
        self._http_duration(known, route).observe(seconds)

    def grpc_call_served(self, method: str, code: str, seconds: float) -> None:
        self._grpc(method, code).inc()
        self._grpc_duration(method).observe(seconds)

    # ------------------------------------------------------------------------------------------------------------------

    def _counter(self, name: str, help_text: str, *labels: str) -> _Family[_Count]:
        family = _Family("counter", name, help_text, labels, _Count)
        self.registry.register(family)
        return family

    def _histogram(self, name: str, help_text: str, bounds: Sequence[float], *labels: str) -> _Family[_Spread]:
        family = _Family("histogram", name, help_text, labels, partial(_Spread, bounds))
        self.registry.register(family)
        return family

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(name, help_text, labels, registry=self.registry)


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
