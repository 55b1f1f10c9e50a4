"""Traces of a real server, collected over OTLP: one for a saga, whatever happens to the server on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from k1s0.system.saga.v1 import saga_pb2

from tests.support.collector import Seen, collector
from tests.support.participants import Call, Participant, participant
from tests.support.server_process import ROOT, server_process

SERVER, CLIENT = 2, 3
"""OTLP's numbers for kinds of spans."""

WORKFLOW = """\
name: order
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
  - name: charge
    service: shop
    method: Payments.Charge
    compensate: Payments.Refund
    retry: {initial_interval_ms: 20}
  - {name: ship, service: shop, method: Shipping.Ship, compensate: Shipping.Recall}
"""
REFUSED = [{"status": "FAILED_PRECONDITION", "message": "no, by password=s3cret"}]
TRACE, OTHER_TRACE = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


def config_for(shop: Participant, endpoint: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {"services": {"shop": shop.settings()}, "saga": {"lease_secs": 1.0}}
    if endpoint is not None:
        config |= {"observability": {"otlp": {"endpoint": endpoint}}, "app": {"name": "shop-sagas"}}
    return config


def told(call: Call) -> tuple[str, str, str]:
    """Trace, span and flags as a participant was told them."""
    version, trace_id, span_id, flags = call.metadata["traceparent"].split("-")
    assert version == "00"
    return trace_id, span_id, flags


def ms(instant: str) -> int:
    return round(datetime.fromisoformat(instant).timestamp() * 1000)


def by_name(spans: list[Seen]) -> dict[str, list[Seen]]:
    found = defaultdict(list)
    for span in spans:
        found[span.name].append(span)
    return found


def test_one_trace_holds_a_saga_and_its_attempts_across_sigkill_and_restart(tmp_path: Path) -> None:
    charge: list[dict[str, Any]] = [
        {"hang": True, "times": 1},
        {"status": "UNAVAILABLE", "times": 1},
        {"answer": {"ok": True}},
    ]
    with (
        collector() as kept,
        participant(flavour="grpcio", script={"Charge": charge, "Ship": REFUSED}) as shop,
        server_process(tmp_path, config_for(shop, kept.endpoint)) as server,
    ):
        server.start()
        server.register(WORKFLOW)
        saga_id = server.start_saga("order", {})
        trace_id = saga_id.replace("-", "")
        while not shop.calls("Charge"):
            pass
        kept.until(lambda spans: {"execute reserve", "POST /api/v1/sagas"} <= {span.name for span in spans})
        server.kill()
        server.start()
        saga = server.ended(saga_id)["saga"]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0

        assert saga["status"] == "FAILED"
        spans = by_name(kept.spans(trace_id))
        (request,), (root,) = spans.pop("POST /api/v1/sagas"), spans.pop("saga order")
        assert (request.parent, request.kind, request.attributes["http.response.status_code"]) == ("", SERVER, 201)
        assert (root.parent, root.failed, root.attributes["saga.id"]) == (request.span_id, True, saga_id)
        assert (root.start // 10**6, root.end // 10**6) == (ms(saga["created_at"]), ms(saga["updated_at"]))
        assert root.resource["service.name"] == "shop-sagas"

        attempts = {span.span_id: span for named in spans.values() for span in named}
        assert {name: len(named) for name, named in spans.items()} == {
            "execute reserve": 1,
            "execute charge": 2,
            "execute ship": 1,
            "compensate charge": 1,
            "compensate reserve": 1,
        }
        calls = {told(call)[1]: call for call in shop.calls()}
        # The attempt in hand when the process was killed is all that nobody could tell of.
        (cut_off,) = set(calls) - set(attempts)
        assert calls[cut_off] == shop.calls("Charge")[0]
        assert set(attempts) < set(calls)
        assert {told(call)[0] for call in shop.calls()} == {trace_id}
        for span_id, span in attempts.items():
            metadata = calls[span_id].metadata
            assert (span.parent, span.kind) == (root.span_id, CLIENT)
            assert span.name == f"{metadata['saga-action']} {metadata['saga-step']}"
            assert str(span.attributes["saga.attempt"]) == metadata["saga-attempt"]
            assert str(span.attributes["saga.epoch"]) == metadata["saga-epoch"]
            assert root.start <= span.start <= span.end
        outcomes = [span.attributes["rpc.response.status_code"] for span in attempts.values()]
        assert sorted(outcomes) == ["FAILED_PRECONDITION", "OK", "OK", "OK", "OK", "UNAVAILABLE"]
        assert [span.failed for span in spans["execute charge"]] == [True, False]
        assert spans["execute ship"][0].message == "FAILED_PRECONDITION: no, by password=***"
        # Two processes told of it.
        assert len({span.resource["service.instance.id"] for span in kept.spans(trace_id)}) == 2


def test_a_callers_trace_goes_on_through_both_doors_and_is_collected_if_the_caller_keeps_it(tmp_path: Path) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=100%,b=2"}
    with (
        collector() as kept,
        participant(flavour="grpclib") as shop,
        server_process(tmp_path, config_for(shop, None), env={"OTEL_EXPORTER_OTLP_ENDPOINT": kept.endpoint}) as server,
    ):
        server.start()
        server.register(WORKFLOW)
        status, answer = server.call("POST", "/api/v1/sagas", {"workflow_name": "order"}, **headers)
        assert status == 201
        over_rest = answer["saga_id"]
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            # A list that came in two lines is one list.
            over_grpc = start_over_grpc(
                channel, (("traceparent", headers["traceparent"]), ("tracestate", "vendor=100%"), ("tracestate", "b=2"))
            )
        not_kept = {"traceparent": f"00-{OTHER_TRACE}-{CALLER}-00"}
        _, answer = server.call("POST", "/api/v1/sagas", {"workflow_name": "order"}, **not_kept)
        for saga_id in (over_rest, over_grpc, answer["saga_id"]):
            assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0

        spans = by_name(kept.spans(TRACE))
        for saga_id, name in (
            (over_rest, "POST /api/v1/sagas"),
            (over_grpc, "k1s0.system.saga.v1.SagaService/StartSaga"),
        ):
            (request,) = spans[name]
            (root,) = [span for span in spans["saga order"] if span.attributes["saga.id"] == saga_id]
            assert (request.kind, request.parent, root.parent) == (SERVER, CALLER, request.span_id)
            calls = [call for call in shop.calls() if call.metadata["saga-id"] == saga_id]
            below = {span.span_id for span in kept.spans(TRACE) if span.parent == root.span_id}
            assert {told(call)[1] for call in calls} == below
            assert len(below) == 3
        assert {told(call)[::2] for call in shop.calls()} == {(TRACE, "01"), (OTHER_TRACE, "00")}
        assert kept.spans(OTHER_TRACE) == []
        states = {(told(call)[0], call.metadata.get("tracestate")) for call in shop.calls()}
        assert states == {(TRACE, headers["tracestate"]), (OTHER_TRACE, None)}
        assert {span.tracestate for span in kept.spans(TRACE)} == {headers["tracestate"]}
        # What is logged of it says so.
        assert f"trace_id={TRACE}" in server.log
        (line,) = [line for line in server.log.splitlines() if "grpc_call method=StartSaga" in line]
        assert f"saga_id={over_grpc}" in line
        assert f"trace_id={TRACE}" in line


def start_over_grpc(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> str:
    call = channel.unary_unary(
        "/k1s0.system.saga.v1.SagaService/StartSaga",
        request_serializer=saga_pb2.StartSagaRequest.SerializeToString,
        response_deserializer=saga_pb2.StartSagaResponse.FromString,
    )
    started: str = call(saga_pb2.StartSagaRequest(workflow_name="order"), metadata=metadata, timeout=30).saga_id
    return started


def test_without_a_collector_participants_get_the_callers_trace_all_the_same(tmp_path: Path) -> None:
    with participant(flavour="grpclib") as shop, server_process(tmp_path, config_for(shop, None)) as server:
        server.start()
        server.register(WORKFLOW)
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "a=1"}
        _, answer = server.call("POST", "/api/v1/sagas", {"workflow_name": "order"}, **headers)
        server.ended(answer["saga_id"])
        assert {(told(call)[0], call.metadata["tracestate"]) for call in shop.calls()} == {(TRACE, "a=1")}
        assert CALLER not in {told(call)[1] for call in shop.calls()}


def test_a_server_that_is_to_trace_without_the_extra_does_not_start_and_says_what_to_do(tmp_path: Path) -> None:
    without = "import sys; sys.modules['opentelemetry'] = None; from server.cli import main; sys.exit(main())"
    config = {"observability": {"otlp": {"endpoint": "http://localhost:4318"}}}
    with server_process(tmp_path, config, program=("-c", without)) as server:
        server.spawn()
        assert server.wait() == 1
        assert "saga: observability.otlp: " in server.log
        assert "pip install 'saga-orchestrator[otel]'" in server.log
        assert "Traceback" not in server.log


def test_a_server_that_is_not_to_trace_loads_nothing_of_the_extra() -> None:
    code = "import sys, server.app, server.cli; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"})
    assert done.returncode == 0
