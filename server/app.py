"""The composition root: builds the store, the caller, the engine and the doors from a configuration, runs them on one
Trio scheduler, and takes them down in order.

What a signal sets off is all here: the first one drains (no new work, requests and attempts under way may finish), a
second one cuts off.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import random
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from bridge import open_loop
from rpc.caller import GrpcStepCaller
from rpc.reflection import catalog_from_descriptor_set
from rpc.server import serve_grpc
from saga.admission import Admission
from saga.authentication import Authenticator, OpenAccess
from saga.catalog import Catalog
from saga.door_limits import DoorLimits
from saga.drain import Drain
from saga.errors import Unavailable, WorkflowInvalid
from saga.meter import Meter
from saga.payload_mask import PayloadMask
from saga.readiness import OK, Readiness
from saga.retention import AuditRetention, Retention
from saga.runner import STORE_PAUSE_SECS, Engine
from saga.service import RegisteredWorkflow, SagaService
from saga.store_outage import StoreOutage
from saga.supervisor import Limits, Supervisor
from saga.tracing import Tracer
from saga.watchers import Watchers
from saga.workflow_yaml import MAX_YAML_BYTES, format_detail, parse_workflow
from server.config import Config, ConfigInvalid, KafkaConfig
from server.errors import CannotStart, refused_by_database
from server.jwks import KeySet
from server.redaction import Mask, secrets_of
from server.tls import ServerContexts, TlsFilesInvalid, file_problems
from server.tokens import TokenVerifier
from server.version import product_version
from store.errors import MigrationError, StoreInUse, StoreRefuses
from store.instants import SystemClock
from store.kafka import KafkaPublisher, KafkaSettings
from store.outbox import Relay
from store.postgres import PostgresStore, open_postgres
from store.sqlite import MEMORY, SqliteStore, open_sqlite
from web.app import create_app
from web.metrics import PrometheusMeter
from web.serving import serve_rest
from web.shared_metrics import SharedMetrics

log = logging.getLogger("saga.server")

OTHER_FILES = 256
"""Open files beside the connections of both doors: those to participants, database and broker. A guess."""

CLOSE_SECS = 5.0
"""How long closing the connections to participants may take at the end."""

SECOND_SIGNAL_SECS = 1.0
"""A second signal sooner than this is the echo of the first (a shell, make and timeout signal the whole group and then
the child again), not a person who has lost patience."""

AnyStore = PostgresStore | SqliteStore


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """The place of this process among several workers on the same ports. `ready` is called when it serves; in
    `metrics_folder` they tell each other what they count."""

    number: int
    ready: Callable[[], None]
    metrics_folder: Path


def serve(config: Config, *, insecure: bool = False, seat: Seat | None = None) -> int:
    """Runs the server until it is told to stop; the value is the exit status. `CannotStart`, `ConfigInvalid`."""
    check(config, insecure=insecure)
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


def check(config: Config, *, insecure: bool) -> None:
    """Refuses (`ConfigInvalid`) what this release cannot do, and access by anybody unless `insecure`."""
    _refuse_what_is_not_there(config)
    if not insecure:
        config.refuse_open_access()
    elif config.auth is None and not config.server.is_loopback:
        log.warning(
            "no_access_control host=%s message=%s",
            config.server.host,
            "anyone who can reach it can start and cancel sagas",
        )


def _refuse_what_is_not_there(config: Config) -> None:
    """Better no server than one that seems to check tokens or to encrypt and does not."""
    missing = []
    missing += _missing_extra(config)
    missing += _unusable_descriptor_sets(config)
    missing += file_problems(config)
    if missing:
        raise ConfigInvalid(tuple(missing))


def _missing_extra(config: Config) -> list[str]:
    if config.observability.otlp is None:
        return []
    try:
        importlib.import_module("server.spans")
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "server":
            raise
        return [
            f"observability.otlp: expected the extra for it to be installed, but there is no {error.name}: "
            "pip install 'saga-orchestrator[otel]'"
        ]
    return []


def _unusable_descriptor_sets(config: Config) -> list[str]:
    """A file that is not there, or is none, would only be noticed by the first saga that calls the service."""
    problems = []
    for name, service in config.services.items():
        if service.descriptor_set is not None:
            try:
                catalog_from_descriptor_set(Path(service.descriptor_set).read_bytes())
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                problems.append(f"services.{name}.descriptor_set: {service.descriptor_set}: {reason}")
    return problems


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
            store = await _opened_store(stack, config, drain, outage)
            if store is not None:
                await _serve_on(store, config, drain, seat, outage)
        cut_off = False
        nursery.cancel_scope.cancel()
    if cut_off:
        log.warning("cut_off reason=%s", "told to stop twice")
        return 1
    log.info("stopped")
    return 0


async def _opened_embedded(stack: AsyncExitStack, config: Config, events: bool) -> SqliteStore:
    path: str | Path = MEMORY if config.saga.in_memory else config.saga.database_file
    try:
        return await stack.enter_async_context(open_sqlite(path, events=events))
    except OSError as error:
        raise CannotStart(f"saga.data_dir: {error.filename or path}: {error.strerror or error}") from error
    except StoreInUse:
        raise
    except Unavailable as error:
        raise CannotStart(f"{path}: {error}") from error


async def _opened_store(stack: AsyncExitStack, config: Config, drain: Drain, outage: StoreOutage) -> AnyStore | None:
    """The store the configuration names. A database that is away is waited for; None: told to stop meanwhile."""
    events = config.kafka is not None
    host_unknown = False
    pause_secs, longest = STORE_PAUSE_SECS
    try:
        if config.database is None:
            return await _opened_embedded(stack, config, events)
        database = config.database
        while True:
            try:
                return await stack.enter_async_context(
                    open_postgres(
                        database.dsn(),
                        events=events,
                        max_connections=database.max_open_conns,
                        ready_connections=database.max_idle_conns,
                        idle_secs=database.conn_max_lifetime,
                    )
                )
            except StoreRefuses as error:
                raise refused_by_database(error) from error
            except Unavailable as error:
                # Waited for all the same: in many installations the name comes with the database.
                if isinstance(error.__cause__, socket.gaierror) and not host_unknown:
                    host_unknown = True
                    hint = "look at database.host, or DATABASE_URL; it is waited for"
                    log.error("database_host_unknown host=%s hint=%s", database.host, hint)
                outage.failed("start", f"{database.host}:{database.port}: {error}")
            with drain.ends_early() as pause:
                await trio.sleep(pause_secs)
            if pause.cancelled_caught:
                return None
            pause_secs = min(pause_secs * 2, longest)
    except (MigrationError, Unavailable) as error:
        raise CannotStart(str(error)) from error


async def _serve_on(store: AnyStore, config: Config, drain: Drain, seat: Seat | None, outage: StoreOutage) -> None:
    """The server, from the first claim of a saga to the last answer of a drain."""
    clock, meter, watchers, catalog = SystemClock(), PrometheusMeter(), Watchers(), Catalog(store)
    caller = GrpcStepCaller(config.services, max_payload_bytes=config.saga.max_payload_bytes)
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{random.randbytes(4).hex()}"
    tracer = _opened_tracer(config, worker_id, meter)
    supervisor = Supervisor(
        Engine(
            store=store,
            caller=caller,
            clock=clock,
            watchers=watchers,
            meter=meter,
            draw=random.random,
            tracer=tracer,
            park_after_secs=config.saga.park_after_secs,
            outage=outage,
        ),
        catalog,
        worker_id=worker_id,
        limits=Limits(
            max_concurrent=config.saga.max_concurrent,
            lease_secs=config.saga.lease_secs,
            shutdown_grace_secs=config.saga.shutdown_grace_secs,
        ),
        services=config.services,
    )
    service = SagaService(
        store,
        supervisor,
        catalog,
        watchers,
        clock,
        services=config.services,
        max_payload_bytes=config.saga.max_payload_bytes,
        meter=meter,
        tracer=tracer,
        admission=Admission(config.server.limits.max_starts),
    )
    _read_counts(meter, supervisor, store)
    meter.tell_build(
        version=product_version(),
        python=platform.python_version(),
        store="postgres" if isinstance(store, PostgresStore) else "sqlite",
    )
    payload_mask = PayloadMask(config.observability.redact)
    relay = None
    if config.kafka is not None:
        relay = _relay_to(config.kafka, store, worker_id, config.saga.lease_secs, payload_mask)
    if relay is not None:
        _read_relay_counts(meter, relay)
    # Sagas run without the broker: their events wait.
    readiness = Readiness(service, drain, {} if relay is None else {"kafka": relay.check})
    _read_readiness(meter, readiness)
    contexts = _contexts(config)
    shared = None if seat is None else SharedMetrics(meter.registry, seat.metrics_folder, seat.number)
    keys = None if config.auth is None else KeySet(config.auth.jwks_url, config.auth.jwks_cache_ttl_secs)
    authenticator = _authenticator(config, keys)
    app = create_app(
        service,
        drain=drain,
        authenticator=authenticator,
        meter=meter,
        tracer=tracer,
        version=product_version(),
        readiness=readiness,
        shared_metrics=shared,
        payload_mask=payload_mask,
        limits=_door_limits(config),
    )
    host, grace_secs = config.server.host, config.saga.shutdown_grace_secs
    sagas_left = trio.Event()
    ends_at = float("inf")
    rest = partial(
        serve_rest,
        app,
        host,
        config.server.port,
        # Whoever asks during a drain is told so, by /readyz above all; the door closes when the sagas have ended.
        shutdown_trigger=sagas_left.wait,
        grace_secs=lambda: max(CLOSE_SECS, ends_at - trio.current_time()),
        reuse_port=seat is not None,
        max_connections=config.server.limits.max_connections,
        tls=None if contexts is None else contexts.rest,
    )
    try:
        async with trio.open_nursery() as workers:
            if contexts is not None:
                workers.start_soon(contexts.run)
            await workers.start(supervisor.run)
            if keys is not None:
                await workers.start(keys.run)
            if relay is not None:
                await workers.start(relay.run)
            if config.saga.retention_days > 0:
                workers.start_soon(Retention(store, meter, config.saga.retention_days).run)
            if config.saga.audit_retention_days > 0:
                workers.start_soon(AuditRetention(store, config.saga.audit_retention_days).run)
            if shared is not None:
                workers.start_soon(shared.run)
            with drain.ends_early():
                loaded = await load_workflows(service, config.saga.workflow_dir, outage)
                readiness.rejected_workflow_files = len(loaded.rejected)
            workers.start_soon(readiness.run)
            async with trio.open_nursery() as doors:
                with _named("server.port", host, config.server.port):
                    rest_port = await doors.start(rest)
                with _named("server.grpc_port", host, config.server.grpc_port):
                    grpc = await doors.start(
                        partial(
                            _serve_grpc,
                            service,
                            authenticator,
                            config,
                            drain,
                            meter,
                            tracer,
                            readiness,
                            seat is not None,
                            contexts,
                        )
                    )
                scheme = "http" if contexts is None else "https"
                log.info("ready rest=%s://%s:%d grpc=%s:%d", scheme, host, rest_port, host, grpc)
                if seat is not None:
                    seat.ready()
                await drain.wait()
                log.info("draining sagas=%d", supervisor.active)
                ends_at = trio.current_time() + grace_secs
                await supervisor.drain()
                sagas_left.set()
            # The doors have answered what was under way, the sagas are ended or freed.
            workers.cancel_scope.cancel()
    finally:
        with trio.move_on_after(CLOSE_SECS, shield=True):
            await caller.aclose()
            if tracer.enabled:
                await trio.to_thread.run_sync(tracer.close)


def _door_limits(config: Config) -> DoorLimits:
    limits = config.server.limits
    return DoorLimits(max_connections=limits.max_connections, max_requests=limits.max_requests)


def _opened_tracer(config: Config, worker_id: str, meter: PrometheusMeter) -> Tracer:
    """The tracer the configuration asks for; one that keeps nothing where it asks for none."""
    otlp = config.observability.otlp
    if otlp is None:
        return Tracer()
    from server.spans import otlp_tracer  # the extra may be absent where it is not asked for

    tracer = otlp_tracer(
        otlp.endpoint,
        Mask(secrets_of(config), PayloadMask(config.observability.redact)),
        name=config.app.name,
        version=product_version(),
        environment=config.app.environment,
        worker_id=worker_id,
    )
    meter.read_counter("saga_spans_exported", "Spans the collector has taken", lambda: tracer.exported)
    meter.read_counter("saga_spans_lost", "Spans lost because the collector was away or slow", lambda: tracer.lost)
    return tracer


def _contexts(config: Config) -> ServerContexts | None:
    if config.server.tls is None:
        return None
    try:
        return ServerContexts(config.server.tls)
    except TlsFilesInvalid as error:  # they were good when the configuration was checked
        raise CannotStart(str(error)) from error


def _authenticator(config: Config, keys: KeySet | None) -> Authenticator:
    if config.auth is None or keys is None:
        return OpenAccess()
    if not config.auth.is_key_source_safe:
        log.warning("jwks_over_cleartext message=%s", "whoever is between this server and its issuer can make tokens")
    return TokenVerifier(keys, issuer=config.auth.issuer, audience=config.auth.audience)


def _relay_to(
    kafka: KafkaConfig, store: AnyStore, worker_id: str, lease_secs: float, payload_mask: PayloadMask
) -> Relay:
    settings = KafkaSettings(
        brokers=kafka.brokers,
        security_protocol=kafka.security_protocol.value,
        sasl_mechanism=None if kafka.sasl is None else kafka.sasl.mechanism.value,
        username=None if kafka.sasl is None else kafka.sasl.username,
        password=None if kafka.sasl is None else kafka.sasl.password.reveal(),
        ca_file=kafka.tls.ca_file,
        cert_file=kafka.tls.cert_file,
        key_file=kafka.tls.key_file,
    )
    return Relay(
        store.outbox,
        KafkaPublisher(settings, client_id=f"saga-{worker_id}"),
        relay_id=worker_id,
        topic=kafka.topic,
        lease_secs=lease_secs,
        payload_mask=payload_mask,
    )


async def _serve_grpc(
    service: SagaService,
    authenticator: Authenticator,
    config: Config,
    drain: Drain,
    meter: Meter,
    tracer: Tracer,
    readiness: Readiness,
    reuse_port: bool,
    contexts: ServerContexts | None,
    task_status: trio.TaskStatus[int],
) -> None:
    host, port = config.server.host, config.server.grpc_port
    tls = None if contexts is None else contexts.grpc
    async with serve_grpc(
        service,
        host,
        port,
        authenticator=authenticator,
        drain=drain,
        meter=meter,
        tracer=tracer,
        readiness=readiness,
        reuse_port=reuse_port,
        tls=tls,
        limits=_door_limits(config),
    ) as front:
        task_status.started(front.port)
        await drain.wait()
        await front.drain(config.saga.shutdown_grace_secs)


@contextmanager
def _named(key: str, host: str, port: int) -> Iterator[None]:
    """An address that cannot be had is a fault of the configuration, and says of which key."""
    try:
        yield
    except OSError as error:
        # asyncio's text repeats the address; the number says it in the system's own words.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CannotStart(f"{key}: cannot listen on {host}:{port}: {reason}") from error


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


def _workflow_files(folder: Path) -> list[tuple[Path, bytes | OSError]]:
    if not folder.is_dir():
        log.warning("workflow_dir_missing folder=%s", folder)
    found: list[tuple[Path, bytes | OSError]] = []
    for file in sorted(path for path in folder.glob("*") if path.suffix in {".yaml", ".yml"}):
        try:
            with file.open("rb") as opened:
                found.append((file, opened.read(MAX_YAML_BYTES + 1)))
        except OSError as error:
            found.append((file, error))
    return found


class Loaded(NamedTuple):
    """What came of a folder of workflows: how many files are good, and which are not."""

    good: int
    rejected: tuple[Path, ...]


async def load_workflows(service: SagaService, folder: Path, outage: StoreOutage | None = None) -> Loaded:
    """Registers the definitions in a folder, by file name. A bad file is reported, line by line, and the others still
    load."""
    outage = outage or StoreOutage()
    seen: dict[str, Path] = {}
    rejected: list[Path] = []
    for file, text in await trio.to_thread.run_sync(_workflow_files, folder):
        try:
            if isinstance(text, OSError):
                raise text
            name = parse_workflow(text, service.known_services).name
            if name in seen:
                # Each start would register the one and then the other, a new version every time.
                log.error(
                    "workflow_rejected problem=%s", f"{file}: name: workflow {name} is defined in {seen[name]} too"
                )
                rejected.append(file)
                continue
            registered = await _registered(service, text, outage)
            if registered.superseded:
                log.warning("workflow_superseded file=%s name=%s version=%d", file, name, registered.workflow.version)
            elif registered.changed:
                log.info("workflow_registered file=%s name=%s version=%d", file, name, registered.workflow.version)
        except WorkflowInvalid as invalid:
            for detail in invalid.details:
                log.error("workflow_rejected problem=%s", format_detail(file, detail))
            rejected.append(file)
        except OSError as error:
            log.error("workflow_rejected problem=%s", f"{file}: cannot be read: {error.strerror or error}")
            rejected.append(file)
        else:
            seen[name] = file
    log.info("workflows_loaded folder=%s count=%d rejected=%d", folder, len(seen), len(rejected))
    return Loaded(len(seen), tuple(rejected))


async def _registered(service: SagaService, text: bytes, outage: StoreOutage) -> RegisteredWorkflow:
    """Registers a file's definition; waits for a store that is away, as the rest of the start does."""
    pause_secs, longest = STORE_PAUSE_SECS
    while True:
        try:
            return await service.register_workflow(text, unless_superseded=True)
        except Unavailable as error:
            outage.failed("workflows", error)
        await trio.sleep(pause_secs)
        pause_secs = min(pause_secs * 2, longest)


def _read_counts(meter: PrometheusMeter, supervisor: Supervisor, store: AnyStore) -> None:
    """What is counted elsewhere and read at each scrape."""
    meter.read_gauge("saga_active", "Sagas this worker runs now", lambda: supervisor.active)
    if store.lanes:
        meter.read_gauge(
            "saga_group_commit_waiting",
            "Moves and creations that wait for the next transaction",
            lambda: {lane.name: float(lane.waiting) for lane in store.lanes},
            "lane",
        )
    for lane in store.lanes:
        lane.meter = meter
        meter.expect_lane(lane.name)


def _read_readiness(meter: PrometheusMeter, readiness: Readiness) -> None:
    def checks() -> dict[str, float]:
        last = readiness.last
        return {} if last is None else {name: float(word == OK) for name, word in last.checks.items()}

    def is_ready() -> float:
        return float(readiness.last is not None and readiness.last.is_ready)

    meter.read_gauge("saga_ready", "1: this process should be sent requests, as of the last few seconds", is_ready)
    meter.read_gauge("saga_check_ok", "1: this part of /readyz is well, as of the last few seconds", checks, "check")


def _read_relay_counts(meter: PrometheusMeter, relay: Relay) -> None:
    meter.read_counter("saga_outbox_published", "Events the broker has acknowledged", lambda: relay.published)
    meter.read_counter(
        "saga_outbox_dead", "Messages the broker refused for good: someone has to look", lambda: relay.dead
    )
    meter.read_gauge(
        "saga_outbox_pending",
        "Events that wait in the part of the outbox this worker relays, as of the last few seconds",
        lambda: relay.backlog.pending,
    )
    meter.read_gauge(
        "saga_outbox_oldest_seconds", "How long the oldest of them has waited", lambda: relay.backlog.oldest_secs
    )
