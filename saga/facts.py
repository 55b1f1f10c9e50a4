"""What happens to a saga, as values: the facts the table of `transitions.py` moves it by, and the one command."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from saga.model import Json, StepAction, UndoCorrection


class Call(msgspec.Struct, frozen=True):
    """Ask a participant: this action of this step, for the `attempt`-th time."""

    step_index: int
    action: StepAction
    attempt: int


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """Something that has happened to a saga."""


class Began(Fact, frozen=True):
    """A worker took the saga up for the first time."""


class Made(Fact, frozen=True, kw_only=True):
    """Base of the facts about attempts: what was sent (None: it could not be built) and when the action began."""

    request: Json | None
    started_at: datetime


class StepSucceeded(Made, frozen=True, kw_only=True):
    """The participant did it."""

    response: Json | None


class StepRetried(Made, frozen=True, kw_only=True):
    """An attempt failed and another follows after `delay_secs`. `unknown`: it may have taken effect all the same."""

    code: str
    message: str
    delay_secs: float
    unknown: bool


class StepFailed(Made, frozen=True, kw_only=True):
    """The last attempt failed, or one after which no other is allowed."""

    code: str
    message: str
    unknown: bool


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that was running when the forward phase was ended from outside; its outcome is unknown."""

    request: Json | None
    started_at: datetime


class DeadlinePassed(Fact, frozen=True, kw_only=True):
    """The workflow's own deadline came before its last step was done. `cut`: the attempt it ended; `began_at`: when the
    first attempt of the step began, as far as this worker knows; None: none was made."""

    cut: Cut | None = None
    began_at: datetime | None = None


class CancelObserved(Fact, frozen=True, kw_only=True):
    """The cancel request has reached the saga. Fields as `DeadlinePassed`."""

    cut: Cut | None = None
    began_at: datetime | None = None


class AllStepsDone(Fact, frozen=True):
    """The last step has succeeded."""


class CompensationSucceeded(Made, frozen=True, kw_only=True):
    """The participant undid it."""

    response: Json | None


class CompensationRetried(Made, frozen=True, kw_only=True):
    """An attempt to undo failed and another follows after `delay_secs`."""

    code: str
    message: str
    delay_secs: float


class CompensationFailed(Made, frozen=True, kw_only=True):
    """The undo of this step failed for good; the ones before it are still undone."""

    code: str
    message: str


class CompensationSkipped(Fact, frozen=True):
    """The step has no compensation."""


class CompensationMarkedDone(Fact, frozen=True):
    """An operator undid it by hand and said so; nobody is called."""


class UndoDone(Fact, frozen=True):
    """Nothing is left to undo, and the saga had failed."""


class UndoDoneAfterCancel(Fact, frozen=True):
    """Nothing is left to undo, and the saga had been cancelled."""


class UndoRetryRequested(Fact, frozen=True, kw_only=True):
    """An operator wants the failed compensations run again, with these corrections, by step index."""

    corrections: Mapping[int, UndoCorrection] = {}


Command = Call | Fact
