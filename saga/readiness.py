"""Whether this process should be sent requests: the one truth that `/readyz`, gRPC health and the metrics tell.

A part that is vital makes the process unhealthy when it fails; without the others it goes on, degraded. A check says
`ok` or, in a word that tells an unauthenticated reader nothing about the inside, what is wrong; the log has the rest.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import msgspec
import trio

from saga.authentication import KeysState
from saga.drain import Drain
from saga.errors import SagaError
from saga.ports import SchemaState
from saga.service import SagaService

log = logging.getLogger("saga.readiness")

CHECK_SECS = 3.0
"""How long one check may take. A guess: shorter than the probes' usual patience."""
REPORT_SECS = 5.0
"""How often the process asks itself when nobody asks, so that a change is logged and the metrics are no older."""
SCHEMA_KEPT_SECS = 1.0
"""How long the state of the schema is told again: anyone may ask, and it changes with a release."""

OK = "ok"

Check = Callable[[], Awaitable[None]]
"""Returns if a part is well; raises `SagaError` if not."""


class Health(enum.StrEnum):
    """How well the process is; only `UNHEALTHY` is not to be sent requests."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


class WorkflowsState(enum.StrEnum):
    """What came of the folder of workflows at the start."""

    LOADED = "ok"
    REJECTED = "rejected"
    """The definitions of some files did not load; the log names them. The others did."""
    MISSING = "missing"
    """The folder that the configuration names is not there or cannot be read: a mistyped path or mount."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks said, by name: `ok`, or a word for what is wrong."""

    health: Health
    checks: Mapping[str, str]

    @property
    def is_ready(self) -> bool:
        return self.health is not Health.UNHEALTHY


class Readiness:
    """The checks of one process. `last` is the newest report; None: nobody has asked yet. `workflows` is
    told by whoever loads them."""

    def __init__(
        self,
        service: SagaService,
        drain: Drain,
        optional_checks: Mapping[str, Check] | None = None,
        *,
        keys_state: Callable[[], KeysState] | None = None,
    ) -> None:
        """`optional_checks`: parts whose failure makes the process degraded, not unhealthy. `keys_state`: of the keys
        that tokens are signed with; None: everybody is let in."""
        self._service = service
        self._drain = drain
        self._optional_checks = dict(optional_checks or {})
        self._keys_state = keys_state
        self._schema: SchemaState | None = None
        self._reasons: dict[str, object] = {}
        self._schema_until = -1.0
        self.workflows = WorkflowsState.LOADED
        self.last: Report | None = None

    async def report(self) -> Report:
        """Asks every part, all at once; takes `CHECK_SECS` at most."""
        checks = dict.fromkeys(("database", "migrations", "lease", "worker", "workflows", *self._optional_checks), OK)
        checks["lease"] = OK if self._service.holds_lease else "lost"
        checks["worker"] = "draining" if self._drain.begun or self._service.is_draining else OK
        checks["workflows"] = self.workflows
        if self._keys_state is not None:
            checks["keys"] = self._keys_state()

        async def ask(name: str, check: Callable[[], Awaitable[str]]) -> None:
            checks[name] = await self._answer(name, check)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "database", partial(_word, self._service.check_database))
            nursery.start_soon(ask, "migrations", self._schema_word)
            for name, check in self._optional_checks.items():
                nursery.start_soon(ask, name, partial(_word, check))
        # Beside a newer schema an older release goes on: its tables are all there while a new release is rolled out.
        self._note_faults(checks)
        vital = all(checks[name] == OK for name in ("database", "lease", "worker"))
        vital = vital and checks["migrations"] in (OK, SchemaState.NEWER)
        vital = vital and checks.get("keys") != KeysState.MISSING
        vital = vital and self.workflows is not WorkflowsState.MISSING
        well = all(word == OK for word in checks.values())
        health = Health.HEALTHY if well else Health.DEGRADED if vital else Health.UNHEALTHY
        return self._noted(Report(health=health, checks=checks))

    async def run(self) -> None:
        """Asks now and then, until it is cancelled."""
        while True:
            await self.report()
            await trio.sleep(REPORT_SECS)

    async def _answer(self, name: str, check: Callable[[], Awaitable[str]]) -> str:
        word = "timeout"
        reason: object = f"no answer within {CHECK_SECS:g} s"
        with trio.move_on_after(CHECK_SECS):
            try:
                word, reason = await check(), ""
            except SagaError as error:
                word, reason = "unavailable", error
        self._reasons[name] = reason
        return word

    async def _schema_word(self) -> str:
        if self._schema is None or trio.current_time() >= self._schema_until:
            self._schema = await self._service.schema_state()
            self._schema_until = trio.current_time() + SCHEMA_KEPT_SECS
        return OK if self._schema is SchemaState.CURRENT else self._schema

    def _note_faults(self, checks: Mapping[str, str]) -> None:
        """Logs what has begun to fail, or fails in another way."""
        for name, reason in self._reasons.items():
            before = OK if self.last is None else self.last.checks.get(name, OK)
            if checks[name] in (OK, before) or {checks[name], before} == {"unavailable", "timeout"}:
                continue
            if name == "migrations" and checks["database"] != OK:
                continue  # for the database's reason, which has its line
            log.warning("check_failed check=%s outcome=%s error=%s", name, checks[name], reason)

    def _noted(self, report: Report) -> Report:
        before = Health.HEALTHY if self.last is None else self.last.health
        if report.health is not before:
            wrong = ",".join(f"{name}:{word}" for name, word in report.checks.items() if word != OK)
            level = logging.INFO if report.health is Health.HEALTHY else logging.WARNING
            log.log(level, "readiness_changed before=%s now=%s checks=%s", before, report.health, wrong or OK)
        self.last = report
        return report


async def _word(check: Check) -> str:
    await check()
    return OK
