"""The parts of a server, made from a configuration and joined to each other. Nothing runs yet: see `app.py`."""

from __future__ import annotations

import logging
import os
import platform
import random
import socket

import msgspec
import trio
from quart_trio import QuartTrio

from rpc.caller import GrpcStepCaller
from saga.admission import Admission
from saga.authentication import Authenticator, OpenAccess
from saga.catalog import Catalog
from saga.door_limits import DoorLimits
from saga.drain import Drain
from saga.payload_mask import PayloadMask
from saga.readiness import OK, Readiness
from saga.runner import Engine
from saga.service import SagaService
from saga.store_outage import StoreOutage
from saga.supervisor import Limits, Supervisor
from saga.tracing import Tracer
from saga.watchers import Watchers
from server import logs
from server.certificate_ends import CertificateEnds, shown_certificates
from server.config import Config, KafkaConfig
from server.errors import CannotStart
from server.jwks import KeySet
from server.opened_store import AnyStore
from server.redaction import Mask, mask_of
from server.seat import Seat
from server.tls import ServerContexts, TlsFilesInvalid
from server.tokens import TokenVerifier
from server.version import product_version
from store.instants import SystemClock
from store.kafka import KafkaPublisher, KafkaSettings
from store.outbox import Relay
from store.postgres import PostgresStore
from web.app import create_app
from web.metrics import PrometheusMeter
from web.shared_metrics import SharedMetrics

log = logging.getLogger("saga.server")

CLOSE_SECS = 5.0
"""How long closing the connections to participants may take at the end."""


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """A server before it runs. None: what the configuration does not ask for (`relay` without Kafka, `keys` without
    tokens, `contexts` without TLS, `certificate_ends` without a certificate of ours, `shared_metrics` without other
    workers)."""

    meter: PrometheusMeter
    tracer: Tracer
    caller: GrpcStepCaller
    supervisor: Supervisor
    service: SagaService
    readiness: Readiness
    authenticator: Authenticator
    limits: DoorLimits
    rest: QuartTrio
    relay: Relay | None
    contexts: ServerContexts | None
    certificate_ends: CertificateEnds | None
    keys: KeySet | None
    shared_metrics: SharedMetrics | None

    async def aclose(self) -> None:
        """Lets go of the participants, and of the collector with what it has not got yet; for `CLOSE_SECS` at most,
        cancelled or not."""
        with trio.move_on_after(CLOSE_SECS, shield=True):
            await self.caller.aclose()
            if self.tracer.enabled:
                await trio.to_thread.run_sync(self.tracer.close)


class _Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What many of the parts are given."""

    config: Config
    store: AnyStore
    worker_id: str
    meter: PrometheusMeter
    tracer: Tracer
    payload_mask: PayloadMask
    catalog: Catalog
    watchers: Watchers
    clock: SystemClock


def joined_parts(store: AnyStore, config: Config, drain: Drain, seat: Seat | None, outage: StoreOutage) -> Parts:
    """The parts of a server over `store`. Raises `CannotStart`."""
    shared = _shared(store, config)
    meter = shared.meter
    caller = GrpcStepCaller(config.services, max_payload_bytes=config.saga.max_payload_bytes)
    supervisor = _supervisor(shared, caller, outage)
    service = _service(shared, supervisor)
    _read_counts(meter, supervisor, service, store)
    relay = _relay(shared)
    keys = _keys(config, meter)
    readiness = _readiness(service, drain, relay, keys, meter)
    contexts = _contexts(config)
    certificate_ends = _certificate_ends(config, contexts, meter)
    shared_metrics = None if seat is None else SharedMetrics(meter.registry, seat.metrics_folder, seat.number)
    authenticator = _authenticator(config, keys)
    limits = DoorLimits(
        max_connections=config.server.limits.max_connections, max_requests=config.server.limits.max_requests
    )
    rest = create_app(
        service,
        drain=drain,
        authenticator=authenticator,
        meter=meter,
        tracer=shared.tracer,
        version=product_version(),
        readiness=readiness,
        shared_metrics=shared_metrics,
        payload_mask=shared.payload_mask,
        limits=limits,
        loopback_names_only=config.is_for_this_machine_only,
    )
    return Parts(
        meter=meter,
        tracer=shared.tracer,
        caller=caller,
        supervisor=supervisor,
        service=service,
        readiness=readiness,
        authenticator=authenticator,
        limits=limits,
        rest=rest,
        relay=relay,
        contexts=contexts,
        certificate_ends=certificate_ends,
        keys=keys,
        shared_metrics=shared_metrics,
    )


def _shared(store: AnyStore, config: Config) -> _Shared:
    meter, mask = PrometheusMeter(), mask_of(config)
    meter.tell_build(
        version=product_version(),
        python=platform.python_version(),
        store="postgres" if isinstance(store, PostgresStore) else "sqlite",
    )
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{random.randbytes(4).hex()}"
    return _Shared(
        config=config,
        store=store,
        worker_id=worker_id,
        meter=meter,
        tracer=_opened_tracer(config, worker_id, meter, mask),
        payload_mask=mask.fields,
        catalog=Catalog(store),
        watchers=Watchers(),
        clock=SystemClock(),
    )


def _opened_tracer(config: Config, worker_id: str, meter: PrometheusMeter, mask: Mask) -> Tracer:
    """The tracer the configuration asks for; one that keeps nothing where it asks for none."""
    otlp = config.observability.otlp
    if otlp is None:
        return Tracer()
    from server.spans import otlp_tracer  # the extra may be absent where it is not asked for

    tracer = otlp_tracer(
        otlp.endpoint,
        mask,
        name=config.app.name,
        version=product_version(),
        environment=config.app.environment,
        worker_id=worker_id,
    )
    meter.read_counter("saga_spans_exported", "Spans the collector has taken", lambda: tracer.exported)
    meter.read_counter("saga_spans_lost", "Spans lost because the collector was away or slow", lambda: tracer.lost)
    return tracer


def _supervisor(shared: _Shared, caller: GrpcStepCaller, outage: StoreOutage) -> Supervisor:
    saga = shared.config.saga
    engine = Engine(
        store=shared.store,
        caller=caller,
        clock=shared.clock,
        watchers=shared.watchers,
        meter=shared.meter,
        draw=random.random,
        tracer=shared.tracer,
        park_after_secs=saga.park_after_secs,
        outage=outage,
    )
    return Supervisor(
        engine,
        shared.catalog,
        worker_id=shared.worker_id,
        limits=Limits(
            max_concurrent=saga.max_concurrent,
            lease_secs=saga.lease_secs,
            shutdown_grace_secs=saga.shutdown_grace_secs,
        ),
        services=shared.config.services,
    )


def _service(shared: _Shared, supervisor: Supervisor) -> SagaService:
    config = shared.config
    return SagaService(
        shared.store,
        supervisor,
        shared.catalog,
        shared.watchers,
        shared.clock,
        services=config.services,
        max_payload_bytes=config.saga.max_payload_bytes,
        meter=shared.meter,
        tracer=shared.tracer,
        admission=Admission(config.server.limits.max_starts),
        payload_mask=shared.payload_mask,
    )


def _readiness(
    service: SagaService, drain: Drain, relay: Relay | None, keys: KeySet | None, meter: PrometheusMeter
) -> Readiness:
    readiness = Readiness(
        service,
        drain,
        # Sagas run without the broker: their events wait.
        {} if relay is None else {"kafka": relay.check},
        keys_state=None if keys is None else lambda: keys.state,
    )
    _read_readiness(meter, readiness)
    return readiness


def _keys(config: Config, meter: PrometheusMeter) -> KeySet | None:
    if config.auth is None:
        return None
    keys = KeySet(config.auth.jwks_url, config.auth.jwks_cache_ttl_secs)
    meter.read_counter("saga_jwks_fetches", "Fetches of the keys of tokens", lambda: keys.fetches, "outcome")
    meter.read_gauge(
        "saga_jwks_fetched_timestamp_seconds", "When the keys of tokens came last; 0: never", lambda: keys.fetched_at
    )
    return keys


def _certificate_ends(
    config: Config, contexts: ServerContexts | None, meter: PrometheusMeter
) -> CertificateEnds | None:
    certificates = shown_certificates(config, contexts)
    if not certificates:
        return None
    ends = CertificateEnds(certificates)
    meter.read_gauge(
        "saga_tls_certificate_expiry_timestamp_seconds",
        "When the certificates end that this process shows to others",
        lambda: ends.timestamps,
        "use",
    )
    return ends


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


def _relay(shared: _Shared) -> Relay | None:
    kafka = shared.config.kafka
    if kafka is None:
        return None
    relay = Relay(
        shared.store.outbox,
        KafkaPublisher(_kafka_settings(kafka), client_id=f"saga-{shared.worker_id}"),
        relay_id=shared.worker_id,
        topic=kafka.topic,
        lease_secs=shared.config.saga.lease_secs,
        payload_mask=shared.payload_mask,
    )
    _read_relay_counts(shared.meter, relay)
    return relay


def _kafka_settings(kafka: KafkaConfig) -> KafkaSettings:
    return KafkaSettings(
        brokers=kafka.brokers,
        security_protocol=kafka.security_protocol.value,
        sasl_mechanism=None if kafka.sasl is None else kafka.sasl.mechanism.value,
        username=None if kafka.sasl is None else kafka.sasl.username,
        password=None if kafka.sasl is None else kafka.sasl.password.reveal(),
        ca_file=kafka.tls.ca_file,
        cert_file=kafka.tls.cert_file,
        key_file=kafka.tls.key_file,
    )


def _read_counts(meter: PrometheusMeter, supervisor: Supervisor, service: SagaService, store: AnyStore) -> None:
    """What is counted elsewhere and read at each scrape."""
    meter.read_counter("saga_log_lines_lost", "Lines of the log that nobody took in time", logs.lines_lost)
    meter.read_counter(
        "saga_audit_denials_lost",
        "Denied requests that the store would not enter in the audit log",
        lambda: service.audit.denials_lost,
    )
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
