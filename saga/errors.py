"""The errors a client or the engine can meet, by blame.

    SagaError
    +-- RequestError                the caller asked for something that cannot be
    |   +-- NotFound                no such saga or workflow
    |   +-- Invalid                 the request breaks a rule; one detail for each field at fault
    |   |   +-- WorkflowInvalid     a definition breaks rules; details carry line and column
    |   |   +-- PayloadTooLarge     over `saga.max_payload_bytes`
    |   +-- Conflict                the saga's state, or an idempotency key, forbids it
    |   +-- Unauthenticated         it is not known who asks
    |   |   +-- MissingToken        no token came
    |   |   +-- TokenInvalid        a token came that is none of ours, or broken
    |   |   +-- TokenExpired        it was good once
    |   +-- PermissionDenied        it is known who asks, and they may not
    +-- MappingFailed               a step's request cannot be built from the payload and the earlier responses
    +-- Unavailable                 the environment: the store cannot be reached now; try again
    |   +-- Overloaded              there is more to do than can be done now; nothing was begun
    +-- LeaseLost                   a write of a worker that no longer owns the saga; nothing was changed
    +-- RowRejected                 the store refuses this one row whatever is done; nothing was changed
    +-- BrokenRule                  our own bug: a move outside the transition table

What each becomes on the wire is one table, `error_codes.py`, that `web/` and `rpc/` read.
"""

from __future__ import annotations

import msgspec


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """One field at fault. `field` is its path (`steps[1].retry.max_attempts`), `reason` a fixed word.

    `line` and `column` count from 1 and are set where the field came from a text.
    """

    field: str
    reason: str
    message: str
    line: int | None = None
    column: int | None = None


class SagaError(Exception):
    """Base of all errors of this product; the text is fit to be shown to a caller unless said otherwise."""


class RequestError(SagaError):
    """The caller's mistake."""


class NotFound(RequestError):
    """No such saga or workflow."""


class Invalid(RequestError):
    """The request breaks a rule."""

    def __init__(self, message: str, details: tuple[Detail, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


def refused(details: list[Detail]) -> Invalid:
    """The error for these details, one or more; its message says the first and how many others there are."""
    first, others = details[0], len(details) - 1
    more = f" (and {others} more)" if others else ""
    return Invalid(f"{first.field}: {first.message}{more}", tuple(details))


class WorkflowInvalid(Invalid):
    """A workflow definition breaks rules; every one of them is in `details`, in the order of the text."""


class PayloadTooLarge(Invalid):
    """The payload is over the configured size."""


class Conflict(RequestError):
    """The request contradicts what is stored."""


class Unauthenticated(RequestError):
    """It is not known who asks. The text never holds any of the token."""


class MissingToken(Unauthenticated):
    """No token came with the request."""

    def __init__(self) -> None:
        super().__init__("a bearer token is needed")


class TokenInvalid(Unauthenticated):
    """The token cannot be trusted; the text says why."""


class TokenExpired(Unauthenticated):
    """The token's time is over."""

    def __init__(self) -> None:
        super().__init__("the token has expired")


class PermissionDenied(RequestError):
    """None of the caller's roles allows it."""


class MappingFailed(SagaError):
    """The request of a step cannot be built: the same expression would fail again, so a retry cannot help.

    `path` names the place in the step (`input.items[2].sku`), `reason` says what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class Unavailable(SagaError):
    """The store cannot be reached now. For a write: it did not happen or it is unknown whether it did.

    `told` is fit for a caller. The text has the `reason` too, which may name hosts and ports: it is for the log.
    """

    def __init__(self, told: str, reason: object = None) -> None:
        super().__init__(told if reason is None else f"{told}: {reason}")
        self.told = told
        self.reason = reason


class Overloaded(Unavailable):
    """There is more to do than can be done now; nothing of what was asked for was begun."""


class LeaseLost(SagaError):
    """The saga has another owner, epoch or revision than the write relied on; nothing was changed."""

    def __init__(self, saga_id: str) -> None:
        super().__init__(f"saga {saga_id} is no longer owned by this worker")
        self.saga_id = saga_id


class RowRejected(SagaError):
    """The store refuses this row for its content; nothing was changed. Text names the saga and the cause."""


class BrokenRule(SagaError):
    """A move that is not in the transition table: our own bug."""
