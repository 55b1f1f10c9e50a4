"""What a workflow is: frozen definitions, already checked.

Reading YAML and reporting its errors is `workflow_yaml.py`; building requests is `mapping.py`.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from saga.model import StepAction

STATUS_CODES = (
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
"""The gRPC codes a call can fail with, in the order of their numbers, from 1."""

DEFAULT_NON_RETRYABLE = frozenset(
    {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "FAILED_PRECONDITION",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
    }
)
"""gRPC codes that fail a step at once (spec section 3)."""

DEFAULT_STEP_TIMEOUT_SECS = 30.0


class Backoff(enum.StrEnum):
    """How the pause grows from retry to retry."""

    EXPONENTIAL = "exponential"
    LINEAR = "linear"
    CONSTANT = "constant"


class OnUnknown(enum.StrEnum):
    """What to do with a step that failed without anyone knowing whether it took effect."""

    SKIP = "skip"
    COMPENSATE = "compensate"


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When and how often a failed attempt is repeated."""

    max_attempts: Annotated[int, Meta(description="the first included")] = 3
    backoff: Backoff = Backoff.EXPONENTIAL
    initial_interval_ms: Annotated[int, Meta(description="the first pause")] = 1000
    max_interval_ms: Annotated[int | None, Meta(description="the longest pause; null: no bound")] = None
    jitter: Annotated[float, Meta(description="the share of each pause that is drawn at random")] = 0.0
    non_retryable: Annotated[frozenset[str], Meta(description="gRPC codes that fail the step at once")] = (
        DEFAULT_NON_RETRYABLE
    )

    def delay_secs(self, retry: int, draw: float) -> float:
        """Pause before retry number `retry` (from 0), in seconds.

        Exponential is the seed's `initial_interval_ms * 2^n`; linear grows by one interval a retry. `draw` in [0, 1)
        is the caller's random number: the share `jitter` of the delay is replaced by `draw` of that share, so the
        delay lies between `(1 - jitter) * delay` and `delay`.
        """
        cap = self.max_interval_ms
        if self.backoff is Backoff.EXPONENTIAL:
            # Past 2^40 ms (35 years) the exact number says nothing more; the bound keeps big ints out.
            delay_ms: float = self.initial_interval_ms * 2 ** min(retry, 40)
        elif self.backoff is Backoff.LINEAR:
            delay_ms = self.initial_interval_ms * (retry + 1)
        else:
            delay_ms = self.initial_interval_ms
        if cap is not None:
            delay_ms = min(delay_ms, cap)
        return delay_ms * (1.0 - self.jitter * (1.0 - draw)) / 1000.0


DEFAULT_COMPENSATE_RETRY = RetryPolicy(max_attempts=5)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step: what to call, what undoes it, and how patiently.

    `input` / `compensate_input` are what YAML said (a JMESPath expression or a map of them), None meaning the
    saga's payload as it is.
    """

    name: str
    service: str
    method: str
    compensate: str | None = None
    timeout_secs: float = DEFAULT_STEP_TIMEOUT_SECS
    retry: RetryPolicy = RetryPolicy()
    compensate_retry: RetryPolicy = DEFAULT_COMPENSATE_RETRY
    on_unknown: OnUnknown = OnUnknown.SKIP
    input: Any = None
    compensate_input: Any = None

    def policy(self, action: StepAction) -> RetryPolicy:
        return self.retry if action is StepAction.EXECUTE else self.compensate_retry

    def method_of(self, action: StepAction) -> str:
        """The method to call for an action; only asked for actions the step has."""
        if action is StepAction.EXECUTE:
            return self.method
        assert self.compensate is not None
        return self.compensate


class WorkflowDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A checked workflow. `timeout_secs` bounds the whole forward phase; None: no bound."""

    name: str
    steps: tuple[Step, ...]
    timeout_secs: float | None = None

    @property
    def services(self) -> frozenset[str]:
        """All participants it calls, to act or to undo."""
        return frozenset(step.service for step in self.steps)


class Workflow(msgspec.Struct, frozen=True, kw_only=True):
    """A definition under the version it was registered as; versions count from 1."""

    definition: WorkflowDefinition
    version: int


_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(WorkflowDefinition)


def encode_definition(definition: WorkflowDefinition) -> str:
    """The one JSON text of a definition: equal definitions give equal texts, whatever their YAML looked like."""
    return _encoder.encode(definition).decode()


def decode_definition(text: str | bytes) -> WorkflowDefinition:
    """Reads what `encode_definition` wrote."""
    return _decoder.decode(text)
