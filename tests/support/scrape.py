"""What `/metrics` of a real server prints once everything it can tell of has happened: sagas of each end, a failed
undo, both doors, and the parts that only some configurations have."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bridge  # noqa: F401  isort: skip  (before grpclib)
from grpclib.client import Channel
from k1s0.system.saga.v1 import saga_pb2
from k1s0.system.saga.v1.saga_grpc import SagaServiceStub
from prometheus_client.parser import text_string_to_metric_families

from tests.support.certificates import certificate
from tests.support.issuer import issuer, token_of
from tests.support.participants import participant
from tests.support.postgres import in_plain_loop
from tests.support.server_process import ServerProcess, free_port, server_process

ORDER = """\
name: order
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release,
     compensate_retry: {max_attempts: 1}}
  - {name: charge, service: shop, method: Payments.Charge, compensate: Payments.Refund, retry: {max_attempts: 1}}
"""
REFUSED = {"status": "FAILED_PRECONDITION", "message": "no"}
SECS = 30.0


@dataclass(frozen=True)
class Family:
    """A metric as it is printed. `labels`: of each sample name, those that any of its samples has."""

    kind: str
    labels: Mapping[str, frozenset[str]]

    @property
    def own_labels(self) -> frozenset[str]:
        """Without the bounds of a histogram's buckets."""
        return frozenset().union(*self.labels.values()) - {"le"}


def families(text: str) -> dict[str, Family]:
    """The metrics by the name they are asked for, a counter's with its ending; those that tell when another was made
    are left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        labels: dict[str, frozenset[str]] = {}
        for sample in family.samples:
            labels[sample.name] = labels.get(sample.name, frozenset()) | frozenset(sample.labels)
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = Family(family.type, labels)
    return found


def scrape(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=SECS) as answer:
        text: str = answer.read().decode()
    return text


async def list_workflows(port: int, bearer: str) -> None:
    async with Channel("127.0.0.1", port) as channel:
        metadata = {"authorization": f"Bearer {bearer}"}
        await SagaServiceStub(channel).ListWorkflows(saga_pb2.ListWorkflowsRequest(), timeout=SECS, metadata=metadata)


def printed_by_a_server(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> dict[str, Family]:
    """Runs a server until it has something to tell of every metric."""
    client = certificate(folder, called="client")
    with participant(flavour="grpclib") as shop, issuer() as idp:
        config = {
            "services": {"shop": shop.settings()},
            "auth": idp.settings(),
            # Nobody listens there; the metrics of what would be sent are told all the same.
            "kafka": {
                "brokers": [f"127.0.0.1:{free_port()}"],
                "security_protocol": "SSL",
                "tls": {"cert_file": client.cert_file, "key_file": client.key_file},
            },
            "observability": {"otlp": {"endpoint": f"http://127.0.0.1:{free_port()}/v1/traces"}},
        }
        with server_process(folder, config, *arguments, env=env) as server:
            server.bearer = token_of("sys_admin")
            server.start()
            server.register(ORDER)
            assert server.ended(server.start_saga("order", {}))["saga"]["status"] == "COMPLETED"
            shop.script({"Charge": [REFUSED], "Release": [REFUSED]})
            assert server.ended(server.start_saga("order", {}))["saga"]["compensation_failed"] is True
            in_plain_loop(lambda: list_workflows(server.grpc_port, token_of("sys_auditor")))
            # What the store holds, and what the other workers count, is some seconds old.
            give_up_at = time.monotonic() + SECS
            while True:
                found = families(scrape(server))
                silent = [name for name, family in found.items() if not family.labels]
                if not silent:
                    return found
                assert time.monotonic() < give_up_at, (silent, server.log)
                time.sleep(0.1)  # a process of its own: nothing to wait on but what it tells
