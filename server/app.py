"""The composition root: runs a server's parts and its doors on one Trio scheduler, and takes them down in order.

What a signal sets off is all here: the first one drains (no new work, requests and attempts under way may finish), a
second one cuts off.
"""

from __future__ import annotations

import logging
import os
import platform
import resource
import signal
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from bridge import open_loop
from saga.drain import Drain
from saga.retention import AuditRetention, Retention
from saga.store_outage import StoreOutage
from server.checks import check
from server.config import Config
from server.doors import serve_doors
from server.errors import CannotStart
from server.opened_store import AnyStore, opened_store
from server.parts import Parts, joined_parts
from server.seat import Seat
from server.version import product_version
from server.workflow_folder import keep_looking
from store.sqlite_connections import MEMORY

log = logging.getLogger("saga.server")

OTHER_FILES = 256
"""Open files beside the connections of both doors: those to participants, database and broker. A guess."""

KEYS_SECS = 1.0
"""How long the doors stay shut for the first keys of tokens; without them nobody could be let in. A guess: an issuer
that is there answers in a fraction of it, and a start is then not unready, and logged as such, for its first moment."""

SECOND_SIGNAL_SECS = 1.0
"""A second signal sooner than this is the echo of the first (a shell, make and timeout signal the whole group and then
the child again), not a person who has lost patience."""


def serve(config: Config, *, seat: Seat | None = None) -> int:
    """Runs the server until it is told to stop; the value is the exit status. `CannotStart`, `ConfigInvalid`."""
    check(config)
    _allow_files(2 * config.server.limits.max_connections + OTHER_FILES)
    # open_loop() wraps whatever leaves it in groups, so what a person can mend is carried out as a value.
    outcome = trio.run(_serve, config, seat)
    if isinstance(outcome, CannotStart):
        raise outcome
    return outcome


def tell_beginnings(config: Config, config_file: Path | None, workers: int) -> None:
    """Logs what this server is about to run on, for whoever asks later which release, file or store it was."""
    if config.database is None:
        store = f"sqlite:{MEMORY if config.saga.in_memory else config.saga.database_file}"
    else:
        store = f"postgres:{config.database.user}@{config.database.host}:{config.database.port}/{config.database.name}"
    log.info(
        "starting version=%s python=%s pid=%d workers=%d config=%s store=%s workflow_dir=%s",
        product_version(),
        platform.python_version(),
        os.getpid(),
        workers,
        config_file,
        store,
        config.saga.workflow_dir,
    )


def _allow_files(count: int) -> None:
    """Asks the system for as many open files as the limits allow for, since many systems begin with 1024; where that is
    not to be had, connections wait in the listener's queue."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            log.warning("few_open_files allowed=%d wanted=%d error=%s", soft, count, error)


async def _serve(config: Config, seat: Seat | None) -> int | CannotStart:
    # What a person can mend leaves as a value: open_loop() and the nurseries wrap errors in groups of groups.
    async with open_loop():
        try:
            return await _run(config, seat)
        except (CannotStart, BaseExceptionGroup) as error:
            found = _only(error)
            if isinstance(found, CannotStart):
                return found
            raise


def _only(error: BaseException) -> BaseException:
    """The one error in groups of one; the group itself where there are more."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _run(config: Config, seat: Seat | None) -> int:
    drain = Drain()
    cut_off = True
    async with trio.open_nursery() as nursery:
        await nursery.start(_signals, drain, nursery.cancel_scope)
        async with AsyncExitStack() as stack:
            outage = StoreOutage()
            store = await opened_store(stack, config, drain, outage)
            if store is not None:
                await _serve_on(store, config, drain, seat, outage)
        cut_off = False
        nursery.cancel_scope.cancel()
    if cut_off:
        log.warning("cut_off reason=%s", "told to stop twice")
        return 1
    log.info("stopped")
    return 0


async def _serve_on(store: AnyStore, config: Config, drain: Drain, seat: Seat | None, outage: StoreOutage) -> None:
    """The server, from the first claim of a saga to the last answer of a drain."""
    parts = joined_parts(store, config, drain, seat, outage)
    try:
        async with trio.open_nursery() as workers:
            await _start_workers(workers, parts, store, config)
            with drain.ends_early():
                await workers.start(
                    partial(
                        keep_looking,
                        parts.service,
                        config.saga.workflow_dir,
                        parts.readiness,
                        outage,
                        is_folder_optional=not config.saga.asks_for_workflows,
                    )
                )
            workers.start_soon(parts.readiness.run)
            await serve_doors(parts, config, drain, seat)
            workers.cancel_scope.cancel()
    finally:
        await parts.aclose()


async def _start_workers(workers: trio.Nursery, parts: Parts, store: AnyStore, config: Config) -> None:
    """What runs beside the doors, in the order in which one needs the other."""
    if parts.contexts is not None:
        workers.start_soon(parts.contexts.run)
    if parts.certificate_ends is not None:
        await workers.start(parts.certificate_ends.run)
    await workers.start(parts.supervisor.run)
    if parts.keys is not None:
        await workers.start(parts.keys.run)
        with trio.move_on_after(KEYS_SECS):
            await parts.keys.refetched()
    if parts.relay is not None:
        await workers.start(parts.relay.run)
    if config.saga.retention_days > 0:
        workers.start_soon(Retention(store, parts.meter, config.saga.retention_days).run)
    if config.saga.audit_retention_days > 0:
        workers.start_soon(AuditRetention(store, config.saga.audit_retention_days).run)
    if parts.shared_metrics is not None:
        workers.start_soon(parts.shared_metrics.run)


async def _signals(
    drain: Drain, everything: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        first = 0.0
        async for _ in signals:
            if not drain.begun:
                first = trio.current_time()
                drain.begin()
            elif trio.current_time() - first >= SECOND_SIGNAL_SECS:
                everything.cancel()
