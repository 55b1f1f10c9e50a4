"""What the engine and the front doors count. `server/` gives a meter Prometheus can read; without one, nothing is."""

from __future__ import annotations

from saga.model import SagaStatus, StepAction, StepStatus


class Meter:
    """Counts nothing; the base of meters that do. Every method is cheap and never raises."""

    def saga_started(self, workflow_name: str) -> None:
        """A saga was accepted."""

    def start_refused(self, reason: str) -> None:
        """A start was turned away because others are on their way; `reason` is one of `admission.REASONS`."""

    def saga_ended(self, workflow_name: str, status: SagaStatus, seconds: float) -> None:
        """A saga reached a final state, `seconds` after it was created."""

    def attempt_made(self, action: StepAction, service: str, method: str, code: str, seconds: float) -> None:
        """A participant was called; `code` is the gRPC code name the attempt ended with."""

    def step_ended(self, workflow_name: str, action: StepAction, status: StepStatus) -> None:
        """An action of a step came to its end, after all its attempts; durably."""

    def compensation_failed(self, workflow_name: str) -> None:
        """A compensation failed for good."""

    def sagas_claimed(self, count: int) -> None:
        """That many sagas were taken from the store to be run here."""

    def sagas_freed(self, count: int) -> None:
        """That many sagas were taken from workers whose lease had ended."""

    def worker_lease_lost(self) -> None:
        """This worker could not renew its lease in time and gave up all its sagas."""

    def lease_lost(self) -> None:
        """A write was refused because the saga belongs to another worker now."""

    def saga_crashed(self) -> None:
        """A saga met an error of our own and was put aside for a while."""

    def sagas_removed(self, count: int) -> None:
        """That many sagas were removed because they had ended long ago."""

    def batch_written(self, lane: str, rows: int, seconds: float) -> None:
        """A group commit is durable: so many rows in one transaction, which took `seconds`."""

    def batch_failed(self, lane: str) -> None:
        """A group commit failed as a whole: the database was away, or took no writes."""

    def http_request_served(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered; `route` is the pattern (`/api/v1/sagas/{saga_id}`), never the path."""

    def grpc_call_served(self, method: str, code: str, seconds: float) -> None:
        """A gRPC call of ours was answered; `code` is the gRPC code name."""
