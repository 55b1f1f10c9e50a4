"""What goes wrong, when and how often: drawn from one seed, counted by kind.

`Climate` is what a whole run is like, `Chance` throws the dice as the run goes. Every draw is made in the order in
which the simulated world asks, and that order follows from the seed: the same seed gives the same run.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import msgspec
import trio

from saga.ports import Answer, Outcome
from saga.workflow import Backoff, OnUnknown, RetryPolicy, Step, WorkflowDefinition


class Climate(msgspec.Struct, frozen=True, kw_only=True):
    """One run: how many workers, how hurried, how rough. Shares are of exchanges, calls or sagas."""

    workers: int
    lease_secs: float
    max_concurrent: int
    park_after_secs: float
    traffic_secs: float
    store_trouble: float
    call_trouble: float
    refusals: float
    cancels: float
    duplicates: float
    watchers: float
    misfortunes: int
    """Crashes, stops, cut lines and outages."""
    relays: bool
    """Whether the workers relay the outbox to a broker; else its rows are what is checked."""


def climate_of(dice: random.Random, sagas: int) -> Climate:
    rough = dice.choice((0.0, 0.3, 1.0, 1.0, 2.0))
    return Climate(
        workers=dice.randint(1, 4),
        lease_secs=dice.choice((2.0, 4.0, 15.0)),
        max_concurrent=dice.choice((3, 10, 40, 100)),
        park_after_secs=dice.choice((0.5, 3.0, 30.0)),
        traffic_secs=dice.choice((2.0, 10.0, 20.0)) * max(1.0, sagas / 200),
        store_trouble=0.02 * rough,
        call_trouble=dice.choice((0.02, 0.1, 0.25)),
        refusals=dice.choice((0.01, 0.05, 0.15)),
        cancels=dice.choice((0.0, 0.1, 0.3)),
        duplicates=0.15,
        watchers=0.03,
        misfortunes=round(dice.randint(0, 14) * rough),
        relays=dice.random() < 0.4,
    )


def workflows_of(dice: random.Random) -> list[WorkflowDefinition]:
    """Four workflows of one to five steps, every option of the engine among them."""
    return [_workflow(dice, f"w{number}") for number in range(4)]


def _workflow(dice: random.Random, name: str) -> WorkflowDefinition:
    mapped = dice.random() < 0.3
    steps = []
    for index in range(dice.randint(1, 5)):
        request = {"order": "payload.order", "of": "saga.saga_id"}
        if index:
            request["token"] = f"steps.s{index - 1}.response.token"
        steps.append(
            Step(
                name=f"s{index}",
                service="shop",
                method="Shop.Do",
                compensate="Shop.Undo" if dice.random() < 0.85 else None,
                timeout_secs=dice.choice((0.5, 2.0, 5.0)),
                retry=_policy(dice, dice.randint(1, 4)),
                compensate_retry=_policy(dice, dice.randint(2, 6)),
                on_unknown=dice.choice(tuple(OnUnknown)),
                input=request if mapped else None,
            )
        )
    return WorkflowDefinition(name=name, steps=tuple(steps), timeout_secs=dice.choice((None, None, 3.0, 12.0)))


def _policy(dice: random.Random, max_attempts: int) -> RetryPolicy:
    return RetryPolicy(
        max_attempts=max_attempts,
        backoff=dice.choice(tuple(Backoff)),
        initial_interval_ms=dice.choice((0, 100, 1000)),
        max_interval_ms=dice.choice((None, 1500)),
        jitter=dice.choice((0.0, 0.5)),
    )


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one call. The request arrives after `there_secs` (None: never; it may still arrive
    `afterwards_secs` later, when its caller has long given up), `times` times; the answer is back after another
    `back_secs` (None: it never is). `answer` in place of the participant's own: a refusal, or a broken connection."""

    there_secs: float | None = 0.0
    back_secs: float | None = 0.0
    afterwards_secs: float | None = None
    times: int = 1
    works: bool = True
    answer: Answer | None = None


WELL = Course()
LOST = Answer(outcome=Outcome.UNKNOWN, code="UNAVAILABLE", message="connection lost")


class Chance:
    """The dice of one run; `faults` counts what was thrown, `trace` stands for everything that happened."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self._trace = hashlib.blake2b(digest_size=16)
        self.told: list[str] | None = None

    def note(self, *what: object) -> None:
        """One line of the trace, under the virtual time."""
        line = f"{trio.current_time():.6f} {what}\n"
        self._trace.update(line.encode())
        if self.told is not None:
            self.told.append(line)

    def fault(self, kind: str, *what: object) -> None:
        self.faults[kind] += 1
        self.note("fault", kind, *what)

    @property
    def trace(self) -> str:
        return self._trace.hexdigest()

    def course(self, climate: Climate) -> Course:
        """What becomes of the next call."""
        dice = self.dice
        roll = dice.random()
        if roll >= climate.call_trouble + climate.refusals:
            return WELL if roll < 0.6 else Course(there_secs=dice.choice((0.01, 0.05, 0.1)))
        if roll < climate.refusals:
            return self._refusal()
        kind = dice.randrange(9)
        if kind == 0:
            self.faults["call: never left"] += 1
            answer = Answer(outcome=Outcome.NOT_DONE, code="UNAVAILABLE", message="connection refused")
            return Course(there_secs=None, answer=answer)
        if kind == 1:
            self.faults["call: request lost"] += 1
            return Course(there_secs=None, back_secs=None)
        if kind == 2:
            self.faults["call: request held up"] += 1
            return Course(there_secs=None, back_secs=None, afterwards_secs=dice.uniform(0.1, 12.0))
        if kind == 3:
            self.faults["call: reply lost"] += 1
            return Course(there_secs=0.02, answer=LOST)
        if kind == 4:
            self.faults["call: reply never comes"] += 1
            return Course(there_secs=0.02, back_secs=None)
        if kind == 5:
            self.faults["call: reply slow"] += 1
            return Course(there_secs=0.02, back_secs=dice.uniform(0.2, 6.0))
        if kind == 6:
            self.faults["call: request delivered twice"] += 1
            return Course(there_secs=0.02, times=2, afterwards_secs=dice.uniform(0.0, 8.0))
        if kind == 7:
            self.faults["call: broken on the way"] += 1
            return Course(works=False, there_secs=0.01, answer=LOST)
        self.faults["call: slow"] += 1
        return Course(there_secs=dice.uniform(0.2, 6.0))

    def _refusal(self) -> Course:
        kind = self.dice.randrange(4)
        if kind == 0:
            self.faults["call: refused for good"] += 1
            answer = Answer(outcome=Outcome.REFUSED, code="FAILED_PRECONDITION", message="no")
        elif kind == 1:
            self.faults["call: asked to wait"] += 1
            answer = Answer(
                outcome=Outcome.REFUSED,
                code="RESOURCE_EXHAUSTED",
                message="busy",
                retry_after_secs=self.dice.choice((0.0, 1.0, 5.0)),
            )
        else:
            self.faults["call: refused"] += 1
            answer = Answer(outcome=Outcome.REFUSED, code="ABORTED", message="not now")
        return Course(works=False, there_secs=0.01, answer=answer)
